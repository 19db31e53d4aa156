"""What runs on tasks found: of each model its best rate, the steps it took, and its accuracy by length."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..harness.format import DASH, format_bytes
from ..report.results import Run
from ..report.statistics import mean_interval
from .plan import MODELS, Kind

__all__ = ["Row", "rows_of", "to_csv", "to_markdown"]


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model on one task, at the rate at which it is best."""

    task: str
    model: str
    lr: float
    at_edge: bool
    """Whether a better rate may lie beyond those that were tried: the best is the lowest or highest, and not solved."""
    runs: Sequence[Run]
    """Of the seeds, at that rate."""
    n_rates: int
    """Rates that were tried."""
    solved: float

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return MODELS[self.model].label

    @property
    def accuracy(self) -> list[float]:
        """Final accuracy at the trained length, by seed."""
        return [run.quality for run in self.runs if run.quality is not None]

    @property
    def steps(self) -> list[int | None]:
        """Steps after which a validation first found the task solved, by seed; None where none did."""
        return [_steps_until(run, self.solved) for run in self.runs]

    @property
    def n_steps(self) -> int:
        """Steps that a run had."""
        return self.runs[0].info["config"]["train"]["steps"]

    @property
    def state_bytes(self) -> int:
        """Bytes of state while decoding at the trained length."""
        return self.runs[0].info["state_bytes"]

    def at(self, length: int) -> list[float]:
        """Accuracy at a tested length, by seed."""
        entries = (e for run in self.runs for e in run.result.get("accuracy_by_length") or ())
        return [e["accuracy"] for e in entries if e["context_len"] == length and e["accuracy"] is not None]

    @property
    def floors(self) -> dict[int, float]:
        """Accuracy without recall by tested length."""
        entries = (e for run in self.runs for e in run.result.get("accuracy_by_length") or ())
        return {e["context_len"]: e["floor"] for e in entries}


def _steps_until(run: Run, accuracy: float) -> int | None:
    validations = ((line["step"], line.get(run.score.tag)) for line in run.metrics)
    return next((step for step, found in validations if found is not None and found >= accuracy), None)


def rows_of(finished: Sequence[tuple[Kind, Run]], *, solved: float) -> list[Row]:
    """The best rate of every task and model, of runs that are done: by mean accuracy, and then by the steps it took."""
    by_kind: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for kind, run in finished:
        by_kind.setdefault((kind.task, kind.model), {}).setdefault(kind.lr, []).append(run)
    rows = []
    for (task, model), by_rate in by_kind.items():
        lr = max(by_rate, key=lambda lr: _merit(by_rate[lr], solved))
        row = Row(task=task, model=model, lr=lr, at_edge=False, runs=by_rate[lr], n_rates=len(by_rate), solved=solved)
        at_edge = lr in (min(by_rate), max(by_rate)) and None in row.steps
        rows.append(Row(**{**vars(row), "at_edge": at_edge}))
    return rows


def _merit(runs: Sequence[Run], solved: float) -> tuple[float, float]:
    accuracy = statistics.fmean(run.quality or 0.0 for run in runs)
    steps = [_steps_until(run, solved) or run.info["config"]["train"]["steps"] for run in runs]
    return min(accuracy, solved), -statistics.fmean(steps)


def to_csv(rows: Sequence[Row]) -> str:
    """One line for each model, task, seed and tested length."""
    out = io.StringIO()
    columns = ["task", "model", "lr", "at_edge", "seed", "steps", "steps_to_solve", "context_len", "accuracy", "floor"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*columns, "state_bytes", "n_params"])
    for row in rows:
        for run, solved_at in zip(row.runs, row.steps, strict=True):
            for entry in run.result.get("accuracy_by_length") or ():
                facts: list[Any] = [row.task, row.model, f"{row.lr:g}", row.at_edge, run.seed, run.result["steps"]]
                facts += [solved_at, entry["context_len"], entry["accuracy"], entry["floor"]]
                writer.writerow([*facts, run.info["state_bytes"], run.info["n_params"]])
    return out.getvalue()


def to_markdown(rows: Sequence[Row]) -> str:
    """A table for each task, with what the numbers are and what they do not say."""
    parts = ["# Recall and state tracking\n"]
    for task in dict.fromkeys(row.task for row in rows):
        parts.append(_task(task, [row for row in rows if row.task == task]))
    return "\n".join(parts)


def _task(task: str, rows: Sequence[Row]) -> str:
    lengths = sorted({length for row in rows for length in row.floors})
    config = rows[0].runs[0].info["config"]
    made = rows[0].runs[0].info["corpus"]["made"]
    trained, n_seeds = config["train"]["seq_len"], max(len(row.runs) for row in rows)
    head = ["Model", "Params", "State", "Rate", "Steps to solve", *(f"{length:,}" for length in lengths)]
    lines = [f"| {' | '.join(head)} |", f"|---{'|---:' * (len(head) - 1)}|"]
    for row in sorted(rows, key=_order):
        rate = f"{row.lr:g}{' (edge)' if row.at_edge else ''}"
        cells = [row.label, f"{row.runs[0].info['n_params']:,}", format_bytes(row.state_bytes), rate, _steps(row)]
        lines.append(f"| {' | '.join([*cells, *(_share(row.at(length)) for length in lengths)])} |")
    floors = rows[0].floors
    lines.append(f"| Without recall | | | | | {' | '.join(f'{floors[length]:.3f}' for length in lengths)} |")
    seeds = f"{n_seeds} seeds: means with 95 % t intervals" if n_seeds > 1 else "one seed, so nothing is said of noise"
    batch = config["train"]["batch_size"]
    return (
        f"## {task}\n\n{made[0].upper()}{made[1:]}. Trained at {trained} symbols, {batch} rows a step; accuracy of the "
        f"answers by length, {seeds}. Solved: a validation with {rows[0].solved:.0%} of the answers right. (edge): the "
        "best rate is the lowest or highest that was tried, and another may do better.\n\n" + "\n".join(lines) + "\n"
    )


def _order(row: Row) -> tuple[float, float]:
    steps = [row.n_steps if step is None else step for step in row.steps]
    return -min(statistics.fmean(row.accuracy), row.solved), statistics.fmean(steps)


def _steps(row: Row) -> str:
    steps = [step for step in row.steps if step is not None]
    if not steps:
        rates = "this rate" if row.n_rates == 1 else f"these {row.n_rates} rates"
        return f"not in {row.n_steps:,} at {rates}"
    some = "" if len(steps) == len(row.runs) else f" ({len(steps)} of {len(row.runs)} seeds)"
    return f"{statistics.median(steps):,.0f}{some}"


def _share(values: Sequence[float]) -> str:
    if not values:
        return DASH
    if len(values) == 1:
        return f"{values[0]:.3f}"
    interval = mean_interval(values)
    return f"{interval.mean:.3f} ± {interval.half_width:.3f}"
