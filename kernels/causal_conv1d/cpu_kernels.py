"""The short convolution and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and a span of channels. It walks the sequence token by token, so that memory is read and
written in order and the K rows in use stay in the first-level cache. The last vector of a span ends where the span
does: it does some channels of the one before it again, with the same result. Tasks share no output, so any number of
threads gives the same bits.

Taps are counted back from the current token: weight[lag] multiplies the input `lag` tokens ago.
"""

from __future__ import annotations

import numpy as np

from ..simd import LANES, Bools2, Floats1, Floats2, Floats3, called, full, inline, kernel, load, sigmoid, store

WIDTH = 16 * LANES
"""Most channels of a task, whose spans are about equal: none has fewer than LANES unless all channels are fewer."""


@called
def _span(part, E):
    """The first channel of a task, and the one after its last."""
    n_parts = -(-E // WIDTH)
    width = -(-E // (n_parts * LANES)) * LANES
    return part * width, min(part * width + width, E)


@called
def _joined(past, x):
    """The inputs before the first token and those of the first tokens, [K - 1 + token, channel]."""
    n = len(past)
    rows = np.empty((2 * n, x.shape[1]), np.float32)
    for i in range(n):
        rows[i] = past[i]
    for i in range(min(n, len(x))):
        rows[n + i] = x[i]
    return rows


@inline
def _convolve(x, t, weight, bias, e, n_taps):
    s = load(bias, e)
    if n_taps == 4:
        s = s + load(x, (t, e)) * load(weight, (0, e)) + load(x, (t - 1, e)) * load(weight, (1, e))
        return s + load(x, (t - 2, e)) * load(weight, (2, e)) + load(x, (t - 3, e)) * load(weight, (3, e))
    for lag in range(n_taps):
        s = s + load(x, (t - lag, e)) * load(weight, (lag, e))
    return s


@called
def _token(x, t, weight, bias, silu, n_taps, first, last, y):
    """Computes one token, which is x[t] and has `n_taps` inputs."""
    for start in range(first, last, LANES):
        e = min(start, last - LANES)
        s = _convolve(x, t, weight, bias, e, n_taps)
        if silu:
            s = s * sigmoid(s)
        store(y, e, s)


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
        x: (B, L, E), where E >= LANES.
        past: the K - 1 inputs before, (B, K-1, E).
        weight: (K, E), by lag.
        bias: (E,).
        silu: whether y passes through SiLU.
        starts: (B, L).
        y: (B, L, E), written.
    """
    L, E, K = x.shape[1], x.shape[2], weight.shape[0]
    n_parts = -(-E // WIDTH)
    for task in range(first, last):
        b = task // n_parts
        e0, e1 = _span(task % n_parts, E)
        rows, joined, n_taps = x[b], _joined(past[b], x[b]), K - 1
        for t in range(L):
            n_taps = 1 if starts[b, t] else min(n_taps + 1, K)
            if t < K - 1:
                _token(joined, K - 1 + t, weight, bias, silu, n_taps, e0, e1, y[b, t])
            else:
                _token(rows, t, weight, bias, silu, n_taps, e0, e1, y[b, t])


@called
def _differentiate(grad_y, x, t, weight, bias, silu, n_taps, first, last, grads, grad_weight, grad_bias):
    """The gradient of a token's sum to `grads`, and what it adds to those of weight and bias; arguments as `_token`."""
    for start in range(first, last, LANES):
        e, i = min(start, last - LANES), start - first
        g = load(grad_y, e)
        if silu:
            s = _convolve(x, t, weight, bias, e, n_taps)
            p = sigmoid(s)
            g = g * (p * (1.0 + s * (1.0 - p)))
        store(grads, i, g)
        store(grad_bias, i, load(grad_bias, i) + g)
        for lag in range(n_taps):
            store(grad_weight, (lag, i), load(grad_weight, (lag, i)) + g * load(x, (t - lag, e)))


@called
def _spread_back(grads, weight, slots, begin, end, first, last, grad_x):
    """grad_x = the sum over lag = begin .. end - 1 of weight[lag] and the gradient of what came `lag` tokens later."""
    for start in range(first, last, LANES):
        e, i = min(start, last - LANES), start - first
        s = full(0.0)
        for lag in range(begin, end):
            s = s + load(grads, (slots[lag], i)) * load(weight, (lag, e))
        store(grad_x, e, s)


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
    """Does the tasks first .. last - 1 of the backward pass, from the last token to the first.

    What SiLU saw is computed again. Writes grad_x (B, L, E), grad_past (B, K-1, E), and each row's part of the sums
    over the batch: grad_weight (B, K, E) and grad_bias (B, E).
    """
    L, E, K = x.shape[1], x.shape[2], weight.shape[0]
    n_parts = -(-E // WIDTH)
    grads = np.zeros((K, WIDTH), np.float32)  # of the last K tokens' sums, a ring
    grad_taps, grad_biases = np.zeros((K, WIDTH), np.float32), np.zeros(WIDTH, np.float32)
    slots, n_taps = np.zeros(K, np.int64), np.zeros(L, np.int64)
    for task in range(first, last):
        b = task // n_parts
        e0, e1 = _span(task % n_parts, E)
        rows, joined = x[b], _joined(past[b], x[b])
        grad_taps[:], grad_biases[:] = 0, 0
        n = K - 1
        for t in range(L):
            n = 1 if starts[b, t] else min(n + 1, K)
            n_taps[t] = n
        n = 0  # tokens that read the input of token t, which come before the next start
        for t in range(L - 1, -K, -1):
            n = 1 if t + 1 < L and starts[b, max(t + 1, 0)] and t >= -1 else min(n + 1, K)
            for lag in range(K):
                slots[lag] = (t + lag) % K
            if t >= K - 1:
                _differentiate(
                    grad_y[b, t], rows, t, weight, bias, silu, n_taps[t], e0, e1,
                    grads[slots[0]], grad_taps, grad_biases,
                )  # fmt: skip
            elif t >= 0:
                _differentiate(
                    grad_y[b, t], joined, K - 1 + t, weight, bias, silu, n_taps[t], e0, e1,
                    grads[slots[0]], grad_taps, grad_biases,
                )  # fmt: skip
            if t >= 0:
                _spread_back(grads, weight, slots, 0, n, e0, e1, grad_x[b, t])
            else:
                _spread_back(grads, weight, slots, -t, min(n, L - t), e0, e1, grad_past[b, K - 1 + t])
        for start in range(e0, e1, LANES):
            e, i = min(start, e1 - LANES), start - e0
            store(grad_bias, (b, e), load(grad_biases, i))
            for lag in range(K):
                store(grad_weight, (b, lag, e), load(grad_taps, (lag, i)))
