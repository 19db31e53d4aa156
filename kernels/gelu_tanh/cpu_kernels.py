"""GELU by tanh and its adjoint as numba kernels on explicit vectors (see kernels/simd.py). A task is a row."""

from __future__ import annotations

from ..simd import LANES, Floats2, inline, kernel, load_first, sigmoid, store_first


@inline
def _share(x):
    """The share of x that passes, (1 + tanh(u / 2)) / 2 = sigmoid(u), which keeps its digits where tanh is near -1."""
    return sigmoid(x * (0.0713548163 * x * x + 1.59576912))


@kernel
def forward(first: int, last: int, x: Floats2, y: Floats2) -> None:
    """Writes y = gelu_tanh(x) for the rows first .. last - 1; both are (T, F)."""
    F = x.shape[1]
    for t in range(first, last):
        for i in range(0, F, LANES):
            v, n = load_first(x, (t, i), F - i), F - i
            store_first(y, (t, i), v * _share(v), n)


@kernel
def backward(first: int, last: int, grad_y: Floats2, x: Floats2, grad_x: Floats2) -> None:
    """Writes the gradient of x for the rows first .. last - 1; all are (T, F)."""
    F = x.shape[1]
    for t in range(first, last):
        for i in range(0, F, LANES):
            v, n = load_first(x, (t, i), F - i), F - i
            s = _share(v)
            slope = s + s * (1.0 - s) * (v * (0.214064449 * v * v + 1.59576912))  # v times the derivative of u
            store_first(grad_x, (t, i), load_first(grad_y, (t, i), n) * slope, n)
