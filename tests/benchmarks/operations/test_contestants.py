"""Races: that contestants take turns and leave alone, what is made of their turns, and that no process is left."""

import dataclasses
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.benchmarks.harness.processes import Child
from crossover.benchmarks.harness.progress import StatusLine
from crossover.benchmarks.operations import contestants
from crossover.benchmarks.operations.contestants import BEFORE, OURS, Contestant, race
from crossover.benchmarks.operations.models import decoding_rows, training_rows
from crossover.benchmarks.operations.options import KernelsConfig

from ..scripts import Script

ROOT = Path(__file__).parents[3]
TASK = {"work": "train", "length": 8, "batch_size": 1, "threads": 1, "burst": 0.0}
HANG = "time.sleep(60)"


def turns_of(*seconds: float | None) -> Callable[[], dict[str, Any] | None]:
    """A contestant whose turns take these seconds, and which leaves at None."""
    left = iter(seconds)
    return lambda: None if (s := next(left)) is None else {"seconds": s, "n_params": 7}


@pytest.mark.quick
def test_the_factor_is_the_median_over_turns_and_the_first_turn_does_not_count() -> None:
    row = race({OURS: turns_of(9, 1, 2, 4), "a": turns_of(2, 3, 4, 20), "b": turns_of(0.1, 2, 1, 4)}, time_box=0).row()
    assert row["ratios"] == {"a": 3.0, "b": 1.0}
    assert row["quartiles"] == {"a": [2.5, 4.0], "b": [0.75, 1.5]}
    assert row["seconds"] == {OURS: 2, "a": 4, "b": 2}
    assert row["repeats"] == {OURS: 3, "a": 3, "b": 3}


def test_contestants_take_turns() -> None:
    taken: list[str] = []
    race({name: lambda name=name: taken.append(name) or {"seconds": 1.0} for name in "abc"}, time_box=0)
    assert taken == ["a", "b", "c"] * 4


def test_a_slow_contestant_has_one_turn_that_counts_and_ours_has_all() -> None:
    found = race({OURS: turns_of(50, 2, 1, 1), "slow": turns_of(80, 40), "fast": turns_of(1, 6, 3, 3)}, time_box=0)
    row = found.row()
    assert row["ratios"] == {"slow": 20.0, "fast": 3.0}
    assert row["repeats"] == {OURS: 3, "slow": 1, "fast": 3}
    assert "slow" not in row["quartiles"]


def test_who_leaves_has_no_result_and_the_others_go_on() -> None:
    found = race({OURS: turns_of(1, 1, 1, 1), "a": turns_of(1, 1, None), "b": turns_of(None)}, time_box=0)
    assert found.row()["repeats"] == {OURS: 3}
    without_ours = race({OURS: turns_of(None), "a": turns_of(1, 2, 2, 2)}, time_box=0).row()
    assert (without_ours["seconds"], without_ours["ratios"]) == ({"a": 2}, {})


def test_a_process_that_is_late_or_dies_says_why(tmp_path: Path) -> None:
    def contestant(*lines: str) -> tuple[Contestant, Child]:
        child = Child(Script("parent.recv()", "parent.send({'seconds': 1.0})", "parent.recv()", *lines), {}, log=log)
        return Contestant("theirs", child, log=log, patience=3.0), child

    log = tmp_path / "log"
    (late, hung), (dead, ended) = contestant(HANG), contestant("sys.exit('no memory')")
    with late, dead:
        assert late.turn(TASK) == dead.turn(TASK) == {"seconds": 1.0}
        assert [late.turn(TASK), late.turn(TASK), dead.turn(TASK), dead.turn(TASK)] == [None] * 4
    assert late.error == "no answer within 3 s at 8 tokens"
    assert dead.error is not None
    assert dead.error.startswith("failed with code 1: no memory (log: ")
    assert [hung.join(), ended.join()] == [-signal.SIGKILL, 1]


def test_a_race_that_is_stopped_leaves_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    children: list[Child] = []

    def start(order: dict[str, Any], *, logs: Path, patience: float) -> Contestant:
        log = logs / "log"
        children.append(Child(Script("parent.recv()", HANG), {}, log=log))
        return Contestant(order["who"], children[-1], log=log, patience=patience)

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("crossover.benchmarks.operations.models.contestant", start)
    monkeypatch.setattr(Contestant, "warm_up", stop)
    config = KernelsConfig(archs=("gpt2",), out=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        next(training_rows(config, threads=[1], logs=tmp_path, status=StatusLine()))
    assert len(children) >= 2
    assert [child.join() for child in children] == [-signal.SIGKILL] * len(children)


@pytest.fixture
def only_plain_peers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if nothing else were installed."""
    monkeypatch.setattr("crossover.benchmarks.operations.peers.importlib.util.find_spec", lambda name: None)
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("only_plain_peers")
def test_ours_another_checkout_and_a_peer_train_by_turns_and_ours_decodes_beside_its_floor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contestants, "_MIN_TURNS", 1)
    config = KernelsConfig(
        archs=("gpt2",), params=(60_000,), decode_params=(60_000,), model_lengths=(8,), against=ROOT, time_box=1e-6
    )
    options = {"threads": [1], "logs": tmp_path, "status": StatusLine()}
    (training,) = training_rows(config, **options)
    (decoding,) = decoding_rows(dataclasses.replace(config, against=None), **options)
    assert (training["errors"], decoding["errors"]) == ({}, {})
    assert training["seconds"].keys() == {OURS, BEFORE, "plain GPT"}
    assert training["n_params"] == training["facts"][BEFORE]["n_params"]
    assert (training["seq_len"], training["batch_size"], training["clock"]) == (8, 512, "cpu")
    assert decoding["seconds"].keys() == {OURS, "torch.mv", "floor"}
    assert (decoding["facts"][OURS]["decode"], decoding["facts"][OURS]["why"]) == ("compiled", None)
    assert decoding["times_floor"] == pytest.approx(1 / decoding["ratios"]["floor"])
    for row in (training, decoding):
        assert all(seconds > 0 for seconds in row["seconds"].values())
        assert row["n_params"] == pytest.approx(60_000, rel=0.02)
