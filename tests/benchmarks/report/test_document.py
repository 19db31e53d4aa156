import base64
import re
from html.parser import HTMLParser

import pytest
from crossover.benchmarks.report.document import (
    Block,
    Details,
    Figure,
    Figures,
    Heading,
    Items,
    Lead,
    Links,
    Map,
    MapCell,
    MapRow,
    Paragraph,
    Preformatted,
    Table,
    to_csv,
    to_html,
    to_markdown,
)

pytestmark = pytest.mark.quick

MARKUP = "a < b & 'c' *d* _e_ | `f` [g](h) #i \"j\""
DATA = [{"model": "Mamba, 2", "speed": 0.5}, {"model": MARKUP, "speed": None}]
CSV = 'model,speed\n"Mamba, 2",0.5\n"a < b & \'c\' *d* _e_ | `f` [g](h) #i ""j""",\n'
FIGURE = Figure(name="speed", caption="What it *shows*.", alt="Lines", light=b"<svg/>", dark=b"<svg></svg>", data=DATA)
BLOCKS: list[Block] = [
    Lead(paragraphs=["First.", MARKUP]),
    Heading(text="A heading"),
    Paragraph(text=MARKUP),
    Map(
        columns=["128 tokens", MARKUP],
        rows=[
            MapRow(
                key="train",
                title="Trains fastest",
                note="tokens",
                cells=[MapCell(text="Mamba", note="2 x", state="won", pen=9), MapCell(note=MARKUP, state="open")],
            )
        ],
        caption="How to read it.",
    ),
    Links(links=[(MARKUP, "../a b/re|port.html")]),
    Items(items=["plain", "loud"], warnings=frozenset({1})),
    Table(
        columns=["Model", "Speed", "Where"],
        rows=[["Mamba", "1,234", "> 5"], [MARKUP, "-", "never"]],
        caption="In bytes.",
        strong=frozenset({(0, 1)}),
    ),
    Figures(figures=[FIGURE, FIGURE]),
    Preformatted(title="A sample", text="def f():\n\n    return '<b>'\n"),
    Details(summary="More", blocks=[Paragraph(text="Inside."), Items(items=["deep"])]),
]


class _Text(HTMLParser):
    """Reads a page: its text and the descriptions of its pictures."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.parts += [value or "" for name, value in attrs if name == "alt"]

    def handle_data(self, data: str) -> None:
        self.parts.append(data)


def words_of_html(page: str) -> list[str]:
    return re.findall(r"\w+", " ".join(_Text(page[page.index("<body>") :]).parts))


def words_of_markdown(text: str) -> list[str]:
    return re.findall(r"\w+", re.sub(r"(?<!\\)\]\([^)]*\)", "]", text).replace("\\_", "_"))


def test_html_and_markdown_say_the_same() -> None:
    page, text = to_html("Title", "and more", BLOCKS), to_markdown("Title", "and more", BLOCKS, "figures")
    assert words_of_html(page) == words_of_markdown(text)
    assert words_of_html(page)[:3] == ["Title", "and", "more"]


def test_our_text_is_read_as_text_in_both() -> None:
    page, text = to_html(MARKUP, MARKUP, BLOCKS), to_markdown(MARKUP, MARKUP, BLOCKS, "figures")
    assert _Text(page[page.index("<body>") :]).parts.count(MARKUP) == 8
    assert "<b>" not in page
    assert text.count(r"a \< b & 'c' \*d\* \_e\_ \| \`f\` \[g\](h) \#i") == 8


def test_markdown_is_laid_out_as_markdown_is_read() -> None:
    text = to_markdown("Title", "more", BLOCKS, "figures")
    assert "- plain\n- **loud**\n\n" in text
    assert "In bytes.\n\n| Model | Speed | Where |\n|---|---:|---|\n| Mamba | **1,234** | \\> 5 |\n| a" in text
    assert (
        "\n\n![Lines](figures/speed.svg)\n\n*What it \\*shows\\*.* Data: [speed.csv](figures/speed.csv)\n\n![Lines]"
        in text
    )
    assert r"\#i \"j\"](../a%20b/re%7Cport.html)".replace('\\"', '"') in text
    assert "### A sample\n\n    def f():\n    \n        return '<b>'\n\n## More\n\nInside.\n\n- deep\n" in text


def test_pictures_and_maps_link_what_they_show_as_csv() -> None:
    assert to_csv(DATA) == CSV
    assert to_csv(DATA, ["speed"]) == 'speed\n0.5\n""\n'
    links = re.findall(r'<a download="(.*?)" href="data:text/csv;charset=utf-8;base64,(.*?)"', to_html("", "", BLOCKS))
    assert [name for name, _ in links] == ["winner-map.csv", "speed.csv", "speed.csv"]
    of_map, *of_figures = (base64.b64decode(content).decode() for _, content in links)
    assert of_map.startswith("criterion,note,column,models,says\nTrains fastest,tokens,128 tokens,Mamba,2 x\n")
    assert of_figures == [CSV, CSV]
    assert "*How to read it.* Data: [winner-map.csv](figures/winner-map.csv)" in to_markdown("", "", BLOCKS, "figures")


def test_columns_of_numbers_are_set_to_the_right() -> None:
    page = to_html("Title", "more", BLOCKS)
    assert '<th>Model</th><th class="n">Speed</th><th>Where</th>' in page
    assert '<td>Mamba</td><td class="n"><strong>1,234</strong></td><td>&gt; 5</td>' in page
