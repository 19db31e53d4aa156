"""The results of a folder as rows: for the CSV files beside a report, and for scripts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..context.cell import Cell
from .results import Comparison, load_comparison, quality

__all__ = ["CONTEXT_COLUMNS", "Results", "context_rows", "load_results"]

CONTEXT_COLUMNS = (
    "arch",
    "phase",
    "context_len",
    "batch_size",
    "n_params",
    "n_active_params",
    "tokens_per_second",
    "spread_low",
    "spread_high",
    "repeats",
    "seconds",
    "cpu_seconds",
    "load",
    "disturbed",
    "peak_bytes",
    "state_bytes",
    "status",
    "error",
    "backend",
    "dtype",
    "peak_method",
)


class Results(list[dict[str, Any]]):
    """Rows of plain values, of which "table" says what they are: "quality", one for each architecture with runs, or
    "context", one for each architecture, phase and context length."""

    @property
    def quality(self) -> list[dict[str, Any]]:
        """Rows as in quality.csv."""
        return [row for row in self if row["table"] == "quality"]

    @property
    def context(self) -> list[dict[str, Any]]:
        """Rows as in context.csv."""
        return [row for row in self if row["table"] == "context"]


def load_results(folder: str | Path) -> Results:
    """The results of a comparison, of some runs or of one, as rows that `pandas.DataFrame` takes.

        results = load_results("runs/compare")
        pandas.DataFrame(results.context).pivot_table("tokens_per_second", "context_len", ["phase", "arch"])

    Args:
        folder: as in `crossover report`; nothing in it is changed, and nothing but its files is read.

    Raises:
        ValueError: if there are no results, or the runs cannot be compared.
    """
    comparison = load_comparison(Path(folder))
    return Results(
        [{"table": "quality", **row} for row in quality(comparison)]
        + [{"table": "context", **row} for row in context_rows(comparison)]
    )


def context_rows(comparison: Comparison) -> list[dict[str, Any]]:
    """Rows of context.csv."""
    return [{key: row[key] for key in CONTEXT_COLUMNS} for row in map(_flat, comparison.ordered_cells)]


def _flat(cell: Cell) -> dict[str, Any]:
    low, high = cell.spread or (None, None)
    backend = "; ".join(f"{op}={'+'.join(names)}" for op, names in sorted(cell.backend.items()))
    return {**cell.to_dict(), "spread_low": low, "spread_high": high, "backend": backend}
