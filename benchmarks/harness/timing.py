"""Timing: to the end of all work that a device was given, repeated within a box of time, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import torch

__all__ = ["clock_of", "quantiles", "rounds", "take_turns", "timed"]


def clock_of(n_threads: int) -> Callable[[], float]:
    """The clock of work on so many threads of a CPU, in seconds.

    On one thread it is the time that the process has had a processor, which other work on the machine does not lengthen
    except through caches and memory; several threads wait for each other, and only the time on the wall tells of it.
    """
    return time.process_time if n_threads == 1 else time.perf_counter


def timed(device: torch.device, work: Callable[[], object], *, clock: Callable[[], float] = time.perf_counter) -> float:
    """Seconds that `work` takes by a clock, with what it leaves running on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begin = clock()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return clock() - begin


def rounds(seconds: float, *, least: int = 1, clock: Callable[[], float] = time.perf_counter) -> Iterator[int]:
    """Counts rounds, from 0 on, until `seconds` have passed and `least` rounds are made."""
    begin, n = clock(), 0
    while n < least or clock() - begin < seconds:
        yield n
        n += 1


def take_turns(works: Mapping[str, Callable[[], float]], *, seconds: float, least: int = 2) -> dict[str, list[float]]:
    """Lets works take turns, so that whatever else the machine does slows all alike.

    Args:
        works: functions by name; each returns the seconds that count, and has been warmed up.
        seconds: spent on all of them together, longer where `least` rounds take longer.
        least: the fewest turns of each.

    Returns:
        What each returned, turn by turn.
    """
    found: dict[str, list[float]] = {name: [] for name in works}
    for _ in rounds(seconds, least=least):
        for name, work in works.items():
            found[name].append(work())
    return found


def quantiles(values: Sequence[float], at: Sequence[float]) -> list[float]:
    """The quantiles of measurements, between two of them where none lies there."""
    return np.quantile(values, at).tolist()
