"""A document as a list of blocks, written by templates as one self-contained HTML page or as Markdown."""

import base64
import csv
import functools
import io
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from ..harness.format import printable

__all__ = [
    "Block",
    "Details",
    "Figure",
    "Figures",
    "Heading",
    "Items",
    "Lead",
    "Links",
    "Map",
    "MapCell",
    "MapRow",
    "PALETTE",
    "Paragraph",
    "Preformatted",
    "Table",
    "plain",
    "to_csv",
    "to_html",
    "to_markdown",
]


# Okabe and Ito's palette, which colour-blind readers can tell apart, lightened for dark paper.
PALETTE = (
    ("#0072b2", "#56b4e9"),
    ("#d55e00", "#ff9a4d"),
    ("#009e73", "#2fd6a3"),
    ("#a8428c", "#e39bcb"),
    ("#8a6d00", "#e6c229"),
    ("#3f4a54", "#c4ccd4"),
    ("#b00040", "#ff6b8f"),
    ("#2a9fd6", "#9fdcff"),
)
"""Colours of the models in their order, on light and on dark paper: figures and tables have the same."""


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Title of a section."""

    kind: ClassVar[str] = "heading"
    text: str


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The paragraphs that say what was found, set larger than the rest."""

    kind: ClassVar[str] = "lead"
    paragraphs: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text."""

    kind: ClassVar[str] = "paragraph"
    text: str


@dataclass(frozen=True, kw_only=True)
class Items:
    """A bulleted list; `warnings` are indices of items that must be seen."""

    kind: ClassVar[str] = "items"
    items: Sequence[str]
    warnings: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Links:
    """A list of links to other files, each a text and a path relative to the page."""

    kind: ClassVar[str] = "links"
    links: Sequence[tuple[str, str]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text."""

    kind: ClassVar[str] = "table"
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells in bold."""

    @functools.cached_property
    def numeric(self) -> frozenset[int]:
        """Columns in which every cell is a number, a dash or empty; they are set right-aligned."""

        def is_number(cell: str) -> bool:
            return not cell or cell == "-" or cell[0].isdigit() or (cell[0] in "+-.<>" and cell[1:2].strip().isdigit())

        return frozenset(i for i in range(1, len(self.columns)) if all(is_number(row[i]) for row in self.rows))

    def strong_in(self, row: int) -> frozenset[int]:
        """Columns of the cells of a row that are in bold."""
        return frozenset(column for r, column in self.strong if r == row)


@dataclass(frozen=True, kw_only=True)
class MapCell:
    """Who wins by one criterion at one length."""

    text: str = ""
    """The names; empty where there is nothing to name."""
    note: str = ""
    """What stands below them."""
    state: Literal["won", "level", "open", "changed"]
    """One is best, several are level, or nothing is decided, which alone is not bold; changed, of several comparisons:
    they name others."""
    models: Sequence[str] = ()
    """The names one by one."""
    pen: int = 0
    """Number of the first model, which gives the cell its colour."""


@dataclass(frozen=True, kw_only=True)
class MapRow:
    """A criterion."""

    key: str
    """What the row is called in code: that of another comparison is the same."""
    title: str
    note: str
    cells: Sequence[MapCell]


@dataclass(frozen=True, kw_only=True)
class Map:
    """Criteria by column, each cell in words. On a narrow page the cells of a row stand below one another."""

    kind: ClassVar[str] = "map"
    name: ClassVar[str] = "winner-map"
    """File name of its data without the ending."""
    columns: Sequence[str]
    rows: Sequence[MapRow]
    caption: str

    @property
    def data(self) -> list[dict[str, str]]:
        """What it shows, as rows with the same keys; a page links it as CSV."""
        return [
            {"criterion": row.title, "note": row.note, "column": column, "models": cell.text, "says": cell.note}
            for row in self.rows
            for column, cell in zip(self.columns, row.cells, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An SVG picture, once for light and once for dark paper, and as pixels where somebody wants them."""

    name: str
    """File name of the picture and of its data without the ending."""
    caption: str
    alt: str
    """Description of the picture for those who do not see it."""
    light: bytes
    dark: bytes
    data: Sequence[Mapping[str, Any]]
    """What is drawn, as rows with the same keys; a page links it as CSV."""
    png: Callable[[], bytes] | None = None
    """Draws it on light paper once more."""


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Pictures side by side where the page is wide enough."""

    kind: ClassVar[str] = "figures"
    figures: Sequence[Figure]


@dataclass(frozen=True, kw_only=True)
class Preformatted:
    """Text whose spaces and line ends matter."""

    kind: ClassVar[str] = "preformatted"
    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that are folded away until asked for."""

    kind: ClassVar[str] = "details"
    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Lead | Map | Paragraph | Items | Links | Table | Figures | Preformatted | Details


def to_csv(rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> str:
    """Writes rows as CSV with a header: these columns of them, or all that the first has."""
    rows = list(rows)
    table = io.StringIO()
    writer = csv.DictWriter(
        table, list(rows[0]) if columns is None else columns, extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows)
    return table.getvalue()


def to_html(title: str, subtitle: str, blocks: Iterable[Block]) -> str:
    """Writes one HTML file without scripts; its content-security policy forbids every outside request.

    The data of its figures are in the file too, as CSV to download.
    """
    return _templates().get_template("page.html.j2").render(title=title, subtitle=subtitle, blocks=blocks)


def to_markdown(title: str, subtitle: str, blocks: Iterable[Block], figure_folder: str) -> str:
    """Writes the same content as Markdown; pictures and their data are links into `figure_folder`."""
    template = _templates().get_template("page.md.j2")
    return template.render(title=title, subtitle=subtitle, blocks=blocks, figure_folder=figure_folder)


@functools.cache
def _templates() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=select_autoescape(enabled_extensions=("html.j2",)),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=lambda value: printable(value) if type(value) is str else value,  # and not what templates have made
    )
    environment.filters |= {"data_uri": _data_uri, "csv": to_csv, "plain": plain}
    environment.globals["palette"] = PALETTE
    return environment


def _data_uri(content: bytes | str, media: str) -> str:
    content = content.encode() if isinstance(content, str) else content
    return f"data:{media};base64,{base64.b64encode(content).decode()}"


def plain(text: str) -> str:
    """Keeps Markdown from reading text as markup, or its line ends as those of a paragraph or a table."""
    return re.sub(r"[\\`*_\[\]<>#|~$]|&(?=#?\w+;)", r"\\\g<0>", " ".join(text.split()))
