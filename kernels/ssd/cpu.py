"""The CPU path: the recurrence itself in numba kernels (cpu_kernels.py), float32 inside.

Forward keeps the state before every CHUNK tokens, and only if a backward can follow; backward recomputes the states
inside a chunk. Chunks of matrix products would take no fewer operations: what they do inside a chunk costs as much as
states of 64, and small heads make small matrices.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..documents import never_if_none
from ..operators import differentiable, operator
from ..parallel import floats, run
from . import torch_impl


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
    return torch_impl.around(_recurrence, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, starts, chunk_len)


def _recurrence(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    """See torch_impl.Scan."""
    decay = torch.exp(dt * A)  # (B, L, H)
    drive = dt[..., None] * x
    keep = torch.is_grad_enabled() and any(t.requires_grad for t in (drive, decay, B, C, initial_state))

    def by_group(t: Tensor, axis: int) -> Tensor:
        """The heads of a group side by side, as its channels."""
        return t.unflatten(axis, (B.shape[2], -1)).flatten(axis + 1, axis + 2)

    decay = decay[..., None].expand(x.shape)
    y, state, _ = _scan(by_group(drive, 2), by_group(decay, 2), B, C, by_group(initial_state, 1), starts, keep)
    return y.view(x.shape), state.view(initial_state.shape)


def forward(
    drive: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, G, E); final state, (B, G, E, N); the state before every CHUNK tokens in the kernels' layout."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, G, E), N = drive.shape, B.shape[3]
    y, state = floats(batch, L, G, E), floats(batch, G, E, N)
    checkpoints = floats(cpu_kernels.checkpoint_shape(batch * G if keep else 0, L, E, N))
    tasks_per_row = blocks.tasks_per_row(batch * G, E)
    run(
        cpu_kernels.forward,
        batch * G * tasks_per_row,
        tasks_per_row,
        blocks.blocks_per_task(batch * G, E),
        drive,
        decay,
        B,
        C,
        initial_state,
        never_if_none(starts, drive),
        checkpoints,
        y,
        state,
    )
    return y, state, checkpoints


_scan = operator("ssd_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    drive: Tensor,
    decay: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of drive, decay, B, C and the initial state."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, G, E), N = drive.shape, B.shape[3]
    tasks_per_row = blocks.tasks_per_row(batch * G, E)
    grad_drive, grad_decay = floats(batch, L, G, E), floats(batch, L, G, E)
    grad_initial_state = floats(batch, G, E, N)
    # each task writes its own part of the sums over channels
    parts_B, parts_C = (floats(tasks_per_row * batch, L, G, N) for _ in range(2))
    outputs = (grad_drive, grad_decay, parts_B, parts_C, grad_initial_state)
    run(
        cpu_kernels.backward,
        batch * G * tasks_per_row,
        tasks_per_row,
        blocks.blocks_per_task(batch * G, E),
        drive,
        decay,
        B,
        C,
        never_if_none(starts, drive),
        checkpoints,
        grad_y,
        grad_state,
        *outputs,
    )
    grad_B, grad_C = (blocks.sum_of(parts.unflatten(0, (-1, batch))) for parts in (parts_B, parts_C))
    return grad_drive, grad_decay, grad_B, grad_C, grad_initial_state


_scan_backward = operator("ssd_cpu_backward", backward, device_types="cpu")


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:6], output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_y: Tensor, grad_state: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    drive, decay, B, C, _, starts, checkpoints = ctx.saved_tensors
    return *_scan_backward(grad_y, grad_state, drive, decay, B, C, starts, checkpoints), None, None


def _again(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    return _step_by_step, ctx.saved_tensors[:-1]


def _step_by_step(
    drive: Tensor, decay: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The first results of `forward`, as reference.ssd finds them."""
    ys = []
    for t in range(drive.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        h = decay[:, t, ..., None] * h + drive[:, t, ..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    return torch.stack(ys, dim=1), h


differentiable(_scan, _backward, _setup_context, _again)
