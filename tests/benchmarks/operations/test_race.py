"""The race of operations: who takes part, that they take turns, and what is written."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.benchmarks.cli import main
from crossover.benchmarks.operations import bench, race
from crossover.benchmarks.operations.bench import bench_kernels
from crossover.benchmarks.operations.options import KernelsConfig
from crossover.benchmarks.operations.race_cases import Compiler, case_of, cases, compiled, contestants
from crossover.files import read_json_lines
from crossover.kernels import ops
from crossover.kernels.selective_scan import cases as scan_cases

TINY: dict[str, Any] = {
    "lengths": (16,),
    "batch_size": 2,
    "channels": 16,
    "time_box": 0.001,
    "compile_box": 0.0,
    "parts": ("operations",),
}
SIZES = (("selective_scan", 16), ("selective_scan", 32), ("rms_norm", 16))


@pytest.fixture(autouse=True)
def _two_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("crossover.benchmarks.operations.limits._SIZES", (1 << 14, 1 << 16))
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
def test_every_operation_is_raced_and_every_row_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = KernelsConfig(**TINY, threads=2, out=tmp_path)
    assert bench_kernels(config, command=["crossover", "bench", "kernels"]) == 0
    limits, two, *rows = read_json_lines(tmp_path / "kernels.jsonl")
    assert [(row["kind"], row["threads"]) for row in (limits, two)] == [("limits", 1), ("limits", 2)]
    assert {(row["op"], row["pass"], row["threads"]) for row in rows} == {
        (op, which, threads) for op in ops.OPS for which in ("fwd", "fwd+bwd") for threads in (1, 2)
    }
    for row in rows:
        assert row["provenance"]["command"] == "crossover bench kernels"
        assert row["seconds"]["ours"] > 0
        assert set(row["seconds"]) <= {"ours", "torch", "definition", "peer"}
        assert ("torch" in row["seconds"]) == (row["backend"] != "torch")
        assert ("peer" in row["seconds"]) == (row["op"] == "lstm_scan")
        inference_alone = row["op"] == "state_update" and row["pass"] == "fwd+bwd"
        assert (row["bound"] is None) == (row["times_bound"] is None) == inference_alone
    table = (tmp_path / "kernels.md").read_text()
    _, _, operations = table.partition("## Operations")
    assert operations.count("| fwd+bwd |") == len(rows) / 2
    assert capsys.readouterr().out.count("\n") > len(rows)


@pytest.mark.quick
@pytest.mark.parametrize("name", ops.OPS)
def test_all_contestants_compute_the_same(name: str) -> None:
    (case,) = cases(name, KernelsConfig(**TINY))
    racing = contestants(case)
    racing.pop("peer", None)  # has weights of its own
    expected, *others = (out if isinstance(out := racer.run(), tuple) else (out,) for racer in racing.values())
    for other in others:
        torch.testing.assert_close(other[0], expected[0], rtol=1e-3, atol=1e-4)


def test_the_compiled_loop_is_the_selective_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    case = case_of("selective_scan", 32, KernelsConfig(**TINY))
    monkeypatch.setattr(scan_cases, "compiled_chunk", lambda: scan_cases.chunk)
    loop = compiled(case)
    assert loop is not None
    torch.testing.assert_close(loop.run(), contestants(case)["ours"].run(), rtol=1e-4, atol=1e-4)
    assert compiled(case_of("selective_scan", 33, KernelsConfig(**TINY))) is None


def test_a_definition_that_would_take_too_long_is_left_out_and_said_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(race, "_SHORT", 4)
    config = KernelsConfig(**TINY, ops=("selective_scan",), threads=1, out=tmp_path)
    assert bench_kernels(config, command=["crossover"]) == 0
    for row in read_json_lines(tmp_path / "kernels.jsonl")[1:]:
        assert row["skipped"]["definition"].startswith("too slow: ")
        assert "definition" not in row["seconds"]
    assert "definition too slow" in (tmp_path / "kernels.md").read_text()


def test_compiling_ends_with_its_seconds_but_not_for_what_is_compiled_already() -> None:
    scan, longer, norm = (case_of(name, L, KernelsConfig(**TINY)) for name, L in SIZES)
    compiler = Compiler(1e-9)
    assert compiler.first_call(scan, False, lambda: None) is None
    assert compiler.first_call(longer, False, lambda: None) is None
    for case, backward in ((scan, True), (norm, False)):
        assert compiler.first_call(case, backward, lambda: None) == "no time left to compile (--compile-box)"

    def fail() -> None:
        raise RuntimeError("no C++ compiler\nand more")

    assert Compiler(1.0).first_call(scan, False, fail) == "does not compile: no C++ compiler"


def test_a_stopped_race_leaves_the_page_of_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*args: Any, **kwargs: Any) -> Iterator[dict[str, Any]]:
        yield from rows(("rms_norm",), *args[1:], **kwargs)
        raise KeyboardInterrupt

    rows = bench.operation_rows
    monkeypatch.setattr(bench, "operation_rows", stop)
    options = ["--lengths", "16", "--channels", "16", "--time-box", "0.001", "--compile-box", "0", "--threads", "1"]
    assert main(["bench", "kernels", *options, "--out", str(tmp_path)]) == 130
    written, said = (tmp_path / "kernels.md").read_text(), capsys.readouterr()
    assert written[written.index("## Operations") :].count("rms\\_norm") >= 2
    assert 0 < said.out.index("BEHIND") < said.out.index("OPERATIONS")
    assert said.err.count("rms_norm T=128 D=16, fwd") == 2  # as they were measured


def test_mistakes_end_with_code_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "kernels", "--ops", "rms_morn"]) == 2
    wrong = (["--lengths", "64", "32"], ["--channels", "20"], ["--archs", "mambo"], ["--against", "docs"])
    for words in wrong:
        assert main(["bench", "kernels", *words]) == 2
    text = capsys.readouterr().err
    assert len(text.splitlines()) == 1 + len(wrong)
    assert "did you mean 'rms_norm'?" in text
    assert "--lengths must be increasing" in text
    assert "--channels must be a multiple of 16, got 20" in text
    assert "did you mean 'mamba'?" in text
    assert "--against docs is no checkout of this repository" in text


@pytest.mark.slow
def test_the_loop_is_compiled_once_for_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setattr(scan_cases, "LOOP_LEN", 2)
    scan_cases.compiled_chunk.cache_clear()
    graphs = []
    for L in (4, 8, 16):
        inputs = {name: torch.randn(2, L, 3) for name in ("u", "delta", "z")}
        inputs |= {name: torch.randn(2, L, 2) for name in ("B", "C")}
        inputs |= {"A": -torch.rand(3, 2), "D": torch.randn(3), "delta_bias": torch.randn(3)}
        leaves: dict[str, Any] = {name: t.requires_grad_() for name, t in inputs.items()}
        with torch.no_grad():
            scan_cases.loop(**leaves)
        y, _ = scan_cases.loop(**leaves)
        y.sum().backward()
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[1] == graphs[2]
    scan_cases.compiled_chunk.cache_clear()
