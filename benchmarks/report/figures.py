"""The figures of a report, drawn by matplotlib as SVG with the same bytes for the same data."""

import io
import math
import textwrap
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..context.cell import Cell
from ..harness.format import count, format_bytes, printable
from .document import PALETTE, Figure
from .results import Comparison, Metric, tokens_per_step
from .words import capital, status_words

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["context_figure", "draw", "learning_figure", "position_figure", "quality_figure"]

_LIGHT, _DARK = zip(*PALETTE, strict=True)
# Every line also has its own marker and dashes, for print and for lines that lie on one another.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (3, 1.2)), "-", (0, (5, 1.6)), (0, (1, 1)))
_SIZE = (5.0, 3.5)  # inches; shown at 360 to 540 pixels, where 10 points stay readable


@dataclass(frozen=True)
class _Theme:
    ink: str
    soft: str
    line: str
    colors: tuple[str, ...]


_THEMES = {
    "light": _Theme("#1d2125", "#5b636b", "#dfe2e5", _LIGHT),
    "dark": _Theme("#e6e8ea", "#9aa3ab", "#30363c", _DARK),
}


@dataclass(frozen=True)
class _Pen:
    """Label, colour, marker and dashes of an architecture, the same in every figure."""

    label: str
    color: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


def _pens(comparison: Comparison, theme: _Theme) -> dict[str, _Pen]:
    return {
        arch: _Pen(
            _short(" ".join(comparison.label(arch).split())), theme.colors[i % 8], _MARKERS[i % 8], _DASHES[i % 8]
        )
        for i, arch in enumerate(comparison.archs)
    }


def _short(label: str) -> str:
    """A name that leaves room for the curves. One that begins with _ would be left out of a legend."""
    label = " ".join(label.split())
    label = label if len(label) <= 24 else f"{label[:23]}\N{HORIZONTAL ELLIPSIS}"
    return f" {label}" if label.startswith("_") else label


def _labels(comparison: Comparison, archs: Sequence[str]) -> str:
    return ", ".join(map(comparison.label, archs))


def draw(name: str, caption: str, alt: str, paint: Callable[["Axes", _Theme], None]) -> Figure:
    """Draws one figure on light and on dark paper. `paint` puts the data on the axes."""
    return Figure(
        name=name, caption=caption, alt=alt, light=_svg(paint, _THEMES["light"]), dark=_svg(paint, _THEMES["dark"])
    )


def _svg(paint: Callable[["Axes", _Theme], None], theme: _Theme) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    style: dict[Any, Any] = {
        "svg.hashsalt": "crossover",  # ids of clip paths are hashes of this instead of random numbers
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.edgecolor": theme.soft,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "text.color": theme.ink,
        "xtick.color": theme.soft,
        "ytick.color": theme.soft,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "grid.color": theme.line,
        "grid.linewidth": 0.7,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "lines.linewidth": 1.7,
        "lines.markersize": 5,
    }
    with matplotlib.rc_context(style), warnings.catch_warnings():
        # text stays text in the file, so the fonts of the reader count and not those of this machine
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        canvas = Canvas(figsize=_SIZE, layout="constrained")
        FigureCanvasSVG(canvas)
        axes = canvas.add_subplot()
        axes.grid(visible=True, which="major")
        paint(axes, theme)
        handles, labels = axes.get_legend_handles_labels()
        if handles:
            canvas.legend(handles, labels, loc="outside upper left", ncols=3, handlelength=2.6, columnspacing=1.2)
        for text in canvas.findobj(Text):
            assert isinstance(text, Text)
            text.set_text(printable(text.get_text()))
        buffer = io.BytesIO()
        canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _count_tick(value: float, _: object = None) -> str:
    """Tick label of a count: 128, 2k, 3.1M."""
    return count(value, gap="")


def _context_tick(value: float, _: object = None) -> str:
    """Tick label of a context length: 128, 512, 2k, 8k, the k being 1024."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def _log2_axis(axes: "Axes", lengths: Sequence[int]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(_context_tick))


def _log_speed(axes: "Axes") -> None:
    """Logarithmic tokens per second with few, plain labels; the narrower the span the more of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(_count_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _log_bytes(axes: "Axes") -> None:
    """Logarithmic bytes, labelled at powers of two."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_yscale("log", base=2)
    low, high = (math.log2(max(limit, 1)) for limit in axes.get_ylim())
    stride = max(1, math.ceil((high - low) / 6))
    octaves = [2.0**k for k in range(math.floor(low / stride) * stride, math.ceil(high) + stride, stride)]
    between = [1.5 * size for size in octaves] if high - low < 3 else []
    axes.yaxis.set_major_locator(FixedLocator(sorted(octaves + between)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def _references(axes: "Axes", theme: _Theme, references: Mapping[str, float], *, vertical: bool = False) -> None:
    """Lines where general-purpose compressors stand on the held-out text, as far as the axes reach.

    The names of two that are close stand one above the other: above and below the lines, or in two rows.
    """
    low, high = axes.get_xlim() if vertical else axes.get_ylim()
    close = (0.22 if vertical else 0.06) * (high - low)  # a name is about as wide, or high
    before, row = math.inf, 0
    for name, value in sorted(references.items(), key=lambda item: -item[1]):
        if not low <= value <= high:
            continue
        row = (row + 1) % 2 if before - value < close else 0
        before = value
        line = axes.axvline if vertical else axes.axhline
        line(value, color=theme.soft, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        where, transform = (
            ((value, 1.0), axes.get_xaxis_transform()) if vertical else ((1.0, value), axes.get_yaxis_transform())
        )
        axes.annotate(
            f"{name} {value:.2f}",
            where,
            xycoords=transform,
            xytext=(0, 3 + 10 * row if vertical else 3 - 6 * row),
            textcoords="offset points",
            ha="center" if vertical else "right",
            va="bottom" if vertical or not row else "top",
            fontsize=8.5,
            color=theme.soft,
        )


def quality_figure(comparison: Comparison, rows: Sequence[Mapping]) -> Figure:
    """The score of every architecture, the best one on top, beside the compressors where there are any."""
    score, references = comparison.score, comparison.references
    key, spread = score.key, f"{score.key}_std"
    less, smaller = ("less", "smaller") if score.better == "lower" else ("more", "larger")
    scored = sorted(
        (row for row in rows if row[key] is not None), key=lambda row: row[key], reverse=score.better == "lower"
    )

    def paint(axes: "Axes", theme: _Theme) -> None:
        pens = _pens(comparison, theme)
        for y, row in enumerate(scored):
            pen, value = pens[row["arch"]], row[key]
            axes.errorbar(value, y, xerr=row[spread], color=pen.color, marker=pen.marker, markersize=8, capsize=4)
            axes.annotate(
                f"{value:.2f}" if abs(value) < 1e6 else f"{value:.3g}",
                (value, y),
                xytext=(0, 9),
                textcoords="offset points",
                ha="center",
                fontsize=9,
            )
        several = len({row["seq_len"] for row in scored}) > 1
        names = [pens[row["arch"]].label + (f", {row['seq_len']:,}" if several else "") for row in scored]
        axes.set_yticks(range(len(scored)), names)
        axes.set_ylim(-0.6, len(scored) - 0.2)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.update_datalim([(value, 0) for value in references.values()], updatey=False)
        _references(axes, theme, references, vertical=True)
        axes.set_xlabel(f"{score.words} ({less} is better)")

    notes = ["Dashed: general-purpose compressors on the whole of it"] if references else []
    notes += ["bars: one standard deviation over seeds"] if any(row[spread] for row in scored) else []
    return draw(
        "quality",
        f"{capital(comparison.held_out)} after training, {smaller} is better."
        + (f" {capital('; '.join(notes))}." if notes else ""),
        f"{capital(score.unit)}: " + ", ".join(f"{row['label']} {row[key]:.2f}" for row in reversed(scored)),
        paint,
    )


def learning_figure(comparison: Comparison, x: str) -> Figure:
    """The score in validation against what was spent: x is 'tokens' or 'seconds'. Every seed is one line."""
    archs, score, references = comparison.archs, comparison.score, comparison.references
    curves = [(run.arch, run.curve()) for arch in archs for run in comparison.runs_of(arch)]

    def paint(axes: "Axes", theme: _Theme) -> None:
        from matplotlib.ticker import FuncFormatter

        pens, named = _pens(comparison, theme), set()
        for arch, curve in curves:
            pen = pens[arch]
            axes.plot(
                [point[x] for point in curve],
                [point[score.tag] for point in curve],
                color=pen.color,
                linestyle=pen.dashes,
                marker=pen.marker,
                markevery=(0.0, 0.13),
                markersize=4.5,
                label=None if arch in named else pen.label,
            )
            named.add(arch)
        # The first evaluations are of models that know nothing yet, and would flatten what matters.
        later = [point[score.tag] for _, curve in curves for point in curve[len(curve) // 5 :]]
        low, high = min([*later, *references.values()], default=0.0), max(later, default=0.0)
        if low < high:
            axes.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
        _references(axes, theme, references)
        axes.set_xlim(left=0)
        if x == "tokens":
            axes.xaxis.set_major_formatter(FuncFormatter(_count_tick))
        axes.set_xlabel("training tokens" if x == "tokens" else "seconds of training")
        axes.set_ylabel(textwrap.fill(score.words, 36))

    if x == "tokens":
        caption = "The same data for everyone: what each token teaches."
    else:
        caption = "The same runs against the time they took on this machine."
    trains = [run.info["config"]["train"] for run in comparison.runs]
    if any(train["final_eval_tokens"] > train["eval_tokens"] for train in trains):
        caption += f" The last point of a run reads more of the {comparison.held_out} than those before it."
    what = "tokens" if x == "tokens" else "seconds"
    return draw(
        f"learning-{what}",
        caption,
        f"Validation {score.unit} against training {what} for {_labels(comparison, archs)}",
        paint,
    )


def position_figure(comparison: Comparison) -> Figure | None:
    """Bits per byte by position in the sequence, with a line at the trained length; None where no run has it."""
    archs = [
        arch
        for arch in comparison.archs
        if any(run.result.get("position_bits_per_byte") for run in comparison.runs_of(arch))
    ]
    if not archs:
        return None
    seq_len = comparison.runs[0].info["config"]["train"]["seq_len"]
    profiles: dict[str, dict[tuple[int, int], list[float]]] = {arch: {} for arch in archs}
    for arch in archs:
        for run in comparison.runs_of(arch):
            for span in run.result.get("position_bits_per_byte") or ():
                if span.get("bits_per_byte") is not None:
                    profiles[arch].setdefault((span["start"], span["stop"]), []).append(span["bits_per_byte"])
    stops = sorted({stop for profile in profiles.values() for _, stop in profile})
    if not stops:
        return None

    def paint(axes: "Axes", theme: _Theme) -> None:
        for arch, pen in _pens(comparison, theme).items():
            if arch not in profiles:
                continue
            spans = sorted(profiles[arch])
            axes.plot(
                [max(1.0, (start * stop) ** 0.5 if start else stop / 2) for start, stop in spans],
                [sum(values) / len(values) for span in spans for values in [profiles[arch][span]]],
                color=pen.color,
                linestyle=pen.dashes,
                marker=pen.marker,
                label=pen.label,
            )
        _log2_axis(axes, [4**k for k in range(16) if 4**k <= max(stops)])
        axes.axvline(seq_len, color=theme.ink, linewidth=1)
        axes.annotate(
            "trained length",
            (seq_len, 1.0),
            xycoords=axes.get_xaxis_transform(),
            xytext=(4, -2),
            textcoords="offset points",
            va="top",
            fontsize=8.5,
            color=theme.soft,
        )
        values = [value for profile in profiles.values() for many in profile.values() for value in many]
        if max(values) > 8.5:  # a model that collapses beyond its training must not hide the others
            axes.set_ylim(min(values) - 0.2, 8.5)
        axes.set_xlabel("position in the sequence")
        axes.set_ylabel("bits per byte")

    return draw(
        "position",
        f"How well each position is predicted. Right of the line lies beyond the {seq_len:,} tokens seen in training.",
        f"Bits per byte by position for {_labels(comparison, archs)}, to {max(stops):,} tokens",
        paint,
    )


def context_figure(comparison: Comparison, metric: Metric) -> Figure | None:
    """Draws a metric against the context length, with crosses at lengths that could not run; None without cells."""
    archs = [arch for arch in comparison.archs if comparison.ranked_cells(arch, metric)]
    cells = {arch: comparison.ranked_cells(arch, metric) for arch in archs}
    lengths = sorted({cell.context_len for several in cells.values() for cell in several})
    done = {arch: [cell for cell in several if cell.done] for arch, several in cells.items()}
    if not any(done.values()):
        return None
    is_bytes = metric.key.endswith("bytes")
    less_is_better = metric.direction == "lower"

    def paint(axes: "Axes", theme: _Theme) -> None:
        pens = _pens(comparison, theme)
        for arch in archs:
            pen = pens[arch]
            x = [cell.context_len for cell in done[arch]]
            y = [getattr(cell, metric.key) for cell in done[arch]]
            axes.plot(x, y, color=pen.color, linestyle=pen.dashes, marker=pen.marker, label=pen.label)
            if metric.key == "tokens_per_second":
                spread = [cell.spread for cell in done[arch] if cell.spread]
                axes.fill_between(
                    x, [s[0] for s in spread], [s[1] for s in spread], color=pen.color, alpha=0.16, linewidth=0
                )
        _log2_axis(axes, lengths)
        if failed:
            _make_room(axes, at_top=less_is_better)
        if is_bytes:
            _log_bytes(axes)
        else:
            _log_speed(axes)
        _mark_failures(axes, theme, pens, cells, at_top=less_is_better)
        axes.set_xlabel("context length (tokens)")
        axes.set_ylabel(_LABELS[metric.name])

    failed = [
        f"{comparison.label(arch)} {status_words(cell.status)} at {cell.context_len:,}"
        for arch in archs
        for cell in cells[arch]
        if not cell.done
    ]
    return draw(
        f"context-{metric.phase}-{'memory' if metric.key == 'peak_bytes' else 'state' if is_bytes else 'speed'}",
        _caption(comparison, metric) + (f" Crosses: {'; '.join(failed)}." if failed else ""),
        f"{metric.name} against context length for {_labels(comparison, archs)}"
        + (f"; {'; '.join(failed)}" if failed else ""),
        paint,
    )


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
    axes: "Axes", theme: _Theme, pens: Mapping[str, _Pen], cells: Mapping[str, Sequence[Cell]], *, at_top: bool
) -> None:
    """Draws every cell that could not run as a cross at the bad edge, stacked where several share a length."""
    failed: dict[int, list[tuple[_Pen, str]]] = {}
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
