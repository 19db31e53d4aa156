import dataclasses
import io
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crossover.archs import configure
from crossover.benchmarks import context
from crossover.benchmarks.config import MeasureConfig
from crossover.benchmarks.context import (
    PHASES,
    ContextJob,
    _cause_of_death,
    append_jsonl,
    cell_tasks,
    measure_cells,
    reusable_cells,
)
from crossover.benchmarks.progress import Progress, Schedule
from crossover.benchmarks.results import read_jsonl

REQUIRED = {
    "arch", "phase", "context_len", "batch_size", "tokens_per_second", "peak_bytes", "state_bytes", "status", "backend",
    "dtype", "repeats", "spread", "n_params", "n_active_params", "error", "peak_method",
}  # fmt: skip


def job(arch: str = "transformer", context_len: int = 32, **measure: Any) -> ContextJob:
    options = {"time_box": 0.02, "min_repeats": 2, "decode_tokens": 2, "tokens_per_batch": 64, **measure}
    model = configure(arch, d_model=32, n_layers=8 if arch == "jamba" else 1).to_dict()
    settings = {**dataclasses.asdict(MeasureConfig(**options)), "precision": "fp32", "device": "cpu", "threads": 1}
    return ContextJob(
        arch=arch,
        context_len=context_len,
        model=json.loads(json.dumps(model)),
        n_params=1,
        n_active_params=1,
        settings=settings,
    )


def measure(jobs: list[ContextJob], folder: Path) -> list[dict[str, Any]]:
    progress = Progress(Schedule(cell_tasks(jobs)), stream=io.StringIO())
    measure_cells(jobs, folder / "context.jsonl", progress, log=folder / "log")
    return read_jsonl(folder / "context.jsonl")


def play(monkeypatch: pytest.MonkeyPatch, *scripts: str) -> None:
    """Lets the workers be these Python scripts instead, one after the other."""
    left = list(scripts)
    monkeypatch.setattr(context, "module_command", lambda *_: [sys.executable, "-c", left.pop(0)])


def tell(*events: dict[str, Any], end: str = "") -> str:
    lines = "\n".join(f"print({json.dumps(event)!r}, flush=True)" for event in events)
    return f"import os, signal, sys, time\n{lines}\n{end}"


def test_a_measured_cell_has_every_key_and_plausible_values(tmp_path: Path) -> None:
    cells = measure([job()], tmp_path)
    assert [cell["phase"] for cell in cells] == list(PHASES)
    for cell in cells:
        assert cell.keys() >= REQUIRED
        assert (cell["status"], cell["error"]) == ("done", None)
        low, high = cell["spread"]
        assert 0 < low <= cell["tokens_per_second"] <= high
        assert cell["repeats"] >= 2
        assert cell["peak_bytes"] >= 0
        assert "attention" in cell["backend"]
    train = cells[-1]
    assert train["batch_size"] == 2
    # keys and values of 32 tokens, float32, in one layer of width 32, and a few counters
    assert 32 * 32 * 2 * 4 <= train["state_bytes"] <= 32 * 32 * 2 * 4 + 1024


def test_memory_that_runs_out_is_a_recorded_point_and_the_other_phases_are_measured(tmp_path: Path) -> None:
    # A training batch of 2^25 tokens needs 4 GiB for the first activation alone.
    cells = measure([job(context_len=64, tokens_per_batch=2**25, memory_limit=2**29)], tmp_path)
    assert [cell["status"] for cell in cells] == ["done", "done", "out_of_memory"]
    assert cells[-1]["tokens_per_second"] is None
    assert "memory" in cells[-1]["error"]
    assert cells[-1]["batch_size"] == 2**25 // 64
    assert cells[-1]["state_bytes"] == cells[0]["state_bytes"]  # does not need the memory to be known


def test_cells_are_not_measured_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for phase in PHASES:
        append_jsonl(tmp_path / "context.jsonl", job().cell(phase, status="done", tokens_per_second=1.0))
    play(monkeypatch)  # a worker would be one too many
    assert len(measure([job()], tmp_path)) == 3


def test_failed_cells_are_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for phase in PHASES:
        status = "failed" if phase == "train" else "out_of_memory"
        append_jsonl(tmp_path / "context.jsonl", job().cell(phase, status=status))
    play(monkeypatch, tell({"event": "cell", "phase": "train", "status": "done", "tokens_per_second": 5.0}))
    assert measure([job()], tmp_path)[-1]["tokens_per_second"] == 5.0


def test_a_worker_killed_by_the_system_ran_out_of_memory_and_a_new_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"event": "cell", "status": "done", "tokens_per_second": 1.0}
    killed = tell(
        {"event": "begin", "phase": "decode"}, {**done, "phase": "decode"}, {"event": "begin", "phase": "prefill"},
        end="os.kill(os.getpid(), signal.SIGKILL)",
    )  # fmt: skip
    play(monkeypatch, killed, tell({**done, "phase": "train"}))
    cells = measure([job()], tmp_path)
    assert [(cell["phase"], cell["status"]) for cell in cells] == [
        ("decode", "done"), ("prefill", "out_of_memory"), ("train", "done"),
    ]  # fmt: skip


def test_a_phase_that_takes_too_long_is_a_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hang = tell({"event": "begin", "phase": "decode"}, end="time.sleep(60)")
    done = [{"event": "cell", "phase": phase, "status": "done", "tokens_per_second": 1.0} for phase in PHASES[1:]]
    play(monkeypatch, hang, tell(*done))
    cells = measure([job(timeout=0.8)], tmp_path)
    assert [cell["status"] for cell in cells] == ["timeout", "done", "done"]
    assert cells[0]["error"] == "stopped after 0.8 s"


def test_a_worker_that_fails_leaves_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    play(monkeypatch, *[tell(end="sys.exit('no such thing')")] * 3)
    cells = measure([job()], tmp_path)
    assert {(cell["status"], cell["error"]) for cell in cells} == {("failed", "no such thing (ended with code 1)")}


@pytest.mark.parametrize(
    ("returncode", "last_words", "status"),
    [
        (-signal.SIGKILL, "", "out_of_memory"),
        (-signal.SIGABRT, "terminate called after throwing an instance of 'std::bad_alloc'", "out_of_memory"),
        (1, "RuntimeError: DefaultCPUAllocator: can't allocate memory", "out_of_memory"),
        (-signal.SIGSEGV, "", "failed"),
        (1, "ValueError: no", "failed"),
    ],
)
def test_causes_of_death_are_told_apart(returncode: int, last_words: str, status: str) -> None:
    assert _cause_of_death(returncode, last_words)["status"] == status


def test_measurements_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    append_jsonl(tmp_path / "context.jsonl", job(time_box=9.0).cell("train", status="done"))
    with pytest.raises(ValueError, match="another time_box; give the same options, another --out, or --fresh"):
        reusable_cells(tmp_path / "context.jsonl", [job()])


def test_measurements_of_another_model_are_not_reused(tmp_path: Path) -> None:
    other = {**job().model, "d_model": 64}
    append_jsonl(tmp_path / "context.jsonl", dataclasses.replace(job(), model=other).cell("train", status="done"))
    with pytest.raises(ValueError, match="another model"):
        reusable_cells(tmp_path / "context.jsonl", [job()])


def test_appending_repairs_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "context.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    append_jsonl(path, {"a": 3})
    assert read_jsonl(path) == [{"a": 1}, {"a": 3}]


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["s4d", "mamba", "jamba", "lstm"])
def test_every_architecture_can_be_measured(arch: str, tmp_path: Path) -> None:
    cells = measure([job(arch, context_len=16)], tmp_path)
    assert [(cell["status"], cell["error"]) for cell in cells] == [("done", None)] * 3


def test_the_worker_answers_in_lines_of_json_alone() -> None:
    order = {
        "phases": ["decode"],
        "context_len": 8,
        "model": job().model,
        "measure": {field.name: job().settings[field.name] for field in dataclasses.fields(MeasureConfig)},
        **{key: job().settings[key] for key in ("precision", "device", "threads")},
    }
    command = [sys.executable, "-m", "crossover.benchmarks.worker", json.dumps(order)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [json.loads(line)["event"] for line in done.stdout.splitlines()] == ["begin", "cell"]
    assert done.stderr == ""
