"""Speed and memory against context length: a process per architecture and length, a cell per phase."""

import dataclasses
import json
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import MeasureConfig
from .processes import last_line, module_command, start, stop
from .progress import Progress, Task
from .results import display_name, read_jsonl

__all__ = ["PHASES", "ContextJob", "append_jsonl", "cell_tasks", "measure_cells", "reusable_cells"]

PHASES = ("decode", "prefill", "train")
_START_SECONDS = 6.0  # import of torch and the first call of every kernel


@dataclass(frozen=True, kw_only=True)
class ContextJob:
    """One architecture at one context length."""

    arch: str
    context_len: int
    model: Mapping[str, Any]
    """ModelConfig.to_dict()"""
    n_params: int
    n_active_params: int
    settings: Mapping[str, Any]
    """What all cells of a comparison share: MeasureConfig, precision, device, threads, allocator."""

    @property
    def name(self) -> str:
        """What progress and messages call it."""
        return f"{display_name(self.arch)} at {self.context_len:,} tokens"

    def cell(self, phase: str, **content: Any) -> dict[str, Any]:
        """A cell with all its keys; `content` is what was measured."""
        empty = dict.fromkeys(
            ("batch_size", "tokens_per_second", "spread", "repeats", "peak_bytes", "peak_method", "state_bytes")
        )
        return {
            "arch": self.arch,
            "phase": phase,
            "context_len": self.context_len,
            "n_params": self.n_params,
            "n_active_params": self.n_active_params,
            **empty,
            "backend": {},
            "dtype": self.settings["precision"],
            "status": "failed",
            "error": None,
            **content,
            "model": self.model,
            "settings": self.settings,
        }


def cell_tasks(jobs: Sequence[ContextJob]) -> list[Task]:
    """The jobs as tasks of a schedule, with their seconds if nothing is slow."""
    return [
        Task(name=job.name, kind="cell", cost=_START_SECONDS + len(PHASES) * 1.5 * job.settings["time_box"])
        for job in jobs
    ]


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line and flushes it. A torn last line, left by a killed writer, is ended first."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                _drop_torn_line(file)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()


def _drop_torn_line(file: Any) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)


def reusable_cells(path: Path, jobs: Sequence[ContextJob]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Cells already measured for these jobs, by architecture, length and phase.

    Raises:
        ValueError: if the file holds cells of other settings or other models, with which these cannot be compared.
    """
    by_arch = {job.arch: job for job in jobs}
    wanted = {(job.arch, job.context_len) for job in jobs}
    cells = {}
    for cell in read_jsonl(path):
        job = by_arch.get(cell["arch"], jobs[0])
        differing = _differences(cell["settings"], job.settings)
        if cell["arch"] in by_arch and cell["model"] != json.loads(json.dumps(job.model)):
            differing = ["model", *differing]
        if differing:
            raise ValueError(
                f"{path} holds measurements with another {', '.join(differing)}; "
                "give the same options, another --out, or --fresh to start over"
            )
        if (cell["arch"], cell["context_len"]) in wanted and cell["status"] in ("done", "out_of_memory", "timeout"):
            cells[cell["arch"], cell["context_len"], cell["phase"]] = cell
    return cells


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def measure_cells(jobs: Sequence[ContextJob], path: Path, progress: Progress, *, log: Path) -> None:
    """Measures every job that is not in the file yet, and appends each cell as it comes."""
    existing = reusable_cells(path, jobs)
    for job in jobs:
        phases = [phase for phase in PHASES if (job.arch, job.context_len, phase) not in existing]
        if not phases:
            progress.skip(job.name, "measured before")
            continue
        progress.begin(job.name)
        told: list[str] = []
        while phases:  # a phase that kills its process leaves the others to a new one
            cells = _run_worker(job, phases, progress, log=log)
            for cell in cells:
                append_jsonl(path, cell)
                told.append(_brief(cell))
            phases = [phase for phase in phases if phase not in {cell["phase"] for cell in cells}]
        progress.finish(job.name, ", ".join(told))


def _brief(cell: Mapping[str, Any]) -> str:
    if cell["status"] == "done":
        return f"{cell['phase']} {cell['tokens_per_second']:,.0f} tokens/s"
    return f"{cell['phase']} {cell['status'].replace('_', ' ')}"


def _run_worker(job: ContextJob, phases: Sequence[str], progress: Progress, *, log: Path) -> list[dict[str, Any]]:
    """Runs one worker to its end and returns at least one cell: of each phase that ended, and of one that did not."""
    settings = job.settings
    measure = {field.name: settings[field.name] for field in dataclasses.fields(MeasureConfig)}
    order = {
        "phases": list(phases),
        "context_len": job.context_len,
        "model": job.model,
        "measure": measure,
        **{key: settings[key] for key in ("precision", "device", "threads")},
    }
    log.unlink(missing_ok=True)
    command = module_command("crossover.benchmarks.worker", json.dumps(order))
    child = start(command, threads=settings["threads"], log=log, output=subprocess.PIPE)
    cells: list[dict[str, Any]] = []
    running = phases[0]
    try:
        for event in _events(child, timeout=settings["timeout"]):
            if event is not None:
                running = event.pop("phase")
                if event.pop("event") == "cell":
                    cells.append(job.cell(running, **event))
            progress.update(job.name, len(cells) / len(PHASES), running)
    except TimeoutError:
        stop(child, grace=0)
        limit = f"stopped after {settings['timeout']:g} s"
        return [*cells, job.cell(running, status="timeout", error=limit)]
    except KeyboardInterrupt:
        stop(child, grace=0)
        raise
    left = [phase for phase in phases if phase not in {cell["phase"] for cell in cells}]
    if left:
        cells.append(job.cell(left[0], **_cause_of_death(child.returncode, last_line(log))))
    return cells


def _events(child: subprocess.Popen, *, timeout: float) -> Iterator[dict[str, Any] | None]:
    """Yields what a worker prints until it ends, and None while it is silent.

    Raises:
        TimeoutError: after `timeout` seconds of silence.
    """
    assert child.stdout is not None
    deadline, pending = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=0.5):
                if time.monotonic() > deadline:
                    raise TimeoutError
                yield None
                continue
            block = os.read(child.stdout.fileno(), 65536)
            if not block:
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                deadline = time.monotonic() + timeout
                yield json.loads(line)
    child.stdout.close()
    child.wait()


def _cause_of_death(returncode: int, last_words: str) -> dict[str, Any]:
    """Says what ended a worker in the middle of a phase. Killed from outside (SIGKILL) means that memory ran out."""
    if returncode == -signal.SIGKILL:
        return {"status": "out_of_memory", "error": "killed by the system (SIGKILL)"}
    if any(
        sign in last_words for sign in ("bad_alloc", "MemoryError", "can't allocate memory", "Cannot allocate memory")
    ):
        return {"status": "out_of_memory", "error": last_words}
    ended = f"ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
    return {"status": "failed", "error": f"{last_words} ({ended})" if last_words else ended}
