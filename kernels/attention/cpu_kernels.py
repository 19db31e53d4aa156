"""Causal self-attention and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

The blocks of FlashAttention (Dao 2023, arXiv:2307.08691): BLOCK queries meet BLOCK keys, and on the diagonal only those
scores are computed, to whole vectors, that a query sees. Scratch is [token, channel], where zeros fill the channels up
to whole pairs, or [channel, key] where keys are the right factor of a product.

Scores are times log2(e), for exp2. A task of the forward pass is one query head of one row of the batch, of the
backward pass one key head with the queries that read it. Tasks share no output, so any number of threads gives the same
bits.
"""

from __future__ import annotations

import numpy as np

from ..chunks import transpose_into
from ..simd import (
    BLOCK_ROWS,
    LANES,
    LOG2_E,
    PAIR,
    STATES,
    TILE,
    Floats3,
    Floats4,
    add_product,
    aligned_zeros,
    called,
    exp2,
    full,
    highest,
    inline,
    kernel,
    larger,
    load,
    load_few,
    load_first,
    load_tile,
    product,
    store,
    store_first,
    total,
    usual_nan,
)

BLOCK = 64
"""Queries and keys that meet at a time."""

LOWEST = -3e38
"""The maximum of no scores: finite, because infinity less itself is no number."""


# Memory


@called
def _width(P):
    """Channels rounded up to whole pairs."""
    return -(-P // PAIR) * PAIR


@called
def _tokens(L, P):
    """Scratch for L tokens of P channels, rounded up to whole blocks."""
    return aligned_zeros(-(-L // BLOCK) * BLOCK, _width(P))


@called
def _columns(L, P):
    """Scratch for the transposes of blocks of L tokens, [block, channel, token]."""
    n, width = -(-L // BLOCK), _width(P)
    return aligned_zeros(n * width, BLOCK).reshape(n, width, BLOCK)


@called
def _scores():
    """Scratch for a block of scores, with room for what `_hide_future` writes behind the last one."""
    return aligned_zeros(BLOCK, BLOCK + LANES)


@called
def _row():
    return np.zeros(BLOCK, np.float32)


@called
def _read(x, b, t0, h, n_tokens, factor, scratch):
    """scratch[t, p] = factor x[b, t0 + t, h, p]."""
    P = x.shape[3]
    whole = P // LANES * LANES
    for t in range(n_tokens):
        for p in range(0, whole, LANES):
            store(scratch, (t, p), usual_nan(factor * load(x, (b, t0 + t, h, p))))
        if whole < P:
            store(scratch, (t, whole), usual_nan(factor * load_first(x, (b, t0 + t, h, whole), P - whole)))


@called
def _write(scratch, factor, x, b, t0, h, n_tokens):
    """x[b, t0 + t, h, p] = factor scratch[t, p]."""
    P = x.shape[3]
    whole = P // LANES * LANES
    for t in range(n_tokens):
        for p in range(0, whole, LANES):
            store(x, (b, t0 + t, h, p), factor * load(scratch, (t, p)))
        if whole < P:
            store_first(x, (b, t0 + t, h, whole), factor * load(scratch, (t, whole)), P - whole)


@called
def _transpose_blocks(tokens, n_channels, columns):
    """columns[block, p, t] = tokens[block * BLOCK + t, p]."""
    for block in range(columns.shape[0]):
        transpose_into(columns[block], tokens[block * BLOCK : (block + 1) * BLOCK], BLOCK, n_channels)


# A block of queries and keys, which on the diagonal are those of the same tokens


@inline
def _end(i, n, step, diagonal):
    """The end of the keys that are looked at with the queries i .. i + n - 1, `step` of them at a time."""
    return -(-(i + n) // step) * step if diagonal else BLOCK


@called
def _score(a, b, n_queries, depth, diagonal, scores):
    """scores = a b; `depth` columns of a and rows of b are summed over."""
    for i in range(0, n_queries, BLOCK_ROWS):
        for j in range(0, _end(i, BLOCK_ROWS, PAIR, diagonal), PAIR):
            product(scores, i, j, a.T, b, 0, depth)


@called
def _add_to_queries(weights, b, n_queries, diagonal, c):
    """c[query] += the sum of weights[query, key] b[key]."""
    for j in range(0, c.shape[1], PAIR):
        for i in range(0, n_queries, BLOCK_ROWS):
            add_product(c, i, j, weights.T, b, 0, _end(i, BLOCK_ROWS, BLOCK_ROWS, diagonal))


@called
def _add_to_keys(weights, b, n_queries, diagonal, c):
    """c[key] += the sum of weights[query, key] b[query]."""
    for j in range(0, c.shape[1], PAIR):
        for i in range(0, n_queries if diagonal else BLOCK, BLOCK_ROWS):
            add_product(c, i, j, weights, b, i if diagonal else 0, n_queries)


@called
def _hide_future(scores, i, end):
    """Hides from the queries i .. i + STATES - 1 the keys after their own. Writes up to a vector beyond the end."""
    for r in range(i, i + STATES):
        for j in range(r + 1, end, LANES):
            store(scores, (r, j), full(-np.inf))


@called
def _soften(scores, n_queries, diagonal, maxima, factors, sums, os, four):
    """Turns scores into weights relative to the maximum so far, and scales what was summed before to that maximum.

    Of a query's weights there are as many sums as lanes. `four` is scratch for one vector of each of four queries.
    """
    step = max(LANES, BLOCK_ROWS)
    for i in range(0, n_queries, STATES):
        end = _end(i, STATES, step, diagonal)
        if diagonal:
            _hide_future(scores, i, end)
        for r in range(STATES):
            m = full(maxima[i + r])
            for j in range(0, end, LANES):
                m = larger(load(scores, (i + r, j)), m)
            store(four, r * LANES, m)
        m = highest(load_tile(four, 0))
        store(factors, i, exp2(load_few(maxima, i) - m))
        store(maxima, i, m)
    for i in range(n_queries):
        m, factor = maxima[i], factors[i]
        s = factor * load(sums, (i, 0))
        for j in range(0, _end(i // STATES * STATES, STATES, step, diagonal), LANES):
            weight = exp2(load(scores, (i, j)) - m)
            s = s + weight
            store(scores, (i, j), weight)
        store(sums, (i, 0), s)
        for p in range(0, os.shape[1], LANES):
            store(os, (i, p), factor * load(os, (i, p)))


@called
def _differentiate(weights, grad_scores, n_queries, diagonal, maxima, shares, means):
    """Turns scores into weights w, and dw into w (dw - mean), the gradient of the scores.

    Scores are less their maximum before anything is added: what is added to large ones is lost.
    """
    for i in range(0, n_queries, STATES):
        end = _end(i, STATES, max(LANES, BLOCK_ROWS), diagonal)
        if diagonal:
            _hide_future(weights, i, end)
        for r in range(i, i + STATES):
            m, share, mean = maxima[r], shares[r], means[r]
            for j in range(0, end, LANES):
                weight = share * exp2(load(weights, (r, j)) - m)
                store(weights, (r, j), weight)
                store(grad_scores, (r, j), weight * (load(grad_scores, (r, j)) - mean))


@called
def _dot_columns(a, b, n_rows, result):
    """result[j] = sum over i of a[i, j] b[i, j], added up as `_score` does: what is equal cancels to the last bit."""
    for j in range(0, BLOCK, LANES):
        s = full(0.0)
        for i in range(n_rows):
            s = s + load(a, (i, j)) * load(b, (i, j))
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
    V, group, one = v.shape[3], H // k.shape[2], np.float32(1.0)
    keys, values, ks = _tokens(L, P), _tokens(L, V), _columns(L, P)
    queries, os, scores = _tokens(BLOCK, P), _tokens(BLOCK, V), _scores()
    peaks, factors, parts = _row(), _row(), aligned_zeros(BLOCK, LANES)
    totals, four = _row(), np.zeros(TILE, np.float32)
    for task in range(first, last):
        b, h = task // H, task % H
        _read(k, b, 0, h // group, L, scale * np.float32(LOG2_E), keys)
        _read(v, b, 0, h // group, L, one, values)
        _transpose_blocks(keys, P, ks)
        for i in range(0, L, BLOCK):
            n_queries = min(BLOCK, L - i)
            _read(q, b, i, h, n_queries, one, queries)
            os[:], peaks[:], parts[:] = 0, LOWEST, 0
            for j in range(0, i + 1, BLOCK):
                diagonal = i == j
                _score(queries, ks[j // BLOCK], n_queries, P, diagonal, scores)
                _soften(scores, n_queries, diagonal, peaks, factors, parts, os, four)
                _add_to_queries(scores, values[j : j + BLOCK], n_queries, diagonal, os)
            for t in range(0, BLOCK, STATES):
                store(totals, t, total(load_tile(parts, (t, 0))))
            for t in range(n_queries):
                maxima[b, h, i + t], sums[b, h, i + t] = peaks[t], totals[t]
                share = one / totals[t]
                for p in range(0, os.shape[1], LANES):
                    store(os, (t, p), share * load(os, (t, p)))
            _write(os, one, o, b, i, h, n_queries)


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
    group, one = H // H_kv, np.float32(1.0)
    keys, values, ks, vs = _tokens(L, P), _tokens(L, V), _columns(L, P), _columns(L, V)
    grad_keys, grad_values = _tokens(L, P), _tokens(L, V)
    queries, grads, outputs, grad_queries = _tokens(BLOCK, P), _tokens(BLOCK, V), _tokens(BLOCK, V), _tokens(BLOCK, P)
    gs, os = aligned_zeros(_width(V), BLOCK), aligned_zeros(_width(V), BLOCK)
    weights, grad_scores = _scores(), _scores()
    peaks, shares, means = _row(), _row(), _row()
    for task in range(first, last):
        b, kv_head = task // H_kv, task % H_kv
        _read(k, b, 0, kv_head, L, scale * np.float32(LOG2_E), keys)
        _read(v, b, 0, kv_head, L, one, values)
        _transpose_blocks(keys, P, ks)
        _transpose_blocks(values, V, vs)
        grad_keys[:], grad_values[:] = 0, 0
        for h in range(kv_head * group, (kv_head + 1) * group):
            for i in range(0, L, BLOCK):
                n_queries = min(BLOCK, L - i)
                _read(q, b, i, h, n_queries, one, queries)
                _read(grad_o, b, i, h, n_queries, one, grads)
                _read(o, b, i, h, n_queries, one, outputs)
                transpose_into(gs, grads, BLOCK, V)
                transpose_into(os, outputs, BLOCK, V)
                _dot_columns(gs, os, V, means)
                for t in range(n_queries):
                    peaks[t], shares[t] = maxima[b, h, i + t], one / sums[b, h, i + t]
                grad_queries[:] = 0
                for j in range(0, i + 1, BLOCK):
                    diagonal, here = i == j, slice(j, j + BLOCK)
                    _score(queries, ks[j // BLOCK], n_queries, P, diagonal, weights)
                    _score(grads, vs[j // BLOCK], n_queries, V, diagonal, grad_scores)
                    _differentiate(weights, grad_scores, n_queries, diagonal, peaks, shares, means)
                    _add_to_keys(weights, grads, n_queries, diagonal, grad_values[here])
                    _add_to_keys(grad_scores, queries, n_queries, diagonal, grad_keys[here])
                    _add_to_queries(grad_scores, keys[here], n_queries, diagonal, grad_queries)
                _write(grad_queries, np.float32(1 / LOG2_E), grad_q, b, i, h, n_queries)
        _write(grad_keys, scale, grad_k, b, 0, kv_head, L)
        _write(grad_values, one, grad_v, b, 0, kv_head, L)
