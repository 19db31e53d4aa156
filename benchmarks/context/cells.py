"""Speed and memory against context length: a process per architecture and length, a cell per phase."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...train import plugins
from ...train.runtime import MemoryKills, says_out_of_memory, signals_held
from ..harness.folder import append_jsonl
from ..harness.processes import Child, last_line, preloaded
from ..harness.progress import Progress, Task
from .cell import Cell, read_cells
from .jobs import ContextJob

__all__ = ["Failure", "cause_of_death", "cell_tasks", "measure_cells", "reusable_cells"]

Key = tuple[str, str, int, int]

_RESULTS = ("done", "out_of_memory", "timeout", "beyond_positions")  # whatever else a cell holds is tried again
_SAME_MACHINE = ("cpu", "device", "torch")
_START_SECONDS = 3.0  # the first call of every kernel


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A cell that failed."""

    name: str
    reason: str
    log: Path


def cell_tasks(jobs: Sequence[ContextJob]) -> list[Task]:
    """The jobs as tasks of a schedule, with their seconds if nothing is slow."""
    return [
        Task(name=job.name, kind="cell", cost=_START_SECONDS + len(job.phases) * 1.5 * job.measure.time_box)
        for job in jobs
    ]


def reusable_cells(path: Path, jobs: Sequence[ContextJob]) -> dict[Key, Cell]:
    """Cells already measured for these jobs, by architecture, phase, length and repeat.

    One that was disturbed has been measured when it has been tried twice.

    Raises:
        ValueError: if the file holds cells of other settings, other models, another machine or another torch, with
            which these cannot be compared.
    """
    by_arch = {job.arch: job for job in jobs}
    wanted = {(job.arch, job.context_len, job.repeat) for job in jobs}
    cells: dict[Key, Cell] = {}
    seen: set[Key] = set()
    for cell in read_cells(path):
        job = by_arch.get(cell.arch, jobs[0])
        differing = _differences(cell.settings, job.settings)
        differing += [key for key in _SAME_MACHINE if cell.provenance.get(key) != job.provenance.get(key)]
        if cell.arch in by_arch and cell.model != job.model:
            differing = ["model", *differing]
        if differing:
            raise ValueError(
                f"{path} holds measurements with another {', '.join(dict.fromkeys(differing))}; "
                "give the same options, another --out, or --fresh to start over"
            )
        if (cell.arch, cell.context_len, cell.repeat) in wanted and cell.status in _RESULTS:
            if cell.key in seen or not cell.disturbed:
                cells[cell.key] = cell
            seen.add(cell.key)
    return cells


def _differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    return sorted(key for key in a.keys() | b.keys() if a.get(key) != b.get(key))


def measure_cells(jobs: Sequence[ContextJob], path: Path, progress: Progress, *, logs: Path) -> list[Failure]:
    """Measures every job that is not in the file yet, and appends each cell as its phase ends.

    What was disturbed is measured once more, in another process. What ran out of memory, of time or of positions at the
    first repeat is not tried at the others.

    Returns:
        The cells that failed; running out of memory, of time or of positions is a result.
    """
    existing = reusable_cells(path, jobs)
    _warn_of_other_commits(existing.values(), jobs, progress)
    failed: list[Failure] = []
    hopeless = {cell.key[:3] for cell in existing.values() if not cell.done}
    for job in jobs:
        keys = {phase: (job.arch, phase, job.context_len) for phase in job.phases}
        phases = [p for p, key in keys.items() if (*key, job.repeat) not in existing and key not in hopeless]
        if not phases:
            progress.skip(job.name, "measured before")
            continue
        progress.begin(job.name)
        log = logs / f"context-{job.arch}-{job.context_len}.log"
        if not job.repeat:
            log.unlink(missing_ok=True)
        cells: dict[str, Cell] = {}

        def keep(cell: Cell, cells: dict[str, Cell] = cells) -> None:
            append_jsonl(path, cell.to_dict())
            cells[cell.phase] = cell

        for phase in phases:
            if (reason := job.beyond_positions(phase)) is not None:
                keep(job.cell(phase, status="beyond_positions", error=reason))
        # a phase that kills its process leaves the others to a new one
        while left := [phase for phase in phases if phase not in cells]:
            _run_worker(job, left, progress, keep, log=log)
        if disturbed := [cell.phase for cell in cells.values() if cell.disturbed]:
            _run_worker(job, disturbed, progress, keep, log=log)
        hopeless |= {cell.key[:3] for cell in cells.values() if cell.status in _RESULTS and not cell.done}
        progress.finish(job.name, ", ".join(map(_brief, cells.values())))
        failed += [
            Failure(name=f"{job.name}, {cell.phase}", reason=cell.error or "", log=log)
            for cell in cells.values()
            if cell.status == "failed"
        ]
    return failed


def _warn_of_other_commits(cells: Iterable[Cell], jobs: Sequence[ContextJob], progress: Progress) -> None:
    ours = {job.provenance.get("git_commit") for job in jobs}
    others = {cell.provenance.get("git_commit") for cell in cells} - ours
    if others:
        names = ", ".join(sorted(str(commit)[:12] for commit in others))
        progress.say(f"warning: keeps measurements made at another commit ({names}); --fresh makes them anew")


def _brief(cell: Cell) -> str:
    if cell.tokens_per_second is not None:
        disturbed = " (disturbed)" if cell.disturbed else ""
        return f"{cell.phase} {cell.tokens_per_second:,.0f} tokens/s{disturbed}"
    return f"{cell.phase} {cell.status.replace('_', ' ')}"


def _run_worker(
    job: ContextJob, phases: Sequence[str], progress: Progress, keep: Callable[[Cell], None], *, log: Path
) -> None:
    """Runs one worker until its phases are done or it ends.

    It takes them one after the other. Gives `keep` the cell of each when it ends, and of the one that did not end well.
    """
    left = list(phases)

    def show() -> None:
        progress.update(job.name, 1 - len(left) / len(job.phases), left[0])

    log_bytes = log.stat().st_size if log.exists() else 0
    kills = MemoryKills()
    with contextlib.ExitStack() as ends:
        with signals_held():
            order = (job, phases, plugins.imported())
            child = ends.enter_context(Child(_work, order, log=log, preload=preloaded(job.device)))
        while left:
            show()
            try:
                cell = child.receive(timeout=job.measure.timeout, meanwhile=show)
            except TimeoutError:
                keep(job.cell(left[0], status="timeout", error=f"stopped after {job.measure.timeout:g} s"))
                return
            except EOFError:
                code = child.join()
                ran_out = code == -signal.SIGKILL and kills.explain_one()
                keep(job.cell(left[0], **cause_of_death(code, last_line(log, after=log_bytes), ran_out=ran_out)))
                return
            keep(cell)
            left.pop(0)


def _work(order: tuple[ContextJob, Sequence[str], Sequence[str]], parent: Connection) -> None:
    """Main function of a cell's process. The import is here because this process, the parent, needs none of it."""
    from .worker import measure_phases

    job, phases, modules = order
    plugins.load(modules)
    measure_phases(job, phases, parent)


def cause_of_death(returncode: int, last_words: str, *, ran_out: bool = False) -> dict[str, Any]:
    """Says what ended a worker in the middle of a phase.

    A kill is a result only if memory `ran_out`, as the system says: what else kills a process measures nothing.
    """
    if ran_out:
        return {"status": "out_of_memory", "error": "killed by the system for want of memory"}
    if returncode == -signal.SIGKILL:
        return {"status": "failed", "error": "killed from outside (SIGKILL)"}
    if says_out_of_memory(last_words):
        return {"status": "out_of_memory", "error": last_words}
    ended = f"ended by {signal.Signals(-returncode).name}" if returncode < 0 else f"ended with code {returncode}"
    return {"status": "failed", "error": f"{last_words} ({ended})" if last_words else ended}
