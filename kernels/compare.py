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


def to(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Floating tensors in another precision, complex ones in the matching one."""
    paired = {torch.float64: torch.complex128}.get(dtype, torch.complex64)
    return {
        k: t.to(paired) if t.is_complex() else t.to(dtype) if t.is_floating_point() else t for k, t in tensors.items()
    }


def example(op: str, *, B: int = 2, L: int = 37, E: int = 6, N: int = 5, optional: bool = True) -> dict[str, Any]:
    """Random inputs of an operation in float64, by argument name.

    Args:
        op: name of the operation.
        B: batch.
        L: length; the number of tokens for operations without a length.
        E: channels.
        N: states, heads' width, taps or classes, whichever the operation has.
        optional: whether optional tensors are given too: bias, gate, initial state, starts with a mark in most rows.
    """

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    def poles() -> Tensor:
        return torch.complex(-torch.rand(E, N, dtype=torch.float64) - 0.01, normal(E, N))

    starts = torch.rand(B, L) < 2 / L
    documents = {"starts": starts} if optional else {}
    if op == "selective_scan":
        tensors = {
            "u": normal(B, L, E),
            "delta": normal(B, L, E) - 2 if optional else torch.rand(B, L, E, dtype=torch.float64),
            "A": -torch.rand(E, N, dtype=torch.float64) * 8 - 0.1,
            "B": normal(B, L, N),
            "C": normal(B, L, N),
        }
        extra = {"D": normal(E), "z": normal(B, L, E), "delta_bias": normal(E), "initial_state": normal(B, E, N)}
        return tensors | (extra | documents if optional else {})
    if op == "ssd":
        tensors = {
            "x": normal(B, L, 4, E),
            "dt": normal(B, L, 4) - 2 if optional else torch.rand(B, L, 4, dtype=torch.float64),
            "A": -torch.rand(4, dtype=torch.float64) * 8 - 0.1,
            "B": normal(B, L, 2, N),
            "C": normal(B, L, 2, N),
        }
        extra = {"D": normal(4), "z": normal(B, L, 4, E), "dt_bias": normal(4), "initial_state": normal(B, 4, E, N)}
        return tensors | (extra | documents if optional else {})
    if op == "gated_delta_rule":
        q, k = (torch.nn.functional.normalize(normal(B, L, 3, N), dim=-1) for _ in range(2))  # longer keys can explode
        tensors = {"q": q, "k": k, "v": normal(B, L, 3, E)}
        tensors |= {"log_decay": -normal(B, L, 3).exp(), "beta": torch.rand(B, L, 3, dtype=torch.float64)}
        return tensors | ({"initial_state": normal(B, 3, E, N)} | documents if optional else {})
    if op == "attention":
        past = N if optional else 0
        tensors = {"q": normal(B, L, 4, 2 * N), "k": normal(B, past + L, 2, 2 * N), "v": normal(B, past + L, 2, 2 * N)}
        return tensors | ({"first_key": torch.randint(past, (B,))} | documents if optional else {})
    if op == "causal_conv1d":
        tensors = {"x": normal(B, L, E), "weight": normal(E, N)}
        return tensors | ({"bias": normal(E), "initial_state": normal(B, N - 1, E)} | documents if optional else {})
    if op == "state_update":
        channels = 4 * E + 2 * 2 * N
        return {
            "x": normal(B, channels),
            "dt": normal(B, 4) - 2,
            "window": normal(B, 3, channels),
            "state": normal(B, 4, E, N),
            "weight": normal(channels, 4),
            "bias": normal(channels),
            "A": -torch.rand(4, dtype=torch.float64) * 8 - 0.1,
            "D": normal(4),
            "dt_bias": normal(4),
        }
    if op == "ssm_kernel":
        return {"A": poles(), "C": torch.complex(normal(E, N), normal(E, N))}
    if op == "long_conv":
        return {"u": normal(B, L, E), "kernel": normal(E, L)} | ({"D": normal(E)} if optional else {})
    if op == "ssm_scan":
        tensors = {"u": normal(B, L, E), "A": poles(), "C": torch.complex(normal(E, N), normal(E, N))}
        state = torch.complex(normal(B, E, N), normal(B, E, N))
        return tensors | ({"D": normal(E), "initial_state": state} | documents if optional else {})
    if op in ("dplr_kernel", "dplr_scan"):
        # a pole near zero hardly decays, and its truncated kernel is a difference of nearly equal numbers
        tensors = {"A": poles() - 0.5} | {k: torch.complex(normal(E, N), normal(E, N)) for k in "PBC"}
        if op == "dplr_kernel":
            return tensors
        state = torch.complex(normal(B, E, N), normal(B, E, N))
        extra = {"D": normal(E), "initial_state": state} | documents
        return {"u": normal(B, L, E)} | tensors | (extra if optional else {})
    if op == "lstm_scan":
        tensors = {"gates": normal(B, L, 4 * E), "weight": normal(4 * E, E)}
        return tensors | ({"initial_state": normal(B, 2, E)} | documents if optional else {})
    if op == "rms_norm":
        return {"x": normal(B, L, E + 1), "weight": normal(E + 1)}  # of one channel only the sign would be left
    if op == "gated_rms_norm":
        return {"x": normal(B, L, 2 * E), "z": normal(B, L, 2 * E), "weight": normal(2 * E)}
    if op == "swiglu":
        return {"gate": normal(B, L, E), "up": normal(B, L, E)}
    if op == "rotary":
        tensors = {"q": normal(B, L, 4, 2 * N), "k": normal(B, L, 2, 2 * N)}
        return tensors | {"positions": torch.arange(E, E + L)}
    if op == "linear_cross_entropy":
        targets = torch.randint(N + 1, (L,))
        targets[:: 3 if optional else L + 1] = -100 if optional else 0
        return {"x": normal(L, E), "weight": normal(N + 1, E), "targets": targets}
    if op == "grouped_mm":
        group = torch.randint(N, (L,))
        return {"x": normal(L, E), "weight": normal(N, E + 1, E), "counts": torch.bincount(group, minlength=N)}
    raise ValueError(f"no example for the operation {op!r}")


def options(op: str, *, optional: bool = True, L: int = 37) -> dict[str, Any]:
    """Arguments of an operation that are not tensors, to go with `example`."""
    if op == "rms_norm":
        return {"eps": 1e-5}
    if op == "gated_rms_norm":
        return {"eps": 1e-5, "n_groups": 2 if optional else 1}
    if op in ("ssm_kernel", "dplr_kernel"):
        return {"length": L}
    if not optional:
        return {}
    return {
        "selective_scan": {"delta_softplus": True},
        "ssd": {"dt_softplus": True, "chunk_len": 32},
        "attention": {"window": 7},
        "causal_conv1d": {"activation": "silu"},
        "linear_cross_entropy": {"z_loss": 1e-2},
    }.get(op, {})
