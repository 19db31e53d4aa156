"""Compares implementations of an operation with its reference: values and gradients, by relative norm.

Tests use it on random examples; so can anyone who writes a backend.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def values_and_gradients(function: Callable[..., Any], tensors: dict[str, Tensor], **others: Any) -> dict[str, Tensor]:
    """Outputs, and the gradients of all floating inputs under a fixed random weighting of the outputs.

    Args:
        function: called with the tensors and the others by name.
        tensors: inputs; those with a floating dtype get gradients.
        others: passed through.
    """
    leaves = {
        k: t.detach().clone().requires_grad_() if t.is_floating_point() or t.is_complex() else t
        for k, t in tensors.items()
    }
    out = function(**leaves, **others)
    outputs = out if isinstance(out, tuple) else (out,)
    generator = torch.Generator().manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64)
    for t in outputs:
        real = torch.view_as_real(t) if t.is_complex() else t
        weights = torch.randn(real.shape, generator=generator, dtype=torch.float64)
        loss = loss + (real.double() * weights).sum()
    wanted = {k: t for k, t in leaves.items() if t.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), materialize_grads=True)
    result = {f"output {i}": t.detach() for i, t in enumerate(outputs)}
    return result | {f"gradient of {k}": g for k, g in zip(wanted, grads, strict=True)}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """|actual - expected| / |expected| in float64; infinite for anything that is not finite.

    A tensor that should vanish has no scale of its own: it is judged as if its elements were 0.01, inputs being near 1.
    """
    wide = torch.complex128 if expected.is_complex() else torch.float64
    actual, expected = actual.to(wide), expected.to(wide)
    if not torch.isfinite(actual).all():
        return float("inf")
    return float((actual - expected).norm() / expected.norm().clamp(min=0.01 * expected.numel() ** 0.5))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    """Compares everything `values_and_gradients` gave."""
    assert actual.keys() == expected.keys()
    errors = {k: relative_error(actual[k], expected[k]) for k in expected}
    assert {k: e for k, e in errors.items() if not e <= tolerance} == {}
    assert {k: t.shape for k, t in actual.items()} == {k: t.shape for k, t in expected.items()}


def cast(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in another precision, complex ones in the matching one."""
    paired = {torch.float64: torch.complex128}.get(dtype, torch.complex64)
    return {
        k: t.to(paired) if t.is_complex() else t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()
    }
