"""Instructions of attention: the rotation by positions, and one query against a cache that the token then joins."""

from __future__ import annotations

import math

import numpy as np

from ..simd import (
    LANES,
    STATES,
    called,
    exp,
    floats_at,
    fold,
    full,
    halves_at,
    ints_at,
    load_first,
    load_rows,
    load_rows_first,
    repeat,
    spread,
    store,
    store_first,
    sum_of,
    tanh,
    total,
)
from .instruction import float_of, share, unpack


def angles(words: int, rank: int, n_ranks: int) -> None:
    """cos and sin, (rows, n) float32, of position x frequency: position (rows,) int64, frequency (n,) float64 bits."""
    position, frequency, cos, sin, n, rows = unpack(words, 6)
    positions, frequencies, cosines, sines = ints_at(position), ints_at(frequency), floats_at(cos), floats_at(sin)
    if rank:
        return
    for row in range(rows):
        for i in range(n):
            angle = positions[row] * float_of(frequencies[i])
            cosines[row * n + i] = math.cos(angle)
            sines[row * n + i] = math.sin(angle)


def rotate(words: int, rank: int, n_ranks: int) -> None:
    """Turns the pairs (x[i], x[i + n]) of each head by angles (rows, n), in place: x (rows, H 2 n)."""
    x, x_stride, cos, sin, H, n, rows = unpack(words, 7)
    xs, cosines, sines = floats_at(x), floats_at(cos), floats_at(sin)
    first, last = share(rows * H, rank, n_ranks)
    for task in range(first, last):
        row, at = task // H, task // H * x_stride + task % H * 2 * n
        for i in range(0, n, LANES):
            c, s = load_first(cosines, row * n + i, n - i), load_first(sines, row * n + i, n - i)
            a, b = load_first(xs, at + i, n - i), load_first(xs, at + n + i, n - i)
            store_first(xs, at + i, a * c - b * s, n - i)
            store_first(xs, at + n + i, b * c + a * s, n - i)


@called
def _scores(q, q_at, keys, key_at, stride, P, first, last, scores, at, scale):
    """scores[t] = scale q k[t] for t in first .. last - 1, and the largest of them."""
    largest = np.float32(-np.inf)
    t = first
    while t < last:
        step = min(STATES, last - t)
        if step < STATES and last - first >= STATES:  # the last STATES keys, of which some have had their turn
            t, step = last - STATES, STATES
        if step == STATES:
            sums, start = repeat(full(0.0)), key_at + t * stride
            for p in range(0, P, LANES):
                if P - p >= LANES:
                    block = load_rows(keys, start + p, stride)
                else:
                    block = load_rows_first(keys, start + p, stride, P - p)
                sums = sums + block * repeat(load_first(q, q_at + p, P - p))
            store(scores, at + t, scale * total(sums))
        else:
            for i in range(step):
                part = full(0.0)
                for p in range(0, P, LANES):
                    left = P - p
                    part = part + load_first(q, q_at + p, left) * load_first(keys, key_at + (t + i) * stride + p, left)
                scores[at + t + i] = scale * sum_of(part)
        t += step
    for t in range(first, last):
        largest = max(largest, scores[at + t])
    return largest


@called
def _attend(keys, values, words, rank, n_ranks):
    (q, q_stride, k, k_stride, v, v_stride, _, _, length, first_key, scratch, o, H, G, P, capacity, room, rows,
     bits) = unpack(words, 19)  # fmt: skip
    qs, ks, vs, scores, os = floats_at(q), floats_at(k), floats_at(v), floats_at(scratch), floats_at(o)
    scale, stride, shared = np.float32(float_of(bits)), G * P, H // G
    first, last = share(rows * G, rank, n_ranks)
    for task in range(first, last):
        row, g = task // G, task % G
        held = ints_at(length)[row]
        seen = ints_at(first_key)[row] if first_key else 0
        cache, new = row * capacity * stride + g * P, g * P
        for head in range(g * shared, (g + 1) * shared):
            q_at, at, o_at = row * q_stride + head * P, (row * H + head) * (capacity + 1), (row * H + head) * P
            largest = _scores(qs, q_at, keys, cache, stride, P, seen, held, scores, at, scale)
            own = np.float32(0.0)
            if k:
                for p in range(0, P, LANES):
                    own += sum_of(load_first(qs, q_at + p, P - p) * load_first(ks, row * k_stride + new + p, P - p))
                own *= scale
                largest = max(largest, own)
                own = np.float32(math.exp(own - largest))
            sums = full(0.0)
            for t in range(seen, held, LANES):
                left = held - t
                weight = exp(load_first(scores, at + t, left) - largest)
                store_first(scores, at + t, weight, left)
                sums = sums + (weight if left >= LANES else load_first(scores, at + t, left))
            whole = sum_of(sums) + own
            for p in range(0, P, LANES):
                left, block = P - p, repeat(full(0.0))
                t = seen
                while t + STATES <= held:
                    start = cache + t * stride + p
                    if left >= LANES:
                        block = block + load_rows(values, start, stride) * spread(scores, at + t)
                    else:
                        block = block + load_rows_first(values, start, stride, left) * spread(scores, at + t)
                    t += STATES
                value = fold(block)
                if k:
                    value = value + own * load_first(vs, row * v_stride + new + p, left)
                while t < held:
                    value = value + scores[at + t] * load_first(values, cache + t * stride + p, left)
                    t += 1
                store_first(os, o_at + p, value / whole, left)
        if k and held == room:  # the oldest key has left the window
            for t in range(1, held):
                for p in range(0, P, LANES):
                    older, start = cache + (t - 1) * stride + p, cache + t * stride + p
                    store_first(keys, older, load_first(keys, start, P - p), P - p)
                    store_first(values, older, load_first(values, start, P - p), P - p)
        place = min(held, room - 1)
        if k and place >= 0:
            for p in range(0, P, LANES):
                start = cache + place * stride + p
                store_first(keys, start, load_first(ks, row * k_stride + new + p, P - p), P - p)
                store_first(values, start, load_first(vs, row * v_stride + new + p, P - p), P - p)


def attend(words: int, rank: int, n_ranks: int) -> None:
    """o = softmax(scale q k^T) v per head over the keys held from first_key on and the new one, which then joins them.

    q, o (rows, H P) · k, v (rows, G P) · keys, values (rows, capacity, G, P) · length, first_key (rows,) int64 ·
    scratch (rows, H, capacity + 1). Where `room` keys are held the oldest leaves. Without k and v nothing joins.
    """
    _attend(floats_at(ints_at(words)[6]), floats_at(ints_at(words)[7]), words, rank, n_ranks)


def attend_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`attend` with a cache in bfloat16."""
    _attend(halves_at(ints_at(words)[6]), halves_at(ints_at(words)[7]), words, rank, n_ranks)


def slide(words: int, rank: int, n_ranks: int) -> None:
    """Moves first_key, (rows,) int64, one back, to zero at least, where `room` keys are held: the oldest has left."""
    first_key, length, room, rows = unpack(words, 4)
    firsts, held = ints_at(first_key), ints_at(length)
    if rank == 0:
        for row in range(rows):
            if held[row] == room and firsts[row] > 0:
                firsts[row] -= 1


@called
def _compare(keys, values, words, rank, n_ranks):
    q, q_stride, _, _, length, weight, bias, scratch, y, n_keys, d_key, d_value, rows = unpack(words, 13)
    qs, ws, offset, scores, ys = floats_at(q), floats_at(weight), floats_at(bias), floats_at(scratch), floats_at(y)
    first, last = share(rows, rank, n_ranks)
    for row in range(first, last):
        held, at, largest = ints_at(length)[row], row * n_keys, np.float32(-np.inf)
        for t in range(held):
            sums = full(0.0)
            for i in range(0, d_key, LANES):
                left = d_key - i
                pair = load_first(qs, row * q_stride + i, left) + load_first(keys, (at + t) * d_key + i, left)
                sums = sums + load_first(ws, i, left) * tanh(pair)
            scores[at + t] = sum_of(sums) + offset[0] if bias else sum_of(sums)
            largest = max(largest, scores[at + t])
        whole = np.float32(0.0)
        for t in range(held):
            scores[at + t] = math.exp(scores[at + t] - largest)
            whole += scores[at + t]
        for i in range(0, d_value, LANES):
            value = full(0.0)
            for t in range(held):
                value = value + scores[at + t] * load_first(values, (at + t) * d_value + i, d_value - i)
            store_first(ys, row * d_value + i, value / whole, d_value - i)


def compare(words: int, rank: int, n_ranks: int) -> None:
    """y = sum over t of a[t] v[t], where a = softmax over t of weight tanh(q + k[t]) + bias (arXiv:1409.0473).

    q (rows, d_key) · keys (rows, S, d_key) · values (rows, S, d_value) · length (rows,) int64 · weight (d_key,) · bias
    (1,) or none · scratch (rows, S).
    """
    _compare(floats_at(ints_at(words)[2]), floats_at(ints_at(words)[3]), words, rank, n_ranks)


def compare_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`compare` with keys and values in bfloat16."""
    _compare(halves_at(ints_at(words)[2]), halves_at(ints_at(words)[3]), words, rank, n_ranks)
