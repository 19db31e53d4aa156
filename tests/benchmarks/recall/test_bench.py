"""The recall benchmark: what it plans, what it makes of runs with known results, and a toy run from end to end."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
from crossover.archs import build
from crossover.benchmarks.cli import main
from crossover.benchmarks.comparison import forecast
from crossover.benchmarks.recall import bench
from crossover.benchmarks.recall.options import RecallConfig
from crossover.benchmarks.recall.plan import SETTINGS, Kind, find_model, kinds_of, name_of
from crossover.benchmarks.recall.report import write_recall
from crossover.benchmarks.recall.rows import Row, rows_of
from crossover.benchmarks.report.results import Run
from crossover.train.config import RunConfig
from crossover.train.objectives.recall import TASKS
from crossover.train.run import train
from crossover.train.score import Score

pytestmark = pytest.mark.quick

ACCURACY = Score(name="accuracy", unit="accuracy", words="accuracy of the answers", better="higher")
STEPS = (100, 200, 300, 400)


def found(model: str, lr: float, *accuracies: float, seed: int = 0, beyond: float | None = 0.5) -> tuple[Kind, Run]:
    """A run that was validated after each hundred steps."""
    kind = Kind(task="mqar", model=model, lr=lr, seed=seed, run=RunConfig(name=name_of("mqar", model, lr, seed)))
    tested = [
        {"context_len": 32, "accuracy": accuracies[-1], "floor": 0.25, "status": "done"},
        {"context_len": 64, "accuracy": beyond, "floor": 0.24, "status": "done"},
    ]
    run = Run(
        folder=Path(kind.run.name),
        info={
            "seed": seed,
            "score": ACCURACY.to_dict(),
            "state_bytes": 2048,
            "n_params": 50_000,
            "corpus": {"made": "rows that are made"},
            "config": {"train": {"steps": 400, "seq_len": 32, "batch_size": 64}},
        },
        result={
            "status": "done",
            "val_accuracy": accuracies[-1],
            "steps": 100 * len(accuracies),
            "accuracy_by_length": tested,
        },
        metrics=[{"step": step, "val/accuracy": a} for step, a in zip(STEPS, accuracies, strict=False)],
    )
    return kind, run


def cells(rows: list[Row], folder: Path) -> dict[str, list[str]]:
    """The table of the report by the first cell of its rows."""
    record = {"provenance": {"torch": "2.13"}, "failures": {"mqar-h3-r0.1-s0": "the loss is nan"}}
    return cells_in(write_recall(rows, folder, record=record).with_suffix(".md").read_text())


def cells_in(text: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    return {row[0]: row[1:] for row in rows[2:]}


def test_the_best_rate_of_a_model_counts_and_is_marked_where_a_better_one_may_lie_beyond(tmp_path: Path) -> None:
    rows = rows_of(
        [
            found("mamba", 1e-3, 0.3, 0.5, 0.6, 0.7),
            found("mamba", 3e-3, 0.3, 0.9, 0.98, 0.99),
            found("mamba", 1e-2, 0.3, 0.98, 0.99, 0.98),  # solves it sooner, and as well
            found("s4d", 1e-3, 0.2, 0.3, 0.4, 0.5),
            found("s4d", 3e-3, 0.2, 0.3, 0.4, 0.45),
            found("lstm", 1e-3, 0.2, 0.2, 0.2, 0.3),
            found("lstm", 3e-3, 0.2, 0.2, 0.2, 0.6, beyond=None),
            found("lstm", 1e-2, 0.2, 0.2, 0.2, 0.2),
        ],
        lrs=(1e-3, 3e-3, 1e-2),
        solved=0.97,
    )
    assert [(row.model, row.lr, row.at_edge, row.steps) for row in rows] == [
        ("mamba", 1e-2, False, [200]),
        ("s4d", 1e-3, True, [None]),
        ("lstm", 3e-3, False, [None]),
    ]
    table = cells(rows, tmp_path)
    assert list(table) == ["Mamba", "LSTM", "S4D", "Without recall"]  # from the best
    assert table["Mamba"] == ["50,000", "2 KiB", "0.01", "200", "0.980", "0.500"]
    assert table["S4D"][2:4] == ["0.001 (edge)", "not in 400 at these 2 rates"]
    assert table["LSTM"][2:] == ["0.003", "not in 400 at these 3 rates", "0.600", "-"]
    assert table["Without recall"][-2:] == ["0.250", "0.240"]
    text = (tmp_path / "report.md").read_text()
    assert "one seed, so nothing is said of noise" in text
    assert "figures/mqar-lengths.svg" in text
    assert "mqar-frontier" not in text
    assert "mqar-h3-r0.1-s0: the loss is nan" in text.replace("\\", "")


def test_seeds_have_intervals_and_say_how_many_solved_the_task(tmp_path: Path) -> None:
    rows = rows_of(
        [
            *(found("mamba", 1e-3, 0.5, accuracy, seed=seed) for seed, accuracy in enumerate((0.98, 0.9, 0.97))),
            *(found("mamba", 1e-2, 1.0, 1.0, seed=seed) for seed in (0, 1)),  # the third has failed: no better rate
        ],
        lrs=(1e-3, 1e-2),
        solved=0.97,
    )
    assert (rows[0].lr, rows[0].n_rates) == (1e-3, 1)
    assert rows[0].steps == [200, None, 200]
    assert cells(rows, tmp_path)["Mamba"][3:5] == ["200 (2 of 3 seeds)", "0.950 ± 0.108"]
    lines = list(csv.DictReader((tmp_path / "recall.csv").read_text().splitlines()))
    assert [(line["seed"], line["steps_to_solve"], line["context_len"]) for line in lines[::2]] == [
        ("0", "200", "32"),
        ("1", "", "32"),
        ("2", "200", "32"),
    ]


def test_what_is_recalled_is_drawn_against_bytes_of_state(tmp_path: Path) -> None:
    names = ("mamba2@d_state=4", "mamba2@d_state=16", "mamba2@d_state=64", "transformer")
    finished = [found(name, 1e-3, accuracy) for name, accuracy in zip(names, (0.3, 0.6, 0.9, 1.0), strict=True)]
    for i, (_, run) in enumerate(finished):
        run.info["state_bytes"] = 1024 * 4**i  # pyright: ignore[reportIndexIssue]
    table = cells(rows_of(finished, lrs=(1e-3,), solved=0.97), tmp_path)
    assert list(table)[:3] == ["Attention", r"Mamba-2, d\_state 64", r"Mamba-2, d\_state 16"]
    lines = list(csv.DictReader((tmp_path / "figures" / "mqar-frontier.csv").read_text().splitlines()))
    assert [(line["model"], line["state_bytes"], line["accuracy"]) for line in lines] == [
        (name, str(1024 * 4**i), accuracy)
        for i, (name, accuracy) in enumerate(zip(names, ("0.3", "0.6", "0.9", "1.0"), strict=True))
    ]


def test_models_of_the_frontier_differ_in_the_size_of_their_state_alone() -> None:
    kinds = kinds_of(RecallConfig(preset="frontier", lrs=(1e-3,)))
    by_base: dict[str, list[tuple[int, int]]] = {}
    for kind in kinds:
        model = build(kind.run.model.configure(64), device="meta")
        size = (model.init_state(1, 64).nbytes, sum(p.numel() for p in model.parameters()))
        by_base.setdefault(find_model(kind.model).base, []).append(size)
    for sizes in by_base.values():
        assert len({state for state, _ in sizes}) == len(sizes) >= 3
    assert len({kind.run.name for kind in kinds}) == len(kinds)


def test_every_model_learns_every_task_at_every_rate() -> None:
    made = tuple(task for task in SETTINGS if task != "needle")  # which would load the default documents
    config = RecallConfig(tasks=made, seeds=2, lrs=(1e-3, 1e-2))
    assert RecallConfig(preset="all").chosen_tasks == (*made, "needle") == tuple(TASKS)
    kinds = kinds_of(config)
    assert len({kind.run.name for kind in kinds}) == len(kinds) == 11 * 9 * 2 * 2
    assert {kind.seed for kind in kinds[: len(kinds) // 2]} == {0}
    bench._checked(kinds)
    layers = {kind.model: kind.run.model.configure(64).layers for kind in kinds}
    assert {len(of_model) for of_model in layers.values()} == {2}
    assert {ffn for of_model in layers.values() for _, ffn in of_model} == {None}
    assert len(set(layers.values())) == 8  # attention is there with positions and without


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--tasks", "mqr"], "--tasks mqr is no task of recall; did you mean 'mqar'?"),
        (["--tasks", "next_token"], "--tasks next_token is no task of recall"),
        (["--models", "mamba4"], "--models mamba4 is unknown"),
        (["--lrs", "0.01", "0.001"], "--lrs must increase, got 0.01 0.001"),
        (["--models", "lstm", "lstm"], "--models names one twice"),
        (["--lrs", "0.001", "0.0010000001"], "--lrs names one twice"),
        (["--models", "hybrid", "--n-layers", "1"], "--models hybrid has 2 kinds of layers: give --n-layers 2 or more"),
        (["--solved", "1"], "--solved=1.0 must be at most 0.999"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "recall", "--out", str(tmp_path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_a_dry_run_says_what_is_left_and_leaves_the_folder_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pace = {"start": 1.0, "step": 0.5, "token": 0.0, "sample": 0.0}
    monkeypatch.setattr(forecast, "_measure", lambda runs, logs: [pace] * len(runs))
    words = ["bench", "recall", "--dry-run", "--out", str(tmp_path / "out"), "--tasks", "parity", "--steps", "80"]
    assert main([*words, "--models", "lstm", "--lrs", "0.001", "0.01", "--threads", "1"]) == 0
    (row,) = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("parity, lstm")]
    assert row[2:] == ["0", "2", "41.0", "s", "1:22", "min"]
    assert not (tmp_path / "out").exists()


def test_a_toy_benchmark_leaves_its_tables_and_is_not_done_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trained: list[str] = []

    def train_here(runs: list[RunConfig], *_: Any, **__: Any) -> dict[str, str]:
        for run in runs:
            if not (run.directory / "result.json").exists():
                assert train(run).exit_code == 0
                trained.append(run.name)
        return {}

    monkeypatch.setattr(bench, "train_runs", train_here)
    words = ["bench", "recall", "--out", str(tmp_path), "--tasks", "parity", "--models", "transformer", "lstm"]
    words += ["--lrs", "0.01", "--steps", "4", "--batch-size", "4", "--d-model", "32", "--threads", "1"]
    assert main(words) == 0
    assert trained == ["parity-transformer-r0.01-s0", "parity-lstm-r0.01-s0"]
    table = cells_in((tmp_path / "report.md").read_text())
    assert table.keys() == {"Attention", "LSTM", "Without recall"}
    assert all(0.3 < float(row[4]) < 0.7 for row in table.values())
    assert json.loads((tmp_path / "recall.json").read_text())["failures"] == {}
    assert "\nparity\n" in capsys.readouterr().out
    assert main(words) == 0
    assert len(trained) == 2
    assert main([*words, "--batch-size", "5"]) == 2
    assert "train.batch_size 4 instead of 5" in capsys.readouterr().err
