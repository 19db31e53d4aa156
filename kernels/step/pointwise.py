"""Instructions on single numbers: activations and gates, norms, and the short convolution."""

from __future__ import annotations

import math

import numpy as np

from ..simd import (
    LANES,
    absolute,
    called,
    exp,
    floats_at,
    full,
    halves_at,
    inline,
    ints_at,
    load_first,
    sigmoid,
    softplus,
    store_first,
    sum_of,
    tanh,
    where_below,
)
from .instruction import float_of, share, unpack

ADD, MULTIPLY, SWIGLU, GLU, GELU, GELU_TANH, SIGMOID = range(7)
"""Functions: a + b, a b, silu(a) b, a sigmoid(b), gelu(a), its approximation by tanh, b sigmoid(a)."""


@inline
def _erf(x):
    """The error function to 2e-7 (Abramowitz and Stegun 1964, 7.1.26)."""
    size = absolute(x)
    t = 1.0 / (1.0 + 0.3275911 * size)
    p = ((((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592) * t
    y = 1.0 - p * exp(0.0 - x * x)
    return where_below(x, 0.0, -1.0, full(1.0)) * y


def pointwise(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, n) = function(a, b), where b may be one row for all, of stride 0."""
    function, a, a_stride, b, b_stride, y, y_stride, n, rows = unpack(words, 9)
    left, right, ys = floats_at(a), floats_at(b), floats_at(y)
    first, last = share(-(-n // LANES), rank, n_ranks)
    for row in range(rows):
        for block in range(first, last):
            i = block * LANES
            u = load_first(left, row * a_stride + i, n - i)
            v = load_first(right, row * b_stride + i, n - i)
            if function == ADD:
                value = u + v
            elif function == MULTIPLY:
                value = u * v
            elif function == SWIGLU:
                value = u * sigmoid(u) * v
            elif function == GLU:
                value = u * sigmoid(v)
            elif function == GELU:
                value = 0.5 * u * (1.0 + _erf(0.70710678 * u))
            elif function == GELU_TANH:
                value = 0.5 * u * (1.0 + tanh(0.79788456 * (u + 0.044715 * u * u * u)))
            else:
                value = v * sigmoid(u)
            store_first(ys, row * y_stride + i, value, n - i)


@inline
def _inverse_rms(x, at, gate, gate_at, is_gated, n, eps):
    """1 / sqrt(mean x^2 + eps), of x silu(gate) where it is gated."""
    sums = full(0.0)
    for i in range(0, n, LANES):
        value = load_first(x, at + i, n - i)
        if is_gated:
            z = load_first(gate, gate_at + i, n - i)
            value = value * z * sigmoid(z)
        sums = sums + value * value
    square = np.float64(sum_of(sums)) / n
    if not square < np.inf:  # beyond float32, if it is a number at all
        square = 0.0
        for i in range(n):
            value = np.float64(x[at + i])
            if is_gated:
                z = np.float64(gate[gate_at + i])
                value *= z / (1.0 + math.exp(-z))
            square += value * value / n
    return np.float32(1.0 / math.sqrt(square + eps))


def rms_norm(words: int, rank: int, n_ranks: int) -> None:
    """y = weight x / rms(x) in groups of n: x, y (rows, groups n), weight (n,), or (groups n,) of their own.

    x is multiplied by silu(gate) before where there is a gate.
    """
    x, x_stride, gate, gate_stride, weight, own, y, y_stride, n, groups, rows, bits = unpack(words, 12)
    xs, zs, ws, ys = floats_at(x), floats_at(gate), floats_at(weight), floats_at(y)
    first, last = share(rows * groups, rank, n_ranks)
    for task in range(first, last):
        row, g = task // groups, task % groups
        at, gate_at, to = row * x_stride + g * n, row * gate_stride + g * n, row * y_stride + g * n
        factor = _inverse_rms(xs, at, zs, gate_at, gate != 0, n, float_of(bits))
        for i in range(0, n, LANES):
            value = load_first(xs, at + i, n - i)
            if gate:
                z = load_first(zs, gate_at + i, n - i)
                value = value * z * sigmoid(z)
            value = value * factor * load_first(ws, (g * n if own else 0) + i, n - i)
            store_first(ys, to + i, value, n - i)


def layer_norm(words: int, rank: int, n_ranks: int) -> None:
    """y = weight (x - mean) / sqrt(variance + eps) + bias: x, y (rows, n), weight, bias (n,) or none."""
    x, x_stride, weight, bias, y, y_stride, n, rows, bits = unpack(words, 9)
    xs, ws, offsets, ys = floats_at(x), floats_at(weight), floats_at(bias), floats_at(y)
    first, last = share(rows, rank, n_ranks)
    for row in range(first, last):
        at = row * x_stride
        sums = full(0.0)
        for i in range(0, n, LANES):
            sums = sums + load_first(xs, at + i, n - i)
        mean = np.float64(sum_of(sums)) / n
        square = 0.0
        for i in range(n):
            square += (xs[at + i] - mean) ** 2
        factor = np.float32(1.0 / math.sqrt(square / n + float_of(bits)))
        centre = np.float32(mean)
        for i in range(0, n, LANES):
            value = (load_first(xs, at + i, n - i) - centre) * factor
            if weight:
                value = value * load_first(ws, i, n - i)
            if bias:
                value = value + load_first(offsets, i, n - i)
            store_first(ys, row * y_stride + i, value, n - i)


@called
def _convolve(window, words, rank, n_ranks):
    _, x, x_stride, weight, bias, y, n, n_past, rows, is_silu = unpack(words, 10)
    xs, ws, offsets, ys = floats_at(x), floats_at(weight), floats_at(bias), floats_at(y)
    first, last = share(-(-n // LANES), rank, n_ranks)
    for row in range(rows):
        past = row * n_past * n
        for block in range(first, last):
            i = block * LANES
            new = load_first(xs, row * x_stride + i, n - i)
            value = load_first(ws, n_past * n + i, n - i) * new
            if bias:
                value = value + load_first(offsets, i, n - i)
            for t in range(n_past):
                held = load_first(window, past + t * n + i, n - i)
                value = value + load_first(ws, t * n + i, n - i) * held
                if t:
                    store_first(window, past + (t - 1) * n + i, held, n - i)
            if n_past:
                store_first(window, past + (n_past - 1) * n + i, new, n - i)
            store_first(ys, row * n + i, value * sigmoid(value) if is_silu else value, n - i)


def convolve(words: int, rank: int, n_ranks: int) -> None:
    """y (rows, n) = bias + weight[:-1] window + weight[-1] x, then perhaps silu; x then joins the window.

    window (rows, n_past, n) · weight (n_past + 1, n) · bias (n,) or none.
    """
    _convolve(floats_at(ints_at(words)[0]), words, rank, n_ranks)


def convolve_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`convolve` with a window in bfloat16."""
    _convolve(halves_at(ints_at(words)[0]), words, rank, n_ranks)


def decays(words: int, rank: int, n_ranks: int) -> None:
    """step = softplus(dt + bias) and decay = exp(A step): dt (rows, n), bias, A (n,), the others (rows, n)."""
    dt, dt_stride, bias, A, step, decay, n, rows = unpack(words, 8)
    dts, offsets, As, steps, results = (
        floats_at(dt),
        floats_at(bias),
        floats_at(A),
        floats_at(step),
        floats_at(decay),
    )
    if rank:
        return
    for row in range(rows):
        for i in range(0, n, LANES):
            size = softplus(load_first(dts, row * dt_stride + i, n - i) + load_first(offsets, i, n - i))
            store_first(steps, row * n + i, size, n - i)
            store_first(results, row * n + i, exp(size * load_first(As, i, n - i)), n - i)


@called
def _save(y, words, rank):
    _, x, x_stride, n, rows = unpack(words, 5)
    xs = floats_at(x)
    if rank:
        return
    for row in range(rows):
        for i in range(0, n, LANES):
            store_first(y, row * n + i, load_first(xs, row * x_stride + i, n - i), n - i)


def save(words: int, rank: int, n_ranks: int) -> None:
    """y = x: both (rows, n)."""
    _save(floats_at(ints_at(words)[0]), words, rank)


def save_bfloat16(words: int, rank: int, n_ranks: int) -> None:
    """`save` as bfloat16."""
    _save(halves_at(ints_at(words)[0]), words, rank)
