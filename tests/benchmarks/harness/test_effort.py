import os
import time

import pytest
from crossover.benchmarks.harness import effort as module
from crossover.benchmarks.harness.effort import MAX_FOREIGN_SHARE, MAX_WAITING, Effort

pytestmark = pytest.mark.quick


def effort(*, wall: float, process: float, thread: float, machine: float | None = None) -> Effort:
    """What is found where the clocks went on by so many seconds."""
    found = Effort()
    begin, machine_begin = 3.5, None if machine is None else 70.0
    found._begin = module._Times(begin, begin, begin, machine_begin)
    end = None if machine is None or machine_begin is None else machine_begin + machine
    found._end = module._Times(begin + wall, begin + process, begin + thread, end)
    return found


def test_work_that_sleeps_is_said_to_have_waited_and_work_that_computes_is_charged() -> None:
    with Effort() as asleep:
        time.sleep(0.05)
    assert asleep.is_disturbed(1)
    assert not asleep.is_disturbed(1, on_cpu=False) or (asleep.load or 0) > MAX_FOREIGN_SHARE * (os.cpu_count() or 1)
    with Effort() as busy:
        while time.process_time() - busy._begin.process < 0.05:
            pass
    assert 0.05 <= busy.cpu_seconds < 0.1
    assert asleep.cpu_seconds < 0.05 <= asleep.seconds


def test_work_is_disturbed_beyond_the_stated_share_of_waiting() -> None:
    assert not effort(wall=1.0, process=1.01 / MAX_WAITING, thread=1.0 / MAX_WAITING).is_disturbed(1)
    assert effort(wall=1.0, process=0.99 / MAX_WAITING, thread=0.98 / MAX_WAITING).is_disturbed(1)


def test_a_thread_that_lets_others_work_does_not_count_as_waiting() -> None:
    assert not effort(wall=1.0, process=3.0, thread=0.1).is_disturbed(3)
    assert not effort(wall=1.0, process=1.5, thread=1.0).is_disturbed(3)
    assert effort(wall=1.0, process=1.5, thread=0.2).is_disturbed(3)


def test_the_load_is_what_others_use_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    at_limit = 8 * MAX_FOREIGN_SHARE
    quiet = effort(wall=2.0, process=2.0, thread=2.0, machine=2.0 + 2 * 0.9 * at_limit)
    busy = effort(wall=2.0, process=2.0, thread=2.0, machine=2.0 + 2 * 1.1 * at_limit)
    assert quiet.load == pytest.approx(0.9 * at_limit)
    assert (quiet.is_disturbed(1), busy.is_disturbed(1)) == (False, True)
    assert effort(wall=2.0, process=2.0, thread=2.0).load is None
