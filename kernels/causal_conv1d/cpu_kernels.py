"""The short convolution and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and a span of channels. With the usual number of taps it walks the sequence by a few
tokens in registers; otherwise by chunks that are copied near, with the inputs before them, and in which a few tokens at
a time have their sums in registers. The last vector of a span ends where the span does: it does some channels of the
one before it again, with the same result. Tasks share no output, so any number of threads gives the same bits.

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
CHUNK = 64
"""Tokens of a chunk."""
WIDTH = 16 * LANES
"""Most channels of a task, whose spans are about equal: none has fewer than LANES unless all channels are fewer."""

ROW = WIDTH + LANES
"""Numbers of a row of scratch: rows that are a power of two apart would share few places of the first-level cache."""


@called
def _span(part, E):
    """The first channel of a task, and the one after its last."""
    n_parts = -(-E // WIDTH)
    width = -(-E // (n_parts * LANES)) * LANES
    return part * width, min(part * width + width, E)


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


# Any number of taps. Rows of scratch have a span's vectors of channels one after the other.


@called
def _scratch(n_rows):
    return np.zeros((n_rows, ROW), np.float32)


@called
def _copied(source, begin, n, first, last, scratch, row):
    """Rows begin .. begin + n - 1 of the channels first .. last - 1 to scratch."""
    for r in range(n):
        for start in range(first, last, LANES):
            store(scratch, (row + r, start - first), load(source, (begin + r, min(start, last - LANES))))


@called
def _with_past(x, past, t0, n, first, last, scratch):
    """Tokens t0 .. t0 + n - 1 and the K - 1 before them to scratch."""
    n_past = len(past)
    before = max(0, min(n_past, n_past - t0))  # of the rows, those that are in the past
    _copied(past, n_past - before, before, first, last, scratch, 0)
    _copied(x, t0 - n_past + before, n_past - before + n, first, last, scratch, before)


@called
def _count_taps(starts, K, n_taps):
    """Inputs that each token has."""
    n = K - 1
    for t in range(len(starts)):
        n = 1 if starts[t] else min(n + 1, K)
        n_taps[t] = n


@called
def _count_readers(starts, K, n_readers):
    """Tokens that read the input of each token, as if there were more behind the last one.

    Returns: those of the first token, and 0 if a document begins with it.
    """
    n = K
    for t in range(len(starts) - 1, -1, -1):
        n = 1 if t + 1 < len(starts) and starts[t + 1] else min(n + 1, K)
        n_readers[t] = n
    return 0 if starts[0] else n


@called
def _all(counts, t, last, K):
    """Whether TOKENS tokens from t on are there and count K each."""
    return t + TOKENS <= last and counts[t : t + TOKENS].min() >= K


@called
def _sums(x, n, weight, bias, n_taps, t0, K, width, sums):
    """sums[i], without SiLU, of the tokens t0 + i, i < n, whose inputs are x[K - 1 + i] and the rows before it."""
    r = 0
    while r < n:
        q = K - 1 + r
        if _all(n_taps, t0 + r, t0 + n, K):
            for i in range(0, width, LANES):
                s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = load(bias, (0, i))
                for lag in range(K):
                    w, k = load(weight, (lag, i)), q - lag
                    s0, s1 = s0 + load(x, (k, i)) * w, s1 + load(x, (k + 1, i)) * w
                    s2, s3 = s2 + load(x, (k + 2, i)) * w, s3 + load(x, (k + 3, i)) * w
                    s4, s5 = s4 + load(x, (k + 4, i)) * w, s5 + load(x, (k + 5, i)) * w
                    s6, s7 = s6 + load(x, (k + 6, i)) * w, s7 + load(x, (k + 7, i)) * w
                for j, s in enumerate((s0, s1, s2, s3, s4, s5, s6, s7)):
                    store(sums, (r + j, i), s)
            r += TOKENS
        else:
            for i in range(0, width, LANES):
                s = load(bias, (0, i))
                for lag in range(n_taps[t0 + r]):
                    s = s + load(x, (q - lag, i)) * load(weight, (lag, i))
                store(sums, (r, i), s)
            r += 1


@called
def _add_gradients_of_taps(x, n, grads, n_taps, t0, K, width, grad_weight):
    """Adds to grad_weight, by lag, what the tokens of `_sums` with these gradients have for it."""
    r = 0
    while r < n:
        q = K - 1 + r
        if _all(n_taps, t0 + r, t0 + n, K):
            for i in range(0, width, LANES):
                g0, g1, g2, g3 = (
                    load(grads, (r, i)), load(grads, (r + 1, i)), load(grads, (r + 2, i)), load(grads, (r + 3, i)),
                )  # fmt: skip
                g4, g5, g6, g7 = (
                    load(grads, (r + 4, i)), load(grads, (r + 5, i)), load(grads, (r + 6, i)), load(grads, (r + 7, i)),
                )  # fmt: skip
                for lag in range(K):
                    k = q - lag
                    a = load(grad_weight, (lag, i)) + g0 * load(x, (k, i)) + g1 * load(x, (k + 1, i))
                    a = a + g2 * load(x, (k + 2, i)) + g3 * load(x, (k + 3, i))
                    b = g4 * load(x, (k + 4, i)) + g5 * load(x, (k + 5, i))
                    b = b + g6 * load(x, (k + 6, i)) + g7 * load(x, (k + 7, i))
                    store(grad_weight, (lag, i), a + b)
            r += TOKENS
        else:
            for i in range(0, width, LANES):
                g = load(grads, (r, i))
                for lag in range(n_taps[t0 + r]):
                    store(grad_weight, (lag, i), load(grad_weight, (lag, i)) + g * load(x, (q - lag, i)))
            r += 1


@called
def _spread_back(grads, r, weight, begin, end, first, last, grad_x):
    """grad_x = the sum over lag = begin .. end - 1 of weight[lag] and the gradient of what came `lag` tokens later."""
    for start in range(first, last, LANES):
        i, s = start - first, full(0.0)
        for lag in range(begin, end):
            s = s + load(grads, (r + lag, i)) * load(weight, (lag, i))
        store(grad_x, min(start, last - LANES), s)


@called
def _spread_all_back(grads, n, weight, n_readers, t0, K, first, last, grad_x):
    """grad_x of the tokens t0 .. t0 + n - 1: `grads` begins with theirs and goes on behind them."""
    r = 0
    while r < n:
        t = t0 + r
        if _all(n_readers, t, t0 + n, K):
            for start in range(first, last, LANES):
                i, e = start - first, min(start, last - LANES)
                s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = full(0.0)
                for lag in range(K):
                    w, k = load(weight, (lag, i)), r + lag
                    s0, s1 = s0 + load(grads, (k, i)) * w, s1 + load(grads, (k + 1, i)) * w
                    s2, s3 = s2 + load(grads, (k + 2, i)) * w, s3 + load(grads, (k + 3, i)) * w
                    s4, s5 = s4 + load(grads, (k + 4, i)) * w, s5 + load(grads, (k + 5, i)) * w
                    s6, s7 = s6 + load(grads, (k + 6, i)) * w, s7 + load(grads, (k + 7, i)) * w
                for j, s in enumerate((s0, s1, s2, s3, s4, s5, s6, s7)):
                    store(grad_x, (t + j, e), s)
            r += TOKENS
        else:
            _spread_back(grads, r, weight, 0, n_readers[t], first, last, grad_x[t])
            r += 1


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
    inputs, sums, taps, biases = _scratch(K - 1 + CHUNK), _scratch(CHUNK), _scratch(K), _scratch(1)
    n_taps = np.zeros(L, np.int64)
    for task in range(first, last):
        b = task // n_parts
        e0, e1 = _span(task % n_parts, E)
        if K == USUAL:
            _usual(x[b], past[b], weight, bias, silu, starts[b], e0, e1, y[b])
            continue
        _copied(weight, 0, K, e0, e1, taps, 0)
        for start in range(e0, e1, LANES):
            store(biases, (0, start - e0), load(bias, min(start, e1 - LANES)))
        _count_taps(starts[b], K, n_taps)
        for t0 in range(0, L, CHUNK):
            n = min(CHUNK, L - t0)
            _with_past(x[b], past[b], t0, n, e0, e1, inputs)
            _sums(inputs, n, taps, biases, n_taps, t0, K, e1 - e0, sums)
            for t in range(n):
                for start in range(e0, e1, LANES):
                    s = load(sums, (t, start - e0))
                    if silu:
                        s = s * sigmoid(s)
                    store(y, (b, t0 + t, min(start, e1 - LANES)), s)


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
    inputs, sums, taps, biases = _scratch(K - 1 + CHUNK), _scratch(CHUNK), _scratch(K), _scratch(1)
    grads = _scratch(CHUNK + K - 1)  # of the sums of a chunk and of the K - 1 tokens behind it
    grad_taps, grad_biases = _scratch(K), _scratch(1)
    n_taps, n_readers = np.zeros(L, np.int64), np.zeros(L, np.int64)
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
        _copied(weight, 0, K, e0, e1, taps, 0)
        for start in range(e0, e1, LANES):
            store(biases, (0, start - e0), load(bias, min(start, e1 - LANES)))
        grads[:], grad_taps[:], grad_biases[:] = 0, 0, 0
        _count_taps(starts[b], K, n_taps)
        seen = _count_readers(starts[b], K, n_readers)
        for t0 in range((L - 1) // CHUNK * CHUNK, -1, -CHUNK):
            n = min(CHUNK, L - t0)
            for r in range(K - 2, -1, -1):
                grads[CHUNK + r] = grads[r]
            _with_past(x[b], past[b], t0, n, e0, e1, inputs)
            _copied(grad_y[b], t0, n, e0, e1, grads, 0)
            if silu:
                _sums(inputs, n, taps, biases, n_taps, t0, K, e1 - e0, sums)
            for r in range(n):
                for i in range(0, e1 - e0, LANES):
                    g = load(grads, (r, i))
                    if silu:
                        g = _through_silu(g, load(sums, (r, i)))
                        store(grads, (r, i), g)
                    store(grad_biases, (0, i), load(grad_biases, (0, i)) + g)
            _add_gradients_of_taps(inputs, n, grads, n_taps, t0, K, e1 - e0, grad_taps)
            _spread_all_back(grads, n, taps, n_readers, t0, K, e0, e1, grad_x[b])
        for t in range(-1, -K, -1):
            seen = min(seen + 1, K)
            _spread_back(grads, t, taps, -t, min(seen, L - t), e0, e1, grad_past[b, K - 1 + t])
        for start in range(e0, e1, LANES):
            e, i = min(start, e1 - LANES), start - e0
            store(grad_bias, (b, e), load(grad_biases, (0, i)))
            for lag in range(K):
                store(grad_weight, (b, lag, e), load(grad_taps, (lag, i)))
