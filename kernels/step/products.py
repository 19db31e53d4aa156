"""Instructions that multiply a matrix with vectors, and those that look rows of a matrix up."""

from __future__ import annotations

import math

import numpy as np

from ..simd import (
    LANES,
    STATES,
    called,
    floats_at,
    full,
    halves_at,
    inline,
    ints_at,
    load,
    load_few,
    load_first,
    load_rows,
    load_rows_first,
    repeat,
    store,
    store_first,
    sum_of,
    total,
    without_first,
)
from .instruction import share, unpack


@inline
def _dots(matrix, start, stride, x, at, k):
    """The products of STATES rows of a matrix, the first at matrix[start], with the k numbers at x[at]."""
    sums = repeat(full(0.0))
    whole = k - k % LANES
    for j in range(0, whole, LANES):
        sums = sums + load_rows(matrix, start + j, stride) * repeat(load(x, at + j))
    if whole < k:
        if whole:  # the last LANES numbers, of which some have had their turn
            rest = without_first(load(x, at + k - LANES), LANES - (k - whole))
            sums = sums + load_rows(matrix, start + k - LANES, stride) * repeat(rest)
        else:
            sums = sums + load_rows_first(matrix, start, stride, k) * repeat(load_first(x, at, k))
    return total(sums)


@inline
def _dot(matrix, start, x, at, k):
    sums = full(0.0)
    for j in range(0, k, LANES):
        sums = sums + load_first(matrix, start + j, k - j) * load_first(x, at + j, k - j)
    return sum_of(sums)


@called
def _linear(matrix, words, rank, n_ranks):
    _, x, x_stride, y, y_stride, bias, n, k, rows, adds = unpack(words, 10)
    xs, ys, offsets = floats_at(x), floats_at(y), floats_at(bias)
    first, last = share(-(-n // STATES), rank, n_ranks)
    for block in range(first, last):  # of which every row of the batch reads its part of the matrix while it is near
        i = block * STATES
        for b in range(rows):
            target = b * y_stride + i
            if i + STATES <= n:
                sums = _dots(matrix, i * k, k, xs, b * x_stride, k)
                if bias:
                    sums = sums + load_few(offsets, i)
                if adds:
                    sums = sums + load_few(ys, target)
                store(ys, target, sums)
            else:
                for j in range(n - i):
                    value = _dot(matrix, (i + j) * k, xs, b * x_stride, k)
                    if bias:
                        value += offsets[i + j]
                    if adds:
                        value += ys[target + j]
                    ys[target + j] = value


def linear(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, n) = matrix x + bias, or y + matrix x + bias: matrix (n, k), x (rows, k), bias (n,) or none."""
    _linear(floats_at(ints_at(words)[0]), words, rank, n_ranks)


def linear_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`linear` by a matrix in bfloat16."""
    _linear(halves_at(ints_at(words)[0]), words, rank, n_ranks)


@called
def _chosen(matrices, words, rank, n_ranks):
    _, choice, x, x_stride, y, n, k, rows, top_k, shared = unpack(words, 10)
    xs, ys, choices = floats_at(x), floats_at(y), ints_at(choice)
    first, last = share(-(-n // STATES), rank, n_ranks)
    for row in range(rows * top_k):
        source = row // top_k * x_stride if shared else row * x_stride
        for i in range(first * STATES, min(n, last * STATES), STATES):
            start = (choices[row] * n + i) * k
            if i + STATES <= n:
                store(ys, row * n + i, _dots(matrices, start, k, xs, source, k))
            else:
                for j in range(n - i):
                    ys[row * n + i + j] = _dot(matrices, start + j * k, xs, source, k)


def chosen(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, top_k, n) = matrices[choice] x: matrices (n_experts, n, k), choice (rows, top_k)."""
    _chosen(floats_at(ints_at(words)[0]), words, rank, n_ranks)


def chosen_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`chosen` of matrices in bfloat16."""
    _chosen(halves_at(ints_at(words)[0]), words, rank, n_ranks)


def route(words: int, rank: int, n_ranks: int) -> None:
    """The top_k largest of softmax(scores), (rows, n): choice, (rows, top_k) int64, and share, their probabilities.

    Of equal ones the first is taken. The scores are used up.
    """
    scores, choice, weight, n, rows, top_k = unpack(words, 6)
    xs, choices, shares = floats_at(scores), ints_at(choice), floats_at(weight)
    if rank:
        return
    for b in range(rows):
        largest = -np.inf
        for i in range(n):
            largest = max(largest, xs[b * n + i])
        total_share = 0.0
        for i in range(n):
            total_share += math.exp(xs[b * n + i] - largest)
        for j in range(top_k):
            best = 0
            for i in range(n):
                if xs[b * n + i] > xs[b * n + best]:
                    best = i
            choices[b * top_k + j] = best
            shares[b * top_k + j] = math.exp(xs[b * n + best] - largest) / total_share
            xs[b * n + best] = -np.inf


def mix(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, n) = sum over j of share[j] x[j]: x (rows, top_k, n), share (rows, top_k)."""
    x, weight, y, y_stride, n, rows, top_k = unpack(words, 7)
    xs, shares, ys = floats_at(x), floats_at(weight), floats_at(y)
    if rank:
        return
    for b in range(rows):
        for i in range(0, n, LANES):
            value = full(0.0)
            for j in range(top_k):
                value = value + shares[b * top_k + j] * load_first(xs, (b * top_k + j) * n + i, n - i)
            store_first(ys, b * y_stride + i, value, n - i)


@called
def _lookup(table, words, rank):
    _, index, less, y, y_stride, n, rows, adds = unpack(words, 8)
    ys, indices, offsets = floats_at(y), ints_at(index), ints_at(less)
    if rank:
        return
    for b in range(rows):
        row = indices[b] - offsets[b] if less else indices[b]
        for i in range(0, n, LANES):
            value = load_first(table, row * n + i, n - i)
            if adds:
                value = value + load_first(ys, b * y_stride + i, n - i)
            store_first(ys, b * y_stride + i, value, n - i)


def lookup(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, n) = table[index - less], or that added to y: table (m, n), index (rows,) int64, less alike or none."""
    _lookup(floats_at(ints_at(words)[0]), words, rank)


def lookup_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`lookup` in a table in bfloat16."""
    _lookup(halves_at(ints_at(words)[0]), words, rank)


def advance(words: int, rank: int, n_ranks: int) -> None:
    """Adds one to numbers, (n,) int64, up to a largest value."""
    numbers, n, most = unpack(words, 3)
    counts = ints_at(numbers)
    if rank == 0:
        for i in range(n):
            counts[i] = min(counts[i] + 1, most)
