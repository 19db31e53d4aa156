"""Channels in blocks of LANES, for the scans: which task takes which, and how they are read and written.

Scratch arrays are indexed [block, state * LANES + channel] or [block, token, channel], where states are padded to a
multiple of STATES.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from .parallel import floats, run
from .simd import LANES, STATES, TILE, Floats1, Floats2, called, kernel, load, load_first, store, store_first

SUM_WIDTH = 4096
"""Columns a task of `sum_parts` adds up."""

TASKS = 16
"""Tasks to aim at: enough for many threads, few enough to read long pieces of rows and to share the work on B and C."""

MAX_BLOCKS = 16
"""Largest number of blocks of a task: its scratch stays in the second-level cache."""


def blocks_per_task(batch: int, E: int) -> int:
    """Channel blocks that a task takes together; independent of the number of threads, as the bits depend on it."""
    n_blocks = -(-E // LANES)
    return min(n_blocks, MAX_BLOCKS, max(2, batch * n_blocks // TASKS))


def tasks_per_row(batch: int, E: int) -> int:
    """Tasks that share a row of the batch."""
    return -(-E // (LANES * blocks_per_task(batch, E)))


def padded(N: int) -> int:
    """Length of the axis [state * LANES + channel] of N states."""
    return TILE * -(-N // STATES)


@called
def scratch(n_blocks, n_tokens):
    """Zeros for the [block, token, channel] of a task."""
    return np.zeros((n_blocks, n_tokens, LANES), np.float32)


@called
def pack(matrix, e0, scratch, scale):
    """scratch[n * LANES + lane] = scale * matrix[e0 + lane, n], zero where there is no such channel or state."""
    E, N = matrix.shape
    for n in range(len(scratch) // LANES):
        for lane in range(LANES):
            value = matrix[e0 + lane, n] if n < N and e0 + lane < E else np.float32(0.0)
            # NaN as IEEE arithmetic makes it: exp2 would misread the low bits of another
            scratch[n * LANES + lane] = scale * value if value == value else np.float32(np.nan)


@called
def unpack(scratch, e0, matrix):
    """matrix[e0 + lane, n] = scratch[n * LANES + lane]."""
    E, N = matrix.shape
    for lane in range(min(LANES, E - e0)):
        for n in range(N):
            matrix[e0 + lane, n] = scratch[n * LANES + lane]


@called
def read_tokens(source, b, t0, n_tokens, scratch):
    """scratch[t, n] = source[b, t0 + t, n], with zeros beyond: what another task left there may be no number."""
    N = source.shape[2]
    whole = N // LANES * LANES
    for t in range(n_tokens):
        for n in range(0, whole, LANES):
            store(scratch, (t, n), load(source, (b, t0 + t, n)))
        for n in range(whole, N):
            scratch[t, n] = source[b, t0 + t, n]
        for n in range(N, scratch.shape[1]):
            scratch[t, n] = 0.0


@called
def write_tokens(scratch, target, b, t0, n_tokens):
    """The reverse of `read_tokens`."""
    N = target.shape[2]
    whole = N // LANES * LANES
    for t in range(n_tokens):
        for n in range(0, whole, LANES):
            store(target, (b, t0 + t, n), load(scratch, (t, n)))
        for n in range(whole, N):
            target[b, t0 + t, n] = scratch[t, n]


@called
def read(source, b, t0, n_tokens, e, n_blocks, scratch):
    """scratch[block, t, lane] = source[b, t0 + t, e + block * LANES + lane], token by token, as memory has it."""
    n_whole = min(n_blocks, (source.shape[2] - e) // LANES)
    for t in range(n_tokens):
        for block in range(n_whole):
            store(scratch, (block, t, 0), load(source, (b, t0 + t, e + block * LANES)))
        if n_whole < n_blocks:
            rest = e + n_whole * LANES
            store(scratch, (n_whole, t, 0), load_first(source, (b, t0 + t, rest), source.shape[2] - rest))


@called
def write(scratch, target, b, t0, n_tokens, e, n_blocks):
    """The reverse of `read`."""
    n_whole = min(n_blocks, (target.shape[2] - e) // LANES)
    for t in range(n_tokens):
        for block in range(n_whole):
            store(target, (b, t0 + t, e + block * LANES), load(scratch, (block, t, 0)))
        if n_whole < n_blocks:
            rest = e + n_whole * LANES
            store_first(target, (b, t0 + t, rest), load(scratch, (n_whole, t, 0)), target.shape[2] - rest)


@kernel
def sum_parts(first: int, last: int, parts: Floats2, result: Floats1) -> None:
    """result[i] = the sum of parts[:, i], taken in order, for the columns first * SUM_WIDTH .. last * SUM_WIDTH - 1."""
    stop = min(last * SUM_WIDTH, result.shape[0])
    for i in range(first * SUM_WIDTH, stop):
        result[i] = parts[0, i]
    for p in range(1, parts.shape[0]):
        for i in range(first * SUM_WIDTH, stop):
            result[i] += parts[p, i]


def sum_of(parts: Tensor) -> Tensor:
    """The sum over the first axis, always in the same order."""
    n = parts[0].numel()  # and not len(result), which torch.compile would take for a constant
    result = floats(n)
    run(sum_parts, -(-n // SUM_WIDTH), parts.flatten(1), result)
    return result.view(parts.shape[1:])
