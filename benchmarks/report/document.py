"""A document as a list of blocks, written as one self-contained HTML page or as Markdown, with the same content."""

import base64
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

__all__ = [
    "Block",
    "Details",
    "Figure",
    "Figures",
    "Heading",
    "Items",
    "Lead",
    "Paragraph",
    "Preformatted",
    "Table",
    "to_html",
    "to_markdown",
]


@dataclass(frozen=True, kw_only=True)
class Heading:
    """Title of a section."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Lead:
    """The paragraphs that say what was found, set larger than the rest."""

    paragraphs: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Paragraph:
    """Running text."""

    text: str


@dataclass(frozen=True, kw_only=True)
class Items:
    """A bulleted list; `warnings` are indices of items that must be seen."""

    items: Sequence[str]
    warnings: frozenset[int] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Table:
    """Cells as text. Columns in which every cell is a number, a dash or empty are set right-aligned."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    caption: str = ""
    strong: frozenset[tuple[int, int]] = frozenset()
    """(row, column) of the cells in bold."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """An SVG picture, once for light and once for dark paper."""

    name: str
    """File name without its ending, for the Markdown version."""
    caption: str
    alt: str
    """What the picture shows, for those who do not see it."""
    light: bytes
    dark: bytes


@dataclass(frozen=True, kw_only=True)
class Figures:
    """Pictures side by side where the page is wide enough."""

    figures: Sequence[Figure]


@dataclass(frozen=True, kw_only=True)
class Preformatted:
    """Text whose spaces and line ends matter."""

    text: str
    title: str = ""


@dataclass(frozen=True, kw_only=True)
class Details:
    """Blocks that are folded away until asked for."""

    summary: str
    blocks: "Sequence[Block]"


Block = Heading | Lead | Paragraph | Items | Table | Figures | Preformatted | Details

_STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fdfdfc; --ink: #1d2125; --soft: #5b636b; --line: #dfe2e5; --tint: #f3f4f2;
  --accent: #0b6e99; --warn: #a33b00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15181b; --ink: #e6e8ea; --soft: #9aa3ab; --line: #30363c; --tint: #1d2226;
    --accent: #6cc4ec; --warn: #ff9d66;
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 5rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
}
h1 {
  font-size: clamp(1.7rem, 4.5vw, 2.5rem); line-height: 1.15; letter-spacing: -.02em; margin: 0 0 .4rem;
  text-wrap: balance;
}
h2 { font-size: 1.35rem; line-height: 1.25; letter-spacing: -.01em; margin: 3.2rem 0 .6rem; }
p, ul { max-width: 44rem; margin: .6rem 0; }
ul { padding-left: 1.2rem; } li { margin: .3rem 0; }
.subtitle { color: var(--soft); margin: 0 0 2rem; }
.lead { border-left: 3px solid var(--accent); padding-left: 1.25rem; margin: 0 0 2rem; }
.lead p { font-size: 1.15rem; line-height: 1.55; max-width: 48rem; margin: .5rem 0; }
.lead p + p { font-size: 1rem; color: var(--soft); }
.scroll { overflow-x: auto; margin: 1rem 0 1.4rem; }
table { border-collapse: collapse; font-size: .86rem; line-height: 1.4; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; max-width: 44rem; }
th, td { padding: .4rem .45rem; text-align: left; vertical-align: baseline; white-space: nowrap; }
th {
  white-space: normal; font-weight: 600; color: var(--soft); border-bottom: 1px solid var(--ink);
  vertical-align: bottom;
}
td { border-bottom: 1px solid var(--line); }
td:first-child, th:first-child { position: sticky; left: 0; background: var(--paper); padding-left: 0; }
th.n, td.n { text-align: right; }
.figures {
  display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)); gap: 1.6rem 2rem;
  margin: 1.2rem 0;
}
figure { margin: 0; break-inside: avoid; }
figure img { display: block; width: 100%; max-width: 34rem; height: auto; }
figcaption { font-size: .88rem; line-height: 1.45; color: var(--soft); margin-top: .3rem; max-width: 34rem; }
pre {
  background: var(--tint); border-radius: 6px; padding: .9rem 1.1rem; margin: .4rem 0 1.4rem; overflow-x: auto;
  font: .8rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
}
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
details { border-top: 1px solid var(--line); padding: .7rem 0; } details + details { margin-top: 0; }
summary { cursor: pointer; font-weight: 600; }
.warn { color: var(--warn); font-weight: 600; }
@media (max-width: 40rem) {
  body { padding: 1.6rem 1rem 3rem; } .lead p { font-size: 1.06rem; } h2 { margin-top: 2.4rem; }
}
@media print {
  :root { --paper: #fff; --ink: #000; --soft: #444; --line: #bbb; --tint: #f4f4f4; --accent: #000; }
  body { max-width: none; padding: 0; font-size: 9.5pt; } .scroll { overflow: visible; } table { font-size: 7.5pt; }
  .figures { grid-template-columns: 1fr 1fr; gap: 1rem; } h2 { break-after: avoid; } tr { break-inside: avoid; }
}
"""


def to_html(title: str, subtitle: str, blocks: Iterable[Block]) -> str:
    """Writes one HTML file without scripts; its content-security policy forbids every outside request."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{escape(title)}</h1>\n<p class="subtitle">{escape(subtitle)}</p>\n'
        + "\n".join(_html(block) for block in blocks)
        + "\n</body>\n</html>\n"
    )


def _html(block: Block) -> str:
    match block:
        case Heading(text=text):
            return f"<h2>{escape(text)}</h2>"
        case Lead(paragraphs=paragraphs):
            return '<div class="lead">' + "".join(f"<p>{escape(text)}</p>" for text in paragraphs) + "</div>"
        case Paragraph(text=text):
            return f"<p>{escape(text)}</p>"
        case Items(items=items, warnings=warnings):
            marked = (' class="warn"' if i in warnings else "" for i in range(len(items)))
            return (
                "<ul>"
                + "".join(f"<li{mark}>{escape(item)}</li>" for mark, item in zip(marked, items, strict=True))
                + "</ul>"
            )
        case Table():
            return _html_table(block)
        case Figures(figures=figures):
            return '<div class="figures">\n' + "\n".join(map(_html_figure, figures)) + "\n</div>"
        case Preformatted(text=text, title=title):
            return (f"<h3>{escape(title)}</h3>\n" if title else "") + f"<pre>{escape(text)}</pre>"
        case Details(summary=summary, blocks=blocks):
            inside = "\n".join(map(_html, blocks))
            return f"<details>\n<summary>{escape(summary)}</summary>\n{inside}\n</details>"


def _html_table(table: Table) -> str:
    numeric = _numeric_columns(table)
    kind = [' class="n"' if i in numeric else "" for i in range(len(table.columns))]
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    head = "".join(f"<th{kind[i]}>{escape(column)}</th>" for i, column in enumerate(table.columns))
    body = "\n".join(
        "<tr>"
        + "".join(
            f"<td{kind[i]}>{f'<strong>{escape(cell)}</strong>' if (r, i) in table.strong else escape(cell)}</td>"
            for i, cell in enumerate(row)
        )
        + "</tr>"
        for r, row in enumerate(table.rows)
    )
    return (
        f'<div class="scroll"><table>{caption}\n<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table></div>'
    )


def _numeric_columns(table: Table) -> set[int]:
    def is_number(cell: str) -> bool:
        return not cell or cell == "-" or cell[0].isdigit() or (cell[0] in "+-.<>" and cell[1:2].strip().isdigit())

    return {i for i in range(1, len(table.columns)) if all(is_number(row[i]) for row in table.rows)}


def _html_figure(figure: Figure) -> str:
    light, dark = (f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}" for svg in (figure.light, figure.dark))
    return (
        f'<figure>\n<picture><source media="(prefers-color-scheme: dark) and (not print)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(figure.alt)}"></picture>\n'
        f"<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"
    )


def to_markdown(title: str, subtitle: str, blocks: Iterable[Block], figure_folder: str) -> str:
    """Writes the same content as Markdown; pictures are links into `figure_folder`."""
    return (
        f"# {title}\n\n{_plain(subtitle)}\n\n" + "\n\n".join(_markdown(block, figure_folder) for block in blocks) + "\n"
    )


def _plain(text: str) -> str:
    """Keeps Markdown from reading our text as markup."""
    for character in "\\`*_[]<>#|":
        text = text.replace(character, "\\" + character)
    return text


def _markdown(block: Block, figure_folder: str) -> str:
    match block:
        case Heading(text=text):
            return f"## {_plain(text)}"
        case Lead(paragraphs=paragraphs):
            return "\n\n".join(map(_plain, paragraphs))
        case Paragraph(text=text):
            return _plain(text)
        case Items(items=items, warnings=warnings):
            return "\n".join(
                f"- **{_plain(item)}**" if i in warnings else f"- {_plain(item)}" for i, item in enumerate(items)
            )
        case Table():
            return _markdown_table(block)
        case Figures(figures=figures):
            return "\n\n".join(
                f"![{_plain(figure.alt)}]({figure_folder}/{figure.name}.svg)\n\n*{_plain(figure.caption)}*"
                for figure in figures
            )
        case Preformatted(text=text, title=title):
            indented = "\n".join(f"    {line}" for line in text.splitlines())
            return (f"### {_plain(title)}\n\n" if title else "") + indented
        case Details(summary=summary, blocks=blocks):
            return f"## {_plain(summary)}\n\n" + "\n\n".join(_markdown(inner, figure_folder) for inner in blocks)


def _markdown_table(table: Table) -> str:
    numeric = _numeric_columns(table)
    lines = [
        "| " + " | ".join(map(_plain, table.columns)) + " |",
        "|" + "|".join("---:" if i in numeric else "---" for i in range(len(table.columns))) + "|",
    ]
    for r, row in enumerate(table.rows):
        cells = [f"**{_plain(cell)}**" if (r, i) in table.strong else _plain(cell) for i, cell in enumerate(row)]
        lines.append("| " + " | ".join(cells) + " |")
    caption = f"{_plain(table.caption)}\n\n" if table.caption else ""
    return caption + "\n".join(lines)
