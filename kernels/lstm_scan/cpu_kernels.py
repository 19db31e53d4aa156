"""The recurrence of the LSTM and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is ROWS rows of the batch; the tasks of a thread walk the sequence together, so that a block of the recurrent
weight that has been brought into the first-level cache serves all their rows. Rows do not mix, so any number of threads
gives the same bits, and no thread ever waits for another.

The recurrent product is written out here because a call of a BLAS for every token costs half as much again: it packs
the same weight each time. Weights come packed, (blocks, K, TILE): the TILE columns of a block side by side for each of
the K numbers that they multiply. In forward these are the four gates of LANES cells, in backward TILE cells.
"""

from __future__ import annotations

import numpy as np

from ..simd import (
    LANES,
    STATES,
    TILE,
    Bools2,
    Floats3,
    Floats4,
    called,
    full,
    kernel,
    load,
    load_first,
    load_tile,
    sigmoid,
    store,
    store_first,
    tanh,
)

GATES = 4
"""Input, forget, cell and output gate, in this order."""

assert GATES == STATES

ROWS = 4
"""Rows of a task: as many tiles of sums as fit the registers of AVX-512 and NEON; AVX2 has half as many."""

_DEPTH = 64
"""Rows of a weight block that are used on all rows of the batch before the next: 16 KiB."""


@called
def _multiply(left, weight, sums):
    """sums[r, block * TILE + c] = sum_k left[r, k] weight[block, k, c]."""
    K = weight.shape[1]
    sums[:] = 0.0
    for block in range(weight.shape[0]):
        column = block * TILE
        for first in range(0, K, _DEPTH):
            last = min(first + _DEPTH, K)
            for r in range(0, len(left), ROWS):
                sum0, sum1 = load_tile(sums, (r, column)), load_tile(sums, (r + 1, column))
                sum2, sum3 = load_tile(sums, (r + 2, column)), load_tile(sums, (r + 3, column))
                for k in range(first, last):
                    w = load_tile(weight, (block, k, 0))
                    sum0, sum1 = sum0 + left[r, k] * w, sum1 + left[r + 1, k] * w
                    sum2, sum3 = sum2 + left[r + 2, k] * w, sum3 + left[r + 3, k] * w
                store(sums, (r, column), sum0)
                store(sums, (r + 1, column), sum1)
                store(sums, (r + 2, column), sum2)
                store(sums, (r + 3, column), sum3)


@called
def _scratch(rows, columns):
    return np.zeros((rows, columns), np.float32)


@kernel
def forward(
    first: int,
    last: int,
    gates: Floats4,
    weight: Floats3,
    initial_state: Floats3,
    starts: Bools2,
    y: Floats3,
    state: Floats3,
    activated: Floats4,
    cells: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        gates: (B, L, 4, E).
        weight: recurrent weight, packed: (cells / LANES, E, TILE).
        initial_state: (B, 2, E).
        starts: (B, L).
        y: (B, L, E), written.
        state: (B, 2, E), written.
        activated: the gates as they act, (B, L, 4, E), written; empty if no backward is to come.
        cells: (B, L, E), written; empty if no backward is to come.
    """
    batch, L, E = y.shape
    b0 = first * ROWS
    n_rows, keep = min(last * ROWS, batch) - b0, activated.shape[0] > 0
    padded = (last - first) * ROWS
    hs, cs = _scratch(padded, weight.shape[0] * LANES), _scratch(padded, weight.shape[0] * LANES)
    sums = _scratch(padded, weight.shape[0] * TILE)
    for r in range(n_rows):
        for e in range(E):
            hs[r, e], cs[r, e] = initial_state[b0 + r, 0, e], initial_state[b0 + r, 1, e]
    for t in range(L):
        for r in range(n_rows):
            if starts[b0 + r, t]:
                hs[r], cs[r] = 0.0, 0.0
        _multiply(hs, weight, sums)
        for r in range(n_rows):
            b = b0 + r
            for e in range(0, E, LANES):
                n, column = E - e, e * GATES
                i = sigmoid(load(sums, (r, column)) + load_first(gates, (b, t, 0, e), n))
                f = sigmoid(load(sums, (r, column + LANES)) + load_first(gates, (b, t, 1, e), n))
                g = tanh(load(sums, (r, column + 2 * LANES)) + load_first(gates, (b, t, 2, e), n))
                o = sigmoid(load(sums, (r, column + 3 * LANES)) + load_first(gates, (b, t, 3, e), n))
                c = f * load(cs, (r, e)) + i * g
                h = o * tanh(c)
                store(cs, (r, e), c)
                store(hs, (r, e), h)
                store_first(y, (b, t, e), h, n)
                if keep:
                    store_first(activated, (b, t, 0, e), i, n)
                    store_first(activated, (b, t, 1, e), f, n)
                    store_first(activated, (b, t, 2, e), g, n)
                    store_first(activated, (b, t, 3, e), o, n)
                    store_first(cells, (b, t, e), c, n)
    for r in range(n_rows):
        for e in range(E):
            state[b0 + r, 0, e], state[b0 + r, 1, e] = hs[r, e], cs[r, e]


@kernel
def backward(
    first: int,
    last: int,
    grad_y: Floats3,
    grad_state: Floats3,
    weight: Floats3,
    initial_state: Floats3,
    starts: Bools2,
    activated: Floats4,
    cells: Floats3,
    grad_gates: Floats4,
    grad_initial_state: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass, from the last token to the first.

    Args:
        first: first task.
        last: the task after the last.
        grad_y: (B, L, E).
        grad_state: (B, 2, E).
        weight: recurrent weight, packed: (cells / TILE, 4 padded E, TILE).
        initial_state: (B, 2, E).
        starts: (B, L).
        activated: as forward wrote it.
        cells: as forward wrote it.
        grad_gates: (B, L, 4, E), written; the gradient of the weight is its product with the outputs one token before.
        grad_initial_state: (B, 2, E), written.
    """
    batch, L, E = grad_y.shape
    b0 = first * ROWS
    n_rows = min(last * ROWS, batch) - b0
    padded, width = (last - first) * ROWS, weight.shape[1] // GATES
    # gradients of the gates before their functions, of y and of c, the latter two as later tokens give them
    slopes, grad_hs = _scratch(padded, GATES * width), _scratch(padded, weight.shape[0] * TILE)
    grad_cs, cs = _scratch(padded, width), _scratch(padded, width)
    for r in range(n_rows):
        for e in range(E):
            grad_hs[r, e], grad_cs[r, e] = grad_state[b0 + r, 0, e], grad_state[b0 + r, 1, e]
            cs[r, e] = initial_state[b0 + r, 1, e]
    for t in range(L - 1, -1, -1):
        for r in range(n_rows):
            b = b0 + r
            start = starts[b, t]
            for e in range(0, E, LANES):
                n = E - e
                i, f = load_first(activated, (b, t, 0, e), n), load_first(activated, (b, t, 1, e), n)
                g, o = load_first(activated, (b, t, 2, e), n), load_first(activated, (b, t, 3, e), n)
                tanh_c = tanh(load_first(cells, (b, t, e), n))
                before = load(cs, (r, e)) if t == 0 else load_first(cells, (b, t - 1, e), n)
                if start:
                    before = full(0.0)
                grad_h = load(grad_hs, (r, e)) + load_first(grad_y, (b, t, e), n)
                grad_c = load(grad_cs, (r, e)) + grad_h * o * (1.0 - tanh_c * tanh_c)
                grad_i = grad_c * g * (i * (1.0 - i))
                grad_f = grad_c * before * (f * (1.0 - f))
                grad_g = grad_c * i * (1.0 - g * g)
                grad_o = grad_h * tanh_c * (o * (1.0 - o))
                store(slopes, (r, e), grad_i)
                store(slopes, (r, width + e), grad_f)
                store(slopes, (r, 2 * width + e), grad_g)
                store(slopes, (r, 3 * width + e), grad_o)
                store(grad_cs, (r, e), full(0.0) if start else grad_c * f)
                store_first(grad_gates, (b, t, 0, e), grad_i, n)
                store_first(grad_gates, (b, t, 1, e), grad_f, n)
                store_first(grad_gates, (b, t, 2, e), grad_g, n)
                store_first(grad_gates, (b, t, 3, e), grad_o, n)
        _multiply(slopes, weight, grad_hs)
        for r in range(n_rows):
            if starts[b0 + r, t]:
                grad_hs[r] = 0.0
    for r in range(n_rows):
        for e in range(E):
            grad_initial_state[b0 + r, 0, e], grad_initial_state[b0 + r, 1, e] = grad_hs[r, e], grad_cs[r, e]
