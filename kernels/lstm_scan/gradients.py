"""Gradients of the compiled backends of the LSTM, which differ in the two operators alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..operators import differentiable


def register_gradients(scan: Any, scan_backward: Any) -> None:
    """Makes the custom operator `scan` differentiable once.

    Args:
        scan: (gates, weight, initial_state, starts, keep) to y, the final state, and the activated gates and cells that
            backward needs.
        scan_backward: (grad_y, grad_state, weight, initial_state, starts, y, activated, cells) to the gradients of
            gates, weight and the initial state.
    """

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        _, weight, initial_state, starts, _ = inputs
        y, _, activated, cells = output
        ctx.save_for_backward(weight, initial_state, starts, y, activated, cells)
        ctx.set_materialize_grads(False)  # zeros for the activated gates, which nobody asks for, would take long

    def backward(
        ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _activated: None, _cells: None
    ) -> tuple[Tensor | None, ...]:
        _, initial_state, _, y, _, _ = ctx.saved_tensors
        grad_y = torch.zeros_like(y) if grad_y is None else grad_y
        grad_state = torch.zeros_like(initial_state) if grad_state is None else grad_state
        return *scan_backward(grad_y, grad_state, *ctx.saved_tensors), None, None

    differentiable(scan, backward, setup_context)


def weight_gradient(grad_gates: Tensor, y: Tensor, initial_state: Tensor, starts: Tensor | None) -> Tensor:
    """Gradient of the recurrent weight, (4 E, E): that of the gates times the output one token before, over all tokens.

    Args:
        grad_gates: (B, L, 4 E).
        y: (B, L, E).
        initial_state: (B, 2, E).
        starts: (B, L), or None.
    """
    before = torch.cat([initial_state[:, :1].to(y.dtype), y[:, :-1]], dim=1)
    if starts is not None:
        before.masked_fill_(starts[..., None], 0.0)
    return grad_gates.flatten(0, 1).T @ before.flatten(0, 1)
