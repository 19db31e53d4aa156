import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from crossover.benchmarks.report.crossovers import Point, crossover
from crossover.benchmarks.report.results import METRICS, crossovers_of, load_comparison, quality
from crossover.benchmarks.report.words import Span, and_list, headline, span_of, title

from ..fake_runs import append_cells, cell, write_comparison

pytestmark = pytest.mark.quick

LENGTHS = (100, 200, 400, 800)
FLAT = (10, 10, 10, 10)


def span(values: Sequence[float | None], noise: float = 0.0, *, against: Sequence[float | None] = FLAT, **at) -> Span:
    """Finds where these speeds at LENGTHS beat the others, each with a spread of `noise`; None ran out of memory,
    or of time where `stopped_after` is given."""
    curves = {
        name: [
            Point(context_len=L, value=v, low=v and v * (1 - noise), high=v and v * (1 + noise), **({} if v else at))
            for L, v in zip(LENGTHS, speeds, strict=True)
        ]
        for name, speeds in (("other", against), ("this", values))
    }
    forth = crossover("speed", "other", "this", curves, "higher")
    return span_of(forth, crossover("speed", "this", "other", curves, "higher"), str.capitalize)


@pytest.mark.parametrize(
    ("found", "text", "cell"),
    [
        (span((5, 8, 20, 40)), "beyond 240 tokens", "> 240"),
        (span((5, 8, 20, 40), 0.05), "beyond 240 tokens (220-260)", "> 240 (220-260)"),
        (span((40, 20, 8, 5)), "up to 340 tokens", "< 340"),
        (span((5, 5, 5, 5), against=(10, 10, None, None)), "from 400 tokens on, where Other no longer runs", "> 400 †"),
        (
            span((5, 5, 5, 5), against=(10, 10, None, None), stopped_after=300.0),
            "from 400 tokens on, where Other was stopped after 300 s",
            "> 400 †",
        ),
        (span((20, 20, None, None)), "below 400 tokens, where This no longer runs", "< 400 †"),
        (span((10.1, 10.1, 20, 40), 0.05), "beyond 220 tokens (before: within the noise)", "> 220, before unclear"),
        (span((40, 20, 10.1, 10.1), 0.05), "up to 370 tokens (beyond: within the noise)", "< 370, beyond unclear"),
        (span((10, 10.1, 9.9, 10), 0.05), "within the noise at every length measured", "unclear"),
        (span((20, 20, 20, 20)), "at every length measured", "always"),
        (span((5, 5, 5, 5)), "at none", "never"),
        (Span(kind="some shorter"), "at some shorter lengths", "some shorter"),
    ],
)
def test_a_span_says_the_same_in_a_sentence_and_in_a_table(found: Span, text: str, cell: str) -> None:
    assert (found.in_text(), found.in_cell()) == (text, cell)


def test_a_difference_within_the_noise_is_told_from_one_beyond_it() -> None:
    assert span((10, 10.1, 9.9, 10), 0.05).is_noise
    assert not span((10.1, 10.1, 20, 40), 0.05).is_noise


@pytest.mark.parametrize(
    ("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_lists_are_written_as_in_a_sentence(words: list[str], text: str) -> None:
    assert and_list(words) == text


def test_writing_a_report_needs_neither_torch_nor_the_parser_of_the_command_line() -> None:
    code = "import crossover.benchmarks.report.write, sys; assert not {'torch', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def of_comparison(folder: Path) -> str:
    comparison = load_comparison(folder)
    return " ".join(headline(comparison, quality(comparison), crossovers_of(comparison)))


def test_one_length_is_no_range(tmp_path: Path) -> None:
    said = of_comparison(write_comparison(tmp_path, archs=["transformer", "mamba", "lstm"], seeds=1, context=[64]))
    assert "No other model trains faster than Transformer at 64 tokens." in said
    assert "Mamba and LSTM carry less state than Transformer at 64 tokens." in said
    assert "One length was measured, 64 tokens" in said
    for word in ("interpolated", "every length", "any length", "from 64 to"):
        assert word not in said


def test_a_partial_comparison_says_what_was_measured_and_names_the_rest(tmp_path: Path) -> None:
    archs = ["transformer", "mamba", "lstm", "s4d"]
    write_comparison(tmp_path, archs=archs, seeds=1, context=[])
    shutil.rmtree(tmp_path / "s4d-s0")
    info = json.loads((tmp_path / "compare.json").read_text())
    info["config"]["context"] = [128, 512, 2048]
    (tmp_path / "compare.json").write_text(json.dumps(info))
    append_cells(tmp_path, *[cell("transformer", phase, 128) for phase in ("decode", "prefill", "train")])
    append_cells(tmp_path, *[cell("lstm", phase, 128) for phase in ("decode", "prefill", "train")])
    said = of_comparison(tmp_path)
    assert "LSTM does not train faster than Transformer at 128 tokens, the only length measured of both." in said
    for word in ("No other model", "any length measured", "every length measured"):
        assert word not in said
    assert "Mamba predicts held-out text best of the 3 that have finished" in said
    for missing in (
        "s4d-s0: not run yet",
        "LSTM: not measured yet at 512 and 2,048 tokens",
        "Mamba: not measured yet at 128, 512 and 2,048 tokens",
    ):
        assert missing in said
    append_cells(
        tmp_path, *[cell(arch, "train", 512) for arch in ("transformer", "mamba")], cell("mamba", "train", 128)
    )
    said = of_comparison(tmp_path)
    assert "(both measured up to 512 only)" in said


@pytest.mark.parametrize(("tokens_per_second", "says"), [(100.0, True), (2000.0, False)])
def test_decode_that_measures_python_is_said_to(tokens_per_second: float, says: bool, tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, context=[128])
    append_cells(
        tmp_path,
        cell("mamba", "decode", 128, tokens_per_second=tokens_per_second),
        cell("transformer", "decode", 128, tokens_per_second=5000.0),
    )
    said = of_comparison(tmp_path)
    assert ("Decode speeds of Mamba measure Python more than the architecture" in said) == says
    if says:  # 1/74,400 s of arithmetic, and 4 MB of weights and 98 kB of state at 5 GB/s, of 10 ms
        assert "explain at most 8 % of a step of 10 ms" in said


def test_a_decode_speed_by_modules_is_not_compared_with_compiled_ones(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, context=[128])
    compiled, modules = {"decode": ["compiled"]}, {"decode": ["modules"]}
    append_cells(
        tmp_path,
        cell("mamba", "decode", 128, tokens_per_second=9000.0, backend=compiled),
        cell("transformer", "decode", 128, tokens_per_second=5000.0, backend=modules),
    )
    said = of_comparison(tmp_path)
    assert "Transformer was decoded by calling modules and the others by a compiled step" in said
    assert "generates faster" not in said
    append_cells(tmp_path, cell("transformer", "decode", 128, tokens_per_second=5000.0, backend=compiled))
    said = of_comparison(tmp_path)
    assert "a compiled step" not in said
    assert "Mamba generates faster than Transformer" in said
    append_cells(
        tmp_path,
        cell("mamba", "decode_many", 128, tokens_per_second=9000.0, backend=compiled),
        cell("transformer", "decode_many", 128, tokens_per_second=5000.0, backend=modules),
    )
    assert "Transformer was decoded, many sequences at once, by calling modules" in of_comparison(tmp_path)
    comparison = load_comparison(tmp_path)
    many = next(metric for metric in METRICS if metric.phase == "decode_many")
    assert [len(comparison.ranked_cells(arch, many)) for arch in ("mamba", "transformer")] == [1, 0]


def test_the_title_says_when_products_are_not_in_float32(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["mamba"], seeds=1, context=[128])
    assert "bfloat16" not in title(load_comparison(tmp_path), [])[1]
    append_cells(tmp_path, cell("mamba", "decode", 128, dtype="bf16"))
    assert "products in bfloat16" in title(load_comparison(tmp_path), [])[1]


def test_the_growth_of_a_prompts_time_is_told_where_three_long_ones_were_read(tmp_path: Path) -> None:
    write_comparison(tmp_path, archs=["transformer", "mamba"], seeds=1, context=[])
    for length in (128, 1024, 4096, 16_384):  # the first says nothing of the others
        assert "reading a prompt" not in of_comparison(tmp_path)
        speed = length**-0.5 if length >= 1024 else 1e-9
        append_cells(tmp_path, cell("mamba", "prefill", length, tokens_per_second=speed, peak_bytes=2**20 * length))
    said = of_comparison(tmp_path)
    assert "as its length to the power 1.50 (Mamba, 1,024 to 16,384 tokens)," in said
    assert "weights included, goes from 1 GiB to 16 GiB (Mamba)." in said
