"""The report of the recall benchmark: a table and a picture for each task, and what states hold against their bytes."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import write_text
from ..harness.format import DASH, format_bytes
from ..report.document import Block, Figure, Figures, Heading, Items, Paragraph, Table, to_csv
from ..report.drawing import Theme, bytes_axis, draw, line, log2_axis, pens_of, reference_lines
from ..report.statistics import mean_interval
from ..report.words import and_list
from ..report.write import write_page
from .plan import find_model
from .rows import Row, csv_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["write_recall"]

_TITLE = "Recall and state tracking"


def write_recall(rows: Sequence[Row], folder: Path, *, record: Mapping[str, Any]) -> Path:
    """Writes report.html, report.md, recall.csv and figures/ into a folder; returns the path of the first.

    `record` is what recall.json holds: provenance, and failures by the name of the run.
    """
    blocks: list[Block] = [Paragraph(text=_ABOUT)]
    for task in dict.fromkeys(row.task for row in rows):
        blocks += _task([row for row in rows if row.task == task])
    if record["failures"]:
        failed = [f"{name}: {reason}" for name, reason in record["failures"].items()]
        blocks += [Heading(text="Did not finish"), Items(items=failed, warnings=frozenset(range(len(failed))))]
    items = [f"{key}: {value}" for key, value in record["provenance"].items()]
    blocks += [Heading(text="Provenance"), Items(items=items)]
    write_text(folder / "recall.csv", to_csv(csv_rows(rows), _COLUMNS))
    models = list(dict.fromkeys(row.label for row in rows))
    return write_page(folder, _TITLE, ", ".join(models), blocks)


_COLUMNS = (
    "task", "model", "lr", "at_edge", "seed", "steps", "steps_to_solve", "context_len", "accuracy", "floor",
    "state_bytes", "n_params",
)  # fmt: skip

_ABOUT = (
    "Accuracy is the share of answers that are right, in rows that are made for the test; beyond the trained length a "
    "model extrapolates. Without recall: the best of four guesses, the most frequent answer, the one most frequent "
    "after the symbol that asks, the symbol most frequent in the row, and the last one read. State is what one "
    "sequence of the trained length carries while decoding, in float32. A model counts at the best of the rates that "
    "were tried, by other rows than those of the test; where that is the lowest or highest of them and the task is not "
    "solved, marked (edge), another rate may do better. That a task was not solved in so many steps does not say that "
    "a model cannot."
)


def _task(rows: Sequence[Row]) -> list[Block]:
    first = rows[0]
    train, made = first.runs[0].info["config"]["train"], first.runs[0].info["corpus"].get("made") or "documents"
    n_seeds = max(len(row.runs) for row in rows)
    seeds = f"{n_seeds} seeds: means with 95 % t intervals" if n_seeds > 1 else "one seed, so nothing is said of noise"
    about = (
        f"{made[0].upper()}{made[1:]}, of {train['seq_len']} symbols, {train['batch_size']} a step; {seeds}. Solved: a "
        f"validation with {first.solved:.0%} of the answers right."
    )
    figures = [figure for figure in (_lengths(rows), _frontier(rows)) if figure is not None]
    return [Heading(text=first.task), Paragraph(text=about), _table(rows), Figures(figures=figures)]


def _table(rows: Sequence[Row]) -> Table:
    lengths = sorted({length for row in rows for length in row.floors})
    cells = [
        [
            row.label,
            f"{row.runs[0].info['n_params']:,}",
            format_bytes(row.state_bytes),
            row.rate,
            _steps(row),
            *(_share(row.at(length)) for length in lengths),
        ]
        for row in sorted(rows, key=_order)
    ]
    floors = rows[0].floors
    cells.append(["Without recall", "", "", "", "", *(f"{floors[length]:.3f}" for length in lengths)])
    head = ["Model", "Params", "State", "Rate", "Steps to solve", *(f"{length:,}" for length in lengths)]
    return Table(columns=head, rows=cells)


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


def _lengths(rows: Sequence[Row]) -> Figure:
    """Accuracy at the trained length and beyond."""
    points = [
        {"model": row.model, "label": row.label, "context_len": length, "accuracy": statistics.fmean(found)}
        for row in rows
        for length in sorted(row.floors)
        if (found := row.at(length))
    ]
    floors = rows[0].floors

    def paint(axes: Axes, theme: Theme) -> None:
        for model, pen in pens_of({row.model: row.label for row in rows}, theme).items():
            mine = [point for point in points if point["model"] == model]
            line(axes, pen, [point["context_len"] for point in mine], [point["accuracy"] for point in mine])
        axes.plot(list(floors), list(floors.values()), color=theme.soft, linestyle=":", label="without recall")
        log2_axis(axes, list(floors))
        axes.set_ylim(-0.03, 1.03)

    return draw(
        f"{rows[0].task}-lengths",
        f"{rows[0].task}: accuracy by length of the row, the shortest of which was trained.",
        f"Accuracy on {rows[0].task} by length for {and_list([row.label for row in rows])}",
        paint,
        axis_labels=("symbols", "accuracy"),
        data=points,
    )


def _frontier(rows: Sequence[Row]) -> Figure | None:
    """Accuracy against bytes of state: a curve for each kind of model of which there are several."""
    by_base: dict[str, list[Row]] = {}
    for row in rows:
        by_base.setdefault(find_model(row.model).base, []).append(row)
    if max(map(len, by_base.values())) < 2:
        return None
    curves = {base: sorted(several, key=lambda row: row.state_bytes) for base, several in by_base.items()}
    points = [
        {
            "model": row.model,
            "label": row.label,
            "state_bytes": row.state_bytes,
            "n_params": row.runs[0].info["n_params"],
            "accuracy": statistics.fmean(row.accuracy),
        }
        for several in curves.values()
        for row in several
    ]
    floor, names = rows[0].floors[rows[0].runs[0].seq_len], [find_model(base).label for base in curves]

    def paint(axes: Axes, theme: Theme) -> None:
        for base, pen in pens_of({base: find_model(base).label for base in curves}, theme).items():
            several = curves[base]
            shares = [statistics.fmean(row.accuracy) for row in several]
            line(axes, pen, [row.state_bytes for row in several], shares)
        bytes_axis(axes)
        axes.set_ylim(-0.03, 1.03)
        reference_lines(axes, theme, {"without recall": floor})

    return draw(
        f"{rows[0].task}-frontier",
        f"{rows[0].task}: accuracy against the bytes of state that one sequence carries while decoding. What is solved "
        "furthest to the left recalls most per byte.",
        f"Accuracy on {rows[0].task} against bytes of state for {and_list(names)}",
        paint,
        axis_labels=("state of one sequence", "accuracy"),
        data=points,
    )
