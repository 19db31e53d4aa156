import csv
import io
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossover.benchmarks.cli import main
from crossover.benchmarks.comparison import tuning
from crossover.benchmarks.comparison.options import CompareConfig
from crossover.benchmarks.comparison.tuning import Search, next_trials, rounds_of
from crossover.benchmarks.harness.progress import Progress, Schedule
from crossover.benchmarks.harness.sizes import size_arch
from crossover.files import read_json, write_json
from crossover.train.config import RunConfig, TrainConfig
from crossover.train.objectives import open_objective
from crossover.train.score import BITS_PER_BYTE, Score

N_ROUNDS = 3
HIGHER = Score.from_dict({**BITS_PER_BYTE.to_dict(), "better": "higher"})


def search(loss: Callable[[int, int], float | None], score: Score = BITS_PER_BYTE) -> tuple[Any, list[dict[int, Any]]]:
    """What is found where a trial of a round and a power has this loss, and all that was tried."""
    found: list[dict[int, float | None]] = [{} for _ in range(N_ROUNDS)]
    for _ in range(100):
        wanted = next_trials(found, score)
        if not isinstance(wanted, tuple):
            return wanted, found
        number, powers = wanted
        assert powers
        for power in powers:
            assert power not in found[number]  # nothing is tried twice
            found[number][power] = loss(number, power)
    raise AssertionError("it never ends")


@pytest.mark.quick
@pytest.mark.parametrize("best", range(-6, 7))
def test_the_best_rate_is_found_wherever_it_is_and_has_worse_neighbours(best: int) -> None:
    for score, sign in ((BITS_PER_BYTE, 1), (HIGHER, -1)):
        power, found = search(lambda number, power, sign=sign: sign * (power - best - 0.1 * number) ** 2, score)
        assert power == best
        for values in found:
            assert {best - 1, best, best + 1} <= values.keys()
    assert sum(map(len, found)) <= 11 + 2 * max(0, abs(best) - 1)


@pytest.mark.quick
def test_what_is_found_is_better_than_both_neighbours_in_every_round_however_noisy() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        noise = rng.normal(size=(N_ROUNDS, 40))
        power, found = search(lambda number, power, noise=noise: 0.3 * power**2 + noise[number, power + 20])
        last = {p: v for p, v in found[-1].items() if v is not None}
        assert last[power] == min(last.values())
        for values in found:
            best = min(values, key=lambda p, values=values: values[p])
            assert {best - 1, best + 1} <= values.keys()
        for earlier, later in itertools.pairwise(found):
            kept = sorted(earlier, key=lambda p, earlier=earlier: earlier[p])[: math.ceil(len(earlier) / 2)]
            assert set(kept) <= later.keys()


@pytest.mark.quick
def test_rates_that_diverge_are_the_worst_and_a_model_that_always_does_has_none() -> None:
    power, found = search(lambda number, power: None if power > 0 else -float(power) - number)
    assert power == 0
    assert all(1 in values for values in found)
    assert search(lambda number, power: None)[0] is None


@pytest.mark.quick
def test_the_search_ends_where_scores_never_stop_improving() -> None:
    assert search(lambda number, power: -float(power))[0] == 8


@pytest.mark.quick
@pytest.mark.parametrize(("steps", "rounds"), [(450, [28, 56, 112]), (1200, [75, 150, 300]), (3, [1])])
def test_rounds_double_up_to_a_share_of_the_steps(steps: int, rounds: list[int]) -> None:
    assert rounds_of(CompareConfig(steps=steps)) == rounds


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        (folder / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 12)
    return folder


WORDS = (
    "--params",
    "60k",
    "--steps",
    "12",
    "--seeds",
    "1",
    "--batch-size",
    "2",
    "--seq-len",
    "32",
    "--eval-tokens",
    "64",
)


@pytest.mark.slow
def test_a_comparison_finds_its_rates_trains_with_them_and_does_nothing_twice(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tuning, "_FIRST", (2, 3))
    monkeypatch.setattr(tuning, "_N_ROUNDS", 1)
    out = tmp_path / "out"
    more = ("--archs", "lstm", "--context", "16", "--time-box", "0.01", "--decode-tokens", "2", "--threads", "1")
    words = ["compare", "--tune-lr", "--data", str(text), "--out", str(out), *WORDS, *more]
    assert main(words) == 0, capsys.readouterr().err
    (rate,) = read_json(out / "tuning" / "rates.json")["rates"].values()
    assert read_json(out / "lstm-s0" / "run.json")["config"]["optim"]["lr"] == rate
    with (out / "tuning" / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    last = {float(t["lr"]): float(t["val_bits_per_byte"]) for t in trials}
    assert last[rate] == min(last.values())
    assert {rate / 2, rate * 2} <= last.keys()
    digests = {read_json(path)["corpus"]["digest"] for path in (out / "tuning").glob("*/run.json")}
    assert read_json(out / "lstm-s0" / "run.json")["corpus"]["digest"] not in digests
    page = (out / "report.md").read_text()
    assert f"{len(trials)} trials" in page
    assert "no number here comes from" in page

    capsys.readouterr()
    trained = {path: path.stat().st_mtime_ns for path in out.glob("**/result.json")}
    assert len(trained) == len(trials) + 1
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("**/result.json")} == trained
    assert main([*words, "--tune-share", "0.5"]) == 2
    assert "with other settings" in capsys.readouterr().err


@pytest.mark.quick
def test_a_search_that_was_stopped_goes_on_and_its_progress_counts_what_there_is(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CompareConfig(
        archs=("mamba", "lstm"), params=60_000, steps=400, seeds=1, seq_len=(32,), out=tmp_path, threads=1
    )
    data = type(config.data)(source=str(text), held_out="tuning", cache=tmp_path / "cache")
    objective = open_objective(RunConfig(data=data, train=TrainConfig(seq_len=32, position_len=0)))
    sizes = {arch: size_arch(arch, n_params=60_000, vocab_size=256, seq_len=32) for arch in config.archs}
    results: dict[str, float] = {}
    trained: list[str] = []

    def train(runs: list[RunConfig], progress: Progress, **_: object) -> dict[str, str]:
        for run in runs:
            if run.name in results:
                progress.skip(run.name, "trained before")
                continue
            if len(results) == 13:
                raise KeyboardInterrupt
            assert run.optim.lr is not None
            assert run.data.held_out == "tuning"
            results[run.name] = abs(math.log2(run.optim.lr / sizes[run.model.preset].lr) - 1)
            trained.append(run.name)
            progress.begin(run.name)
            progress.finish(run.name, "")
        return {}

    monkeypatch.setattr(tuning, "train_runs", train)
    monkeypatch.setattr(tuning, "load_quality", lambda run: results.get(run.name))

    def found() -> tuple[dict[str, float], Progress]:
        search = Search(config, sizes, objective, at_once=1, threads=1)
        progress = Progress(Schedule(search.tasks()), stream=io.StringIO())
        return search.run(progress, logs=tmp_path), progress

    (tmp_path / "tuning").mkdir()
    with pytest.raises(KeyboardInterrupt):
        found()
    results["stopped"] = 0.0
    rates, progress = found()
    assert rates == {arch: 2 * sizes[arch].lr for arch in config.archs}
    assert progress.schedule.remaining() == 0
    assert progress.schedule.done == f"{len(trained)}/{len(trained)}"
    assert len(set(trained)) == len(trained)
    again, progress = found()
    assert (again, progress.schedule.done) == (rates, "0/0")
    path = tmp_path / "tuning" / "rates.json"
    held = read_json(path)
    del held["settings"]["train"]["seconds"]  # as a search of before there was such an option
    write_json(path, held)
    assert found()[0] == rates
    for other in ("seconds", "an option of the future"):
        write_json(path, held | {"settings": held["settings"] | {"train": held["settings"]["train"] | {other: 7.0}}})
        with pytest.raises(ValueError, match="a search for learning rates with other settings"):
            found()
