"""Plain PyTorch: matrix products and a triangular solve inside chunks, a state between them (arXiv:2412.06464, 3.3).

Inside a chunk that the state S enters, with d[i, j] the decay of token j at token i and e[i] that of S,

    S[i] = e[i] S + sum over j <= i of d[i, j] u[j] k[j]^T,
    u[i] = b[i] (v[i] - e[i] S k[i] - sum over j < i of d[i, j] (k[j] k[i]) u[j]).

The second line is a unit lower triangular system. It is solved for all chunks at once and for both of its right sides,
values b v and keys b e k, since u = (solution for values) - S (solution for keys): only this and the state itself are
left to do chunk by chunk.

Every decay is the exponential of a sum of log decays, never of a difference: none can be positive, none loses digits to
the decays before it, and the start of a document is simply a log decay of -inf.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import isolated
from ..operators import opaque

CHUNK = 64
"""Largest number of tokens of a chunk."""


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.gated_delta_rule."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    (batch, L, H, P), N = v.shape, k.shape[-1]
    S = v.new_zeros(batch, H, P, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    wide_q, wide_k, wide_v, log_decay, beta = (t.to(dtype) for t in (q, k, v, log_decay[..., None], beta[..., None]))
    spoilt = None
    if starts is not None:
        written = (wide_k, wide_v, log_decay, beta)
        S, written, wide_q, *spoilt = isolated(starts, S, written, wide_q)
        wide_k, wide_v, log_decay, beta = written
        log_decay = log_decay.masked_fill(starts[..., None, None], -torch.inf)
    # the state and the solve stay in float32, whatever precision autocast has chosen for products
    with torch.autocast(v.device.type, enabled=False):
        o, S = (_step if L == 1 else _scan)(wide_q, wide_k, wide_v, log_decay, beta, S)
    if spoilt is not None:
        no_state, no_output = spoilt
        o = o.masked_fill(no_output[..., None, None], torch.nan)
        S = S.masked_fill(no_state[:, -1, None, None, None], torch.nan)
    return o.to(v.dtype), S


def _step(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Takes one token, by the recurrence as it stands."""
    q, k, v, decay, beta = (t[:, 0, ..., None] for t in (q, k, v, log_decay.exp(), beta))  # columns, (B, H, ., 1)
    S = decay * S
    S = torch.addcmul(S, beta * (v - S @ k), k.mT)
    return (S @ q)[:, None, ..., 0], S


@opaque(lambda q, k, v, log_decay, beta, S: (v.new_empty(v.shape), S.new_empty(S.shape)))
def _scan(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, S: Tensor) -> tuple[Tensor, Tensor]:
    """Chunks of Q tokens, all (B, H, L / Q, Q, .)."""
    (L, P), N = v.shape[1::2], k.shape[-1]
    n_chunks = -(-L // CHUNK)
    q, k, v, log_decay, beta = (_in_chunks(t, n_chunks) for t in (q, k, v, log_decay, beta))
    Q = q.shape[3]
    # [i, j] sums the log decays of tokens j + 1 to i
    pair = log_decay.expand(*log_decay.shape[:-1], Q).tril(-1).cumsum(-2).exp().tril()
    enter = log_decay.cumsum(-2).exp()
    whole, leave = enter[..., -1:, :], pair[..., -1, :, None]

    system = (beta * k) @ k.mT * pair
    sides = beta * torch.cat([v, enter * k], dim=-1)
    of_values, of_keys = torch.linalg.solve_triangular(system, sides, upper=False, unitriangular=True).split([P, N], -1)
    # unbound at once: the gradient of one chunk picked out of all would be as large as all
    chunks = zip(*(t.unbind(2) for t in (of_values, of_keys, leave * k, whole)), strict=True)
    states, us = [], []
    for of_v, of_k, k_leaving, decay in chunks:
        u = of_v - of_k @ S.mT
        states.append(S)
        us.append(u)
        S = decay * S + u.mT @ k_leaving
    o = (enter * q) @ torch.stack(states, dim=2).mT + (q @ k.mT * pair) @ torch.stack(us, dim=2)
    return o.permute(0, 2, 3, 1, 4).flatten(1, 2)[:, :L], S


def _in_chunks(t: Tensor, n_chunks: int) -> Tensor:
    """(B, L, H, X) as (B, H, C, Q, X), with zeros at the end: tokens that neither decay the state nor write to it."""
    Q = -(-t.shape[1] // n_chunks)
    padded = F.pad(t, (0, 0, 0, 0, 0, n_chunks * Q - t.shape[1]))
    return padded.unflatten(1, (n_chunks, Q)).permute(0, 3, 1, 2, 4)
