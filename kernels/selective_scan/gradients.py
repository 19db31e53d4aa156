"""Gradients of the compiled backends of the selective scan, which differ in the two operators alone."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..operators import differentiable
from . import reference


def register_gradients(scan: Any, scan_backward: Any) -> None:
    """Makes the custom operator `scan` differentiable once.

    Args:
        scan: (u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts, keep) to y, the final state
            and the states that backward continues from.
        scan_backward: (grad_y, grad_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, starts, states) to the
            gradients of u, delta, A, B, C, D, z, delta_bias and the initial state, whether these were given or not.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts, _ = inputs
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, initial_state, starts, output[2])
        ctx.delta_softplus = delta_softplus
        ctx.set_materialize_grads(True)

    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, initial_state, starts, states = ctx.saved_tensors
        *grads, grad_initial = scan_backward(grad_y, grad_state, *inputs, ctx.delta_softplus, starts, states)
        given = [None if x is None else grad for x, grad in zip(inputs, grads, strict=True)]
        return *given, None, None if initial_state is None else grad_initial, None, None

    def again(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
        *inputs, initial_state, starts, _ = ctx.saved_tensors
        return reference.selective_scan, (*inputs, ctx.delta_softplus, initial_state, starts)

    differentiable(scan, backward, setup_context, again)
