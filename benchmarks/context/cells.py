"""Speed and memory against context length: a process per architecture and length, a cell per phase."""

import dataclasses
import json
import os
import selectors
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...train.files import read_json_lines
from ...train.runtime import says_out_of_memory
from ..config import MeasureConfig
from ..harness.folder import append_jsonl
from ..harness.processes import Fork, last_line
from ..harness.progress import Progress, Task

__all__ = ["PHASES", "ContextJob", "Failure", "cell_tasks", "events", "measure_cells", "reusable_cells"]

PHASES = ("decode", "prefill", "train")
_RESULTS = ("done", "out_of_memory", "timeout", "beyond_positions")  # whatever else a cell holds is tried again
_SAME_MACHINE = ("cpu", "device", "torch")
_START_SECONDS = 3.0  # the first call of every kernel
# torch._dynamo is imported by every optimizer, numba by the CPU kernels
_PRELOAD = ("crossover.benchmarks.context.worker", "torch._dynamo", "numba")


@dataclass(frozen=True, kw_only=True)
class ContextJob:
    """One architecture at one context length.

    Raises:
        ValueError: if the model reads a source and writes a target.
    """

    arch: str
    label: str
    """The architecture's name as written in text."""
    context_len: int
    model: Mapping[str, Any]
    """ModelConfig.to_dict()"""
    n_params: int
    n_active_params: int
    settings: Mapping[str, Any]
    """What all cells of a comparison share: MeasureConfig, precision, device, threads, allocator."""
    provenance: Mapping[str, Any]
    """What measures: cpu, device, torch, git_commit."""

    def __post_init__(self) -> None:
        if "source" in self.model:
            raise ValueError(
                f"{self.label} has two lengths, of a source and of a target, where the others have one context: leave "
                f"{self.arch} out of --archs (crossover train --data.rows pairs trains it)"
            )

    @property
    def name(self) -> str:
        """What progress and messages call it."""
        return f"{self.label} at {self.context_len:,} tokens"

    def beyond_positions(self, phase: str) -> str | None:
        """Why the model has too few learned positions for a phase; None where it has enough."""
        n_positions = self.model["max_positions"]
        needed = self.context_len + (self.settings["decode_tokens"] if phase == "decode" else 0)
        if n_positions is None or needed <= n_positions:
            return None
        return f"{needed:,} tokens are beyond its {n_positions:,} positions"

    def cell(self, phase: str, **content: Any) -> dict[str, Any]:
        """A cell with all its keys; `content` is what was measured."""
        empty = dict.fromkeys(
            ("batch_size", "tokens_per_second", "spread", "repeats", "peak_bytes", "peak_method", "state_bytes")
        )
        return {
            "arch": self.arch,
            "label": self.label,
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
            "provenance": self.provenance,
        }


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that failed."""

    name: str
    reason: str
    log: Path


def cell_tasks(jobs: Sequence[ContextJob]) -> list[Task]:
    """The jobs as tasks of a schedule, with their seconds if nothing is slow."""
    return [
        Task(name=job.name, kind="cell", cost=_START_SECONDS + len(PHASES) * 1.5 * job.settings["time_box"])
        for job in jobs
    ]


def reusable_cells(path: Path, jobs: Sequence[ContextJob]) -> dict[tuple[str, int, str], dict[str, Any]]:
    """Cells already measured for these jobs, by architecture, length and phase.

    Raises:
        ValueError: if the file holds cells of other settings, other models, another machine or another torch, with
            which these cannot be compared.
    """
    by_arch = {job.arch: job for job in jobs}
    wanted = {(job.arch, job.context_len) for job in jobs}
    cells = {}
    for cell in read_json_lines(path):
        job = by_arch.get(cell["arch"], jobs[0])
        differing = _differences(cell["settings"], job.settings)
        before = cell.get("provenance", {})
        differing += [key for key in _SAME_MACHINE if before.get(key) != job.provenance.get(key)]
        if cell["arch"] in by_arch and cell["model"] != json.loads(json.dumps(job.model)):
            differing = ["model", *differing]
        if differing:
            raise ValueError(
                f"{path} holds measurements with another {', '.join(dict.fromkeys(differing))}; "
                "give the same options, another --out, or --fresh to start over"
            )
        if (cell["arch"], cell["context_len"]) in wanted and cell["status"] in _RESULTS:
            cells[cell["arch"], cell["context_len"], cell["phase"]] = cell
    return cells


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def measure_cells(jobs: Sequence[ContextJob], path: Path, progress: Progress, *, logs: Path) -> list[Failure]:
    """Measures every job that is not in the file yet, and appends each cell as its phase ends.

    Returns:
        The cells that failed; running out of memory, of time or of positions is a result.
    """
    existing = reusable_cells(path, jobs)
    _warn_of_other_commits(existing.values(), jobs, progress)
    failed: list[Failure] = []
    for job in jobs:
        phases = [phase for phase in PHASES if (job.arch, job.context_len, phase) not in existing]
        if not phases:
            progress.skip(job.name, "measured before")
            continue
        progress.begin(job.name)
        log = logs / f"context-{job.arch}-{job.context_len}.log"
        log.unlink(missing_ok=True)
        cells: list[dict[str, Any]] = []

        def keep(cell: dict[str, Any], cells: list[dict[str, Any]] = cells) -> None:
            append_jsonl(path, cell)
            cells.append(cell)

        for phase in phases:
            if (reason := job.beyond_positions(phase)) is not None:
                keep(job.cell(phase, status="beyond_positions", error=reason))
        # a phase that kills its process leaves the others to a new one
        while phases := [phase for phase in phases if phase not in {cell["phase"] for cell in cells}]:
            _run_worker(job, phases, progress, keep, log=log)
        progress.finish(job.name, ", ".join(map(_brief, cells)))
        failed += [
            Failure(name=f"{job.name}, {cell['phase']}", reason=cell["error"], log=log)
            for cell in cells
            if cell["status"] == "failed"
        ]
    return failed


def _warn_of_other_commits(cells: Iterable[Mapping[str, Any]], jobs: Sequence[ContextJob], progress: Progress) -> None:
    ours = {job.provenance.get("git_commit") for job in jobs}
    others = {cell["provenance"].get("git_commit") for cell in cells} - ours
    if others:
        names = ", ".join(sorted(str(commit)[:12] for commit in others))
        progress.say(f"warning: keeps measurements made at another commit ({names}); --fresh makes them anew")


def _brief(cell: Mapping[str, Any]) -> str:
    if cell["status"] == "done":
        return f"{cell['phase']} {cell['tokens_per_second']:,.0f} tokens/s"
    return f"{cell['phase']} {cell['status'].replace('_', ' ')}"


def _run_worker(
    job: ContextJob, phases: Sequence[str], progress: Progress, keep: Callable[[dict[str, Any]], None], *, log: Path
) -> None:
    """Runs one worker to its end. Gives `keep` the cell of each phase when it ends, and of one that never did."""
    settings = job.settings
    measure = {field.name: settings[field.name] for field in dataclasses.fields(MeasureConfig)}
    order = {
        "phases": list(phases),
        "context_len": job.context_len,
        "model": job.model,
        "measure": measure,
        **{key: settings[key] for key in ("precision", "device", "threads")},
    }
    log_bytes = log.stat().st_size if log.exists() else 0
    child = Fork(_work, order, log=log, preload=_PRELOAD if settings["device"] == "cpu" else None)
    left = list(phases)
    running = phases[0]
    try:
        for event in events(child, timeout=settings["timeout"]):
            if event is not None:
                running = event.pop("phase")
                if event.pop("event") == "cell":
                    keep(job.cell(running, **event))
                    left.remove(running)
            progress.update(job.name, 1 - len(left) / len(PHASES), running)
    except TimeoutError:
        child.kill()
        keep(job.cell(running, status="timeout", error=f"stopped after {settings['timeout']:g} s"))
        return
    except KeyboardInterrupt:
        child.kill()
        raise
    if left:
        keep(job.cell(left[0], **_cause_of_death(child.join(), last_line(log, after=log_bytes))))


def _work(order: dict[str, Any]) -> None:
    """What the process of a cell does. The import is here because this process, the parent, needs none of it."""
    from .worker import main

    main(order)


def events(child: Fork, *, timeout: float) -> Iterator[dict[str, Any] | None]:
    """Yields what a worker prints until it ends, and None while it is silent.

    Raises:
        TimeoutError: after `timeout` seconds of silence.
    """
    deadline, pending = time.monotonic() + timeout, b""
    with selectors.DefaultSelector() as selector:
        selector.register(child.output, selectors.EVENT_READ)
        while True:
            if not selector.select(timeout=0.5):
                if time.monotonic() > deadline:
                    raise TimeoutError
                yield None
                continue
            block = os.read(child.output, 65536)
            if not block:
                break
            *lines, pending = (pending + block).split(b"\n")
            for line in lines:
                deadline = time.monotonic() + timeout
                yield json.loads(line)


def _cause_of_death(returncode: int, last_words: str) -> dict[str, Any]:
    """Says what ended a worker in the middle of a phase. Killed from outside (SIGKILL) means that memory ran out."""
    if returncode == -signal.SIGKILL:
        return {"status": "out_of_memory", "error": "killed by the system (SIGKILL)"}
    if says_out_of_memory(last_words):
        return {"status": "out_of_memory", "error": last_words}
    ended = f"ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
    return {"status": "failed", "error": f"{last_words} ({ended})" if last_words else ended}
