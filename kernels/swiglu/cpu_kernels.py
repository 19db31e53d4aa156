"""The gate of a SwiGLU and its adjoint as numba kernels on explicit vectors (see kernels/simd.py). A task is a row."""

from __future__ import annotations

from ..simd import LANES, Floats2, kernel, load_first, sigmoid, store_first


@kernel
def forward(first: int, last: int, gate: Floats2, up: Floats2, y: Floats2) -> None:
    """Writes y = gate sigmoid(gate) up for the rows first .. last - 1; all are (T, F)."""
    F = gate.shape[1]
    for t in range(first, last):
        for i in range(0, F, LANES):
            g, n = load_first(gate, (t, i), F - i), F - i
            store_first(y, (t, i), g * sigmoid(g) * load_first(up, (t, i), n), n)


@kernel
def backward(
    first: int, last: int, grad_y: Floats2, gate: Floats2, up: Floats2, grad_gate: Floats2, grad_up: Floats2
) -> None:
    """Writes the gradients of gate and up for the rows first .. last - 1; all are (T, F)."""
    F = gate.shape[1]
    for t in range(first, last):
        for i in range(0, F, LANES):
            n = F - i
            g, gy = load_first(gate, (t, i), n), load_first(grad_y, (t, i), n)
            s = sigmoid(g)
            store_first(grad_up, (t, i), gy * (g * s), n)
            slope = s * (1.0 + g * (1.0 - s))
            store_first(grad_gate, (t, i), gy * load_first(up, (t, i), n) * slope, n)
