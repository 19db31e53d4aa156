"""Two comparisons made by hand, whose winners are known: every cell and sentence of what changed is checked."""

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks import cli
from crossover.benchmarks.report.between import between, load_sides
from crossover.benchmarks.report.document import Block, Items, Map, Paragraph, Table

from ..fake_runs import QUALITY, SPEEDS, cell, write_json, write_run, write_winners

pytestmark = pytest.mark.quick

LATER = QUALITY | {
    "transformer": {100: (2.00, 2.10, 2.05), 300: (1.70, 1.80, 1.75)},
    "mamba": {100: (1.60, 1.71, 1.64), 300: (1.50, 1.61, 1.54)},
}
"""At 100 Mamba is best as before; at 300 it alone, and it and the LSTM differ from the Transformer, on either side."""
FASTER = SPEEDS | {"lstm": (400.0, 920.0)}


def change(folder: Path, *keys: str, **values: Any) -> None:
    """Changes a table of the run.json of every run of a folder."""
    for path in folder.glob("*/run.json"):
        info = json.loads(path.read_text())
        table = info
        for key in keys:
            table = table[key]
        table |= values
        write_json(path, info)


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """A comparison, and one of more steps after which other models are best."""
    small = write_winners(tmp_path / "study" / "small")
    large = write_winners(tmp_path / "study" / "large", quality=LATER, speeds=FASTER)
    info = json.loads((large / "compare.json").read_text())
    for folder, steps in ((small, 600), (large, 2400)):
        write_json(folder / "compare.json", {"config": info["config"] | {"steps": steps, "out": str(folder)}})
    return small, large


def blocks_of(*folders: Path, baseline: str | None = None) -> list[Block]:
    return between(load_sides(folders, baseline=baseline), folders[0].parent / "both")[2]


def test_every_cell_of_the_map_says_who_wins_in_each_and_whether_that_changed(folders: tuple[Path, Path]) -> None:
    (found,) = (block for block in blocks_of(*folders) if isinstance(block, Map))
    assert found.columns == ["100 tokens", "300 tokens"]
    rows = {row.key: [(cell.text, cell.note, cell.state) for cell in row.cells] for row in found.rows}
    level = "0.08 below Transformer, no difference shown"
    assert rows["quality"] == [
        ("Mamba", "small: 0.20 below Transformer; large: 0.40 below Transformer", "won"),
        ("LSTM ≈ Mamba → Mamba", f"small: {level}; large: 0.20 below Transformer", "level"),
    ]
    assert rows["train tokens_per_second"] == [
        ("Transformer ≈ Mamba → LSTM", "small: the baseline; large: 4 x Transformer", "changed"),
        ("LSTM", "small: 1.84 x Transformer; large: 18.4 x Transformer", "won"),
    ]
    assert rows["decode state_bytes"][0] == ("LSTM", "0.25 x Transformer", "won")
    assert rows["choice train tokens_per_second"][1] == (
        "Mamba, LSTM",
        "LSTM is the fastest of them",
        "won",
    )


def test_first_paragraphs_count_what_stayed_and_name_what_changed(folders: tuple[Path, Path]) -> None:
    lead = blocks_of(*folders)[0]
    assert getattr(lead, "paragraphs", []) == [
        "Of 14 cells of the map that are decided in both, 9 name the same models, 3 some of the same and 2 others "
        "(Trains fastest at 100 tokens: Transformer ≈ Mamba → LSTM; Generates fastest at 100 tokens: Transformer ≈ "
        "Mamba → LSTM).",
        "small: Mamba trained at 100 tokens predicts held-out text best, at 1.85 bits per byte (0.20 ± 0.02 below "
        "Transformer); LSTM and Mamba trained at 300 tokens are level (LSTM: 1.97 bits per byte).",
        "large: Mamba trained at 100 and 300 tokens predicts held-out text best, at 1.65 and 1.55 bits per byte "
        "(0.40 ± 0.02 and 0.20 ± 0.02 below Transformer).",
    ]


def test_tables_have_both_side_by_side_and_say_which_differences_are_shown_where(folders: tuple[Path, Path]) -> None:
    blocks = blocks_of(*folders)
    at, table = next((i, b) for i, b in enumerate(blocks) if isinstance(b, Table) and "Bits per byte" in b.caption)
    assert [tuple(row) for row in table.rows] == [
        ("Transformer, small", "2.050", "2.050"),
        ("Transformer, large", "2.050", "1.750"),
        ("Mamba, small", "1.850 (-0.200 ± 0.025, n=3)", "1.990 (-0.060 ± 0.131, n=3)"),
        ("Mamba, large", "1.650 (-0.400 ± 0.025, n=3)", "1.550 (-0.200 ± 0.025, n=3)"),
        ("LSTM, small", "2.350 (+0.300 ± 0.025, n=3)", "1.967 (-0.083 ± 0.063, n=3)"),
        ("LSTM, large", "2.350 (+0.300 ± 0.025, n=3)", "1.967 (+0.217 ± 0.063, n=3)"),
    ]
    assert table.strong == {(2, 1), (2, 2), (3, 1), (3, 2), (4, 2)}
    assert blocks[at + 1] == Paragraph(
        text="Differences to Transformer. Better in both: Mamba at 100. Worse in both: LSTM at 100. Changed from not "
        "shown to better: Mamba at 300. Changed from not shown to worse: LSTM at 300."
    )


def test_only_what_differs_is_listed(folders: tuple[Path, Path]) -> None:
    small, large = folders
    change(large, "provenance", git_commit="fedcba9876543210", torch="2.14.0")
    cells = (
        (large / "context.jsonl").read_text().replace("2.13.0+cpu", "2.14.0").replace('"threads": 2', '"threads": 8')
    )
    (large / "context.jsonl").write_text(cells)
    table = next(block for block in blocks_of(small, large) if isinstance(block, Table))
    assert table.columns == ["", "small", "large"]
    assert {row[0]: tuple(row[1:]) for row in table.rows} == {
        "steps": ("600", "2400"),
        "commit": ("0123456789ab", "fedcba987654"),
        "PyTorch": ("2.13.0+cpu", "2.14.0"),
        "threads of the measurements": ("2", "8"),
    }


def test_quality_on_other_data_is_not_compared_and_speeds_of_another_machine_are_warned_of(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    small, large = folders
    write_run(large, "s4d")  # which the other one lacks
    change(large, "corpus", digest="feed" * 16)
    lines = (large / "context.jsonl").read_text()
    (large / "context.jsonl").write_text(lines.replace("AMD EPYC 9R45", "Another"))
    assert cli.main(["report", str(small), str(large), "--out", str(tmp_path / "out")]) == 0
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    data, machine, incomplete = summary["warnings"]
    assert incomplete.startswith("large is not complete")
    assert data == (
        "Quality is not compared: the data differ (digests c0ffeec0ffee in small and feedfeedfeed in large), and of "
        "two texts one is easier to predict, whatever the model."
    )
    assert machine.startswith("Speeds were measured under unlike conditions (processor): a speed")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count('<li class="warn">') == 3
    assert not re.search("by trained length|Predicts best|Worth choosing", page)
    assert "Training tokens/s, by context length." in page
    assert {change["criterion"] for change in summary["difference_shown"]} == {"training tokens/s", "decode tokens/s"}
    assert not [name for name in summary["differences"] if "S4D" in name]
    assert summary["differences"]["processor of the measurements"] == ["AMD EPYC 9R45", "Another"]


def test_what_was_disturbed_missing_or_read_unlike_is_warned_of(folders: tuple[Path, Path]) -> None:
    small, large = folders
    assert not [block for block in blocks_of(small, large) if isinstance(block, Items)]
    with (large / "context.jsonl").open("a") as file:
        file.write(json.dumps(cell("mamba", "train", 300, disturbed=True).to_dict()) + "\n")
    shutil.rmtree(large / "lstm-l300-s2")
    for folder, n_bytes in ((small, 65_536), (large, 262_144)):
        for path in folder.glob("*/result.json"):
            write_json(path, json.loads(path.read_text()) | {"val_bytes": n_bytes})
    (warned,) = (block for block in blocks_of(small, large) if isinstance(block, Items))
    assert warned.items == [
        "Unlike amounts of the held-out text were read (65536, 262144 bytes): compare differences within a folder, not "
        "scores.",
        "Other work disturbed 1 of 12 measurements of large.",
        "large is not complete: its own report lists what is missing (1).",
    ]
    assert warned.warnings == {0, 1, 2}


def test_the_page_links_to_the_reports_of_its_folders_and_leaves_them_alone(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()}
    assert cli.main(["report", *map(str, folders), "--out", str(tmp_path / "a b" / "out")]) == 0
    assert {path: path.read_bytes() for folder in folders for path in folder.rglob("*") if path.is_file()} == before
    page = (tmp_path / "a b" / "out" / "report.html").read_text()
    assert re.findall('<a href="([^"]*)">([^<]*)</a>', page) == [
        ("../../study/small/report.html", "small"),
        ("../../study/large/report.html", "large"),
    ]
    assert "Quality is not compared" not in page
    rows = list(csv.DictReader((tmp_path / "a b" / "out" / "criteria.csv").open()))
    assert next(row["value"] for row in rows if row["arch"] == "mamba" and row["context_len"] == "300") == "1.99"
    assert {row["folder"] for row in rows} == {"small", "large"}


def test_folders_of_one_name_are_told_by_more_of_their_paths(tmp_path: Path) -> None:
    folders = [write_winners(tmp_path / name / "compare", seeds=1) for name in ("one", "two")]
    assert [side.name for side in load_sides(folders)] == ["one/compare", "two/compare"]
    lead, _, same, *_ = blocks_of(*folders)
    assert getattr(lead, "paragraphs", [""])[0].startswith(
        "All 8 cells of the map that are decided in both name the same"
    )
    assert same == Paragraph(text="Nothing that the files record: the same comparison was made again.")


def test_what_one_seed_or_one_folder_alone_says_is_not_counted_as_a_change(tmp_path: Path) -> None:
    small, large = write_winners(tmp_path / "small", seeds=1), write_winners(tmp_path / "large", quality=LATER)
    with (large / "context.jsonl").open("a") as file:
        file.write(json.dumps(cell("mamba", "train", 900).to_dict()) + "\n")
    (found,) = (block for block in blocks_of(small, large) if isinstance(block, Map))
    quality, trains = (row.cells for row in found.rows[:2])
    assert (quality[1].text, quality[1].state) == ("Mamba", "open")
    assert (trains[2].text, trains[2].state) == ("- → Mamba", "open")
    sentences = [block.text for block in blocks_of(small, large) if isinstance(block, Paragraph)]
    assert not [text for text in sentences if "Changed" in text]


def test_three_folders_are_told_in_their_order(folders: tuple[Path, Path], tmp_path: Path) -> None:
    blocks = blocks_of(*folders, write_winners(tmp_path / "third"))
    (found,) = (block for block in blocks if isinstance(block, Map))
    assert found.rows[1].cells[0].text == "Transformer ≈ Mamba → LSTM → Transformer ≈ Mamba"
    said = " ".join(block.text for block in blocks if isinstance(block, Paragraph))
    assert (
        "Better in all: Mamba at 100. Worse in all: LSTM at 100. Changed from not shown to better to not shown: "
        in said
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["A", "B"], "say with --out DIR where the report of several folders goes"),
        (["A", "--out", "out"], "the report of one folder goes into it: leave --out out out"),
        ([], "crossover report needs the folder of a comparison"),
        (["A", "A", "--out", "out"], "the same folder is given twice: A A"),
        (["A", "B", "--out", "A"], "--out A holds results, whose own report would be replaced"),
        (["A", "B", "--out", "out"], "unlike baselines (A with transformer and B with lstm): give one of lstm, mamba"),
        (["A", "B", "--out", "out", "--baseline", "gru"], "--baseline gru is not among the models of A"),
        (["A", "C", "--out", "out"], "C is not a folder"),
    ],
)
def test_what_cannot_be_told_is_refused_in_one_line(
    words: list[str],
    complaint: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, baseline in (("A", "transformer"), ("B", "lstm")):
        info = json.loads((write_winners(tmp_path / name, seeds=1) / "compare.json").read_text())
        write_json(tmp_path / name / "compare.json", {"config": info["config"] | {"baseline": baseline}})
    assert cli.main(["report", *words]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1
    assert not (tmp_path / "out").exists()
