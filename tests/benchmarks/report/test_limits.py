"""What a comparison made by hand measured once or little: each sentence, and that it goes where its reason does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks.report.criteria import criteria
from crossover.benchmarks.report.limits import limits, limits_section
from crossover.benchmarks.report.results import load_comparison

from ..fake_runs import QUALITY, append_cells, cell, write_json, write_run, write_winners

pytestmark = pytest.mark.quick


def limits_of(folder: Path) -> dict[str, str]:
    comparison = load_comparison(folder)
    return dict(sentence.split(": ", 1) for sentence in limits(comparison, criteria(comparison)))


def change(folder: Path, name: str, how: Callable[[dict[str, Any]], object]) -> None:
    """Changes a JSON file of every run of a folder."""
    for path in folder.glob(f"*/{name}"):
        values = json.loads(path.read_text())
        how(values)
        write_json(path, values)


def test_what_was_measured_little_is_told_with_its_numbers(tmp_path: Path) -> None:
    folder = write_winners(tmp_path)
    append_cells(folder, cell("lstm", "train", 900), cell("mamba", "train", 300, disturbed=True))
    change(folder, "result.json", lambda result: result.update(val_bytes=65_536))
    assert limits_of(folder) == {
        "Seeds": "3, with 95 % intervals of ± 0.025 to ± 0.131 bits per byte; of 4 differences to Transformer 1 is "
        "smaller than the interval (Mamba at 300).",
        "Budget": "0.61 tokens per parameter. About 20 give a Transformer the lowest loss for its FLOPs (Hoffmann et "
        "al. 2022, arXiv:2203.15556): what is ranked is how fast models begin.",
        "Learning rates": "those of the presets, found at 300,000 parameters in 150 steps of 2,048 tokens; another "
        "size or budget may want others.",
        "Data": "stdlib of Python 3.11.7 alone, judged on 27 documents, of which 65,536 of 520,000 bytes were read.",
        "Lengths": "trained at 100 and 300 tokens; at 900 speed is measured and no quality.",
        "Speeds": "each is of one process, 2 of 8 differences to Transformer are not shown and other work disturbed 1 "
        "of 13 measurements.",
        "Size": "1,000,000 to 1,011,600 parameters alone; at others the order is not measured.",
        "Machine": "one, AMD EPYC 9R45, in float32.",
    }


def test_what_was_measured_enough_is_not_told(tmp_path: Path) -> None:
    quality = {arch: {100: [values[100][0] + i / 1000 for i in range(6)]} for arch, values in QUALITY.items()}
    folder = write_winners(tmp_path, seeds=6, quality=quality)
    (folder / "context.jsonl").unlink()
    change(folder, "result.json", lambda result: result.update(tokens=25_000_000))
    for path in folder.glob("mamba*/run.json"):
        info = json.loads(path.read_text())
        info["n_params"] = 2_000_000
        info["provenance"] |= {"cpu": "Another", "git_dirty": True}
        write_json(path, info)
    write_json(
        folder / "compare.json", {"config": {}, "tuning": {"rounds": [300, 600], "n_trials": 1, "n_documents": 1}}
    )
    assert limits_of(folder).keys() == {"Data", "Code"}


def test_one_seed_tells_no_difference_from_noise(tmp_path: Path) -> None:
    assert (
        limits_of(write_winners(tmp_path, seeds=1))["Seeds"] == "one, which tells no difference in quality from noise."
    )


@pytest.mark.parametrize(("at_half", "said"), [(1.0, "LSTM at 100 tokens led after half"), (9.0, None), (None, None)])
def test_a_model_that_led_half_way_and_not_at_the_end_is_named(
    at_half: float | None, said: str | None, tmp_path: Path
) -> None:
    folder = write_winners(tmp_path)
    change(folder, "result.json", lambda result: result.update(tokens=480_000))  # as the validations count them
    for path in folder.glob("lstm-l100-*/metrics.jsonl"):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps(line) + "\n" for line in _at(lines, at_half)))
    assert (limits_of(folder).get("Half-way") or "").partition(" of the training")[0] == (said or "")


def _at(lines: list[dict[str, Any]], value: float | None) -> Iterator[dict[str, Any]]:
    """Another score at half of the steps, or none at any."""
    for line in lines:
        if "val/bits_per_byte" not in line:
            yield line
        elif value is not None:
            yield line | ({"val/bits_per_byte": value} if line["step"] == 300 else {})


def test_rates_that_were_found_for_less_than_they_are_used_for_are_told(tmp_path: Path) -> None:
    folder = write_winners(tmp_path)
    tuning = {"rounds": [75, 150], "n_trials": 9, "n_documents": 26}
    write_json(folder / "compare.json", {"config": {}, "tuning": tuning})
    assert (
        limits_of(folder)["Learning rates"] == "found in runs of 150 of 600 steps at 100 tokens, and used at 300 too."
    )
    write_json(folder / "compare.json", {"config": {"optim": {"lr": 0.002}}})
    assert limits_of(folder)["Learning rates"] == "0.002 for every model, tuned for none."


def test_quality_that_was_read_beyond_the_trained_lengths_is_told_as_such(tmp_path: Path) -> None:
    folder = write_winners(tmp_path)
    append_cells(folder, cell("lstm", "train", 900), cell("lstm", "train", 2700))
    read = [{"context_len": 900, "bits_per_byte": 2.0}, {"context_len": 2700, "bits_per_byte": None}]
    change(folder, "result.json", lambda result: result.update(by_length=read))
    assert limits_of(folder)["Lengths"] == (
        "trained at 100 and 300 tokens; at 2,700 speed is measured and no quality, and quality at 900 is that of "
        "models trained at other lengths."
    )


def test_of_one_model_there_is_no_verdict(tmp_path: Path) -> None:
    write_run(tmp_path, "mamba")
    comparison = load_comparison(tmp_path)
    assert limits_section(comparison, criteria(comparison)) == []
