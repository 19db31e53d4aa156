"""Causal self-attention and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

The blocks of FlashAttention (Dao 2023, arXiv:2307.08691), transposed: the scores of a block are [key, query], so that
the maximum and the sum of each query are taken between whole vectors, and a head may have any width. On the diagonal
blocks are half as long, and of their queries only those from a pair on are computed that see a key.

Scores are kept times log2(e), for exp2. Scratch is [channel, query] where a block of queries is the right factor of a
product or its result, else [token, channel], where zeros fill the channels up to whole pairs. A task of the forward
pass is one query head of one row of the batch, of the backward pass one key head with the queries that read it. Tasks
share no output, so any number of threads gives the same bits.
"""

from __future__ import annotations

import numpy as np

from ..simd import (
    LANES,
    LOG2_E,
    PAIR,
    TILE,
    Floats3,
    Floats4,
    called,
    exp2,
    full,
    inline,
    kernel,
    larger,
    load,
    load_first,
    load_pair,
    load_tile,
    repeat,
    store,
    store_first,
)

QUERIES = 64
"""Queries of a block."""

KEYS = 64
"""Keys of a block before the diagonal; on it there are half as many."""

LOWEST = -3e38
"""The maximum of no scores: finite, because infinity less itself is no number."""


# Memory


@called
def _scratch(n_rows, width):
    """Zeros that begin at a cache line: what lies across two takes twice as long to read."""
    line = 64 // 4
    memory = np.zeros(n_rows * width + line, np.float32)
    start = -(memory.ctypes.data // 4) % line
    return memory[start : start + n_rows * width].reshape(n_rows, width)


@called
def _width(P):
    """Channels rounded up to whole pairs, which are whole blocks of eight rows too."""
    return -(-P // PAIR) * PAIR


@called
def _tokens(L, P):
    """Scratch for L tokens of P channels, rounded up to whole blocks."""
    return _scratch(-(-L // KEYS) * KEYS, _width(P))


@called
def _row():
    return np.zeros(QUERIES, np.float32)


@called
def _read(x, b, t0, h, n_tokens, scratch):
    """scratch[t, p] = x[b, t0 + t, h, p]."""
    P = x.shape[3]
    whole = P // LANES * LANES
    for t in range(n_tokens):
        for p in range(0, whole, LANES):
            store(scratch, (t, p), load(x, (b, t0 + t, h, p)))
        if whole < P:
            store(scratch, (t, whole), load_first(x, (b, t0 + t, h, whole), P - whole))
        for p in range(P):
            if scratch[t, p] != scratch[t, p]:
                scratch[t, p] = np.nan  # as IEEE arithmetic makes it: exp2 would misread the low bits of another


@called
def _write(scratch, x, b, t0, h, n_tokens):
    """x[b, t0 + t, h, p] = scratch[t, p]."""
    P = x.shape[3]
    whole = P // LANES * LANES
    for t in range(n_tokens):
        for p in range(0, whole, LANES):
            store(x, (b, t0 + t, h, p), load(scratch, (t, p)))
        if whole < P:
            store_first(x, (b, t0 + t, h, whole), load(scratch, (t, whole)), P - whole)


@called
def _transpose(scratch, n_rows, n_columns, scale, result):
    for j in range(n_columns):
        for i in range(n_rows):
            result[j, i] = scale * scratch[i, j]


# Products: a block of four rows and a tile of columns, or of eight rows and a pair, stays in registers


@inline
def _load_tiles(c, i, j):
    return load_tile(c, (i, j)), load_tile(c, (i + 1, j)), load_tile(c, (i + 2, j)), load_tile(c, (i + 3, j))


@inline
def _store_tiles(c, i, j, rows):
    c0, c1, c2, c3 = rows
    store(c, (i, j), c0)
    store(c, (i + 1, j), c1)
    store(c, (i + 2, j), c2)
    store(c, (i + 3, j), c3)


@inline
def _add_to_tiles(rows, a, b, i, j, begin, end):
    """Adds the sum of a[k, i + r] b[k, j : j + TILE] over k = begin .. end - 1 to row r."""
    c0, c1, c2, c3 = rows
    for k in range(begin, end):
        x = load_tile(b, (k, j))
        c0 = c0 + a[k, i] * x
        c1 = c1 + a[k, i + 1] * x
        c2 = c2 + a[k, i + 2] * x
        c3 = c3 + a[k, i + 3] * x
    return c0, c1, c2, c3


@inline
def _load_pairs(c, i, j):
    return (
        load_pair(c, (i, j)),
        load_pair(c, (i + 1, j)),
        load_pair(c, (i + 2, j)),
        load_pair(c, (i + 3, j)),
        load_pair(c, (i + 4, j)),
        load_pair(c, (i + 5, j)),
        load_pair(c, (i + 6, j)),
        load_pair(c, (i + 7, j)),
    )


@inline
def _store_pairs(c, i, j, rows):
    c0, c1, c2, c3, c4, c5, c6, c7 = rows
    store(c, (i, j), c0)
    store(c, (i + 1, j), c1)
    store(c, (i + 2, j), c2)
    store(c, (i + 3, j), c3)
    store(c, (i + 4, j), c4)
    store(c, (i + 5, j), c5)
    store(c, (i + 6, j), c6)
    store(c, (i + 7, j), c7)


@inline
def _add_to_pairs(rows, a, b, i, j, begin, end):
    """Adds the sum of a[k, i + r] b[k, j : j + PAIR] over k = begin .. end - 1 to row r."""
    c0, c1, c2, c3, c4, c5, c6, c7 = rows
    for k in range(begin, end):
        x = load_pair(b, (k, j))
        c0 = c0 + a[k, i] * x
        c1 = c1 + a[k, i + 1] * x
        c2 = c2 + a[k, i + 2] * x
        c3 = c3 + a[k, i + 3] * x
        c4 = c4 + a[k, i + 4] * x
        c5 = c5 + a[k, i + 5] * x
        c6 = c6 + a[k, i + 6] * x
        c7 = c7 + a[k, i + 7] * x
    return c0, c1, c2, c3, c4, c5, c6, c7


@called
def _scores(a, b, n_rows, depth, column, zeros, c):
    """c = a^T b from a column on; `depth` rows of a and b are summed over, and `zeros` is a row of them."""
    whole = column + (QUERIES - column) // TILE * TILE
    for j in range(column, whole, TILE):
        tile = load_tile(zeros, j)
        for i in range(0, n_rows, 4):
            _store_tiles(c, i, j, _add_to_tiles((tile, tile, tile, tile), a, b, i, j, 0, depth))
    if whole < QUERIES:
        x = load_pair(zeros, whole)
        for i in range(0, n_rows, 8):
            _store_pairs(c, i, whole, _add_to_pairs((x, x, x, x, x, x, x, x), a, b, i, whole, 0, depth))


@called
def _add(a, b, n_rows, column, begin, end, c):
    """c += a^T b from a column on; the rows begin .. end - 1 of a and b are summed over."""
    whole = column + (c.shape[1] - column) // TILE * TILE
    for j in range(column, whole, TILE):
        for i in range(0, n_rows, 4):
            _store_tiles(c, i, j, _add_to_tiles(_load_tiles(c, i, j), a, b, i, j, begin, end))
    if whole < c.shape[1]:
        for i in range(0, n_rows, 8):
            _store_pairs(c, i, whole, _add_to_pairs(_load_pairs(c, i, whole), a, b, i, whole, begin, end))


@called
def _hide_future(scores, shift, n_keys):
    """Hides from each query the keys after its own, where the block's first key is `shift` after its first query."""
    for k in range(n_keys):
        for i in range(shift + k):
            scores[k, i] = -np.inf


@called
def _soften(scores, n_keys, maxima, sums, os, P):
    """Turns scores into weights relative to the maximum so far, and scales what was summed before to that maximum."""
    for j in range(0, QUERIES, TILE):
        before = load_tile(maxima, j)
        m = before
        for k in range(n_keys):
            m = larger(load_tile(scores, (k, j)), m)
        factor = exp2(before - m)
        s = factor * load_tile(sums, j)
        for k in range(n_keys):
            weight = exp2(load_tile(scores, (k, j)) - m)
            s = s + weight
            store(scores, (k, j), weight)
        for p in range(P):
            store(os, (p, j), factor * load_tile(os, (p, j)))
        store(maxima, j, m)
        store(sums, j, s)


@called
def _divide(os, sums, P):
    for j in range(0, QUERIES, TILE):
        s = load_tile(sums, j)
        for p in range(P):
            store(os, (p, j), load_tile(os, (p, j)) / s)


@called
def _differentiate(weights, grad_scores, n_keys, maxima, shares, means):
    """Turns scores into weights w, and dw into w (dw - mean), the gradient of the scores.

    Scores are less their maximum before anything is added: what is added to large ones is lost.
    """
    for j in range(0, QUERIES, TILE):
        m, share, mean = load_tile(maxima, j), load_tile(shares, j), load_tile(means, j)
        for k in range(n_keys):
            weight = exp2(load_tile(weights, (k, j)) - m) * share
            store(weights, (k, j), weight)
            store(grad_scores, (k, j), weight * (load_tile(grad_scores, (k, j)) - mean))


@called
def _dot_columns(a, b, n_rows, result):
    """result[j] = sum over i of a[i, j] b[i, j], added up as `_scores` does: what is equal cancels to the last bit."""
    for j in range(0, QUERIES, TILE):
        s = repeat(full(0.0))
        for i in range(n_rows):
            s = s + load_tile(a, (i, j)) * load_tile(b, (i, j))
        store(result, j, s)


@kernel
def forward(
    first: int,
    last: int,
    q: Floats4,
    k: Floats4,
    v: Floats4,
    scale: float,
    o: Floats4,
    maxima: Floats3,
    sums: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        q: (B, L, H, P).
        k: (B, L, H_kv, P).
        v: (B, L, H_kv, V), where V need not be P.
        scale: factor on the scores.
        o: (B, L, H, V), written.
        maxima: largest score of each query, times log2(e), (B, H, L), written.
        sums: sum of a query's exponentials, each relative to the largest, (B, H, L), written.
    """
    L, H, P = q.shape[1:]
    V, group = v.shape[3], H // k.shape[2]
    keys, values, tokens = _tokens(L, P), _tokens(L, V), _tokens(QUERIES, max(P, V))
    qs, os, scores = _scratch(_width(P), QUERIES), _scratch(_width(V), QUERIES), _scratch(KEYS, QUERIES)
    peaks, totals, zeros = _row(), _row(), _row()
    for task in range(first, last):
        b, h = task // H, task % H
        _read(k, b, 0, h // group, L, keys)
        _read(v, b, 0, h // group, L, values)
        for i in range(0, L, QUERIES):
            n_queries = min(QUERIES, L - i)
            _read(q, b, i, h, n_queries, tokens)
            _transpose(tokens, n_queries, P, scale * np.float32(LOG2_E), qs)
            os[:], peaks[:], totals[:] = 0, LOWEST, 0
            j = 0
            while j < i + n_queries:
                shift, n_keys = j - i, min(KEYS if j < i else KEYS // 2, L - j)
                column = max(shift, 0) // PAIR * PAIR
                _scores(keys[j : j + KEYS].T, qs, n_keys, P, column, zeros, scores)
                if shift >= 0:
                    _hide_future(scores, shift, n_keys)
                _soften(scores, n_keys, peaks, totals, os, V)
                _add(values[j : j + KEYS], scores, V, column, 0, n_keys, os)
                j += n_keys
            _divide(os, totals, V)
            _transpose(os, V, n_queries, np.float32(1.0), tokens)
            _write(tokens, o, b, i, h, n_queries)
            for t in range(n_queries):
                maxima[b, h, i + t], sums[b, h, i + t] = peaks[t], totals[t]


@kernel
def backward(
    first: int,
    last: int,
    q: Floats4,
    k: Floats4,
    v: Floats4,
    scale: float,
    o: Floats4,
    maxima: Floats3,
    sums: Floats3,
    grad_o: Floats4,
    grad_q: Floats4,
    grad_k: Floats4,
    grad_v: Floats4,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass: writes the gradients of q, k and v.

    With weights w and dw = grad_o v^T, the gradient of the scores is w (dw - sum(w dw)), and sum(w dw) = sum(grad_o o).
    """
    L, H, P = q.shape[1:]
    H_kv, V = k.shape[2], v.shape[3]
    group, unscaled = H // H_kv, np.float32(1.0)
    keys, values, grad_keys, grad_values = _tokens(L, P), _tokens(L, V), _tokens(L, P), _tokens(L, V)
    queries, grads, outputs = _tokens(QUERIES, P), _tokens(QUERIES, V), _tokens(QUERIES, V)
    qs, grad_qs = _scratch(_width(P), QUERIES), _scratch(_width(P), QUERIES)
    gs, os = _scratch(_width(V), QUERIES), _scratch(_width(V), QUERIES)
    weights, grad_scores = _scratch(KEYS, QUERIES), _scratch(KEYS, QUERIES)
    peaks, shares, means, zeros = _row(), _row(), _row(), _row()
    for task in range(first, last):
        b, kv_head = task // H_kv, task % H_kv
        _read(k, b, 0, kv_head, L, keys)
        _read(v, b, 0, kv_head, L, values)
        grad_keys[:], grad_values[:] = 0, 0
        for h in range(kv_head * group, (kv_head + 1) * group):
            for i in range(0, L, QUERIES):
                n_queries = min(QUERIES, L - i)
                _read(q, b, i, h, n_queries, queries)
                _read(grad_o, b, i, h, n_queries, grads)
                _read(o, b, i, h, n_queries, outputs)
                _transpose(queries, n_queries, P, scale * np.float32(LOG2_E), qs)
                _transpose(grads, n_queries, V, unscaled, gs)
                _transpose(outputs, n_queries, V, unscaled, os)
                _dot_columns(gs, os, V, means)
                for t in range(n_queries):
                    peaks[t], shares[t] = maxima[b, h, i + t], 1 / sums[b, h, i + t]
                grad_qs[:] = 0
                j = 0
                while j < i + n_queries:
                    shift, n_keys = j - i, min(KEYS if j < i else KEYS // 2, L - j)
                    column = max(shift, 0) // PAIR * PAIR
                    ks, vs = keys[j : j + KEYS], values[j : j + KEYS]
                    _scores(ks.T, qs, n_keys, P, column, zeros, weights)
                    _scores(vs.T, gs, n_keys, V, column, zeros, grad_scores)
                    if shift >= 0:
                        _hide_future(weights, shift, n_keys)
                    _differentiate(weights, grad_scores, n_keys, peaks, shares, means)
                    _add(weights.T, grads, n_keys, 0, column, n_queries, grad_values[j : j + KEYS])
                    _add(grad_scores.T, queries, n_keys, 0, column, n_queries, grad_keys[j : j + KEYS])
                    _add(ks, grad_scores, P, column, 0, n_keys, grad_qs)
                    j += n_keys
                _transpose(grad_qs, P, n_queries, scale, queries)
                _write(queries, grad_q, b, i, h, n_queries)
        for t in range(L):
            for p in range(P):
                grad_keys[t, p] *= scale
        _write(grad_keys, grad_k, b, 0, kv_head, L)
        _write(grad_values, grad_v, b, 0, kv_head, L)
