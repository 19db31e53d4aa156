import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from crossover.files import read_json, read_json_lines
from crossover.train.__main__ import main

TINY = (
    "--model.preset", "lstm", "--model.d-model", "16", "--model.n-layers", "1", "--optim.lr", "1e-3",
    "--train.batch-size", "2", "--train.seq-len", "16", "--train.eval-tokens", "64", "--train.position-len", "0",
    "--train.sample-tokens", "0", "--train.checkpoint-every", "0", "--name", "run", "--data.val-fraction", "0.25",
)  # fmt: skip


@pytest.fixture
def options(text_folder: Path, tmp_path: Path) -> tuple[str, ...]:
    return (*TINY, "--data", str(text_folder), "--data.cache", str(tmp_path / "cache"), "--out", str(tmp_path))


def start(options: tuple[str, ...], *more: str, stdout: int = subprocess.PIPE) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "crossover.train", *options, *more]
    return subprocess.Popen(command, stdout=stdout, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.quick
def test_the_command_trains_and_says_what_it_made(
    options: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, "--train.steps", "4", "--train.log-every", "2"], prog="crossover train") == 0
    printed = capsys.readouterr().out
    assert "step 4/4" in printed
    assert "bits per byte of held-out text (zlib needs" in printed
    record = read_json(tmp_path / "run" / "run.json")
    assert record["provenance"]["command"].startswith("crossover train --model.preset lstm")


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (("--data", "nowhere"), "nowhere"),
        (("--model.preset", "lstn"), "lstm"),
        (("--model.set", "d_stat=3"), "d_stat"),
        (("--train.seq-len", "100k"), "--train.seq-len"),
        (("--resume", "must"), "has no checkpoint"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_and_exit_code_2(
    wrong: tuple[str, ...], expected: str, options: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*options, *wrong], prog="crossover train") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("crossover train: error: ")
    assert expected in line


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGHUP, 129), (signal.SIGTERM, 143)])
def test_a_stopped_process_saves_says_so_and_continues(
    signum: signal.Signals, code: int, options: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    # a schedule that does not fall, so that the run may end elsewhere than it was first told
    more = ("--optim.schedule", "constant", "--train.log-every", "1")
    child = start(options, *more, "--train.steps", "1M")
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(read_json_lines(run / "metrics.jsonl")) > 2)
    child.send_signal(signum)
    out, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (code, "")
    assert f"stopped by {signum.name}; the same command continues" in out
    result = read_json(run / "result.json")
    assert result["status"] == "interrupted"
    steps = str(result["steps"] + 2)
    assert main([*options, *more, "--train.steps", steps]) == 0
    logged = [line["step"] for line in read_json_lines(run / "metrics.jsonl") if "train/loss" in line]
    assert logged == list(range(1, int(steps) + 1))


def test_a_run_goes_on_when_nobody_reads_its_output(options: tuple[str, ...], tmp_path: Path) -> None:
    reader, writer = os.pipe()
    child = start(options, "--train.steps", "5", "--train.log-every", "1", stdout=writer)
    os.close(writer)
    os.close(reader)
    _, err = child.communicate(timeout=60)
    assert (child.returncode, err) == (0, "warning: standard output is given up (nobody reads it); the work goes on\n")
    assert read_json(tmp_path / "run" / "result.json")["status"] == "done"
