"""The short convolution and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and up to WIDTH channels. It walks the sequence token by token, so that memory is read
and written in order and the K rows in use stay in the first-level cache. Tasks share no output, so any number of
threads gives the same bits.

Taps are counted back from the current token: weight[lag] multiplies the input `lag` tokens ago.
"""

from __future__ import annotations

import numpy as np

from ..simd import LANES, Bools2, Floats1, Floats2, Floats3, called, inline, kernel, load, sigmoid, store

WIDTH = 16 * LANES
"""Channels of a task."""


@called
def _read(row, e0, scratch):
    """scratch[i] = row[e0 + i], as far as there are channels."""
    for i in range(min(WIDTH, len(row) - e0)):
        scratch[i] = row[e0 + i]


@called
def _write(scratch, row, e0):
    """row[e0 + i] = scratch[i], as far as there are channels."""
    for i in range(min(WIDTH, len(row) - e0)):
        row[e0 + i] = scratch[i]


@called
def _start(past, b, weight, bias, e0, xs, taps, biases):
    """Fills a task's scratch: weights, bias, and the inputs before the first token in their places of the ring xs."""
    K = len(weight)
    _read(bias, e0, biases)
    for k in range(K):
        _read(weight[k], e0, taps[k])
    for k in range(K - 1):
        _read(past[b, k], e0, xs[(k + 1) % K])


@inline
def _turn(t, K, slots):
    """slots[lag] = the place in a ring of what was there `lag` tokens ago."""
    for lag in range(K):
        slots[lag] = (t - lag) % K


@inline
def _convolve(xs, taps, biases, slots, e, n_taps):
    s = load(biases, e)
    for lag in range(n_taps):
        s = s + load(xs, (slots[lag], e)) * load(taps, (lag, e))
    return s


@kernel
def forward(
    first: int,
    last: int,
    x: Floats3,
    past: Floats3,
    weight: Floats2,
    bias: Floats1,
    silu: bool,
    starts: Bools2,
    y: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        x: (B, L, E).
        past: the K - 1 inputs before, (B, K-1, E).
        weight: (K, E), by lag.
        bias: (E,).
        silu: whether y passes through SiLU.
        starts: (B, L).
        y: (B, L, E), written.
    """
    L, E, K = x.shape[1], x.shape[2], weight.shape[0]
    groups = -(-E // WIDTH)
    taps, xs = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
    biases, ys, slots = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32), np.empty(K, np.int64)
    for task in range(first, last):
        b, e0 = task // groups, task % groups * WIDTH
        _start(past, b, weight, bias, e0, xs, taps, biases)
        n_taps = K - 1
        for t in range(L):
            n_taps = 1 if starts[b, t] else min(n_taps + 1, K)
            _turn(t, K, slots)
            _read(x[b, t], e0, xs[slots[0]])
            for e in range(0, min(WIDTH, E - e0), LANES):
                s = _convolve(xs, taps, biases, slots, e, n_taps)
                if silu:
                    s = s * sigmoid(s)
                store(ys, e, s)
            _write(ys, y[b, t], e0)


@kernel
def backward(
    first: int,
    last: int,
    grad_y: Floats3,
    x: Floats3,
    past: Floats3,
    weight: Floats2,
    bias: Floats1,
    silu: bool,
    starts: Bools2,
    grad_x: Floats3,
    grad_past: Floats3,
    grad_weight: Floats3,
    grad_bias: Floats2,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass; what SiLU saw is computed again.

    Writes grad_x (B, L, E), grad_past (B, K-1, E), and each row's part of the sums over the batch: grad_weight
    (B, K, E) and grad_bias (B, E).
    """
    L, E, K = x.shape[1], x.shape[2], weight.shape[0]
    groups = -(-E // WIDTH)
    taps, xs = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)
    biases, gs = np.zeros(WIDTH, np.float32), np.zeros(WIDTH, np.float32)
    grad_xs, grad_taps = np.zeros((K, WIDTH), np.float32), np.zeros((K, WIDTH), np.float32)  # the former a ring, as xs
    grad_biases, slots = np.zeros(WIDTH, np.float32), np.empty(K, np.int64)
    for task in range(first, last):
        b, e0 = task // groups, task % groups * WIDTH
        _start(past, b, weight, bias, e0, xs, taps, biases)
        grad_xs[:], grad_taps[:], grad_biases[:] = 0.0, 0.0, 0.0
        n_taps = K - 1
        for t in range(L + K - 1):  # after the last token the ring is written out
            _turn(t, K, slots)
            if t < L:
                n_taps = 1 if starts[b, t] else min(n_taps + 1, K)
                _read(x[b, t], e0, xs[slots[0]])
                _read(grad_y[b, t], e0, gs)
                for e in range(0, min(WIDTH, E - e0), LANES):
                    g = load(gs, e)
                    if silu:
                        s = _convolve(xs, taps, biases, slots, e, n_taps)
                        p = sigmoid(s)
                        g = g * (p * (1.0 + s * (1.0 - p)))
                    store(grad_biases, e, load(grad_biases, e) + g)
                    for lag in range(n_taps):
                        i = slots[lag]
                        store(grad_taps, (lag, e), load(grad_taps, (lag, e)) + g * load(xs, (i, e)))
                        store(grad_xs, (i, e), load(grad_xs, (i, e)) + g * load(taps, (lag, e)))
            oldest = t - K + 1
            done = grad_xs[slots[K - 1]]
            _write(done, grad_x[b, oldest] if oldest >= 0 else grad_past[b, K - 1 + oldest], e0)
            done[:] = 0.0
        for k in range(K):
            _write(grad_taps[k], grad_weight[b, k], e0)
        _write(grad_biases, grad_bias[b], e0)
