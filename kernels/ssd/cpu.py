"""The CPU path: chunks of matrix products in numba kernels (cpu_kernels.py), float32 inside.

Forward keeps the state before every SPAN tokens, and only if a backward can follow; backward computes those in between
again. The skip is part of the kernels; softplus and gate are left to autograd.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import never_if_none
from ..operators import differentiable, operator
from ..parallel import floats, run
from . import reference, torch_impl

TASKS = 16
"""Tasks to aim at: enough for many threads, few enough that little of what heads share is computed more than once."""

WIDTHS = (64, 256)
"""Least and most channels of a task, if heads allow: what it shares has to pay, and its states stay in the cache."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.ssd, in float32. Differentiable once. `chunk_len` changes nothing here."""
    if x.shape[1] == 1:  # a decode step: plain operations cost less than a call of the kernel
        return torch_impl.ssd(x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, starts, chunk_len)
    inputs = (x, dt, A, B, C, D, dt_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    dt = dt.float() if dt_bias is None else dt.float() + dt_bias.float()
    dt = F.softplus(dt) if dt_softplus else dt
    D = A.new_zeros(A.shape) if D is None else D
    h = None if initial_state is None else initial_state.float()
    y, state, _ = _scan(x.float(), dt, A.float(), B.float(), C.float(), D.float(), h, starts, keep)
    y = y if z is None else y * F.silu(z.float())
    return y.to(x.dtype), state


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, H, P); final state, (B, H, P, N); states before every SPAN tokens in the kernels' layout, if `keep`."""
    from . import cpu_kernels

    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    y, state = floats(batch, L, H * P), floats(batch, H * P, N)
    n_tasks, heads = _tasks(x, G)
    checkpoints = floats(cpu_kernels.checkpoint_shape(n_tasks if keep else 0, L, heads * P, N))
    inputs = _inputs(x, dt, A, B, C, D, initial_state, starts)
    run(cpu_kernels.forward, n_tasks, n_tasks // (batch * G), heads, *inputs, checkpoints, y, state)
    return y.view(x.shape), state.view(batch, H, P, N), checkpoints


_scan = operator("ssd_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C, D and the initial state, which is empty where there was none."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    n_tasks, heads = _tasks(x, G)
    n_parts = n_tasks // (batch * G)
    grad_x, grad_dt, grad_h = floats(batch, L, H * P), floats(dt.shape), floats(*_channels(initial_state, x, N).shape)
    # each task writes its own part of the sums over the batch (A, D) or over heads (B, C)
    parts_A, parts_D = floats(batch, H), floats(batch, H)
    parts_B, parts_C = (floats(n_parts * batch, L, G, N) for _ in range(2))
    inputs = _inputs(x, dt, A, B, C, D, initial_state, starts)
    grads = (grad_y.flatten(2), _channels(grad_state, x, N))
    results = (grad_x, grad_dt, parts_A, parts_B, parts_C, parts_D, grad_h)
    run(cpu_kernels.backward, n_tasks, n_parts, heads, *inputs, checkpoints, *grads, *results)
    grad_B, grad_C = (blocks.sum_of(parts.unflatten(0, (n_parts, batch))) for parts in (parts_B, parts_C))
    return grad_x.view(x.shape), grad_dt, parts_A.sum(0), grad_B, grad_C, parts_D.sum(0), grad_h.view(-1, H, P, N)


_scan_backward = operator("ssd_cpu_backward", backward, device_types="cpu")


def _tasks(x: Tensor, n_groups: int) -> tuple[int, int]:
    """Number of tasks and heads of each, independent of the number of threads: the bits depend on them."""
    batch, _, H, P = x.shape
    per_group = H // n_groups
    least, most = (max(1, width // P) for width in WIDTHS)
    heads = min(per_group, most, max(least, -(-batch * H // TASKS)))
    n_parts = -(-per_group // heads)
    return batch * n_groups * n_parts, -(-per_group // n_parts)  # parts of about the same size


def _inputs(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, ...]:
    """Arguments of both kernels."""
    return x.flatten(2), dt, A, B, C, D, _channels(initial_state, x, B.shape[3]), never_if_none(starts, x)


def _channels(state: Tensor | None, x: Tensor, N: int) -> Tensor:
    """A state as kernels take it, (B, H P, N), with no rows where there is none."""
    return floats(0, x.shape[2] * x.shape[3], N) if state is None else state.flatten(1, 2)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:8], output[2])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_y: Tensor | None, grad_state: Tensor | None, _: Tensor) -> tuple[Tensor | None, ...]:
    x, *others, initial_state, starts, checkpoints = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    *grads, grad_h = _scan_backward(grad_y, grad_state, x, *others, initial_state, starts, checkpoints)
    return *grads, None if initial_state is None else grad_h, None, None


def _again(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    def definition(
        x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h: Tensor | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        return reference.ssd(x, dt, A, B, C, D, initial_state=h, starts=starts)

    return definition, ctx.saved_tensors[:-1]


differentiable(_scan, _backward, _setup_context, _again)
