"""How the figures of a report are drawn: by matplotlib, as SVG with the same bytes for the same data."""

import io
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..harness.format import count, format_bytes, printable
from .document import PALETTE, Figure
from .results import Comparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "Paint",
    "Pen",
    "Theme",
    "context_tick",
    "count_tick",
    "bytes_axis",
    "draw",
    "line",
    "log2_axis",
    "log_bytes",
    "log_speed",
    "pens",
    "pens_of",
    "reference_lines",
]

_LIGHT, _DARK = zip(*PALETTE, strict=True)
# Every line also has its own marker and dashes, for print and for lines that lie on one another.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
_DASHES = ("-", (0, (5, 1.6)), (0, (1.2, 1.2)), (0, (6, 1.6, 1.2, 1.6)), (0, (3, 1.2)), "-", (0, (5, 1.6)), (0, (1, 1)))
_WIDTH, _HEIGHT = 5.0, 3.5  # inches; shown at 360 to 540 pixels, where 10 points stay readable
_LONG_LABEL = 13  # letters of a label, of which three fit side by side in the width


@dataclass(frozen=True)
class Theme:
    """Colours of a picture but those of the models."""

    ink: str
    soft: str
    line: str
    shade: str
    """Of cells, the stronger the larger their number."""
    colors: tuple[str, ...]


_THEMES = {
    "light": Theme("#1d2125", "#5b636b", "#dfe2e5", "#0b6e99", _LIGHT),
    "dark": Theme("#e6e8ea", "#9aa3ab", "#30363c", "#6cc4ec", _DARK),
}


@dataclass(frozen=True)
class Pen:
    """Label, colour, marker and dashes of an architecture, the same in every figure."""

    label: str
    color: str
    marker: str
    dashes: str | tuple[float, tuple[float, ...]]


def pens(comparison: Comparison, theme: Theme) -> dict[str, Pen]:
    """The pen of every architecture."""
    return pens_of({arch: comparison.label(arch) for arch in comparison.archs}, theme)


def pens_of(labels: Mapping[str, str], theme: Theme) -> dict[str, Pen]:
    """A pen for each of these labels, under its key."""
    return {
        key: Pen(_short(label), theme.colors[i % 8], _MARKERS[i % 9], _DASHES[i % 8])
        for i, (key, label) in enumerate(labels.items())
    }


def _short(label: str) -> str:
    """A name that leaves room for the curves. One that begins with _ would be left out of a legend."""
    label = " ".join(label.split())
    label = label if len(label) <= 24 else f"{label[:23]}\N{HORIZONTAL ELLIPSIS}"
    return f" {label}" if label.startswith("_") else label


Paint = Callable[["Axes", Theme], None]
"""Puts the data of a panel on its axes."""


def draw(
    name: str,
    caption: str,
    alt: str,
    paint: Paint | Sequence[Paint],
    *,
    data: Sequence[Mapping[str, Any]],
    axis_labels: tuple[str, str] = ("", ""),
    height: float = _HEIGHT,
) -> Figure:
    """Draws one figure on light and on dark paper.

    Args:
        name: of its files, without their endings.
        caption: what stands below it.
        alt: describes it to those who do not see it.
        paint: draws it; or what draws each panel, one below another with the same axes.
        data: what is drawn, for the CSV file.
        axis_labels: of x and y.
        height: of the axes of all panels in inches.
    """
    paints = [paint] if callable(paint) else paint
    light, dark = (_drawn(paints, _THEMES[theme], axis_labels, height) for theme in ("light", "dark"))

    def png() -> bytes:
        return _drawn(paints, _THEMES["light"], axis_labels, height, pixels=True)

    return Figure(name=name, caption=caption, alt=alt, light=light, dark=dark, data=data, png=png)


def _drawn(
    paints: Sequence[Paint], theme: Theme, axis_labels: tuple[str, str], height: float, *, pixels: bool = False
) -> bytes:
    """A figure as SVG without paper, or as PNG on white."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure as Canvas
    from matplotlib.text import Text

    with matplotlib.rc_context(_style(theme)), warnings.catch_warnings():
        # text stays text in the file, so the fonts of the reader count and not those of this machine
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from font")
        canvas = Canvas(figsize=(_WIDTH, height), layout="constrained")
        (FigureCanvasAgg if pixels else FigureCanvasSVG)(canvas)
        panels = canvas.subplots(len(paints), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for axes, paint in zip(panels, paints, strict=True):
            axes.grid(visible=True, which="major")
            paint(axes, theme)
        panels[-1].set_xlabel(axis_labels[0])
        if len(paints) > 1:
            canvas.supylabel(axis_labels[1], fontsize=10)
        else:
            panels[0].set_ylabel(axis_labels[1])
        named = {}
        for axes in panels:
            handles, labels = axes.get_legend_handles_labels()
            named |= dict(zip(labels, handles, strict=True))
        if named:
            n_columns = 3 if max(map(len, named)) <= _LONG_LABEL else 2
            canvas.legend(
                named.values(), named, loc="outside upper left", ncols=n_columns, handlelength=2.6, columnspacing=1.2
            )
        for text in canvas.findobj(Text):
            assert isinstance(text, Text)
            text.set_text(printable(text.get_text()))
        buffer = io.BytesIO()
        if pixels:
            canvas.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
        else:
            canvas.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return buffer.getvalue()


def _style(theme: Theme) -> dict[Any, Any]:
    return {
        "svg.hashsalt": "crossover",  # ids of clip paths are hashes of this instead of random numbers
        "svg.fonttype": "none",
        "text.parse_math": False,
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],
        "font.size": 10,
        "axes.edgecolor": theme.soft,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 10,
        "axes.titlelocation": "left",
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


Band = Sequence[tuple[float, float] | None]
"""Lower and upper ends at each point of a line."""


def line(axes: "Axes", pen: Pen, x: Sequence[float], y: Sequence[float], band: Band = (), **options: Any) -> None:
    """Draws the line of an architecture, with a band around it where every point has one."""
    axes.plot(x, y, color=pen.color, linestyle=pen.dashes, marker=pen.marker, label=pen.label, **options)
    ends = [end for end in band if end is not None]
    if ends and len(ends) == len(x):
        low, high = zip(*ends, strict=True)
        axes.fill_between(x, low, high, color=pen.color, alpha=0.16, linewidth=0)


def count_tick(value: float, _: object = None) -> str:
    """Tick label of a count: 128, 2k, 3.1M."""
    return count(value, gap="")


def context_tick(value: float, _: object = None) -> str:
    """Tick label of a context length: 128, 512, 2k, 8k, the k being 1024."""
    return f"{value / 1024:g}k" if value >= 1024 and value % 1024 == 0 else f"{value:g}"


def log2_axis(axes: "Axes", lengths: Sequence[int]) -> None:
    """Logarithmic lengths in tokens, labelled at these."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(sorted(set(lengths))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(context_tick))


def log_speed(axes: "Axes") -> None:
    """Logarithmic tokens per second with few, plain labels; the narrower the span the more of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    steps = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0) if high / low > 8 else (1.0, 1.5, 2.0, 3.0, 5.0, 7.0)
    axes.yaxis.set_major_locator(LogLocator(subs=steps))
    axes.yaxis.set_major_formatter(FuncFormatter(count_tick))
    axes.yaxis.set_minor_formatter(NullFormatter())


def log_bytes(axes: "Axes") -> None:
    """Logarithmic bytes on the y axis, labelled at powers of two."""
    axes.set_yscale("log", base=2)
    _label_bytes(axes.yaxis, axes.get_ylim())


def bytes_axis(axes: "Axes") -> None:
    """The same on the x axis."""
    axes.set_xscale("log", base=2)
    _label_bytes(axes.xaxis, axes.get_xlim())


def _label_bytes(axis: Any, limits: tuple[float, float]) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    low, high = (math.log2(max(limit, 1)) for limit in limits)
    stride = max(1, math.ceil((high - low) / 6))
    octaves = [2.0**k for k in range(math.floor(low / stride) * stride, math.ceil(high) + stride, stride)]
    between = [1.5 * size for size in octaves] if high - low < 3 else []
    axis.set_major_locator(FixedLocator(sorted(octaves + between)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_bytes(value)))


def reference_lines(axes: "Axes", theme: Theme, references: Mapping[str, float], *, vertical: bool = False) -> None:
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
        draw_line = axes.axvline if vertical else axes.axhline
        draw_line(value, color=theme.soft, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
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
