import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks.comparison.learning_rate import best_rates, conclude, mark, rate_rows, rate_runs
from crossover.benchmarks.comparison.options import LearningRateConfig
from crossover.benchmarks.report.write import write_report
from crossover.train.config import DataConfig, ObjectiveSpec
from crossover.train.objectives import OBJECTIVES
from crossover.train.objectives.next_token import NextToken
from crossover.train.run import train
from crossover.train.score import Score

from ..fake_runs import write_run

pytestmark = pytest.mark.quick


def test_lowest_bits_per_byte_wins() -> None:
    rows = rate_rows([("mamba", 1e-3, 2.3), ("mamba", 2e-3, 2.1), ("mamba", 4e-3, 2.2), ("lstm", 1e-3, 3.0)])
    assert best_rates(rows) == {"mamba": 2e-3, "lstm": 1e-3}
    assert [row["lr"] for row in rows if row["best"]] == [2e-3, 1e-3]


def test_the_mean_over_seeds_decides() -> None:
    results = [("mamba", 1e-3, 2.0), ("mamba", 1e-3, 2.6), ("mamba", 2e-3, 2.2), ("mamba", 2e-3, 2.2)]
    assert best_rates(rate_rows(results)) == {"mamba": 2e-3}


def test_a_rate_at_which_a_seed_diverged_cannot_win() -> None:
    results = [("mamba", 1e-3, 2.5), ("mamba", 1e-3, 2.5), ("mamba", 9e-3, 1.9), ("mamba", 9e-3, None)]
    rows = rate_rows(results)
    assert best_rates(rows) == {"mamba": 1e-3}
    assert [row["n_seeds"] for row in rows] == [2, 1]


@pytest.mark.parametrize("status", ["failed", "interrupted", None])
def test_a_rate_with_a_seed_that_is_missing_or_not_done_cannot_win(status: str | None, tmp_path: Path) -> None:
    config = LearningRateConfig(archs=("mamba",), rates=(1e-3, 9e-3), seeds=2, out=tmp_path)
    for rate, statuses in (("0.001", ("done", "done")), ("0.009", ("done", status))):
        for seed, found in enumerate(statuses):
            if found is not None:
                home = write_run(tmp_path, "mamba", seed=seed, status=found)
                home.rename(tmp_path / f"mamba-lr{rate}-s{seed}")
    conclude(rate_runs(config), tmp_path)
    lines = (tmp_path / "lr.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines] == ["best", "True", "False"]
    assert lines[2] == "mamba,0.009,,1,False"


def test_a_winner_at_the_end_of_the_list_asks_for_a_longer_one() -> None:
    assert "try further" in mark({"best": True, "lr": 4e-3}, [1e-3, 2e-3, 4e-3])
    assert mark({"best": True, "lr": 2e-3}, [1e-3, 2e-3, 4e-3]) == "best"
    assert mark({"best": False, "lr": 4e-3}, [1e-3, 2e-3, 4e-3]) == ""


class Guessing(NextToken):
    """Next tokens, but judged by a share of which more is better: the more the model has learned, the less it is."""

    score = Score(name="accuracy", unit="right", words="share of right guesses", better="higher")

    def metrics(self, means: Mapping[str, float], rows: Any) -> dict[str, float]:
        return {"accuracy": means["loss"] / 10}

    def experiment(self) -> dict[str, Any]:
        return {"kind": "guessing"}


def test_an_objective_with_a_score_of_its_own_is_tuned_and_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(OBJECTIVES, "guessing", Guessing)
    source, _ = Guessing.example(tmp_path)
    config = LearningRateConfig(
        archs=("lstm", "mamba"),
        rates=(1e-5, 3e-2),
        params=60_000,
        steps=6,
        seq_len=16,
        eval_tokens=64,
        objective=ObjectiveSpec(kind="guessing"),
        data=DataConfig(source=str(source), val_fraction=0.3),
        out=tmp_path / "lr",
    )
    runs = rate_runs(config)
    for run in runs:
        assert train(run).exit_code == 0
    conclude(runs, config.out, Guessing.score)
    table = capsys.readouterr().out
    lines = (config.out / "lr.csv").read_text().splitlines()
    assert lines[0] == "arch,lr,val_accuracy,n_seeds,best"
    assert [line.split(",")[-1] for line in lines[1:]] == ["True", "False"] * 2  # the higher score, of the lower rate
    assert "right" in table
    page = write_report(config.out)
    markdown = page.with_suffix(".md").read_text()
    for text in (page.read_text(), markdown):
        assert "share of right guesses" in text
        assert "bits per byte" not in text
    low, high, *_ = (float(line.split(",")[2]) for line in lines[1:])
    assert f"{(low + high) / 2:.2f}" in markdown  # of the runs of one architecture
    figure = (config.out / "figures/learning-tokens.svg").read_text()
    assert not re.search("bits per byte", figure)
