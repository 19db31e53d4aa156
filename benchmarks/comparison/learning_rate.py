"""Tunes the peak learning rate of each architecture under one rule, the one behind the rates in the presets."""

import csv
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...train.config import ModelSpec, RunConfig, TrainConfig
from ...train.runtime import Interrupted, stop_signals
from ...train.score import BITS_PER_BYTE, Score
from ..harness.folder import folder_for
from ..harness.precision import decide_precision
from ..harness.progress import Progress, Schedule
from ..report.results import load_run
from .compare import check_archs, open_objective, print_table, sizes_of
from .options import LearningRateConfig
from .runs import check_resumable, share_threads, train_runs, training_tasks

__all__ = ["bench_lr", "best_rates", "conclude", "mark", "rate_rows", "rate_runs"]


def bench_lr(config: LearningRateConfig, *, command: Sequence[str]) -> int:
    """Trains every architecture at every rate, writes lr.csv, prints the table; returns the exit code.

    Raises:
        ValueError: before any work is done, if the configuration cannot be run.
    """
    check_archs(config)
    with folder_for(config.out, fresh=config.fresh) as logs:
        objective = open_objective(config)
        sizes, score = sizes_of(config, objective), objective.score
        precision = decide_precision(config, [sized.config.d_model for sized in sizes.values()])
        config = replace(config, precision=precision.name)
        n_runs = len(config.archs) * len(config.rates) * config.seeds
        at_once, threads = share_threads(config.jobs, config.threads, device=config.device, n_runs=n_runs)
        runs = rate_runs(config, threads)
        check_resumable(runs, objective.data.digest)
        progress = Progress(Schedule(training_tasks(runs, sizes), at_once={"train": at_once}))
        try:
            with stop_signals(at_once=True), progress:
                failures = train_runs(runs, progress, logs=logs, jobs=at_once)
        except Interrupted as stop:
            conclude(runs, config.out, score)
            print(f"Stopped. The same command goes on from here: {shlex.join(command)}")
            return stop.exit_code
        conclude(runs, config.out, score)
        for name, reason in failures.items():
            print(f"crossover: {name} did not finish: {reason} (log: {logs / name}.log)", file=sys.stderr)
        return 1 if failures else 0


def rate_runs(config: LearningRateConfig, threads: int | None = None) -> list[RunConfig]:
    """Every architecture at every rate with every seed, all else equal."""
    train = TrainConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        precision=config.precision,
        eval_every=max(1, config.steps // 4),
        eval_tokens=config.eval_tokens,
        final_eval_tokens=config.eval_tokens,
        position_len=0,
        sample_tokens=0,
        checkpoint_every=0,
        device=config.device,
        threads=threads,
    )
    return [
        RunConfig(
            name=f"{arch}-lr{rate:g}-s{seed}",
            seed=seed,
            out=config.out,
            model=ModelSpec(preset=arch, n_params=config.params),
            objective=config.objective,
            data=config.data,
            optim=replace(config.optim, lr=rate),
            train=replace(train, tensorboard=config.out / "tb" / f"{arch}-lr{rate:g}-s{seed}"),
        )
        for arch in config.archs
        for rate in config.rates
        for seed in range(config.seeds)
    ]


def rate_rows(results: Sequence[tuple[str, float, float | None]], score: Score = BITS_PER_BYTE) -> list[dict[str, Any]]:
    """Summarizes (arch, rate, score or None where the run did not finish) to one row per arch and rate.

    A rate at which any seed did not finish has no score: the mean of those that survived would flatter it.
    """
    found: dict[tuple[str, float], list[float | None]] = {}
    for arch, rate, value in results:
        found.setdefault((arch, rate), []).append(value)
    rows = []
    for (arch, rate), values in found.items():
        finished = [value for value in values if value is not None]
        mean = statistics.fmean(finished) if len(finished) == len(values) else None
        rows.append({"arch": arch, "lr": rate, score.key: mean, "n_seeds": len(finished)})
    best = best_rates(rows, score)
    return [{**row, "best": best.get(row["arch"]) == row["lr"]} for row in rows]


def best_rates(rows: Sequence[Mapping[str, Any]], score: Score = BITS_PER_BYTE) -> dict[str, float]:
    """The rate with the best score of each architecture."""
    scored = [row for row in rows if row[score.key] is not None]
    worst_first = sorted(scored, key=lambda row: row[score.key], reverse=score.better == "lower")
    return {row["arch"]: row["lr"] for row in worst_first}


def conclude(runs: Sequence[RunConfig], out: Path, score: Score = BITS_PER_BYTE) -> None:
    """Writes lr.csv from the results that exist, and prints it as a table with the best rates marked."""
    results = [(run.model.preset, run.optim.lr, _quality(run)) for run in runs if run.optim.lr is not None]
    rows = rate_rows(results, score)
    with (out / "lr.csv").open("w", encoding="utf-8", newline="") as file:
        columns: list[str] = ["arch", "lr", score.key, "n_seeds", "best"]
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    from ...archs.presets import find

    tried = {arch: sorted(row["lr"] for row in rows if row["arch"] == arch) for arch in {row["arch"] for row in rows}}
    print()
    print_table(
        ("arch", "lr", score.unit, "seeds", ""),
        [
            (
                find(row["arch"]).label,
                f"{row['lr']:g}",
                "-" if row[score.key] is None else f"{row[score.key]:.4f}",
                str(row["n_seeds"]),
                mark(row, tried[row["arch"]]),
            )
            for row in rows
        ],
    )
    print(f"\nWritten to {out / 'lr.csv'}.")


def _quality(run: RunConfig) -> float | None:
    """The final score of a run; None where it has not finished or not begun."""
    return load_run(run.directory).quality if (run.directory / "run.json").exists() else None


def mark(row: Mapping[str, Any], tried: Sequence[float]) -> str:
    """Says whether a rate is the best of those tried, and whether a better one may lie beyond them."""
    if not row["best"]:
        return ""
    at_the_end = len(tried) > 1 and row["lr"] in (tried[0], tried[-1])
    return "best, at the end of the list: try further" if at_the_end else "best"
