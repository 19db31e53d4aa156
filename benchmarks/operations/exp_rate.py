"""Rate at which this processor takes exponentials: the floor of a selective scan, one for each state and token."""

from __future__ import annotations

import functools

import numpy as np
import torch

from ...kernels.simd import TILE, Floats1, exp2, kernel, load_tile, store
from ..harness.timing import rounds, timed

__all__ = ["seconds_per_exp"]

_N = 16 * TILE  # at most 8 KB in and out: stays in the first-level cache


@kernel
def _exponentials(x: Floats1, y: Floats1, repeats: int) -> None:
    for _ in range(repeats):
        for i in range(0, len(x), TILE):
            store(y, i, exp2(load_tile(x, i)))


def seconds_per_exp(*, seconds: float = 0.2) -> float:
    """Seconds for one exponential of float32 in registers, on one thread: the best of many short runs."""
    x, y = np.linspace(-8, 0, _N, dtype=np.float32), np.empty(_N, np.float32)
    repeats = 1000
    _exponentials(x, y, 1)  # the first call loads the code
    work = functools.partial(_exponentials, x, y, repeats)
    return min(timed(torch.device("cpu"), work) for _ in rounds(seconds)) / (repeats * _N)
