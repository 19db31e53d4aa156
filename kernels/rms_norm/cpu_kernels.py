"""RMSNorm and its adjoint, with or without a gate, as numba kernels on explicit vectors (see kernels/simd.py).

A task is ROWS rows. A row's group of channels is read once into scratch, where zeros fill it up to whole tiles. Tasks
share no output, so any number of threads gives the same bits.
"""

from __future__ import annotations

import numpy as np

from ..simd import (
    LANES,
    TILE,
    Floats1,
    Floats2,
    called,
    full,
    inline,
    kernel,
    load,
    load_first,
    load_tile,
    repeat,
    sigmoid,
    store,
    store_first,
    total,
)

ROWS = 64
"""Rows of a task."""


@called
def _scratch(width):
    return np.zeros(-(-width // TILE) * TILE, np.float32)


@inline
def _read(row, start, width, scratch):
    """scratch[:width] = row[start : start + width], and zeros behind: what stood there may be 0 times infinity."""
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        store(scratch, i, load(row, start + i))
    if whole < width:
        store(scratch, whole, load_first(row, start + whole, width - whole))
    for i in range(-(-width // LANES) * LANES, scratch.shape[0], LANES):
        store(scratch, i, full(0.0))


@inline
def _write(scratch, row, start, width):
    """row[start : start + width] = scratch[:width]."""
    whole = width // LANES * LANES
    for i in range(0, whole, LANES):
        store(row, start + i, load(scratch, i))
    if whole < width:
        store_first(row, start + whole, load(scratch, whole), width - whole)


@inline
def _sum(tile, four):
    """The sum of a tile's values; `four` is scratch."""
    store(four, 0, total(tile))
    return (four[0] + four[1]) + (four[2] + four[3])


@kernel
def forward(
    first: int, last: int, x: Floats2, z: Floats2, weight: Floats1, eps: float, y: Floats2, rstd: Floats2
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        x: (T, D).
        z: gate, (T, D), or (0, D) where there is none.
        weight: (D,).
        eps: added to the mean square.
        y: (T, D), written.
        rstd: 1 / rms of every row and group, (T, G), written.
    """
    n_groups = rstd.shape[1]
    width, gated = x.shape[1] // n_groups, z.shape[0] > 0
    xs, zs, ws, four = _scratch(width), _scratch(width), _scratch(width), np.zeros(4, np.float32)
    for group in range(n_groups):
        start = group * width
        _read(weight, start, width, ws)
        for t in range(first * ROWS, min(last * ROWS, x.shape[0])):
            _read(x[t], start, width, xs)
            if gated:
                _read(z[t], start, width, zs)
            squares = repeat(full(0.0))
            for i in range(0, width, TILE):
                v = load_tile(xs, i)
                if gated:
                    gate = load_tile(zs, i)
                    v = v * (gate * sigmoid(gate))
                    store(xs, i, v)
                squares = squares + v * v
            scale = np.float32(1.0) / np.sqrt(_sum(squares, four) / np.float32(width) + eps)
            if scale == 0:  # the squares are beyond float range
                scale = np.float32(np.nan)
            rstd[t, group] = scale
            for i in range(0, width, TILE):
                store(xs, i, load_tile(xs, i) * scale * load_tile(ws, i))
            _write(xs, y[t], start, width)


@kernel
def backward(
    first: int,
    last: int,
    grad_y: Floats2,
    x: Floats2,
    z: Floats2,
    weight: Floats1,
    rstd: Floats2,
    grad_x: Floats2,
    grad_z: Floats2,
    grad_weight: Floats2,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass.

    With v = x silu(z) and n = v / rms, the gradient of v is (g - n mean(g n)) / rms where g = weight grad_y. Writes
    grad_x and grad_z (T, D), and each task's part of the gradient of the weight, (tasks, D).
    """
    n_groups = rstd.shape[1]
    width, gated = x.shape[1] // n_groups, z.shape[0] > 0
    xs, zs, gs, ws = _scratch(width), _scratch(width), _scratch(width), _scratch(width)
    grad_ws, four = _scratch(width), np.zeros(4, np.float32)
    for task in range(first, last):
        for group in range(n_groups):
            start = group * width
            _read(weight, start, width, ws)
            grad_ws.fill(0)
            for t in range(task * ROWS, min((task + 1) * ROWS, x.shape[0])):
                _read(x[t], start, width, xs)
                _read(grad_y[t], start, width, gs)
                if gated:
                    _read(z[t], start, width, zs)
                scale, products = rstd[t, group], repeat(full(0.0))
                for i in range(0, width, TILE):
                    n, g = load_tile(xs, i) * scale, load_tile(gs, i)
                    if gated:
                        gate = load_tile(zs, i)
                        n = n * (gate * sigmoid(gate))
                    store(grad_ws, i, load_tile(grad_ws, i) + g * n)
                    products = products + g * load_tile(ws, i) * n
                mean = _sum(products, four) / np.float32(width)
                for i in range(0, width, TILE):
                    v, g = load_tile(xs, i), load_tile(gs, i) * load_tile(ws, i)
                    if gated:
                        gate = load_tile(zs, i)
                        s = sigmoid(gate)
                        grad_v = scale * (g - v * (gate * s) * (scale * mean))
                        store(zs, i, grad_v * v * (s * (1.0 + gate * (1.0 - s))))
                        store(xs, i, grad_v * (gate * s))
                    else:
                        store(xs, i, scale * (g - v * (scale * mean)))
                _write(xs, grad_x[t], start, width)
                if gated:
                    _write(zs, grad_z[t], start, width)
            _write(grad_ws, grad_weight[task], start, width)
