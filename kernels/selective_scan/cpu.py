"""The CPU path: numba kernels with hand-written vectors (cpu_kernels.py), float32 inside, fused from softplus to gate.

Forward keeps the state before every CHUNK tokens, and only if a backward can follow; backward recomputes the states
inside a chunk. Results are the same bits on every run and for every number of threads. The kernels are imported when
first needed: numba alone takes half a second.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import never_if_none
from ..operators import operator
from ..parallel import floats, run
from . import torch_impl
from .gradients import register_gradients


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.selective_scan, in float32. Differentiable once."""
    if u.shape[1] == 1:  # a decode step: plain operations cost less than a call of the kernel
        return torch_impl.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts)
    inputs = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    D, z, delta_bias, h = (t if t is None else t.float() for t in (D, z, delta_bias, initial_state))
    y, state, _ = _scan(*(t.float() for t in (u, delta, A, B, C)), D, z, delta_bias, delta_softplus, h, starts, keep)
    return y.to(u.dtype), state


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, E); final state, (B, E, N); the state before every CHUNK tokens in the kernels' layout, if `keep`."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, E), N = u.shape, A.shape[1]
    y, state = floats(batch, L, E), floats(batch, E, N)
    checkpoints = floats(cpu_kernels.checkpoint_shape(batch if keep else 0, L, E, N))
    tasks_per_row = blocks.tasks_per_row(batch, E)
    run(
        cpu_kernels.forward,
        batch * tasks_per_row,
        tasks_per_row,
        blocks.blocks_per_task(batch, E),
        *_inputs(u, delta, A, B, C, D, z, delta_bias),
        delta_softplus,
        _zeros_if_none(initial_state, batch, E, N),
        never_if_none(starts, u),
        checkpoints,
        y,
        state,
    )
    return y, state, checkpoints


_scan = operator("selective_scan_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z (empty without a gate), delta_bias and the initial state."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, E), N = u.shape, A.shape[1]
    tasks_per_row = blocks.tasks_per_row(batch, E)
    grad_u, grad_delta = floats(batch, L, E), floats(batch, L, E)
    grad_z = floats(batch if z is not None else 0, L, E)
    grad_initial_state = floats(batch, E, N)
    # each task writes its own part of the sums over channels (B, C) or over the batch (A, D, delta_bias)
    parts_A, parts_D, parts_bias = floats(batch, E, N), floats(batch, E), floats(batch, E)
    parts_B, parts_C = (floats(tasks_per_row, batch, L, N) for _ in range(2))
    outputs = (grad_u, grad_delta, parts_A, parts_B, parts_C, parts_D, grad_z, parts_bias, grad_initial_state)
    run(
        cpu_kernels.backward,
        batch * tasks_per_row,
        tasks_per_row,
        blocks.blocks_per_task(batch, E),
        *_inputs(u, delta, A, B, C, D, z, delta_bias),
        delta_softplus,
        never_if_none(starts, u),
        checkpoints,
        grad_y,
        grad_state,
        *outputs,
    )
    grad_A, grad_B, grad_C, grad_D, grad_bias = map(blocks.sum_of, (parts_A, parts_B, parts_C, parts_D, parts_bias))
    return grad_u, grad_delta, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial_state


_scan_backward = operator("selective_scan_cpu_backward", backward, device_types="cpu")


register_gradients(_scan, _scan_backward)


def _inputs(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, ...]:
    """First arguments of both kernels; an empty z means no gate."""
    E = u.shape[2]
    return (
        u,
        delta,
        A,
        B,
        C,
        _zeros_if_none(D, E),
        u.new_empty(0, 0, 0) if z is None else z,
        _zeros_if_none(bias, E),
    )


def _zeros_if_none(x: Tensor | None, *shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.float32) if x is None else x
