"""The main job at toy size: real training, real measurements, real interruption."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from crossover.benchmarks.cli import main
from crossover.benchmarks.comparison import compare
from crossover.benchmarks.comparison.options import CompareConfig
from crossover.benchmarks.context.cells import Failure
from crossover.train.config import DataConfig, RunConfig
from crossover.train.run import train

from ..fake_runs import write_comparison

OPTIONS = shlex.split(
    "--archs transformer mamba --params 60k --steps 10 --seeds 1 --batch-size 2 --seq-len 32 --eval-tokens 256 "
    "--threads 1 --context 16 32 --time-box 0.02 --min-repeats 2 --decode-tokens 2 --tokens-per-batch 32"
)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 12)
    return folder


def words(text: Path, out: Path, *more: str) -> list[str]:
    return ["compare", "--data", str(text), "--out", str(out), *OPTIONS, *more]


def command(text: Path, out: Path, *more: str) -> list[str]:
    main = "import sys; from crossover.benchmarks.cli import main; sys.exit(main())"
    return [sys.executable, "-c", main, *words(text, out, *more)]


@pytest.mark.slow
def test_comparison_from_data_to_report_and_again_without_work(text: Path, tmp_path: Path) -> None:
    done = subprocess.run(command(text, tmp_path / "out"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for said in ("zlib", "training FLOPs/token", "crossover.train --name mamba-s0", "report.html"):
        assert said in done.stdout
    out = tmp_path / "out"
    for name in ("report.html", "report.md", "context.csv", "quality.csv", "summary.json", "compare.json"):
        assert (out / name).stat().st_size > 0
    summary = json.loads((out / "summary.json").read_text())
    assert [row["arch"] for row in summary["quality"]] == ["transformer", "mamba"]
    assert all(0 < row["val_bits_per_byte"] < 8.5 for row in summary["quality"])
    assert all(check["equal"] for check in summary["equal_budget"]), summary["equal_budget"]
    cells = [json.loads(line) for line in (out / "context.jsonl").read_text().splitlines()]
    assert {(cell["status"], cell["error"]) for cell in cells} == {("done", None)}
    assert len({(cell["arch"], cell["phase"], cell["context_len"]) for cell in cells}) == 2 * 2 * 3
    page = (out / "report.html").read_text()

    again = subprocess.run(command(text, out), capture_output=True, text=True, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("before") == 2 + 2 * 2
    assert len((out / "context.jsonl").read_text().splitlines()) == len(cells)
    assert (out / "report.html").read_text().count("<img") == page.count("<img")

    other = subprocess.run(command(text, out, "--steps", "20"), capture_output=True, text=True, check=False)
    assert other.returncode == 2
    assert "train.steps 10 instead of 20" in other.stderr
    assert "Traceback" not in other.stderr


def test_several_lengths_at_equal_flops_from_training_to_report(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train_here(runs: list[RunConfig], *_: object, **__: object) -> dict[str, str]:
        assert [train(run).exit_code for run in runs] == [0] * len(runs)
        return {}

    monkeypatch.setattr(compare, "train_runs", train_here)
    monkeypatch.setattr(compare, "measure_cells", lambda *_, **__: [])
    options = ["--archs", "lstm", "transformer", "--seq-len", "32", "64", "--steps", "30", "--equal", "flops"]
    assert main(words(text, tmp_path / "out", *options)) == 0
    assert "Spent, at equal FLOPs of training:" in capsys.readouterr().out
    names = [f"{arch}-l{length}-s0" for arch in ("lstm", "transformer") for length in (32, 64)]
    results = [json.loads((tmp_path / "out" / name / "result.json").read_text()) for name in names]
    flops = [result["train_flops"] for result in results]
    assert max(flops) / min(flops) < 1.04
    for result in results:
        assert [entry["context_len"] for entry in result["by_length"]] == [32, 64]
        assert {entry["status"] for entry in result["by_length"]} == {"too_little_text"}
    assert {path.name for path in (tmp_path / "out" / "tb").iterdir()} == {*names, "report"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    kinds = [(row["arch"], row["seq_len"], row["n_seeds"]) for row in summary["quality"]]
    assert kinds == [(arch, length, 1) for arch in ("lstm", "transformer") for length in (32, 64)]


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_keeps_what_exists_reports_it_and_the_same_command_goes_on(text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    endless = command(text, out, "--steps", "100000", "--jobs", "2")
    child = subprocess.Popen(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    runs = [out / "transformer-s0", out / "mamba-s0"]
    deadline = time.monotonic() + 120
    try:
        while not all((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size for run in runs):
            assert time.monotonic() < deadline
            assert child.poll() is None, child.communicate()
            time.sleep(0.1)
    finally:
        os.kill(child.pid, signal.SIGINT)
        said, complained = child.communicate(timeout=120)
    assert child.returncode == 130, complained
    assert "Traceback" not in complained
    assert "The same command goes on from here: crossover compare" in said
    page = (out / "report.html").read_text()
    for run in runs:
        assert json.loads((run / "result.json").read_text())["status"] == "interrupted"
        assert list((run / "checkpoints").glob("step-*"))
        assert f"{run.name}: interrupted" in page


@pytest.mark.slow
def test_a_run_that_fails_is_recorded_and_the_others_go_on(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    (out / "transformer-s0").mkdir(parents=True)
    (out / "transformer-s0" / "checkpoints").touch()  # a file where the trainer needs a folder
    assert main(words(text, out, "--context", "16")) == 1
    complaints = capsys.readouterr().err
    assert "transformer-s0 did not finish" in complaints
    assert "Traceback" not in complaints
    summary = json.loads((out / "summary.json").read_text())
    status = {row["arch"]: row["status"] for row in summary["quality"]}
    assert status["mamba"] == "done"
    assert status.get("transformer", "failed") == "failed"
    assert "transformer-s0: " in (out / "report.html").read_text()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("words", "arch", "said"),
    [
        (["compare", "--seq-len", "32", "--data"], "bert", "encoder"),
        (["bench", "context", "--vocab-size", "99"], "bert", "encoder"),
        (["compare", "--carry", "--seq-len", "32", "--data"], "transformer", "attention"),
    ],
)
def test_a_model_that_does_not_fit_is_refused_in_words(
    words: list[str], arch: str, said: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = [str(text)] if words[-1] == "--data" else []
    assert main([*words, *data, "--archs", "lstm", arch, "--params", "300k", "--out", str(tmp_path / "out")]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert said in complaint
    assert f"leave {arch} out of --archs" in complaint


@pytest.mark.quick
def test_a_measurement_that_fails_makes_the_comparison_fail(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = Failure(name="Mamba at 16 tokens, train", reason="no such thing", log=tmp_path / "some.log")

    def nothing_but_a_failure(*_: object, **__: object) -> list[Failure]:
        write_comparison(tmp_path, archs=["mamba"], seeds=1, context=[128])
        return [failure]

    monkeypatch.setattr(compare, "train_runs", lambda *_, **__: {})
    monkeypatch.setattr(compare, "measure_cells", nothing_but_a_failure)
    data = DataConfig(source=str(text))
    config = CompareConfig(archs=("mamba",), params=60_000, seq_len=(32,), seeds=1, data=data, out=tmp_path, threads=1)
    assert compare.compare(config, command=["crossover", "compare"]) == 1
    assert f"Mamba at 16 tokens, train: failed: no such thing (log: {failure.log})" in capsys.readouterr().err
