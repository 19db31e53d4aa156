"""The short convolution and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and a span of channels. It walks the sequence token by token, or with the usual number of
taps by a few tokens in registers, so that memory is read and written in order and the K rows in use stay in the
first-level cache. The last vector of a span ends where the span does: it does some channels of the one before it again,
with the same result. Tasks share no output, so any number of threads gives the same bits.

Taps are counted back from the current token: weight[lag] multiplies the input `lag` tokens ago.
"""

from __future__ import annotations

import numpy as np

from ..simd import LANES, Bools2, Floats1, Floats2, Floats3, called, full, inline, kernel, load, sigmoid, store

USUAL = 4
"""Taps of nearly all convolutions: what such a one remembers from token to token fits in registers."""
TOKENS = 8
"""Tokens for which a vector of channels stays in registers, before it is the next one's turn. More of them would put
rows that are a power of two apart into the same few places of the first-level cache."""
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


@called
def _usual(x, past, weight, bias, silu, starts, first, last, y):
    """The forward pass of one row over the channels first .. last - 1, with USUAL taps."""
    zero = full(0.0)
    for t0 in range(0, len(x), TOKENS):
        for start in range(first, last, LANES):
            e = min(start, last - LANES)
            w0, w1, w2, w3 = load(weight, (0, e)), load(weight, (1, e)), load(weight, (2, e)), load(weight, (3, e))
            b = load(bias, e)
            if t0:
                x1 = load(x, (t0 - 1, e))
                x2 = zero if starts[t0 - 1] else load(x, (t0 - 2, e))
                x3 = zero if starts[t0 - 1] or starts[t0 - 2] else load(x, (t0 - 3, e))
            else:
                x1, x2, x3 = load(past, (2, e)), load(past, (1, e)), load(past, (0, e))
            for t in range(t0, min(t0 + TOKENS, len(x))):
                if starts[t]:
                    x1 = x2 = x3 = zero
                x0 = load(x, (t, e))
                s = b + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3
                if silu:
                    s = s * sigmoid(s)
                store(y, (t, e), s)
                x1, x2, x3 = x0, x1, x2


@inline
def _through_silu(g, s):
    p = sigmoid(s)
    return g * (p * (1.0 + s * (1.0 - p)))


@inline
def _put(grad_x, grad_past, t, begin, e, value):
    """Writes the gradient of input t if it is at or behind `begin`; below zero it is one before the first token."""
    if t >= begin:
        if t < 0:
            store(grad_past, (t + USUAL - 1, e), value)
        else:
            store(grad_x, (t, e), value)


@called
def _usual_backward(
    grad_y, x, past, weight, bias, silu, starts, first, last, grad_x, grad_past, grad_weight, grad_bias, kept
):
    """The backward pass of one row over the channels first .. last - 1, with USUAL taps; `kept` is scratch.

    It goes from the first token to the last: p1, p2 and p3 are what inputs t - 1, t - 2 and t - 3 have of their
    gradients so far. They are whole when a document begins.
    """
    L, zero = len(x), full(0.0)
    begin = 1 - USUAL  # the first input of the document of token t
    for t0 in range(0, L, TOKENS):
        t1, began = min(t0 + TOKENS, L), begin
        inside = t1 == t0 + TOKENS and t0 - 3 >= max(begin, 0)  # all in one document: nothing to be asked of a token
        for t in range(t0, t1):
            inside = inside and not starts[t]
        for start in range(first, last, LANES):
            e, i, begin = min(start, last - LANES), start - first, began
            w0, w1, w2, w3 = load(weight, (0, e)), load(weight, (1, e)), load(weight, (2, e)), load(weight, (3, e))
            b = load(bias, e)
            if t0:
                x1, x2, x3 = load(kept, (0, i)), load(kept, (1, i)), load(kept, (2, i))
                p1, p2, p3 = load(kept, (3, i)), load(kept, (4, i)), load(kept, (5, i))
                d0, d1, d2, d3 = load(kept, (6, i)), load(kept, (7, i)), load(kept, (8, i)), load(kept, (9, i))
                db = load(kept, (10, i))
            else:
                x1, x2, x3 = load(past, (2, e)), load(past, (1, e)), load(past, (0, e))
                p1 = p2 = p3 = d0 = d1 = d2 = d3 = db = zero
            if inside:
                for n in range(TOKENS):
                    t = t0 + n
                    x0, g = load(x, (t, e)), load(grad_y, (t, e))
                    if silu:
                        g = _through_silu(g, b + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3)
                    db, d0, d1, d2, d3 = db + g, d0 + g * x0, d1 + g * x1, d2 + g * x2, d3 + g * x3
                    store(grad_x, (t - 3, e), p3 + g * w3)
                    p1, p2, p3 = g * w0, p1 + g * w1, p2 + g * w2
                    x1, x2, x3 = x0, x1, x2
            else:
                for t in range(t0, t1):
                    if starts[t]:
                        _put(grad_x, grad_past, t - 3, begin, e, p3)
                        _put(grad_x, grad_past, t - 2, begin, e, p2)
                        _put(grad_x, grad_past, t - 1, begin, e, p1)
                        begin = t
                        x1 = x2 = x3 = p1 = p2 = p3 = zero
                    x0, g = load(x, (t, e)), load(grad_y, (t, e))
                    if silu:
                        g = _through_silu(g, b + x0 * w0 + x1 * w1 + x2 * w2 + x3 * w3)
                    db, d0, d1, d2, d3 = db + g, d0 + g * x0, d1 + g * x1, d2 + g * x2, d3 + g * x3
                    _put(grad_x, grad_past, t - 3, begin, e, p3 + g * w3)
                    p1, p2, p3 = g * w0, p1 + g * w1, p2 + g * w2
                    x1, x2, x3 = x0, x1, x2
            if t1 < L:
                for slot, vector in enumerate((x1, x2, x3, p1, p2, p3, d0, d1, d2, d3, db)):
                    store(kept, (slot, i), vector)
            else:
                _put(grad_x, grad_past, L - 3, begin, e, p3)
                _put(grad_x, grad_past, L - 2, begin, e, p2)
                _put(grad_x, grad_past, L - 1, begin, e, p1)
                for lag, vector in enumerate((d0, d1, d2, d3)):
                    store(grad_weight, (lag, e), vector)
                store(grad_bias, e, db)


@inline
def _convolve(x, t, weight, bias, e, n_taps):
    s = load(bias, e)
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
        if K == USUAL:
            _usual(x[b], past[b], weight, bias, silu, starts[b], e0, e1, y[b])
            continue
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
    """Does the tasks first .. last - 1 of the backward pass; unless it has the usual taps, from the last token back.

    What SiLU saw is computed again. Writes grad_x (B, L, E), grad_past (B, K-1, E), and each row's part of the sums
    over the batch: grad_weight (B, K, E) and grad_bias (B, E).
    """
    L, E, K = x.shape[1], x.shape[2], weight.shape[0]
    n_parts = -(-E // WIDTH)
    grads = np.zeros((K, WIDTH), np.float32)  # of the last K tokens' sums, a ring
    grad_taps, grad_biases = np.zeros((K, WIDTH), np.float32), np.zeros(WIDTH, np.float32)
    slots, n_taps = np.zeros(K, np.int64), np.zeros(L, np.int64)
    kept = np.empty((11, WIDTH), np.float32)
    for task in range(first, last):
        b = task // n_parts
        e0, e1 = _span(task % n_parts, E)
        if K == USUAL:
            _usual_backward(
                grad_y[b], x[b], past[b], weight, bias, silu, starts[b], e0, e1,
                grad_x[b], grad_past[b], grad_weight[b], grad_bias[b], kept,
            )  # fmt: skip
            continue
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
