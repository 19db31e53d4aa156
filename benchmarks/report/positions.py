"""Bits per byte by position of the same text: the figures of it, trained length by position in numbers and in words."""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .document import Figure, Table
from .drawing import Paint, Theme, context_tick, draw, line, log2_axis, pens
from .figures import around, labels
from .results import Comparison, mean_and_spread
from .statistics import LEVEL, holm, paired
from .words import and_list

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Profiles", "position_figure", "profiles_of", "square_figure", "square_sentence", "square_table"]

Span = tuple[int, int]
Profiles = Mapping[str, Mapping[int, Mapping[Span, Mapping[int, float]]]]
"""Bits per byte by architecture, trained length, positions [start, stop) and seed."""

_SHORTEST = 64
_MOST = 8.5  # bits per byte that the axis has at most: a model that collapses must not hide the others


def profiles_of(comparison: Comparison) -> Profiles:
    """What the runs recorded; architectures and lengths without any are left out."""
    found: dict[str, dict[int, dict[Span, dict[int, float]]]] = {}
    for arch in comparison.archs:
        for run in comparison.runs_of(arch):
            for span in run.result.get("position_bits_per_byte") or ():
                if span.get("bits_per_byte") is not None:
                    by_span = found.setdefault(arch, {}).setdefault(run.seq_len, {})
                    by_span.setdefault((span["start"], span["stop"]), {})[run.seed] = span["bits_per_byte"]
    return found


def _rows(comparison: Comparison, profiles: Profiles, spans: Iterable[Span]) -> list[dict[str, Any]]:
    """Means over seeds as rows of a CSV file."""
    kept, rows = set(spans), []
    for arch, by_length in profiles.items():
        for seq_len, by_span in by_length.items():
            for span in sorted(by_span.keys() & kept):
                mean, spread = mean_and_spread(list(by_span[span].values()))
                row = {"arch": arch, "label": comparison.label(arch), "seq_len": seq_len}
                row |= {"start": span[0], "stop": span[1], "n_seeds": len(by_span[span])}
                rows.append(row | {"bits_per_byte": mean, "bits_per_byte_std": spread})
    return rows


def position_figure(comparison: Comparison, profiles: Profiles) -> Figure | None:
    """Bits per byte by position, a panel for each trained length with a line at it; None where no run has it."""
    rows = _rows(comparison, profiles, {span for by in profiles.values() for spans in by.values() for span in spans})
    if not rows:
        return None
    lengths, stops = sorted({row["seq_len"] for row in rows}), [row["stop"] for row in rows]
    # The first positions hold little text: their values jump, and would flatten what matters.
    values = [row["bits_per_byte"] for row in rows if row["stop"] > 16] or [row["bits_per_byte"] for row in rows]
    low, high = min(values), max(values)

    def panel(seq_len: int) -> Paint:
        def paint(axes: "Axes", theme: Theme) -> None:
            for arch, pen in pens(comparison, theme).items():
                mine = [row for row in rows if (row["arch"], row["seq_len"]) == (arch, seq_len)]
                means, spreads = ([row[key] for row in mine] for key in ("bits_per_byte", "bits_per_byte_std"))
                line(axes, pen, [_middle(row["start"], row["stop"]) for row in mine], means, around(means, spreads))
            log2_axis(axes, [4**k for k in range(16) if 4**k <= max(stops)])
            axes.axvline(seq_len, color=theme.ink, linewidth=1)
            right = seq_len**2 < max(stops)  # of the middle of the axis, there is more room
            axes.annotate(
                "trained length",
                (seq_len, 1.0),
                xycoords=axes.get_xaxis_transform(),
                xytext=(4 if right else -4, -2),
                textcoords="offset points",
                ha="left" if right else "right",
                va="top",
                fontsize=8.5,
                color=theme.soft,
            )
            axes.set_ylim(low - 0.08 * (high - low) - 0.02, min(high + 0.08 * (high - low) + 0.02, _MOST))
            if len(lengths) > 1:
                axes.set_title(f"trained at {seq_len:,} tokens")

        return paint

    seen = f"the {lengths[0]:,} tokens seen in training" if len(lengths) == 1 else "the trained length"
    caption = f"How well each position is predicted. Right of the line lies beyond {seen}."
    if any(row["n_seeds"] > 1 for row in rows):
        caption += " Lines: means over seeds; bands: one standard deviation."
    return draw(
        "position",
        caption,
        f"Bits per byte by position for {labels(comparison, list(profiles))}, to {max(stops):,} tokens",
        [panel(seq_len) for seq_len in lengths],
        axis_labels=("position in the sequence", "bits per byte"),
        height=3.5 if len(lengths) == 1 else 0.8 + 1.7 * len(lengths),
        data=rows,
    )


def _middle(start: int, stop: int) -> float:
    return max(1.0, (start * stop) ** 0.5 if start else stop / 2)


def _compared(profiles: Profiles) -> list[Span]:
    """The spans of the squares: from 64 tokens on, and no short rest at the end, so that each holds enough text."""
    spans = {span for by_length in profiles.values() for by_span in by_length.values() for span in by_span}
    return sorted((start, stop) for start, stop in spans if stop > _SHORTEST and stop - start >= start / 2)


def _lengths(profiles: Profiles) -> list[int]:
    return sorted({length for by_length in profiles.values() for length in by_length})


def square_figure(comparison: Comparison, profiles: Profiles) -> Figure | None:
    """Trained length by position, a square of numbers for each model; None unless several lengths were trained."""
    lengths, spans = _lengths(profiles), _compared(profiles)
    rows = _rows(comparison, profiles, spans)
    if len(lengths) < 2 or not rows:
        return None
    values = [row["bits_per_byte"] for row in rows]
    low, high = min(values), _end_of_scale(values)
    left, right = math.log2(max(spans[0][0], 1)), math.log2(max(stop for _, stop in spans))

    def panel(arch: str) -> Paint:
        def paint(axes: "Axes", theme: Theme) -> None:
            from matplotlib.patches import Rectangle

            for row in (row for row in rows if row["arch"] == arch):
                y, value = lengths.index(row["seq_len"]), row["bits_per_byte"]
                x, end = math.log2(max(row["start"], 1)), math.log2(row["stop"])
                share = (min(value, high) - low) / (high - low) if high > low else 0.0
                place = (x + 0.02, y + 0.03), end - x - 0.04, 0.94
                axes.add_patch(Rectangle(*place, color=theme.shade, alpha=0.05 + 0.5 * share, linewidth=0))
                if value > high:
                    axes.add_patch(Rectangle(*place, fill=False, edgecolor=theme.ink, linestyle=":", linewidth=1.2))
                best = row["seq_len"] in _level(profiles[arch], (row["start"], row["stop"]))
                axes.text(
                    (x + end) / 2,
                    y + 0.5,
                    f"{value:.2f}",
                    ha="center",
                    va="center_baseline",
                    fontweight="bold" if best else "normal",
                )
            stairs = [(math.log2(length), y + edge) for y, length in enumerate(lengths) for edge in (0, 1)]
            stairs = [(x, y) for x, y in stairs if x < right]
            axes.plot(*zip(*stairs, strict=True), color=theme.ink, linewidth=1.6, solid_capstyle="butt")
            axes.set_title(pens(comparison, theme)[arch].label)
            axes.set_xlim(left, right)
            axes.set_ylim(len(lengths), 0)
            edges = sorted({edge for span in spans for edge in span if math.log2(edge or 1) % 1 == 0})
            axes.set_xticks([math.log2(max(edge, 1)) for edge in edges], [context_tick(edge) for edge in edges])
            axes.set_yticks([y + 0.5 for y in range(len(lengths))], [context_tick(length) for length in lengths])
            axes.tick_params(axis="y", length=0)
            axes.spines[:].set_visible(False)
            axes.grid(visible=False)

        return paint

    drawn = [arch for arch in profiles if any(row["arch"] == arch for row in rows)]
    return draw(
        "square",
        _how_to_read(comparison, profiles, rows, high),
        f"Bits per byte by trained length and position for {labels(comparison, drawn)}; the table has every number",
        [panel(arch) for arch in drawn],
        axis_labels=("position in the text (tokens)", "trained length (tokens)"),
        height=0.5 + len(drawn) * (0.32 + 0.26 * len(lengths)),
        data=rows,
    )


def _end_of_scale(values: Sequence[float]) -> float:
    """The largest value that is no far outlier: above the upper quartile by more than three times their distance."""
    lower, _, upper = statistics.quantiles(values, n=4, method="inclusive")
    return max(value for value in values if value <= upper + 3 * (upper - lower))


def _how_to_read(comparison: Comparison, profiles: Profiles, rows: Sequence[Mapping[str, Any]], high: float) -> str:
    said = (
        "Bits per byte by trained length (rows) and position (columns) of the same text; the stronger the shade, the "
        "worse, on one scale for all models. Right of the line a model reads beyond its trained length. Compare within "
        "a column: positions differ in difficulty."
    )
    if any(row["n_seeds"] > 1 for row in rows):
        said += (
            " Bold: the best trained length of a model and those whose interval of the paired difference to it "
            "includes zero."
        )
    if any(row["bits_per_byte"] > high for row in rows):
        said += f" The shade ends at {high:.2f}; dotted frames are beyond."
    longest = {arch: max(stop for spans in by.values() for _, stop in spans) for arch, by in profiles.items()}
    if other := [arch for arch, stop in longest.items() if stop < max(longest.values())]:
        said += f" Of shorter windows, and so of other text: {labels(comparison, other)}, to compare within one square."
    return said


def _level(by_length: Mapping[int, Mapping[Span, Mapping[int, float]]], span: Span) -> list[int]:
    """The trained length that predicts a span best, and those level with it; none where a seed alone tells."""
    values = {length: by_span[span] for length, by_span in by_length.items() if span in by_span}
    if len(values) < 2 or any(len(of_seeds) < 2 for of_seeds in values.values()):
        return []
    best = min(values, key=lambda length: statistics.fmean(values[length].values()))
    gaps = {length: paired(values[best], of_seeds) for length, of_seeds in values.items()}
    return [length for length, gap in gaps.items() if length == best or gap is None or gap.includes_zero]


def square_table(comparison: Comparison, profiles: Profiles) -> Table | None:
    """The numbers of the squares; None where there is no such figure."""
    spans = _compared(profiles)
    rows = _rows(comparison, profiles, spans)
    if len(_lengths(profiles)) < 2 or not rows:
        return None
    spans = [span for span in spans if any((row["start"], row["stop"]) == span for row in rows)]
    values = {(row["arch"], row["seq_len"], row["start"], row["stop"]): row["bits_per_byte"] for row in rows}
    lines = list(dict.fromkeys((row["arch"], row["seq_len"]) for row in rows))
    return Table(
        columns=["Model", "Trained at", *(f"{start:,} to {stop:,}" for start, stop in spans)],
        rows=[
            [
                comparison.label(arch),
                f"{length:,}",
                *(f"{values[arch, length, *span]:.3f}" if (arch, length, *span) in values else "-" for span in spans),
            ]
            for arch, length in lines
        ],
        caption="Bits per byte by position, the same text for every trained length. Compare within a column: positions "
        "differ in difficulty. Means over the seeds.",
    )


def square_sentence(comparison: Comparison, profiles: Profiles) -> str:
    """Says which models read beyond the longest trained length better, or worse, for being trained at the shortest.

    All positions beyond count as one, and a model is named where its difference is shown.
    """
    lengths = _lengths(profiles)
    if len(lengths) < 2:
        return ""
    short, long = lengths[0], lengths[-1]
    spans = [span for span in _compared(profiles) if span[0] >= long]
    values = {arch: [_over(by.get(length, {}), spans) for length in (short, long)] for arch, by in profiles.items()}
    gaps = {arch: gap for arch, (a, b) in values.items() if (gap := paired(b, a)) is not None}
    p_values = holm([gap.p for gap in gaps.values()])
    shown = {arch: gap.mean for (arch, gap), p in zip(gaps.items(), p_values, strict=True) if p < 1 - LEVEL}
    parts = []
    for word, sign in (("better", -1), ("worse", 1)):
        said = []
        for arch in (arch for arch, gap in shown.items() if gap * sign > 0):
            near, far = (statistics.fmean(of_length.values()) for of_length in values[arch])
            said.append(f"{comparison.label(arch)} ({near:.2f} instead of {far:.2f})")
        parts += [f"{word} by {and_list(said)}"] if said else []
    if not parts:
        return ""
    return (
        f"Positions {spans[0][0]:,} to {spans[-1][1]:,} are predicted {', and '.join(parts)}, "
        f"when trained at {short:,} tokens instead of {long:,}. In brackets bits per byte; these differences are "
        "shown, paired by seed, after Holm's correction over the models."
    )


def _over(by_span: Mapping[Span, Mapping[int, float]], spans: Sequence[Span]) -> dict[int, float]:
    """Bits per byte of each seed over several spans, by their tokens; of the seeds that have them all."""
    seeds = set.intersection(*(set(by_span.get(span, {})) for span in spans)) if spans else set()
    weights = [stop - start for start, stop in spans]
    return {seed: statistics.fmean([by_span[span][seed] for span in spans], weights) for seed in sorted(seeds)}
