"""The figures of a report on quality and on costs against context length."""

import statistics
import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..context.cell import Cell
from .document import Figure
from .drawing import (
    Paint,
    Pen,
    Theme,
    count_tick,
    draw,
    line,
    log2_axis,
    log_bytes,
    log_speed,
    pens,
    reference_lines,
)
from .results import Comparison, Metric, mean_and_spread, tokens_per_step
from .words import capital, status_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["around", "context_figure", "labels", "learning_figure", "quality_figure"]


def labels(comparison: Comparison, archs: Sequence[str]) -> str:
    """Names architectures in a list."""
    return ", ".join(map(comparison.label, archs))


def around(means: Sequence[float], spreads: Sequence[float | None]) -> list[tuple[float, float] | None]:
    """One standard deviation to either side of means, where it is known."""
    return [None if s is None else (mean - s, mean + s) for mean, s in zip(means, spreads, strict=True)]


def quality_figure(comparison: Comparison, rows: Sequence[Mapping]) -> Figure:
    """The score of every architecture beside the compressors, where there are any.

    Of one trained length the best is on top; of several a line for each architecture.
    """
    score, refs = comparison.score, comparison.references
    key, spread = score.key, f"{score.key}_std"
    scored = sorted(
        (row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=score.better == "lower"
    )
    less, smaller = ("less", "smaller") if score.better == "lower" else ("more", "larger")
    axis = f"{score.words} ({less} is better)"
    several = len({row["seq_len"] for row in scored}) > 1

    def paint_ranks(axes: "Axes", theme: Theme) -> None:
        drawn = pens(comparison, theme)
        for y, row in enumerate(scored):
            pen, value = drawn[row["arch"]], row[key]
            axes.errorbar(value, y, xerr=row[spread], color=pen.color, marker=pen.marker, markersize=8, capsize=4)
            axes.annotate(
                f"{value:.2f}" if abs(value) < 1e6 else f"{value:.3g}",
                (value, y),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        axes.set_yticks(range(len(scored)), [drawn[row["arch"]].label for row in scored])
        axes.set_ylim(-0.6, len(scored) - 0.2)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.update_datalim([(value, 0) for value in refs.values()], updatey=False)
        reference_lines(axes, theme, refs, vertical=True)

    def paint_lengths(axes: "Axes", theme: Theme) -> None:
        for arch, pen in pens(comparison, theme).items():
            mine = sorted((row for row in scored if row["arch"] == arch), key=lambda row: row["seq_len"])
            means = [row[key] for row in mine]
            line(axes, pen, [row["seq_len"] for row in mine], means, around(means, [row[spread] for row in mine]))
        log2_axis(axes, [row["seq_len"] for row in scored])
        axes.update_datalim([(scored[0]["seq_len"], value) for value in refs.values()], updatex=False)
        axes.autoscale_view()
        reference_lines(axes, theme, refs)

    notes = ["Dashed: general-purpose compressors on the whole of it"] if refs else []
    bars = "bands" if several else "bars"
    notes += [f"{bars}: one standard deviation over seeds"] if any(row[spread] for row in scored) else []
    what = "by trained length" if several else "after training"
    told = [
        f"{row['label']} {row[key]:.2f}" + (f" at {row['seq_len']:,}" if several else "") for row in reversed(scored)
    ]
    kept = ("arch", "label", "seq_len", "n_seeds", key, spread)
    return draw(
        "quality",
        f"{capital(comparison.held_out)} {what}, {smaller} is better."
        + (f" {capital('; '.join(notes))}." if notes else ""),
        f"{capital(score.unit)}: {', '.join(told)}",
        paint_lengths if several else paint_ranks,
        axis_labels=("trained length (tokens)", axis.replace(" (", "\n(")) if several else (axis, ""),
        data=[{name: row[name] for name in kept} for row in rows]
        + [{**dict.fromkeys(kept), "label": name, key: value} for name, value in refs.items()],
    )


def learning_figure(comparison: Comparison, x: str) -> Figure:
    """The score in validation against what was spent: x is 'tokens' or 'seconds'. A panel for each trained length."""
    archs, score = comparison.archs, comparison.score
    points = [
        {"arch": arch, "label": comparison.label(arch), "seq_len": seq_len, **point}
        for seq_len in comparison.trained_lengths
        for arch in archs
        for point in _learning(comparison, arch, seq_len)
    ]
    lengths = sorted({point["seq_len"] for point in points})
    refs = comparison.references if len(lengths) == 1 else {}  # in low panels they would leave no room for the curves
    # The first evaluations are of models that know nothing yet, and would flatten what matters.
    last = {(point["arch"], point["seq_len"]): point[x] for point in points}
    later = [point[score.key] for point in points if point[x] >= 0.2 * last[point["arch"], point["seq_len"]]]
    low, high = min([*later, *refs.values()]), max(later)

    def panel(seq_len: int) -> Paint:
        def paint(axes: "Axes", theme: Theme) -> None:
            for arch, pen in pens(comparison, theme).items():
                mine = [point for point in points if (point["arch"], point["seq_len"]) == (arch, seq_len)]
                means, spreads = ([point[key] for point in mine] for key in (score.key, f"{score.key}_std"))
                places = [point[x] for point in mine]
                line(axes, pen, places, means, around(means, spreads), markevery=(0.0, 0.13), markersize=4.5)
            if low < high:
                axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
            reference_lines(axes, theme, refs)
            axes.set_xlim(0, 1.03 * max(last.values()))
            if x == "tokens":
                axes.xaxis.set_major_formatter(count_tick)
            if len(lengths) > 1:
                axes.set_title(f"trained at {seq_len:,} tokens")

        return paint

    if x == "tokens":
        caption = "The same data for everyone: what each token teaches."
    else:
        caption = "The same runs against the time they took on this machine."
    if any(point["n_seeds"] > 1 for point in points):
        caption += " Lines: means over seeds; bands: one standard deviation."
    trains = [run.info["config"]["train"] for run in comparison.runs]
    if any(train["final_eval_tokens"] > train["eval_tokens"] for train in trains):
        caption += f" The last point of a run reads more of the {comparison.held_out} than those before it."
    return draw(
        f"learning-{x}",
        caption,
        f"Validation {score.unit} against training {x} for {labels(comparison, archs)}"
        + (f", trained at {', '.join(f'{length:,}' for length in lengths)} tokens" if len(lengths) > 1 else ""),
        [panel(seq_len) for seq_len in lengths],
        axis_labels=("training tokens" if x == "tokens" else "seconds of training", textwrap.fill(score.words, 36)),
        height=3.5 if len(lengths) == 1 else 0.8 + 1.7 * len(lengths),
        data=points,
    )


def _learning(comparison: Comparison, arch: str, seq_len: int) -> list[dict[str, Any]]:
    """Means over seeds at the steps that every run evaluated: of finished runs, or where none is, of what there is."""
    runs = comparison.runs_of(arch, seq_len)
    runs = [run for run in runs if run.status == "done"] or runs
    curves = [{line["step"]: line for line in curve} for run in runs if (curve := run.curve())]
    points = []
    for step in sorted(set.intersection(*map(set, curves))) if curves else ():
        records, score = [curve[step] for curve in curves], comparison.score
        mean, spread = mean_and_spread([record[score.tag] for record in records])
        spent = {key: statistics.fmean(record[key] for record in records) for key in ("tokens", "seconds")}
        points.append({"step": step, **spent, "n_seeds": len(curves), score.key: mean, f"{score.key}_std": spread})
    return points


def context_figure(comparison: Comparison, metric: Metric) -> Figure | None:
    """Draws a metric against the context length, with crosses at lengths that could not run; None without cells."""
    archs = [arch for arch in comparison.archs if comparison.ranked_cells(arch, metric)]
    cells = {arch: comparison.ranked_cells(arch, metric) for arch in archs}
    lengths = sorted({cell.context_len for several in cells.values() for cell in several})
    done = {arch: [cell for cell in several if cell.done] for arch, several in cells.items()}
    if not any(done.values()):
        return None
    is_bytes = metric.key.endswith("bytes")
    is_speed = metric.key == "tokens_per_second"
    less_is_better = metric.direction == "lower"

    def paint(axes: "Axes", theme: Theme) -> None:
        drawn = pens(comparison, theme)
        for arch in archs:
            x = [cell.context_len for cell in done[arch]]
            y = [getattr(cell, metric.key) for cell in done[arch]]
            line(axes, drawn[arch], x, y, [cell.spread for cell in done[arch]] if is_speed else ())
        log2_axis(axes, lengths)
        if failed:
            _make_room(axes, at_top=less_is_better)
        if is_bytes:
            log_bytes(axes)
        else:
            log_speed(axes)
        _mark_failures(axes, theme, drawn, cells, at_top=less_is_better)

    failed = [
        f"{comparison.label(arch)} {status_words(cell.status)} at {cell.context_len:,}"
        for arch in archs
        for cell in cells[arch]
        if not cell.done
    ]
    return draw(
        f"context-{metric.phase}-{'memory' if metric.key == 'peak_bytes' else 'state' if is_bytes else 'speed'}",
        _caption(comparison, metric) + (f" Crosses: {'; '.join(failed)}." if failed else ""),
        f"{metric.name} against context length for {labels(comparison, archs)}"
        + (f"; {'; '.join(failed)}" if failed else ""),
        paint,
        axis_labels=("context length (tokens)", _LABELS[metric.name]),
        data=[{"label": comparison.label(cell.arch), **_row(cell, metric)} for arch in archs for cell in cells[arch]],
    )


def _row(cell: Cell, metric: Metric) -> dict[str, Any]:
    """What a figure shows of a cell."""
    low, high = cell.spread or (None, None)
    spread = {"spread_low": low, "spread_high": high} if metric.key == "tokens_per_second" else {}
    value = getattr(cell, metric.key)
    return {"arch": cell.arch, "context_len": cell.context_len, metric.key: value, **spread, "status": cell.status}


_LABELS = {
    "training tokens/s": "tokens trained per second",
    "prefill tokens/s": "prompt tokens per second",
    "decode tokens/s": "tokens generated per second",
    "decode tokens/s of many": "tokens generated per second",
    "seconds to the first token": "seconds to the first token",
    "tokens/s of a long prompt": "tokens of a request per second",
    "tokens/s of a long answer": "tokens of a request per second",
    "peak training memory": "peak memory in training",
    "decoding state": "state of one sequence",
}

_CAPTIONS = {
    "training tokens/s": "Training: forward, backward and optimizer step.",
    "prefill tokens/s": "Prefill: reading a prompt of this length into the state.",
    "decode tokens/s": "Decode: one token at a time after a prompt of this length.",
    "decode tokens/s of many": "Decode: as many sequences at once as fit, after prompts of this length.",
    "seconds to the first token": "From a prompt of this length to the first token of the answer.",
    "tokens/s of a long prompt": "A whole request: a long prompt and a short answer.",
    "tokens/s of a long answer": "A whole request: a short prompt and a long answer.",
    "peak training memory": "Most memory held during a training step, without the program itself.",
    "decoding state": "State carried for one sequence after this many tokens.",
}


def _caption(comparison: Comparison, metric: Metric) -> str:
    tokens = tokens_per_step(comparison) if metric.phase == "train" else ""
    return _CAPTIONS[metric.name].removesuffix(".") + (f"; {tokens}." if tokens else ".")


def _make_room(axes: "Axes", *, at_top: bool) -> None:
    """Leaves a band free at the edge where failures are marked."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    band = (high / low) ** 0.25
    axes.set_ylim((low, high * band) if at_top else (low / band, high))


def _mark_failures(
    axes: "Axes", theme: Theme, pens: Mapping[str, Pen], cells: Mapping[str, Sequence[Cell]], *, at_top: bool
) -> None:
    """Draws every cell that could not run as a cross at the bad edge, stacked where several share a length."""
    failed: dict[int, list[tuple[Pen, str]]] = {}
    for arch, several in cells.items():
        for cell in several:
            if not cell.done:
                failed.setdefault(cell.context_len, []).append((pens[arch], status_words(cell.status)))
    step = 0.065
    for context_len, marks in failed.items():
        for i, (pen, _) in enumerate(marks):
            y = 0.97 - i * step if at_top else 0.03 + i * step
            axes.plot(
                context_len,
                y,
                transform=axes.get_xaxis_transform(),
                marker="x",
                markersize=8,
                markeredgewidth=2.2,
                color=pen.color,
                linestyle="none",
                clip_on=False,
            )
        words = " / ".join(dict.fromkeys(word for _, word in marks))
        y = 0.97 - len(marks) * step if at_top else 0.03 + len(marks) * step
        axes.annotate(
            words,
            (context_len, y),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, 0),
            textcoords="offset points",
            ha="right",
            va="center",
            fontsize=8.5,
            color=theme.ink,
        )
