"""Runs and cells made by hand, with known winners, ties and crossings: every cell and sentence is checked."""

import csv
import json
from pathlib import Path

import pytest
from crossover.benchmarks import cli
from crossover.benchmarks.comparison.options import CompareConfig
from crossover.benchmarks.report.criteria import criteria, undominated
from crossover.benchmarks.report.results import load_comparison
from crossover.benchmarks.report.winner_map import verdict, winner_map
from crossover.benchmarks.report.write import write_report

from ..fake_runs import QUALITY, append_cells, cell, write_json
from ..fake_runs import write_winners as make

pytestmark = pytest.mark.quick

PHASES = ("train", "first_token")


def cells_of(folder: Path, **options: str) -> dict[str, list[tuple[str, str, str]]]:
    comparison = load_comparison(folder, **options)
    rows = winner_map(comparison, criteria(comparison)).rows
    return {f"{row.title} {row.note}": [(cell.text, cell.note, cell.state) for cell in row.cells] for row in rows}


def test_every_cell_of_the_map_names_the_winner_or_those_level_with_it_and_the_distance(tmp_path: Path) -> None:
    assert cells_of(make(tmp_path)) == {
        "Predicts best bits per byte at equal tokens, 3 seeds": [
            ("Mamba", "0.20 below Transformer", "won"),
            ("LSTM ≈ Mamba", "0.08 below Transformer, no difference shown", "level"),
        ],
        "Trains fastest tokens per second": [
            ("Transformer ≈ Mamba", "the baseline", "level"),
            ("LSTM", "1.84 x Transformer", "won"),
        ],
        "Generates fastest tokens per second, after a prompt of this length": [
            ("Transformer ≈ Mamba", "the baseline", "level"),
            ("LSTM", "1.84 x Transformer", "won"),
        ],
        "Trains in least memory peak": [
            ("Transformer ≈ Mamba ≈ LSTM", "the baseline", "level"),
            ("Transformer ≈ Mamba ≈ LSTM", "the baseline", "level"),
        ],
        "Carries the smallest state while decoding": [
            ("LSTM", "0.25 x Transformer", "won"),
            ("LSTM", "1/12 of Transformer", "won"),
        ],
        "Worth choosing best to cheapest: nothing both predicts better and trains faster": [
            ("Mamba, Transformer", "Transformer is the fastest of them", "won"),
            ("LSTM, Mamba", "LSTM is the fastest of them", "won"),
        ],
        "Worth choosing best to cheapest: nothing both predicts better and generates faster": [
            ("Mamba, Transformer", "Transformer is the fastest of them", "won"),
            ("LSTM, Mamba", "LSTM is the fastest of them", "won"),
        ],
    }


def test_sentences_say_who_is_best_where_and_which_differences_are_shown(tmp_path: Path) -> None:
    comparison = load_comparison(make(tmp_path))
    assert verdict(comparison, criteria(comparison)) == (
        "Mamba trained at 100 tokens predicts held-out text best, at 1.85 bits per byte (0.20 ± 0.02 below "
        "Transformer); LSTM and Mamba trained at 300 tokens are level (LSTM: 1.97 bits per byte)."
    )
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert (
        "Against Transformer (after Holm's correction over the models at a length). Difference shown: Mamba and LSTM "
        "at 100. No difference shown: Mamba and LSTM at 300."
    ) in text
    assert "| Mamba | **1.850 (-0.200 ± 0.025, n=3)** | **1.990 (-0.060 ± 0.131, n=3)** |" in text
    assert "| LSTM | 2.350 (+0.300 ± 0.025, n=3) | **1.967 (-0.083 ± 0.063, n=3)** |" in text
    assert "| Mamba | **99 (0.99x, 0.932-1.05)** | 80 (1.6x, 1.51-1.7) |" in text
    (first, *_) = csv.DictReader((tmp_path / "figures" / "winner-map.csv").open())
    assert (first["column"], first["models"], first["says"]) == ("100 tokens", "Mamba", "0.20 below Transformer")
    rows = list(csv.DictReader((tmp_path / "criteria.csv").open()))
    shown = {(row["arch"], row["context_len"]): row["difference_shown"] for row in rows if "bits" in row["criterion"]}
    assert shown["lstm", "300"] == "False"  # its own interval excludes zero, the corrected test does not
    assert shown["mamba", "100"] == "True"


def test_with_one_seed_nothing_of_quality_is_bold_and_the_map_says_why(tmp_path: Path) -> None:
    found = cells_of(make(tmp_path, seeds=1))
    assert found["Predicts best bits per byte at equal tokens, 1 seed"] == [
        ("Mamba", "one seed: 0.20 below Transformer", "open"),
        ("Mamba", "one seed: 0.10 below Transformer", "open"),
    ]
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "With one seed nothing tells a difference in quality from noise: none is bold." in text
    assert "One seed: whether that is more than noise is not known." in text
    table = text[text.index("Bits per byte at equal tokens, by trained length.") :].split("\n\n")[1]
    assert "Mamba" in table
    assert "**" not in table


def test_another_baseline_is_what_the_others_are_compared_with(tmp_path: Path) -> None:
    found = cells_of(make(tmp_path), baseline="mamba")
    assert [note for _, note, _ in found["Trains fastest tokens per second"]] == [
        "1.01 x Mamba, no difference shown",
        "1.15 x Mamba",
    ]
    assert cli.main(["report", str(tmp_path), "--baseline", "lstm"]) == 0
    assert "Against LSTM (after Holm" in (tmp_path / "report.md").read_text()


def test_a_baseline_that_is_no_model_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", str(make(tmp_path, seeds=1)), "--baseline", "gru"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.count("\n") == 1
    assert "--baseline gru is not among the models of" in complaint
    with pytest.raises(ValueError, match="--baseline gru is not among --archs mamba lstm"):
        CompareConfig(archs=("mamba", "lstm"), baseline="gru")


def test_what_could_not_run_or_was_not_measured_is_shown_as_such(tmp_path: Path) -> None:
    make(tmp_path, seeds=2)
    append_cells(
        tmp_path,
        cell("transformer", "train", 300, status="out_of_memory"),
        cell("mamba", "train", 900),
        cell("lstm", "train", 900, status="beyond_positions"),
        *[cell(arch, "train", 2700, status="out_of_memory") for arch in QUALITY],
    )
    found = cells_of(tmp_path)
    trains = found["Trains fastest tokens per second"]
    assert trains[1] == ("LSTM", "Transformer: out of memory", "won")
    assert trains[2] == ("Mamba", "Transformer not measured; LSTM beyond its positions", "open")
    assert trains[3] == ("", "out of memory", "open")
    assert found["Generates fastest tokens per second, after a prompt of this length"][2:] == [
        ("", "not measured", "open"),
        ("", "not measured", "open"),
    ]
    assert found["Predicts best bits per byte at equal tokens, 2 seeds"][2] == (
        "",
        "not trained at this length",
        "open",
    )


def test_speeds_of_several_processes_are_paired_by_round(tmp_path: Path) -> None:
    rounds = {"transformer": (100.0, 200.0, 50.0), "mamba": (110.0, 221.0, 55.2), "lstm": (80.0, 300.0, 40.0)}
    for arch, speeds in rounds.items():
        for repeat, speed in enumerate(speeds):  # within a process the repeats differ by more than models do
            rate = {"tokens_per_second": speed, "spread": (0.5 * speed, 2 * speed), "seconds": 1 / speed}
            append_cells(tmp_path, *[cell(arch, phase, 100, status="done", repeat=repeat, **rate) for phase in PHASES])
    found = cells_of(tmp_path)
    # 1.10, 1.105 and 1.104 times as fast in each round; the LSTM between 0.8 and 1.5 times
    assert found["Trains fastest tokens per second"] == [("Mamba ≈ LSTM", "1.1 x Transformer", "level")]
    text = write_report(tmp_path).with_suffix(".md").read_text()
    assert "paired by round of processes" in text
    assert "| Mamba | **110 (1.1x, 1.1-1.11)** |" in text
    assert "Difference shown: Mamba at 100. No difference shown: LSTM at 100." in text
    note = "seconds to the first token, after a prompt of this length"
    assert found[f"Begins to answer soonest {note}"] == [("Mamba ≈ LSTM", "0.907 x Transformer", "level")]


def test_a_model_that_another_beats_in_both_is_not_worth_choosing(tmp_path: Path) -> None:
    comparison = load_comparison(make(tmp_path))
    by_kind = {criterion.kind: criterion for criterion in criteria(comparison)}
    quality, speed = by_kind["quality"], by_kind["train tokens_per_second"]
    assert undominated(quality, speed, 100) == ["mamba", "transformer"]
    assert undominated(quality, speed, 900) == []


def test_quality_by_length_is_told_by_position_at_other_lengths_and_with_the_context_cut(tmp_path: Path) -> None:
    crossing = {100: (2.25, 2.36, 2.29), 300: (1.80, 1.91, 1.86)}  # from 0.24 above to 0.20 below the Transformer
    make(tmp_path, quality={**QUALITY, "lstm": crossing})
    for home in tmp_path.glob("*-l*-s*"):
        trained, shift = (100, 0.0) if "-l100-" in home.name else (300, 0.5)
        spans = [{"start": 0, "stop": 64, "bits_per_byte": 9.0}, {"start": 64, "stop": 128, "bits_per_byte": 2 + shift}]
        beyond = {"bits_per_byte": None, "status": "beyond_positions"} if "transformer" in home.name else {}
        read = [{"context_len": 300, "bits_per_byte": 1.5 + shift, "status": "done"}]
        read += [{"context_len": 900, "bits_per_byte": 1.25, "status": "done"} | beyond]
        cut = [{"context_len": trained // 2, "bits_per_byte": 3.0}, {"context_len": trained, "bits_per_byte": 2.75}]
        result = json.loads((home / "result.json").read_text())
        more = {"position_bits_per_byte": spans, "by_length": read, "context_cut": cut}
        write_json(home / "result.json", result | more)
    text = write_report(tmp_path).with_suffix(".md").read_text()
    section = text[text.index("## Quality against context length") : text.index("## Quality\n")]
    assert "a step with longer windows holds fewer different documents" in section
    assert "| Mamba | up to 300 tokens" not in section
    assert "| LSTM | beyond 190 tokens (180-190) | 3 |" in section  # 100 x 3^(0.25 / 0.443)
    found = json.loads((tmp_path / "summary.json").read_text())["crossovers"]
    (there,) = (c for c in found if (c["metric"][:4], c["a"], c["b"]) == ("bits", "transformer", "lstm"))
    assert (there["verdict"], there["n_pairs"], round(there["context_len"])) == ("beyond", 3, 186)
    assert 179 < there["low"] < there["context_len"] < there["high"] < 193
    assert "| Model | Trained at | 64 to 128 |\n|---|---:|---:|\n| Transformer | 100 | 2.000 |\n" in section
    assert "| LSTM | 300 | 2.500 |\n" in section
    assert "| Transformer | 100 | 1.500 | beyond its positions |" in section
    assert "| LSTM | 300 | 2.000 | 1.250 |" in section
    assert "| Mamba | 300 | - | - | 3.000 | 2.750 |" in section


def test_models_that_longer_windows_made_worse_are_named_and_no_others(tmp_path: Path) -> None:
    text = write_report(make(tmp_path / "some")).with_suffix(".md").read_text()
    *_, beside = text[text.index("Bits per byte at equal tokens, by trained length.") :].split("\n\n")[:4]
    assert "Trained at 300 tokens Mamba predicts worse than at 100, by the means. At an equal budget" in beside
    better = {arch: {100: by_length[100], 300: (1.5, 1.6, 1.7)} for arch, by_length in QUALITY.items()}
    assert "worse than at" not in write_report(make(tmp_path / "none", quality=better)).with_suffix(".md").read_text()


def test_the_map_says_when_other_work_disturbed_what_it_shows(tmp_path: Path) -> None:
    folder = make(tmp_path)
    assert "disturbed" not in write_report(folder).with_suffix(".md").read_text()
    append_cells(folder, cell("lstm", "train", 300, tokens_per_second=9.0, disturbed=True))
    said = write_report(folder).with_suffix(".md").read_text()
    assert "Other work on the machine disturbed 1 of 12 measurements" in said[: said.index("## Each criterion")]
