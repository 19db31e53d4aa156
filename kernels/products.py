"""Matrix products inside numba kernels, where a library would be called too often or would pack too much.

A right factor comes packed, (panels, K, PANEL): the PANEL columns of a panel side by side for each of the K numbers
that they are multiplied by, with zeros for columns that do not exist. The sums of four rows and a panel, twelve
vectors, stay in registers for all of K: as many as hide the latency of a fused multiply-add, and as AVX2 has room for.
A sum is taken in the order of K whatever rows are computed beside it, and so has the same bits in any company.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .simd import LANES, called, full, inline, load, store

PANEL = 3 * LANES
"""Columns of a panel."""


def packed(matrix: Tensor) -> Tensor:
    """A right factor as kernels take it, (K, columns) -> (panels, K, PANEL)."""
    return F.pad(matrix, (0, -matrix.shape[1] % PANEL)).unflatten(1, (-1, PANEL)).transpose(0, 1).contiguous()


@inline
def _zero():
    return full(0.0), full(0.0), full(0.0)


@inline
def _load(array, i, j, column):
    return load(array, (i, j, column)), load(array, (i, j, column + LANES)), load(array, (i, j, column + 2 * LANES))


@inline
def _add(sums, x, w):
    return sums[0] + x * w[0], sums[1] + x * w[1], sums[2] + x * w[2]


@inline
def _store(array, row, column, sums):
    store(array, (row, column), sums[0])
    store(array, (row, column + LANES), sums[1])
    store(array, (row, column + 2 * LANES), sums[2])


@called
def multiply(left, right, product):
    """product[r, c] = sum_k left[r, k] right[k, c] for a packed right factor, on all columns of its panels."""
    n_rows, K = len(left), right.shape[1]
    for panel in range(len(right)):
        column, r = panel * PANEL, 0
        while r + 4 <= n_rows:
            sums0 = sums1 = sums2 = sums3 = _zero()
            for k in range(K):
                w = _load(right, panel, k, 0)
                sums0, sums1 = _add(sums0, left[r, k], w), _add(sums1, left[r + 1, k], w)
                sums2, sums3 = _add(sums2, left[r + 2, k], w), _add(sums3, left[r + 3, k], w)
            _store(product, r, column, sums0)
            _store(product, r + 1, column, sums1)
            _store(product, r + 2, column, sums2)
            _store(product, r + 3, column, sums3)
            r += 4
        if r + 2 <= n_rows:
            sums0 = sums1 = _zero()
            for k in range(K):
                w = _load(right, panel, k, 0)
                sums0, sums1 = _add(sums0, left[r, k], w), _add(sums1, left[r + 1, k], w)
            _store(product, r, column, sums0)
            _store(product, r + 1, column, sums1)
            r += 2
        if r < n_rows:
            sums0 = _zero()
            for k in range(K):
                sums0 = _add(sums0, left[r, k], _load(right, panel, k, 0))
            _store(product, r, column, sums0)
