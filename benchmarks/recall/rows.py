"""What runs on tasks found: of each model its best rate, the steps it took, and its accuracy by length."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..report.results import Run
from .plan import Kind, find_model

__all__ = ["Row", "csv_rows", "rows_of"]


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
    """Rates among which it is the best."""
    solved: float

    @property
    def label(self) -> str:
        """The model's name in tables."""
        return find_model(self.model).label

    @property
    def rate(self) -> str:
        """Its rate in tables."""
        return f"{self.lr:g}{' (edge)' if self.at_edge else ''}"

    @property
    def accuracy(self) -> list[float]:
        """Accuracy at the trained length, by seed: of the rows of the test, by which no rate was chosen."""
        return self.at(self.runs[0].seq_len)

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


def rows_of(finished: Sequence[tuple[Kind, Run]], *, lrs: Sequence[float], solved: float) -> list[Row]:
    """The best rate of every task and model: by mean accuracy of validations, and then by the steps it took.

    A rate at which seeds are missing, as a run has failed or is still to come, is passed over where others have more.

    Args:
        finished: the runs that are done.
        lrs: all rates, also those of runs that are not.
        solved: accuracy from which on a task is solved.
    """
    by_kind: dict[tuple[str, str], dict[float, list[Run]]] = {}
    for kind, run in finished:
        by_kind.setdefault((kind.task, kind.model), {}).setdefault(kind.lr, []).append(run)
    rows = []
    for (task, model), by_rate in by_kind.items():
        n_seeds = max(map(len, by_rate.values()))
        whole = {lr: runs for lr, runs in by_rate.items() if len(runs) == n_seeds}
        lr = max(whole, key=lambda lr: _merit(whole[lr], solved))
        row = Row(task=task, model=model, lr=lr, at_edge=False, runs=whole[lr], n_rates=len(whole), solved=solved)
        at_edge = lr in (min(lrs), max(lrs)) and None in row.steps
        rows.append(dataclasses.replace(row, at_edge=at_edge))
    return rows


def _merit(runs: Sequence[Run], solved: float) -> tuple[float, float]:
    accuracy = statistics.fmean(run.quality or 0.0 for run in runs)
    steps = [_steps_until(run, solved) or run.info["config"]["train"]["steps"] for run in runs]
    return min(accuracy, solved), -statistics.fmean(steps)


def csv_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """One for each model, task, seed and tested length."""
    return [
        {
            "task": row.task,
            "model": row.model,
            "lr": row.lr,
            "at_edge": row.at_edge,
            "seed": run.seed,
            "steps": run.result["steps"],
            "steps_to_solve": solved_at,
            "context_len": entry["context_len"],
            "accuracy": entry["accuracy"],
            "floor": entry["floor"],
            "state_bytes": row.state_bytes,
            "n_params": run.info["n_params"],
        }
        for row in rows
        for run, solved_at in zip(row.runs, row.steps, strict=True)
        for entry in run.result.get("accuracy_by_length") or ()
    ]
