"""What a comparison is still going to do and how long that takes on this machine, for `--dry-run`.

A run takes as long as finished ones of the same model and length did. Where there are none, a child trains and reads a
little as a run does, side by side with others as runs are, and what it finds is kept in the user's cache folder for the
same model, rows, versions and machine.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, cast

from ...files import read_json, write_json
from ...options import check_table
from ...train import plugins
from ...train.config import ModelSpec, ObjectiveSpec, RunConfig, TrainConfig, plain
from ...train.data.cache import cache_folder
from ...train.progress import duration
from ...train.runtime import choose_device, signals_held
from ...train.verdict import identity
from ..context.cells import cell_tasks, reusable_cells
from ..context.jobs import ContextJob
from ..harness.processes import Child, last_line, preloaded
from ..harness.progress import StatusLine
from ..harness.sizes import SizedArch
from ..harness.tables import print_table
from ..report.results import Run, load_run
from .runs import is_done
from .tuning import Search

__all__ = ["Pace", "Row", "forecast", "forecast_cells", "paces_of", "print_forecast", "real_seconds"]

_N_STEPS = 4  # the first of which is not counted
_START_SECONDS = 600.0  # in which a child has compiled its kernels and made its steps


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a model trains and reads at one length, in seconds."""

    start: float
    """Until the first step."""
    step: float
    """A training step."""
    token: float
    """A held-out token."""
    sample: float
    """What it writes at a validation."""

    def seconds(self, train: TrainConfig) -> float:
        """What a run of these settings takes."""
        training = train.seconds or self.step * train.steps
        n_on_the_way = (train.steps - 1) // train.eval_every if train.eval_every else 0
        tokens = n_on_the_way * train.eval_tokens + (2 if train.position_len else 1) * train.final_eval_tokens
        if train.lengths:  # each, and the trained one cut to its half, its quarter, ...
            tokens += (len(train.lengths) + train.seq_len.bit_length() - 5) * train.length_tokens
        return (
            self.start
            + training
            + self.token * tokens
            + (self.sample * (n_on_the_way + 1) if train.sample_tokens else 0.0)
        )


@dataclass(frozen=True, kw_only=True)
class Row:
    """Work of one kind."""

    name: str
    n_done: int
    left: Sequence[float]
    """Expected seconds of each piece that is to be done."""
    at_once: int = 1


def print_forecast(rows: Sequence[Row]) -> None:
    """Prints what there is to do and how long it takes, of each kind and in all."""
    print("\nTo do, with the time that it takes here:")
    print_table(
        ("", "done", "to do", "each", "together"),
        [
            (
                row.name,
                str(row.n_done),
                str(len(row.left)),
                f"{statistics.fmean(row.left):.1f} s" if row.left else "-",
                duration(sum(row.left) / row.at_once),
            )
            for row in rows
        ],
    )
    at_once = max((row.at_once for row in rows), default=1)
    beside = f", with {at_once} runs at a time" if at_once > 1 else ""
    print(f"\nIn all about {duration(sum(sum(row.left) / row.at_once for row in rows))}{beside}. Nothing was done.")


def forecast(
    runs: Sequence[RunConfig],
    search: Search | None,
    jobs: Sequence[ContextJob],
    sizes: Mapping[str, SizedArch],
    *,
    at_once: int,
    cells: Path,
    logs: Path,
) -> list[Row]:
    """What is done and to do of trials, runs and measurements, with the time of each.

    Args:
        runs: all runs of the comparison.
        search: the search for their rates, if there is one.
        jobs: all measurements.
        sizes: the models.
        at_once: runs that train side by side.
        cells: file of what was measured before.
        logs: folder for what the measurements of pace say.

    Raises:
        ValueError: if a model cannot be trained here, or the file holds measurements of other settings.
    """
    of_runs: dict[_Kind, list[RunConfig]] = {}
    for run in runs:
        of_runs.setdefault(_kind(run), []).append(run)
    done = {kind: [load_run(run.directory) for run in same if is_done(run)] for kind, same in of_runs.items()}
    trials = search.expected() if search is not None else []
    unknown = [kind for kind in of_runs if len(done[kind]) < len(of_runs[kind]) and real_seconds(done[kind]) is None]
    unknown += [_kind(run) for run, _, _ in trials if _kind(run) not in unknown]
    some = [of_runs[kind][0] for kind in dict.fromkeys(unknown)]
    pace = dict(zip(map(_kind, some), paces_of(some, at_once=at_once, logs=logs), strict=True))

    def row(name: str, finished: Sequence[Run], run: RunConfig, n_left: int) -> Row:
        each = 0.0
        if n_left:
            real = real_seconds(finished)
            each = pace[_kind(run)].seconds(run.train) if real is None else real
        return Row(name=name, n_done=len(finished), left=[each] * n_left, at_once=at_once)

    rows = [
        row(f"trial of {run.train.steps} steps, {sizes[run.model.preset].label}", finished, run, n - len(finished))
        for run, n, finished in trials
    ]
    several = len({length for _, length in of_runs}) > 1
    for (arch, length), same in of_runs.items():
        finished = done[arch, length]
        name = f"training, {sizes[arch].label}{f' at {length:,} tokens' if several else ''}"
        rows.append(row(name, finished, same[0], len(same) - len(finished)))
    per_flop = {
        arch: pace[arch, length].step / (run.train.batch_size * length * sizes[arch].flops_at[length])
        for (arch, length), (run, *_) in of_runs.items()
        if (arch, length) in pace
    }
    for finished in (run for of_kind in done.values() for run in of_kind):
        if speed := finished.result.get("tokens_per_second"):
            per_flop[finished.arch] = 1 / (speed * finished.result["flops_per_token"])
    return rows + [_row_of_cells(arch, sizes[arch], jobs, cells, per_flop.get(arch)) for arch in sizes]


def forecast_cells(
    jobs: Sequence[ContextJob], sizes: Mapping[str, SizedArch], *, n_params: int, cells: Path, logs: Path
) -> list[Row]:
    """What is done and to do of measurements alone, with the time of each; see `forecast` for arguments and errors."""
    existing, job = reusable_cells(cells, jobs), jobs[0]
    left = {j.arch for j in jobs if any((j.arch, phase, j.context_len, j.repeat) not in existing for phase in j.phases)}
    seq_len = job.context_len
    some = [
        RunConfig(
            name=arch,
            model=ModelSpec(preset=arch, n_params=n_params),
            # needs no documents, and has the vocabulary of the models but for one symbol at most
            objective=ObjectiveSpec(kind="copying", options={"symbols": max(2, sizes[arch].config.vocab_size - 2)}),
            train=TrainConfig(
                batch_size=max(1, 2048 // seq_len),
                seq_len=seq_len,
                precision=cast(Any, job.precision),
                device=job.device,
                threads=job.threads,
            ),
        )
        for arch in sizes
        if arch in left
    ]
    paces = dict(zip((run.name for run in some), paces_of(some, at_once=1, logs=logs), strict=True))
    per_flop = {
        run.name: paces[run.name].step / (run.train.batch_size * seq_len * sizes[run.name].flops_at[seq_len])
        for run in some
    }
    return [_row_of_cells(arch, sizes[arch], jobs, cells, per_flop.get(arch)) for arch in sizes]


_Kind = tuple[str, int]
"""Architecture and trained length."""


def _kind(run: RunConfig) -> _Kind:
    return run.model.preset, run.train.seq_len


def _row_of_cells(
    arch: str, sized: SizedArch, jobs: Sequence[ContextJob], path: Path, seconds_per_flop: float | None
) -> Row:
    """The measurements of a model: a box of time for each phase, or as long as the fewest repeats take."""
    existing = reusable_cells(path, jobs)
    ours = [job for job in jobs if job.arch == arch]
    left = [
        job for job in ours if any((arch, phase, job.context_len, job.repeat) not in existing for phase in job.phases)
    ]
    seconds = [
        task.cost + sum(_beyond_the_box(job, phase, seconds_per_flop or 0.0) for phase in job.phases)
        for job, task in zip(left, cell_tasks(left), strict=True)
    ]
    return Row(name=f"measurement, {sized.label}", n_done=len(ours) - len(left), left=seconds)


def _beyond_the_box(job: ContextJob, phase: str, seconds_per_flop: float) -> float:
    """Seconds by which the warm-up and the fewest repeats of a phase outlast its box of time."""
    from ...archs import ModelConfig, build

    n_tokens = {"train": 3 * (job.measure.tokens_per_batch or 0), "prefill": job.context_len}.get(phase, 0)
    if not n_tokens or job.beyond_positions(phase):
        return 0.0
    lm = build(ModelConfig.from_dict(job.model), device="meta")
    once = seconds_per_flop * n_tokens * lm.mean_flops_per_token(job.context_len)
    return max(0.0, (1 + job.measure.min_repeats) * once - 1.5 * job.measure.time_box)


def real_seconds(runs: Sequence[Run]) -> float | None:
    """What finished runs took, on the average of those that were never stopped and did not wait for others."""
    found = []
    for run in runs:
        stretches = run.info.get("stretches") or []
        if not run.info["config"]["train"].get("seconds") and len(stretches) == 1:
            begin = datetime.fromisoformat(stretches[0]["started"]).timestamp()
            found.append((run.folder / "result.json").stat().st_mtime - begin)
    return max(0.5, statistics.fmean(found)) if found else None


def paces_of(runs: Sequence[RunConfig], *, at_once: int, logs: Path) -> list[Pace]:
    """How fast each run trains and reads, measured where it has not been: `at_once` of them side by side.

    Raises:
        ValueError: if a model cannot be trained here.
    """
    folder = cache_folder(None) / "paces"
    paths = [folder / f"{_digest(run, at_once)}.json" for run in runs]
    missing = [(run, path) for run, path in zip(runs, paths, strict=True) if not path.exists()]
    with StatusLine() as line:
        for first in range(0, len(missing), at_once):
            group = missing[first : first + at_once]
            line.show(f"{first}/{len(missing)}  measures the pace of {', '.join(run.arch for run, _ in group)}")
            for (_, path), found in zip(group, _measure([run for run, _ in group], logs), strict=True):
                folder.mkdir(exist_ok=True)
                write_json(path, found)
    return [_read(path) for path in paths]


def _read(path: Path) -> Pace:
    held = read_json(path)
    check_table(held, dict.fromkeys(("start", "step", "token", "sample"), float), path)
    return Pace(**held)


def _digest(run: RunConfig, at_once: int) -> str:
    train = run.train
    decides = (
        plain(run.model), run.objective.kind, run.objective.all_options(), at_once,
        train.batch_size, train.seq_len, train.grad_accumulation, train.precision, train.threads, train.device,
        train.sample_tokens, identity(),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(decides, sort_keys=True, default=str).encode()).hexdigest()[:16]


def _measure(runs: Sequence[RunConfig], logs: Path) -> list[dict[str, float]]:
    with contextlib.ExitStack() as alive:
        children = []
        for run in runs:
            log = logs / f"{run.name}.log"
            preload = preloaded(str(choose_device(run.train.device)))
            with signals_held():
                child = Child(_work, (run, plugins.imported()), log=log, preload=preload)
                children.append((run, log, alive.enter_context(child)))
        found = []
        for run, log, child in children:
            try:
                found.append(child.receive(timeout=_START_SECONDS))
            except EOFError:
                raise ValueError(f"{run.arch} cannot be trained here: {last_line(log)}") from None
            except TimeoutError:
                raise ValueError(f"{run.arch} made no {_N_STEPS} steps in {_START_SECONDS:g} s") from None
        return found


def _work(order: tuple[RunConfig, Sequence[str]], parent: Connection) -> None:
    """Trains and reads a little, as a run does, and says how long that took."""
    import time

    begin = time.perf_counter()
    import torch

    from ...archs import build
    from ...train.evaluate import evaluate, evaluating
    from ...train.learner import Learner, Update, split_rows
    from ...train.objectives import open_objective
    from ...train.optim import adamw
    from ...train.runtime import choose_precision, keep_freed_memory
    from ...train.verdict import apply_verdict
    from ...train.warm_up import warm_up
    from ..harness.timing import timed

    run, modules = order
    plugins.load(modules)
    objective = open_objective(run, progress=False)
    if run.train.threads is not None:
        torch.set_num_threads(run.train.threads)
    keep_freed_memory()
    apply_verdict()
    device = choose_device(run.train.device)
    config = run.model.configure(objective.data.tokenizer.vocab_size)
    precision = choose_precision(run.train.precision, device, d_model=config.d_model)
    warm_up(config, objective, device, precision)
    model = objective.prepare(build(config, device=device))
    learner = Learner(model, objective)
    update = Update(learner, objective, adamw(model, run.optim), precision=precision, clip=run.optim.clip)
    found = {"start": time.perf_counter() - begin}

    def step() -> None:
        rows = objective.rows(0)
        update([objective.collate(part) for part in split_rows(rows, run.train.grad_accumulation)], 0.0)

    found["step"] = statistics.median([timed(device, step) for _ in range(_N_STEPS)][1:])
    rows = objective.held_out(run.train.eval_tokens)
    at_once = run.train.batch_size // run.train.grad_accumulation
    reading = timed(device, lambda: evaluate(learner, objective, rows, precision=precision, rows_at_once=at_once))
    found["token"] = reading / objective.n_tokens(rows)
    with evaluating(learner, precision):
        found["sample"] = timed(device, lambda: objective.sample(model)) if run.train.sample_tokens else 0.0
    parent.send(found)
