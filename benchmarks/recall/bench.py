"""`crossover bench recall`: trains every kind, and writes what they found."""

from __future__ import annotations

import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...archs import build
from ...files import write_json
from ...options import nearest
from ...train.config import RunConfig, plain
from ...train.objective import Objective
from ...train.objectives import OBJECTIVES, open_objective
from ...train.objectives.recall import Task as RecallTask
from ...train.record import provenance
from ...train.runtime import Interrupted, choose_device, stop_signals
from ..comparison import forecast
from ..comparison.runs import check_resumable, is_done, share_threads, train_runs
from ..harness.folder import folder_for, nowhere
from ..harness.progress import Progress, Schedule, Task
from ..harness.tables import print_table
from ..report.results import load_run
from .options import RecallConfig
from .plan import Kind, kinds_of
from .report import write_recall
from .rows import rows_of

__all__ = ["bench_recall"]


def bench_recall(config: RecallConfig, *, command: Sequence[str]) -> int:
    """Runs the benchmark and returns the exit code: 0, 1 if a run did not finish, 130 or 143 if stopped.

    Raises:
        ValueError: before any work is done, if a task is unknown, or a model cannot learn it.
    """
    _check_tasks(config)
    kinds = kinds_of(config)
    at_once, threads = share_threads(config.jobs, config.threads, device=config.device, n_runs=len(kinds))
    kinds = kinds_of(config, threads=threads)
    with nowhere() if config.dry_run else folder_for(config.out, fresh=config.fresh) as logs:
        objectives = _checked(kinds)
        for task, objective in objectives.items():
            check_resumable([kind.run for kind in kinds if kind.task == task], objective.data.digest)
        if config.dry_run:
            _print_forecast(kinds, at_once=at_once, logs=logs)
            return 0
        origin = provenance(choose_device(config.device), command=command)
        record: dict[str, Any] = {"config": plain(config), "provenance": origin, "failures": {}}
        write_json(config.out / "recall.json", record)
        progress = Progress(Schedule(_tasks(kinds, objectives), at_once={"train": at_once}))
        try:
            with stop_signals(at_once=True), progress:
                record["failures"] = train_runs([kind.run for kind in kinds], progress, logs=logs, jobs=at_once)
        except Interrupted as stop:
            _report(kinds, config, record)
            print(f"Stopped. The same command goes on from here: {shlex.join(command)}")
            return stop.exit_code
        write_json(config.out / "recall.json", record)
        _report(kinds, config, record)
        for name, reason in record["failures"].items():
            print(f"crossover: {name} did not finish: {reason} (log: {logs / name}.log)", file=sys.stderr)
        return 1 if record["failures"] else 0


def _check_tasks(config: RecallConfig) -> None:
    known = [name for name, objective in OBJECTIVES.items() if issubclass(objective, RecallTask)]
    for task in config.chosen_tasks:
        if task not in known:
            raise ValueError(f"--tasks {task} is no task of recall{nearest(task, known)}")


def _checked(kinds: Sequence[Kind]) -> dict[str, Objective[Any, Any]]:
    """The objective of every task, which every model can learn."""
    objectives: dict[str, Objective[Any, Any]] = {}
    for kind in kinds:
        if kind.task not in objectives:
            objectives[kind.task] = open_objective(kind.run)
        objective = objectives[kind.task]
        try:
            objective.check(kind.run.model.configure(objective.data.tokenizer.vocab_size))
        except ValueError as error:
            raise ValueError(f"{kind.model} on {kind.task}: {error}") from None
    return objectives


def _tasks(kinds: Sequence[Kind], objectives: Mapping[str, Objective[Any, Any]]) -> list[Task]:
    """The runs with the FLOPs that they take at most."""
    per_token: dict[tuple[str, str], float] = {}
    for kind in kinds:
        if (kind.task, kind.model) not in per_token:
            vocab_size = objectives[kind.task].data.tokenizer.vocab_size
            lm = build(kind.run.model.configure(vocab_size), device="meta")
            per_token[kind.task, kind.model] = lm.training_flops_per_token(kind.run.train.seq_len)
    return [
        Task(name=kind.run.name, kind="train", cost=per_token[kind.task, kind.model] * kind.run.train.n_tokens)
        for kind in kinds
    ]


def _print_forecast(kinds: Sequence[Kind], *, at_once: int, logs: Path) -> None:
    groups: dict[tuple[str, str], list[RunConfig]] = {}
    for kind in kinds:
        groups.setdefault((kind.task, kind.model), []).append(kind.run)
    left = {key: [run for run in runs if not is_done(run)] for key, runs in groups.items()}
    some = [runs[0] for runs in left.values() if runs]
    paces = dict(zip((run.name for run in some), forecast.paces_of(some, at_once=at_once, logs=logs), strict=True))
    forecast.print_forecast(
        [
            forecast.Row(
                name=f"{task}, {model}",
                n_done=len(groups[task, model]) - len(runs),
                left=[paces[runs[0].name].seconds(run.train) for run in runs],
                at_once=at_once,
            )
            for (task, model), runs in left.items()
        ]
    )
    print("A run that solves its task ends before.")


def _report(kinds: Sequence[Kind], config: RecallConfig, record: Mapping[str, Any]) -> None:
    """Writes and prints what the runs that are done found."""
    finished = [(kind, load_run(kind.run.directory)) for kind in kinds if is_done(kind.run)]
    if not finished:
        print("\nNo run has finished, so there is nothing to report yet.")
        return
    rows = rows_of(finished, lrs=config.lrs, solved=config.solved)
    for task in dict.fromkeys(row.task for row in rows):
        print(f"\n{task}")
        print_table(
            ("model", "rate", "accuracy", "steps to solve"),
            [
                (
                    row.label,
                    row.rate,
                    f"{statistics.fmean(row.accuracy):.3f}",
                    ", ".join("-" if step is None else str(step) for step in row.steps),
                )
                for row in rows
                if row.task == task
            ],
        )
    print(f"\nReport: {write_recall(rows, config.out, record=record)}")
