"""Plain PyTorch: matrix products inside chunks, a state between them (arXiv:2405.21060, section 6).

Inside a chunk of Q tokens, with s[i, j] the sum of the log decays dt A of tokens j + 1 to i, and s[i] of all up to i,
the scan is attention without a softmax,

    y[i] = sum over j <= i of C[i] B[j] exp(s[i, j]) dt[j] x[j]  +  exp(s[i]) h C[i],

and the state h enters from the chunk before; at the start of a document the log decay is -inf. Forward keeps the states
that enter the chunks and nothing of size Q x Q; backward, written out, walks the chunks in reverse. One chunk at a
time, what is computed in between stays in the cache, and memory is linear in L. The elementwise parts around (softplus,
skip, gate) are left to autograd.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import isolated
from ..operators import differentiable
from . import reference

CHUNK = 64
"""Tokens of a chunk where the caller has no wish."""


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
    """Same contract as reference.ssd. Differentiable once.

    Raises:
        ValueError: if the heads do not make equal groups, or a chunk would have no token.
    """
    return around(_chunked, x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, starts, chunk_len)


Scan = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, int | None], tuple[Tensor, Tensor]]
"""(x, dt, A, B, C, initial_state, starts, chunk_len) to y and the final state: `ssd` without what is elementwise."""


def around(
    scan: Scan,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    starts: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    """`ssd` by a scan of more than one token, with all that is elementwise around it."""
    (batch, L, H, P), N = x.shape, B.shape[3]
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    u = x.to(dtype)
    h = u.new_zeros(batch, H, P, N) if initial_state is None else initial_state.to(dtype)
    if L == 1:  # a decode step: plain operations cost less than a chunk of one
        y, h = _step(u, dt, A.to(dtype), B.to(dtype), C.to(dtype), h, starts)
    else:
        y, h = scan(u, dt, A.to(dtype), B.to(dtype), C.to(dtype), h, starts, chunk_len)
    y = y if D is None else torch.addcmul(y, D.to(dtype)[:, None], u)
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(x.dtype), h


def _chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    chunk_len: int | None,
) -> tuple[Tensor, Tensor]:
    """See Scan."""
    if starts is None:
        return _scan(x, dt, A, B, C, initial_state, None, chunk_len or CHUNK)[:2]
    initial_state, (x, dt, B), C, no_state, no_output = isolated(starts, initial_state, (x, dt, B), C)
    y, h, _ = _scan(x, dt, A, B, C, initial_state, starts, chunk_len or CHUNK)
    return y.masked_fill(no_output[..., None, None], torch.nan), h.masked_fill(
        no_state[:, -1, None, None, None], torch.nan
    )


def _step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    decay = torch.exp(dt * A)[:, 0, :, None, None]  # (B, H, 1, 1)
    if starts is not None:
        h = torch.where(starts[:, :, None, None], 0.0, h)
    u = (dt[..., None] * x).reshape(x.shape[0], B.shape[2], -1, 1)  # (B, G, H / G * P, 1)
    h_next = torch.addcmul((decay * h).reshape(*u.shape[:3], -1), u, B[:, 0, :, None])
    y = h_next @ C[:, 0, :, :, None]
    return y.view(x.shape), h_next.view(h.shape)


class _Decays(NamedTuple):
    """Decay factors inside one chunk of Q tokens. They are zero across the start of a document."""

    pair: Tensor
    """Factor from token j to token i, (B, H, Q, Q); zero above the diagonal."""

    enter: Tensor
    """Factor from the entering state to token i, (B, Q, H)."""

    leave: Tensor
    """Factor from token j to the leaving state, (B, Q, H)."""

    whole: Tensor
    """Factor from the entering state to the leaving one, (B, H)."""


def _decays(dt: Tensor, A: Tensor, starts: Tensor | None, chunk: slice) -> _Decays:
    log_decay = dt[:, chunk] * A  # (B, Q, H)
    if starts is not None:
        log_decay = log_decay.masked_fill(starts[:, chunk, None], -torch.inf)
    Q = log_decay.shape[1]
    # [i, j] sums the log decays of tokens j + 1 to i: a sum, never a difference, loses no digits to earlier decays
    pair = log_decay.mT[..., None].expand(-1, -1, Q, Q).tril(-1).cumsum(-2).exp_().tril_()
    enter = log_decay.cumsum(1).exp_()
    return _Decays(pair, enter, pair[:, :, -1].mT, enter[:, -1])


def _by_group(t: Tensor, G: int) -> Tensor:
    """(B, Q, H, P) as (B, G, Q, H / G * P): the heads of a group side by side, to be multiplied as one matrix."""
    return t.unflatten(2, (G, -1)).flatten(3).transpose(1, 2)


def _by_head(t: Tensor, H: int) -> Tensor:
    """The inverse of `_by_group`."""
    return t.transpose(1, 2).flatten(2).unflatten(2, (H, -1))


@torch.library.custom_op("crossover::ssd", mutates_args=())
def _scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor, starts: Tensor | None, chunk_len: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, H, P); the final state, (B, H, P, N); the states that enter the chunks, (L / Q, B, H, P, N)."""
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = initial_state.clone(memory_format=torch.contiguous_format)
    states = x.new_empty(-(-L // chunk_len), batch, H, P, N)
    for i, first in enumerate(range(0, L, chunk_len)):
        chunk = slice(first, min(first + chunk_len, L))
        states[i] = h
        d = _decays(dt, A, starts, chunk)
        b, c = B[:, chunk].transpose(1, 2), C[:, chunk].transpose(1, 2)  # (B, G, Q, N)
        u = x[:, chunk] * dt[:, chunk, :, None]
        mixing = d.pair.unflatten(1, (G, -1)) * (c @ b.mT)[:, :, None]  # (B, G, H / G, Q, Q)
        inside = (mixing.flatten(1, 2) @ u.transpose(1, 2)).transpose(1, 2)
        entered = _by_head(c @ h.view(batch, G, -1, N).mT, H)
        torch.addcmul(inside, d.enter[..., None], entered, out=y[:, chunk])
        added = _by_group(u * d.leave[..., None], G).mT @ b  # (B, G, H / G * P, N)
        h = torch.addcmul(added.view(h.shape), d.whole[..., None, None], h)
    return y, h, states


@_scan.register_fake
def _(x, dt, A, B, C, initial_state, starts, chunk_len):
    n_chunks = -(-x.shape[1] // chunk_len)
    return (x.new_empty(x.shape), x.new_empty(initial_state.shape), x.new_empty(n_chunks, *initial_state.shape))


@torch.library.custom_op("crossover::ssd_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    states: Tensor,
    chunk_len: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, dt, A, B, C and the initial state, from those of y and of the final state."""
    (batch, L, H, _), (G, N) = x.shape, B.shape[2:]
    grad_x, grad_dt, grad_A = x.new_empty(x.shape), x.new_empty(dt.shape), torch.zeros_like(A)
    grad_B, grad_C = x.new_empty(B.shape), x.new_empty(B.shape)
    r = grad_state.clone(memory_format=torch.contiguous_format)  # gradient of the state that leaves the chunk
    for i in reversed(range(len(states))):
        chunk = slice(i * chunk_len, min((i + 1) * chunk_len, L))
        d, h = _decays(dt, A, starts, chunk), states[i].view(batch, G, -1, N)
        b, c = B[:, chunk].transpose(1, 2), C[:, chunk].transpose(1, 2)
        x_c, dt_c, g = x[:, chunk], dt[:, chunk], grad_y[:, chunk]
        u, r_by_group = x_c * dt_c[..., None], r.view(batch, G, -1, N)
        # inside the chunk: y = (scores * decay) u with scores = C B^T
        decay = d.pair.unflatten(1, (G, -1))
        scores = (c @ b.mT)[:, :, None]
        grad_mixing = (g.transpose(1, 2) @ u.permute(0, 2, 3, 1)).unflatten(1, (G, -1))
        grad_scores = (grad_mixing * decay).sum(2)
        mixing = decay * scores
        grad_u = (mixing.flatten(1, 2).mT @ g.transpose(1, 2)).transpose(1, 2)
        grad_log = grad_mixing.mul_(mixing).flatten(1, 2)  # of each pair's log decay, (B, H, Q, Q)
        # what enters, y += enter * (C h), and what leaves, leave * u B^T
        g_in, u_out = _by_group(g * d.enter[..., None], G), _by_group(u * d.leave[..., None], G)
        entered = (g * d.enter[..., None] * _by_head(c @ h.mT, H)).sum(-1)  # (B, Q, H)
        grad_u_out = d.leave[..., None] * _by_head(b @ r_by_group.mT, H)
        left = (u * grad_u_out).sum(-1)  # (B, Q, H)
        grad_u = grad_u + grad_u_out
        grad_C[:, chunk] = (grad_scores @ b + g_in @ h).transpose(1, 2)
        grad_B[:, chunk] = (grad_scores.mT @ c + u_out @ r_by_group).transpose(1, 2)
        # The log decay of token t is in every pair j < t <= i, in what enters for i >= t, in what leaves for j < t.
        # All are sums, of which none is a difference of two: there is nothing to cancel.
        before = grad_log.cumsum(-1).tril_(-1).sum(-2).mT + left.cumsum(1)  # j <= t, pairs with i > t: of token t + 1
        kept = d.whole * (states[i] * r).sum((-2, -1))
        grad_step = F.pad(before[:, :-1], (0, 0, 1, 0)) + entered.flip(1).cumsum(1).flip(1) + kept[:, None]  # (B, Q, H)
        grad_A += (grad_step * dt_c).sum((0, 1))
        grad_dt[:, chunk] = grad_step * A + (grad_u * x_c).sum(-1)
        grad_x[:, chunk] = grad_u * dt_c[..., None]
        r = torch.addcmul((g_in.mT @ c).view(r.shape), d.whole[..., None, None], r)
    return grad_x, grad_dt, grad_A, grad_B, grad_C, r


@_scan_backward.register_fake
def _(grad_y, grad_state, x, dt, A, B, C, starts, states, chunk_len):
    return tuple(t.new_empty(t.shape) for t in (x, dt, A, B, C, grad_state))


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.chunk_len = inputs
    ctx.save_for_backward(*tensors, output[2])
    ctx.set_materialize_grads(True)


def _backward(ctx, grad_y: Tensor, grad_state: Tensor, _: Tensor):
    x, dt, A, B, C, _, starts, states = ctx.saved_tensors
    grads = _scan_backward(grad_y, grad_state, x, dt, A, B, C, starts, states, ctx.chunk_len)
    return *grads, None, None


def _again(ctx):
    def definition(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h: Tensor, starts: Tensor | None, _: int):
        return reference.ssd(x, dt, A, B, C, initial_state=h, starts=starts)

    return definition, (*ctx.saved_tensors[:-1], ctx.chunk_len)


differentiable(_scan, _backward, _setup_context, _again)
