import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks.cli import main
from crossover.benchmarks.comparison import forecast as forecasting
from crossover.benchmarks.comparison.forecast import Pace, Row, print_forecast
from crossover.files import read_json
from crossover.train.config import RunConfig, TrainConfig
from crossover.train.objectives import open_objective

from ..fake_runs import write_json

pytestmark = pytest.mark.quick

PACE = {"start": 3.0, "step": 0.5, "token": 0.001, "sample": 1.0}


def test_a_run_takes_its_start_its_steps_and_what_it_reads_and_writes() -> None:
    train = TrainConfig(steps=100, eval_every=25, eval_tokens=1000, final_eval_tokens=8000, position_len=0)
    # four validations, three of them on the way
    assert Pace(**PACE).seconds(train) == pytest.approx(3 + 50 + (3 * 1000 + 8000) * 0.001 + 4)
    assert Pace(**PACE).seconds(replace(train, sample_tokens=0, eval_every=0)) == pytest.approx(3 + 50 + 8)
    assert Pace(**PACE).seconds(replace(train, seconds=20.0, sample_tokens=0)) == pytest.approx(3 + 20 + 11)


def test_runs_side_by_side_take_the_time_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    print_forecast([Row(name="a", n_done=1, left=[60.0] * 4, at_once=2), Row(name="b", n_done=3, left=[5.0])])
    said = capsys.readouterr().out
    assert [line.split() for line in said.splitlines()[-4:-2]] == [
        ["a", "1", "4", "60.0", "s", "2:00", "min"],
        ["b", "3", "1", "5.0", "s", "5", "s"],
    ]
    assert "about 2:05 min, with 2 runs at a time" in said


@pytest.fixture
def comparison(tmp_path: Path) -> list[str]:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(60):
        (text / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 12)
    return [
        *("compare", "--dry-run", "--data", str(text), "--out", str(tmp_path / "out")),
        *("--archs", "transformer", "lstm"),
        *("--params", "60k", "--steps", "40", "--seq-len", "32", "--batch-size", "2", "--eval-tokens", "256"),
        *("--seeds", "2", "--threads", "1", "--context", "16", "32"),
    ]  # fmt: skip


def test_a_dry_run_measures_paces_once_and_leaves_the_folder_alone(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def measured(runs: list[RunConfig], logs: Path) -> list[dict[str, float]]:
        asked.extend(run.model.preset for run in runs)
        return [PACE] * len(runs)

    monkeypatch.setattr(forecasting, "_measure", measured)
    for _ in range(2):
        assert main([*comparison, "--tune-lr"]) == 0
        said = capsys.readouterr().out
        assert sorted(asked) == ["lstm", "transformer"]
        assert not (tmp_path / "out").exists()
        rows = [line.split() for line in said[said.index("To do,") :].splitlines()]
        assert ["training,", "LSTM", "0", "2"] in [row[:4] for row in rows]
        assert ["measurement,", "LSTM", "0", "2"] in [row[:4] for row in rows]
        assert ["trial", "of", "10", "steps,", "LSTM", "0", "3"] in [row[:7] for row in rows]


def test_where_a_run_has_finished_the_others_take_as_long(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecasting, "_measure", lambda runs, logs: [PACE] * len(runs))
    assert main(comparison) == 0
    folder, began = tmp_path / "out" / "lstm-s0", time.time() - 1000
    config: Any = {}

    def check_resumable(runs: list[RunConfig], digest: str) -> None:
        config.update(next(run for run in runs if run.name == "lstm-s0").to_dict())

    monkeypatch.setattr("crossover.benchmarks.comparison.compare.check_resumable", check_resumable)
    main(comparison)
    stretch = {"started": datetime.fromtimestamp(began, UTC).isoformat(timespec="seconds")}
    write_json(folder / "run.json", {"arch": "lstm", "seed": 0, "config": config, "stretches": [stretch]})
    write_json(folder / "result.json", {"status": "done", "val_bits_per_byte": 1.0})
    os.utime(folder / "result.json", (began + 321, began + 321))
    capsys.readouterr()
    main(comparison)
    said = capsys.readouterr().out.splitlines()
    row = next(line.split() for line in said if line.startswith("training, LSTM"))
    assert row[2:4] == ["1", "1"]
    assert 320 <= float(row[4]) <= 322


def test_the_pace_of_a_model_is_measured_by_training_it(
    comparison: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*comparison, "--archs", "lstm"]) == 0
    (path,) = (tmp_path / "cache" / "paces").iterdir()
    pace = read_json(path)
    assert set(pace) == set(PACE)
    assert all(0 < seconds < 300 for seconds in pace.values())
    assert pace["token"] < pace["step"] < pace["start"] + 60
    assert "training, LSTM" in capsys.readouterr().out


def test_a_dry_run_of_measurements_alone_measures_a_pace_of_every_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(runs: list[RunConfig], logs: Path) -> list[dict[str, float]]:
        for run in runs:  # which must be able to learn what they are given
            open_objective(run).check(run.model.configure(100))
        return [PACE | {"step": 4e4} for _ in runs]

    monkeypatch.setattr(forecasting, "_measure", measured)
    words = [
        "bench",
        "context",
        "--dry-run",
        "--archs",
        "transformer",
        "lstm",
        "--params",
        "60k",
        "--vocab-size",
        "100",
    ]
    words += ["--context", "16", "64", "--phases", "train", "--repeats", "2", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    rows = {line.split("  ")[0].strip(): line.split() for line in capsys.readouterr().out.splitlines()}
    assert [rows[f"measurement, {label}"][2:4] for label in ("Transformer", "LSTM")] == [["0", "4"], ["0", "4"]]
    assert float(rows["measurement, LSTM"][4]) > 300  # and not its box of time
    assert not (tmp_path / "out").exists()
