"""Plain PyTorch: the time loop runs in preallocated buffers, and the backward is written out.

The gradient of the recurrent weight is one matrix product over all tokens at the end. Kept for backward: the activated
gates and the cells, 5 E numbers a token.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import differentiable


def lstm_scan(
    gates: Tensor, weight: Tensor, initial_state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.lstm_scan. Differentiable once."""
    dtype = torch.promote_types(gates.dtype, torch.float32)
    E = weight.shape[1]
    state = gates.new_zeros(gates.shape[0], 2, E, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    y, c, _, _ = _scan(gates.to(dtype), weight.to(dtype), state, starts)
    return y.transpose(0, 1).to(gates.dtype), torch.stack([y[-1], c], dim=1)


@torch.library.custom_op("crossover::lstm_scan", mutates_args=())
def _scan(
    gates: Tensor, weight: Tensor, initial_state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, (L, B, E); the last cell, (B, E); activated gates, (L, B, 4 E), and cells, (L, B, E), for backward."""
    batch, L, _ = gates.shape
    E = weight.shape[1]
    act = gates.transpose(0, 1).clone(memory_format=torch.contiguous_format)  # (L, B, 4E), to be activated in place
    ys, cells = act.new_empty(L, batch, E), act.new_empty(L, batch, E)
    y, c = (t.clone() for t in initial_state.unbind(1))
    W = weight.T.contiguous()
    for t in range(L):
        if starts is not None:
            y, c = (x.masked_fill(starts[:, t, None], 0) for x in (y, c))
        a = act[t].addmm_(y, W)
        i, f, g, o = a.chunk(4, dim=-1)
        a[:, : 2 * E].sigmoid_()
        g.tanh_()
        o.sigmoid_()
        c = torch.mul(f, c, out=cells[t]).addcmul_(i, g)
        y = torch.tanh(c, out=ys[t]).mul_(o)
    return ys, c.clone(), act, cells


@_scan.register_fake
def _(gates, weight, initial_state, starts):
    batch, L, _ = gates.shape
    E = weight.shape[1]
    return (
        gates.new_empty(L, batch, E),
        gates.new_empty(batch, E),
        gates.new_empty(L, batch, 4 * E),
        gates.new_empty(L, batch, E),
    )


@torch.library.custom_op("crossover::lstm_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_c: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    y: Tensor,
    act: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, (B, L, 4 E), of the recurrent weight and of the initial state."""
    L, batch, E = y.shape
    y_before, c_before = (
        torch.cat([first[None], rest[:-1]]) for first, rest in zip(initial_state.unbind(1), (y, cells), strict=True)
    )
    i, f, g, o = act.chunk(4, dim=-1)
    keep = f  # what remains of the gradient of a cell one token earlier, (L, B, E)
    if starts is not None:
        y_before, c_before, keep = (x.masked_fill(starts.T[..., None], 0) for x in (y_before, c_before, keep))
    # all that does not depend on later tokens, at once: slopes, which dc (for i, f, g) and dy (for o) multiply below
    tanh_c = cells.tanh()
    through = o * (1 - tanh_c * tanh_c)  # from y to c
    grad_gates = torch.cat([g * i * (1 - i), c_before * f * (1 - f), i * (1 - g * g), tanh_c * o * (1 - o)], dim=-1)
    by_gate = grad_gates.view(L, batch, 4, E)
    dy, dc = torch.zeros_like(grad_c), grad_c.clone()  # gradients of y[t] and c[t] from later tokens
    for t in reversed(range(L)):
        dy += grad_y[t]
        dc.addcmul_(dy, through[t])
        by_gate[t, :, :3] *= dc[:, None]
        by_gate[t, :, 3] *= dy
        torch.mm(grad_gates[t], weight, out=dy)
        if starts is not None:
            dy.masked_fill_(starts[:, t, None], 0)
        dc *= keep[t]
    grad_weight = grad_gates.flatten(0, 1).T @ y_before.flatten(0, 1)
    return grad_gates.transpose(0, 1).contiguous(), grad_weight, torch.stack([dy, dc], dim=1)


@_scan_backward.register_fake
def _(grad_y, grad_c, weight, initial_state, starts, y, act, cells):
    L, batch, E = y.shape
    return y.new_empty(batch, L, 4 * E), torch.empty_like(weight), torch.empty_like(initial_state)


def _setup_context(ctx, inputs, output) -> None:
    _, weight, initial_state, starts = inputs
    y, _, act, cells = output
    ctx.save_for_backward(weight, initial_state, starts, y, act, cells)
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_y: Tensor, grad_c: Tensor, _act: Tensor, _cells: Tensor):
    weight, initial_state, starts, y, act, cells = ctx.saved_tensors
    grads = _scan_backward(grad_y, grad_c, weight, initial_state, starts, y, act, cells)
    return *grads, None


differentiable(_scan, _backward, _setup_context)
