"""Matrix products inside numba kernels, where a library would be called too often or would pack too much.

A right factor comes packed, (panels, K, columns): the columns of a panel side by side for each of the K numbers that
they are multiplied by, with zeros for columns that do not exist. The sums of four rows and a panel stay in registers
for all of K. A panel of three vectors makes twelve sums: as many as hide the latency of a fused multiply-add, and as
AVX2 has room for. AVX-512 and NEON have twice the registers, and take four vectors where that leaves fewer zeros.
A sum is taken in the order of K whatever is computed beside it, and so has the same bits in any company.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from .simd import LANES, TILE, called, full, inline, load, load_tile, repeat, store

_VECTORS = (3,) if LANES == 8 else (4, 3)
"""Vectors that a panel may have."""


def packed(matrix: Tensor) -> Tensor:
    """A right factor as kernels take it, (K, columns) -> (panels, K, columns of a panel)."""
    n_vectors = -(-matrix.shape[1] // LANES)
    panel = LANES * min(_VECTORS, key=lambda n: -n_vectors % n)
    return F.pad(matrix, (0, -matrix.shape[1] % panel)).unflatten(1, (-1, panel)).transpose(0, 1).contiguous()


@inline
def _zero_three():
    return full(0.0), full(0.0), full(0.0)


@inline
def _load_three(right, panel, k):
    return load(right, (panel, k, 0)), load(right, (panel, k, LANES)), load(right, (panel, k, 2 * LANES))


@inline
def _add_three(sums, x, w):
    return sums[0] + x * w[0], sums[1] + x * w[1], sums[2] + x * w[2]


@inline
def _store_three(product, row, column, sums):
    store(product, (row, column), sums[0])
    store(product, (row, column + LANES), sums[1])
    store(product, (row, column + 2 * LANES), sums[2])


@inline
def _zero_four():
    return repeat(full(0.0))


@inline
def _load_four(right, panel, k):
    return load_tile(right, (panel, k, 0))


@inline
def _add_four(sums, x, w):
    return sums + x * w


@inline
def _store_four(product, row, column, sums):
    store(product, (row, column), sums)


def _multiplier(zero: Any, load: Any, add: Any, store: Any) -> Callable[..., None]:
    """The function that `multiply` is for panels of one width."""

    @called
    def multiply(left, right, product):
        n_rows, K = len(left), right.shape[1]
        for panel in range(len(right)):
            column, r = panel * right.shape[2], 0
            while r + 4 <= n_rows:
                sums0 = sums1 = sums2 = sums3 = zero()
                for k in range(K):
                    w = load(right, panel, k)
                    sums0, sums1 = add(sums0, left[r, k], w), add(sums1, left[r + 1, k], w)
                    sums2, sums3 = add(sums2, left[r + 2, k], w), add(sums3, left[r + 3, k], w)
                store(product, r, column, sums0)
                store(product, r + 1, column, sums1)
                store(product, r + 2, column, sums2)
                store(product, r + 3, column, sums3)
                r += 4
            if r + 2 <= n_rows:
                sums0 = sums1 = zero()
                for k in range(K):
                    w = load(right, panel, k)
                    sums0, sums1 = add(sums0, left[r, k], w), add(sums1, left[r + 1, k], w)
                store(product, r, column, sums0)
                store(product, r + 1, column, sums1)
                r += 2
            if r < n_rows:
                sums0 = zero()
                for k in range(K):
                    sums0 = add(sums0, left[r, k], load(right, panel, k))
                store(product, r, column, sums0)

    return multiply


_by_three = _multiplier(_zero_three, _load_three, _add_three, _store_three)
_by_four = _multiplier(_zero_four, _load_four, _add_four, _store_four) if 4 in _VECTORS else _by_three


@called
def multiply(left, right, product):
    """product[r, c] = sum_k left[r, k] right[k, c] for a packed right factor, on all columns of its panels."""
    if right.shape[2] == TILE:
        _by_four(left, right, product)
    else:
        _by_three(left, right, product)
