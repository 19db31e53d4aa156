"""The recurrence of the LSTM and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is a row of the batch; the tasks of a thread walk the sequence together, so that a panel of the recurrent weight
that has been brought near serves all their rows. Rows do not mix, so any number of threads gives the same bits, and no
thread ever waits for another.

The recurrent product is written out (kernels/products.py) because a call of a BLAS for every token packs the same
weight each time. Its columns are in forward the four gates of LANES cells, then those of the next ones, and in backward
the cells.
"""

from __future__ import annotations

import numpy as np

from ..products import multiply
from ..simd import (
    LANES,
    Bools2,
    Floats3,
    Floats4,
    called,
    full,
    kernel,
    load,
    load_first,
    sigmoid,
    store,
    store_first,
    tanh,
)

GATES = 4
"""Input, forget, cell and output gate, in this order."""


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
        weight: recurrent weight, packed: (panels, E, columns), where a column is [cell / LANES, gate, cell % LANES].
        initial_state: (B, 2, E).
        starts: (B, L).
        y: (B, L, E), written.
        state: (B, 2, E), written.
        activated: the gates as they act, (B, L, 4, E), written; empty if no backward is to come.
        cells: (B, L, E), written; empty if no backward is to come.
    """
    _, L, E = y.shape
    n_rows, keep = last - first, activated.shape[0] > 0
    width = -(-E // LANES) * LANES
    hs, cs = _scratch(n_rows, width), _scratch(n_rows, width)
    sums = _scratch(n_rows, weight.shape[0] * weight.shape[2])
    for r in range(n_rows):
        for e in range(E):
            hs[r, e], cs[r, e] = initial_state[first + r, 0, e], initial_state[first + r, 1, e]
    for t in range(L):
        for r in range(n_rows):
            if starts[first + r, t]:
                hs[r], cs[r] = 0.0, 0.0
        multiply(hs, weight, sums)
        for r in range(n_rows):
            b = first + r
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
            state[first + r, 0, e], state[first + r, 1, e] = hs[r, e], cs[r, e]


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
        weight: recurrent weight, packed: (panels, 4 width, columns), where width is E up to a multiple of LANES.
        initial_state: (B, 2, E).
        starts: (B, L).
        activated: as forward wrote it.
        cells: as forward wrote it.
        grad_gates: (B, L, 4, E), written; the gradient of the weight is its product with the outputs one token before.
        grad_initial_state: (B, 2, E), written.
    """
    _, L, E = grad_y.shape
    n_rows, width = last - first, weight.shape[1] // GATES
    # gradients of the gates before their functions, of y and of c, the latter two as later tokens give them
    slopes, grad_hs = _scratch(n_rows, GATES * width), _scratch(n_rows, weight.shape[0] * weight.shape[2])
    grad_cs, cs = _scratch(n_rows, width), _scratch(n_rows, width)
    for r in range(n_rows):
        for e in range(E):
            grad_hs[r, e], grad_cs[r, e] = grad_state[first + r, 0, e], grad_state[first + r, 1, e]
            cs[r, e] = initial_state[first + r, 1, e]
    for t in range(L - 1, -1, -1):
        for r in range(n_rows):
            b = first + r
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
        multiply(slopes, weight, grad_hs)
        for r in range(n_rows):
            if starts[first + r, t]:
                grad_hs[r] = 0.0
    for r in range(n_rows):
        for e in range(E):
            grad_initial_state[first + r, 0, e], grad_initial_state[first + r, 1, e] = grad_hs[r, e], grad_cs[r, e]
