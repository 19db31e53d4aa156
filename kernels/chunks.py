"""What numba kernels that go through a sequence in chunks do alike: tokens to scratch and back, and products in it.

Scratch is a matrix of whole vectors, [token, channel] or [channel, token], its rows at least up to whole blocks.
"""

from __future__ import annotations

from .simd import (
    BLOCK_ROWS,
    LANES,
    PAIR,
    add_narrow_product,
    add_product,
    called,
    full,
    load,
    load_first,
    narrow_product,
    product,
    rounded_up,
    store,
    store_first,
    transpose,
)

__all__ = ["ROWS", "clear", "copy", "multiply", "read", "transpose_into", "write"]

ROWS = max(LANES, BLOCK_ROWS)
"""Rows up to a multiple of which scratch is defined: transposes take LANES of them, products BLOCK_ROWS."""


@called
def read(x, t0, e0, n, width, scratch, row):
    """scratch[row + t, i] = x[t0 + t, e0 + i] for n tokens and i < width, and zeros beyond up to ROWS tokens."""
    whole = width // LANES * LANES
    for t in range(n):
        for i in range(0, whole, LANES):
            store(scratch, (row + t, i), load(x, (t0 + t, e0 + i)))
        if whole < scratch.shape[1]:
            store(scratch, (row + t, whole), load_first(x, (t0 + t, e0 + whole), width - whole))
            for i in range(whole + LANES, scratch.shape[1], LANES):
                store(scratch, (row + t, i), full(0.0))
    clear(scratch, row + n, row + rounded_up(n, ROWS))


@called
def write(scratch, row, n, width, x, t0, e0):
    """x[t0 + t, e0 + i] = scratch[row + t, i] for n tokens and i < width."""
    whole = width // LANES * LANES
    for t in range(n):
        for i in range(0, whole, LANES):
            store(x, (t0 + t, e0 + i), load(scratch, (row + t, i)))
        if whole < width:
            store_first(x, (t0 + t, e0 + whole), load(scratch, (row + t, whole)), width - whole)


@called
def clear(scratch, begin, end):
    """Zeros in the rows begin .. end - 1."""
    for i in range(begin, end):
        for j in range(0, scratch.shape[1], LANES):
            store(scratch, (i, j), full(0.0))


@called
def copy(source, target):
    """Copies the rows that both have."""
    for i in range(min(source.shape[0], target.shape[0])):
        for j in range(0, target.shape[1], LANES):
            store(target, (i, j), load(source, (i, j)))


@called
def transpose_into(result, scratch, n_rows, n_columns):
    """result[j, i] = scratch[i, j], in whole vectors."""
    for i in range(0, n_rows, LANES):
        for j in range(0, n_columns, LANES):
            transpose(scratch, i, j, result)


@called
def multiply(c, a, b, first, n_rows, width, begin, end, adds):
    """c[i, j] = the sum of a[k, i] b[k, j] over k = begin .. end - 1, and what c held if `adds`.

    i goes from `first` over n_rows up to whole blocks, j over `width` up to a whole vector.
    """
    for j in range(0, width, PAIR):
        for i in range(first, first + n_rows, BLOCK_ROWS):
            if width - j > LANES:
                if adds:
                    add_product(c, i, j, a, b, begin, end)
                else:
                    product(c, i, j, a, b, begin, end)
            elif adds:
                add_narrow_product(c, i, j, a, b, begin, end)
            else:
                narrow_product(c, i, j, a, b, begin, end)
