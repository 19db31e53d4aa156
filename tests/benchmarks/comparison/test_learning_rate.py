from pathlib import Path

import pytest
from crossover.benchmarks.comparison.learning_rate import best_rates, conclude, mark, rate_rows, rate_runs
from crossover.benchmarks.config import LearningRateConfig
from crossover.train.config import DataConfig

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
        for seed, one in enumerate(statuses):
            if one is not None:
                home = write_run(tmp_path, "mamba", seed=seed, status=one)
                home.rename(tmp_path / f"mamba-lr{rate}-s{seed}")
    conclude(rate_runs(config, DataConfig()), tmp_path)
    lines = (tmp_path / "lr.csv").read_text().splitlines()
    assert [line.split(",")[-1] for line in lines] == ["best", "True", "False"]
    assert lines[2] == "mamba,0.009,,1,False"


def test_a_winner_at_the_end_of_the_list_asks_for_a_longer_one() -> None:
    assert "try further" in mark({"best": True, "lr": 4e-3}, [1e-3, 2e-3, 4e-3])
    assert mark({"best": True, "lr": 2e-3}, [1e-3, 2e-3, 4e-3]) == "best"
    assert mark({"best": False, "lr": 4e-3}, [1e-3, 2e-3, 4e-3]) == ""
