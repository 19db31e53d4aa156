"""The CPU path: a numba kernel each way (cpu_kernels.py), float32 inside.

Backward keeps nothing but the inputs: b and c of the heads, which are as many times larger, it computes again.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..operators import differentiable, operator
from ..parallel import floats, is_small, run
from . import reference, torch_impl

SPAN = 64
"""Tokens of a task."""


def turned_heads(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    drive: Tensor,
    angle: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Same contract as reference.turned_heads, in float32. Differentiable once."""
    if is_small(B):
        return torch_impl.turned_heads(B, C, B_bias, C_bias, drive, angle, before)
    optional = (None if t is None else t.float() for t in (angle, before))
    return _turned(B.float(), C.float(), B_bias.float(), C_bias.float(), drive.float(), *optional)


def forward(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, drive: Tensor, angle: Tensor | None, before: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """drive b, c, their products and b of the last token, as the reference gives them."""
    from . import cpu_kernels

    (batch, L, N), H = B.shape, len(B_bias)
    late, c, dot, last = floats(batch, L, H, N), floats(batch, L, H, N), floats(batch, L, H), floats(batch, H, N)
    inputs = _inputs(B, C, B_bias, C_bias, drive, angle, before)
    run(cpu_kernels.forward, _n_tasks(B), SPAN, *inputs, late, c, dot, last)
    return late, c, dot, last


_turned = operator("turned_heads_cpu", forward, device_types="cpu")


def backward(
    grad_late: Tensor | None,
    grad_c: Tensor | None,
    grad_dot: Tensor | None,
    grad_last: Tensor | None,
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    drive: Tensor,
    angle: Tensor | None,
    before: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the inputs; that of the angles is empty where there are none."""
    from . import cpu_kernels

    (batch, L, N), H, n_tasks = B.shape, len(B_bias), _n_tasks(B)
    grads = (
        B.new_zeros(shape) if grad is None else grad
        for grad, shape in (
            (grad_late, (batch, L, H, N)),
            (grad_c, (batch, L, H, N)),
            (grad_dot, (batch, L, H)),
            (grad_last, (batch, H, N)),
        )
    )
    inputs = _inputs(B, C, B_bias, C_bias, drive, angle, before)
    grad_B, grad_C, grad_drive = floats(B.shape), floats(C.shape), floats(drive.shape)
    grad_angle, grad_before = floats(inputs[5].shape), floats(batch, H, N)
    parts = floats(n_tasks, 2, H, N)  # of the biases, of which each task sums its own
    run(
        cpu_kernels.backward, n_tasks, SPAN, *grads, *inputs,
        grad_B, grad_C, parts[:, 0], parts[:, 1], grad_drive, grad_angle, grad_before,
    )  # fmt: skip
    grad_B_bias, grad_C_bias = parts.sum(0).unbind(0)
    return grad_B, grad_C, grad_B_bias.clone(), grad_C_bias.clone(), grad_drive, grad_angle, grad_before


_turned_backward = operator("turned_heads_cpu_backward", backward, device_types="cpu")


def _n_tasks(B: Tensor) -> int:
    return B.shape[0] * -(-B.shape[1] // SPAN)


def _inputs(
    B: Tensor, C: Tensor, B_bias: Tensor, C_bias: Tensor, drive: Tensor, angle: Tensor | None, before: Tensor | None
) -> tuple[Tensor, ...]:
    """Arguments of both kernels: of no angles none, and zeros before the first token."""
    angle = floats(*drive.shape, 0) if angle is None else angle
    before = B.new_zeros(B.shape[0], *B_bias.shape) if before is None else before
    return B, C, B_bias, C_bias, drive, angle, before


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    *_, angle, before = ctx.saved_tensors
    *others, grad_angle, grad_before = _turned_backward(*grads, *ctx.saved_tensors)
    return *others, None if angle is None else grad_angle, None if before is None else grad_before


differentiable(_turned, _backward, _setup_context, lambda ctx: (reference.turned_heads, ctx.saved_tensors))
