"""Measured limits of this processor, from which bounds of its operations follow: exponentials, products, memory.

All are taken on as many threads as the operation that they are compared with, and are the best of many short runs: a
bound is what the machine can do when nothing else disturbs it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ...kernels.parallel import run
from ...kernels.simd import TILE, Floats1, exp2, full, kernel, load_tile, repeat, store
from ..harness.limits import Limits
from ..harness.timing import clock_of, rounds, timed

__all__ = ["CpuLimits", "measure_limits", "reading"]

_CPU = torch.device("cpu")
_SIZES = tuple(1 << bits for bits in range(14, 29, 2))
"""Bytes of memory whose rates are measured: from what the first-level cache holds to what no cache does."""
_PRODUCT = 1024
"""Rows and columns of the matrices whose product is timed."""
_BLOCK = 2 * TILE
"""Numbers that a task of a kernel here begins and ends at."""
_TIMES = 256
"""Times that the same exponentials are taken in one call."""
_LEAST = 1 << 22
"""Bytes that one call of a kernel goes through at least, so that what the call itself costs does not count."""


@kernel
def _exponentials(first: int, last: int, x: Floats1, y: Floats1, times: int) -> None:
    for _ in range(times):
        for i in range(first * _BLOCK, last * _BLOCK, TILE):
            store(y, i, exp2(load_tile(x, i)))


@kernel
def _read(first: int, last: int, x: Floats1, sums: Floats1, times: int) -> None:
    even = odd = repeat(full(0.0))
    for _ in range(times):
        for i in range(first * _BLOCK, last * _BLOCK, _BLOCK):
            even, odd = even + load_tile(x, i), odd + load_tile(x, i + TILE)
    store(sums, first * TILE, even + odd)  # or the compiler would leave out the loop


@kernel
def _copy(first: int, last: int, x: Floats1, y: Floats1, times: int) -> None:
    for _ in range(times):
        for i in range(first * _BLOCK, last * _BLOCK, TILE):
            store(y, i, load_tile(x, i))


@dataclass(frozen=True, kw_only=True)
class CpuLimits:
    """Rates of this processor on a number of threads, each per second."""

    threads: int
    exps: float
    """Exponentials in registers."""
    flops: float
    """FLOPs of a matrix product in float32."""
    read: Mapping[int, float]
    """Bytes read, by the bytes that are read again and again."""
    copy: Mapping[int, float]
    """Bytes read and bytes written while memory is copied, by the bytes of both."""

    def at(self, n_bytes: float) -> Limits:
        """The limits of a computation on so many bytes: of reading and copying the faster one counts."""
        sizes = np.log(list(self.read))
        rates = (float(np.interp(np.log(n_bytes), sizes, list(rate.values()))) for rate in (self.read, self.copy))
        return Limits(bytes=max(rates), flops=self.flops, exps=self.exps)


def measure_limits(*, seconds: float = 0.05) -> CpuLimits:
    """Measures on torch.get_num_threads() threads, about that long for each rate."""
    n = torch.get_num_threads()

    def rate(amount: float, work: Callable[[], object]) -> float:
        work()  # loads what it needs
        return amount / min(timed(_CPU, work, clock=clock_of(n)) for _ in rounds(seconds, least=3))

    x = torch.linspace(-8, 0, 16 * n * _BLOCK)  # with as many results in the first-level cache of each core
    exponentials = functools.partial(run, _exponentials, 16 * n, x, torch.empty_like(x), _TIMES)
    a, b = (torch.rand(_PRODUCT, _PRODUCT) for _ in range(2))
    return CpuLimits(
        threads=n,
        exps=rate(_TIMES * len(x), exponentials),
        flops=rate(2 * _PRODUCT**3, lambda: a @ b),
        read={size: rate(*reading(size)) for size in _SIZES},
        copy={size: rate(*_copying(size)) for size in _SIZES},
    )


def reading(n_bytes: int) -> tuple[int, Callable[[], object]]:
    """A function that reads so many bytes, again and again, and how many it reads in all."""
    tasks, times = _tasks_and_times(n_bytes)
    x, sums = torch.zeros(tasks * _BLOCK), torch.empty(tasks * TILE)
    return x.nbytes * times, functools.partial(run, _read, tasks, x, sums, times)


def _copying(n_bytes: int) -> tuple[int, Callable[[], object]]:
    """A function that copies half as many bytes again and again, and how many it reads and writes in all."""
    tasks, times = _tasks_and_times(n_bytes // 2)
    x, y = torch.zeros(tasks * _BLOCK), torch.zeros(tasks * _BLOCK)
    return 2 * x.nbytes * times, functools.partial(run, _copy, tasks, x, y, times)


def _tasks_and_times(n_bytes: int) -> tuple[int, int]:
    return max(1, round(n_bytes / (4 * _BLOCK))), -(-_LEAST // n_bytes)
