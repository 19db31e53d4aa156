import time

import pytest
import torch
from crossover.benchmarks.harness.timing import quantiles, rounds, take_turns, timed

pytestmark = pytest.mark.quick

CPU = torch.device("cpu")


@pytest.mark.parametrize(("seconds", "n_rounds"), [(2.0, 5), (3.0, 4), (100.0, 3)])
def test_rounds_fill_the_box_and_slow_ones_get_the_fewest(seconds: float, n_rounds: int) -> None:
    now, numbers = [0.0], []
    for number in rounds(10, least=3, clock=lambda: now[0]):
        now[0] += seconds
        numbers.append(number)
    assert numbers == list(range(n_rounds))


def test_a_box_without_time_has_its_fewest_rounds() -> None:
    assert list(rounds(0.0)) == [0]
    assert list(rounds(0.0, least=0)) == []


def test_contestants_take_turns_until_the_box_is_full() -> None:
    order: list[str] = []

    def work(name: str) -> float:
        order.append(name)
        time.sleep(0.001)
        return len(order)

    works = {name: lambda name=name: work(name) for name in "abc"}
    seconds = take_turns(works, seconds=0.02)
    assert order == list("abc") * len(seconds["a"])
    assert seconds == {name: [float(n) for n in range(i, len(order) + 1, 3)] for i, name in enumerate("abc", start=1)}
    assert len(order) > 6
    assert all(len(turns) == 2 for turns in take_turns(works, seconds=0.0).values())


def test_the_clock_waits_for_what_a_gpu_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    happened: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", happened.append)
    gpu = torch.device("cuda", 1)
    assert timed(gpu, lambda: happened.append("work")) >= 0
    assert happened == [gpu, "work", gpu]


def test_seconds_are_those_of_the_work() -> None:
    assert 0.01 <= timed(CPU, lambda: time.sleep(0.01)) < 5


def test_quantiles_lie_between_measurements() -> None:
    assert quantiles([4.0, 1.0, 2.0], (0, 0.25, 0.5, 1)) == [1.0, 1.5, 2.0, 4.0]
    assert quantiles([7.0], (0.1, 0.9)) == [7.0, 7.0]
