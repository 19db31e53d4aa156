"""The CPU path: numba kernels with hand-written vectors (cpu_kernels.py), float32 inside.

Forward keeps, and only if a backward can follow, the state before every SPAN tokens and what each token wrote; backward
recomputes the states in between. Results are the same bits on every run and for every number of threads. The kernels
are imported when first needed: numba alone takes half a second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..documents import never_if_none
from ..operators import differentiable, operator
from ..parallel import floats, run
from . import reference, torch_impl

TASKS = 8
"""Heads of all rows below which the channels of a head are shared out: there may be more threads than heads."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.gated_delta_rule, in float32. Differentiable once."""
    if q.shape[1] == 1:  # a decode step: plain operations cost less than a call of the kernel
        return torch_impl.gated_delta_rule(q, k, v, log_decay, beta, initial_state, starts)
    inputs = (q, k, v, log_decay, beta, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    h = None if initial_state is None else initial_state.float()
    o, state, _, _ = _rule(*(t.float() for t in (q, k, v, log_decay, beta)), h, starts, keep)
    return o.to(v.dtype), state


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """o, (B, L, H, P); the final state, (B, H, P, N); what backward needs besides, if `keep`."""
    from . import cpu_kernels

    (batch, L, H, P), N = v.shape, k.shape[3]
    width, n_parts = parts_of(v)
    h = torch.zeros(batch, H, P, N, dtype=torch.float32) if initial_state is None else initial_state
    o, state = floats(batch, L, H, P), floats(batch, H, P, N)
    n_tasks = batch * H * n_parts
    kept = n_tasks if keep else 0
    residuals, checkpoints = floats(kept, L, width), floats(kept, -(-L // cpu_kernels.SPAN), N, width)
    inputs = (q, k, v, log_decay, beta, h, never_if_none(starts, v))
    run(cpu_kernels.forward, n_tasks, width, *inputs, o, state, residuals, checkpoints)
    return o, state, residuals, checkpoints


_rule = operator("gated_delta_rule_cpu", forward, device_types="cpu")


def backward(
    grad_o: Tensor,
    grad_state: Tensor,
    q: Tensor,
    k: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    starts: Tensor | None,
    residuals: Tensor,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, log_decay, beta and the initial state."""
    from .. import blocks
    from . import cpu_kernels

    (batch, L, H, P), N = grad_o.shape, k.shape[3]
    width, n_parts = parts_of(grad_o)
    grad_v, grad_initial_state = floats(batch, L, H, P), floats(batch, H, P, N)
    # each task writes its own part of the sums over channels
    parts = [floats(n_parts * batch, L, H, N), floats(n_parts * batch, L, H, N)]
    parts += [floats(n_parts * batch, L, H), floats(n_parts * batch, L, H)]
    inputs = (q, k, log_decay, beta, never_if_none(starts, q), residuals, checkpoints, grad_o, grad_state)
    outputs = (*parts[:2], grad_v, *parts[2:], grad_initial_state)
    run(cpu_kernels.backward, batch * H * n_parts, width, *inputs, *outputs)
    if n_parts > 1:
        parts = [blocks.sum_of(t.unflatten(0, (n_parts, batch))) for t in parts]
    grad_q, grad_k, grad_log_decay, grad_beta = parts
    return grad_q, grad_k, grad_v, grad_log_decay, grad_beta, grad_initial_state


_rule_backward = operator("gated_delta_rule_cpu_backward", backward, device_types="cpu")


def parts_of(v: Tensor) -> tuple[int, int]:
    """Channels of a task and tasks of a head; independent of the number of threads, as the bits depend on it."""
    from ..simd import LANES, PAIR

    batch, _, H, P = v.shape
    wanted = max(1, TASKS // (batch * H))
    width = -(-min(max(PAIR, -(-P // wanted)), P) // LANES) * LANES
    return width, -(-P // width)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7], *output[2:])
    ctx.set_materialize_grads(True)


def _backward(ctx: Any, grad_o: Tensor, grad_state: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    q, k, _, log_decay, beta, initial_state, starts, *kept = ctx.saved_tensors
    *grads, grad_initial_state = _rule_backward(grad_o, grad_state, q, k, log_decay, beta, starts, *kept)
    return *grads, None if initial_state is None else grad_initial_state, None, None


def _again(ctx: Any) -> tuple[Any, tuple[Any, ...]]:
    return reference.gated_delta_rule, ctx.saved_tensors[:7]


differentiable(_rule, _backward, _setup_context, _again)
