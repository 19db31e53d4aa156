"""Plain PyTorch: the time loop writes into reused buffers, and the backward is written out.

Forward keeps the state at the start of every CHUNK tokens; backward walks the chunks in reverse, recomputes the states
inside one and runs the adjoint recurrence r[t] = a[t] (C[t] g[t] + r[t+1]), which needs no division by the decay.
Memory is the inputs plus L / CHUNK states: no (B, L, E, N) tensor exists, in forward or for backward. The elementwise
parts around the recurrence (softplus, skip, gate) are left to autograd.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import differentiable
from . import reference

CHUNK = 16  # (B, CHUNK, E, N) buffers: large enough to amortize the wide operations, small enough for the cache


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
    """Same contract as reference.selective_scan. Differentiable once."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    dt = F.softplus(dt) if delta_softplus else dt
    x = u.to(dtype)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    if x.shape[1] == 1:  # a decode step: plain operations cost less than setting up the loop
        y, h = _step(x, dt, A.to(dtype), B.to(dtype), C.to(dtype), h, starts)
    else:
        y, h, _ = _scan(x, dt, A.to(dtype), B.to(dtype), C.to(dtype), h, starts)
    y = y if D is None else torch.addcmul(y, D.to(dtype), x)
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype), h


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    if starts is not None:
        h = torch.where(starts[:, :, None], 0.0, h)
    h = torch.exp(dt.mT * A) * h + (dt * x).mT * B  # (B, E, N)
    return (h @ C.mT).mT, h


def _decay_and_drive(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, chunk: slice, out: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Fills a[t] = exp(dt[t] A), and dt[t] x[t] B[t], both time first: (Q, B, E, N)."""
    n = len(range(*chunk.indices(x.shape[1])))
    decay, drive = out[0][:n], out[1][:n]
    dt_c = dt[:, chunk].transpose(0, 1)
    torch.mul(dt_c[..., None], A, out=decay).exp_()
    torch.mul((dt_c * x[:, chunk].transpose(0, 1))[..., None], B[:, chunk].transpose(0, 1)[:, :, None], out=drive)
    return decay, drive


def _starts_by_time(starts: Tensor | None) -> Tensor | None:
    """(L, B, 1, 1)."""
    return None if starts is None else starts.T[..., None, None]


@torch.library.custom_op("crossover::selective_scan", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, E); final state, (B, E, N); the state before every CHUNK tokens, (L / CHUNK, B, E, N)."""
    (batch, L, E), N = x.shape, A.shape[1]
    y = x.new_empty(L, batch, E)
    h = initial_state.clone(memory_format=torch.contiguous_format)
    checkpoints = x.new_empty(-(-L // CHUNK), batch, E, N)
    buffers = (x.new_empty(min(CHUNK, L), batch, E, N), x.new_empty(min(CHUNK, L), batch, E, N))
    C, marks = C.transpose(0, 1)[..., None], _starts_by_time(starts)  # (L, B, N, 1), (L, B, 1, 1)
    for i, first in enumerate(range(0, L, CHUNK)):
        chunk = slice(first, first + CHUNK)
        checkpoints[i] = h
        decay, drive = _decay_and_drive(x, dt, A, B, chunk, buffers)
        for t, (a, b) in enumerate(zip(decay.unbind(0), drive.unbind(0), strict=True), first):
            if marks is not None:
                h = h.masked_fill(marks[t], 0)
            torch.addcmul(b, a, h, out=b)  # the drive becomes the state
            h = b
        torch.matmul(drive, C[chunk], out=y[chunk][..., None])
        h = h.clone()  # the buffer it lives in is about to be overwritten
    return y.transpose(0, 1).contiguous(), h, checkpoints


@_scan.register_fake
def _(x, dt, A, B, C, initial_state, starts):
    return (
        torch.empty_like(x),
        torch.empty_like(initial_state),
        x.new_empty(-(-x.shape[1] // CHUNK), *initial_state.shape),
    )


@torch.library.custom_op("crossover::selective_scan_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    checkpoints: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, from those of y and of the final state."""
    (batch, L, E), N = x.shape, A.shape[1]
    Q = min(CHUNK, L)
    grad_x, grad_dt, grad_A = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(A)
    grad_B, grad_C = x.new_empty(L, batch, N), x.new_empty(L, batch, N)
    states = x.new_empty(Q + 1, batch, E, N)
    decays, drives = x.new_empty(Q, batch, E, N), x.new_empty(Q, batch, E, N)
    marks = _starts_by_time(starts)
    r = grad_state.clone()  # (B, E, N): gradient of the state that enters the chunk on the right
    for i in reversed(range(len(checkpoints))):
        chunk = slice(i * CHUNK, min((i + 1) * CHUNK, L))
        n = chunk.stop - chunk.start
        decay, drive = _decay_and_drive(x, dt, A, B, chunk, (decays, drives))
        states[0] = checkpoints[i]
        for t in range(n):
            before = states[t] if marks is None else states[t].masked_fill(marks[chunk.start + t], 0)
            torch.addcmul(drive[t], decay[t], before, out=states[t + 1])
        g = grad_y[:, chunk].transpose(0, 1)  # (Q, B, E)
        torch.matmul(g[:, :, None], states[1 : n + 1], out=grad_C[chunk][:, :, None])
        # the drive's buffer now takes the gradient of each state, dh[t] = C[t] g[t] + a[t+1] dh[t+1]
        dh = torch.mul(g[..., None], C[:, chunk].transpose(0, 1)[:, :, None], out=drive)
        for t in reversed(range(n)):
            dh[t] += r
            torch.mul(decay[t], dh[t], out=r)
            if marks is not None:
                r.masked_fill_(marks[chunk.start + t], 0)
        x_c, dt_c = x[:, chunk].transpose(0, 1), dt[:, chunk].transpose(0, 1)
        s = torch.matmul(dh, B[:, chunk].transpose(0, 1)[..., None])[..., 0]  # (Q, B, E)
        torch.matmul((dt_c * x_c)[:, :, None], dh, out=grad_B[chunk][:, :, None])
        grad_x[:, chunk] = (s * dt_c).transpose(0, 1)
        before = states[:n] if marks is None else states[:n].masked_fill(marks[chunk], 0)
        w = dh.mul_(decay).mul_(before)  # gradient of log a[t] = dt[t] A
        grad_A += torch.mul(w, dt_c[..., None], out=decay).sum((0, 1))
        grad_dt[:, chunk] = (w.mul_(A).sum(-1) + s * x_c).transpose(0, 1)
    return grad_x, grad_dt, grad_A, grad_B.transpose(0, 1).contiguous(), grad_C.transpose(0, 1).contiguous(), r


@_scan_backward.register_fake
def _(grad_y, grad_state, x, dt, A, B, C, starts, checkpoints):
    return (*(torch.empty_like(t) for t in (x, x, A, B, C)), torch.empty_like(grad_state))


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_y: Tensor, grad_state: Tensor, _: Tensor):
    x, dt, A, B, C, _, starts, checkpoints = ctx.saved_tensors
    return *_scan_backward(grad_y, grad_state, x, dt, A, B, C, starts, checkpoints), None


def _again(ctx):
    def definition(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None):
        return reference.selective_scan(x, dt, A, B, C, initial_state=h, starts=starts)

    return definition, ctx.saved_tensors[:-1]


differentiable(_scan, _backward, _setup_context, _again)
