"""Plain PyTorch: FFT for whole sequences, the chunked form of the same convolution where a state comes in or out."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

CHUNK = 64  # tokens between two materialized states of ssm_scan


def ssm_kernel(A: Tensor, C: Tensor, length: int) -> Tensor:
    """Same contract as reference.ssm_kernel, as one small matrix product per channel.

    With t = i T + j the power splits, exp(A t) = exp(A T)^i exp(A)^j: sqrt(L) powers of each kind instead of L, so no
    (E, N, L) tensor exists.
    """
    T = math.isqrt(length - 1) + 1
    left = _powers(torch.exp(A * T), -(-length // T)) * C[:, None]  # (E, L/T, N)
    right = _powers(torch.exp(A), T)  # (E, T, N)
    # Re(l r) is the inner product of (Re l, Im l) and (Re r, -Im r)
    left, right = (torch.view_as_real(t).flatten(-2) for t in (left, right.conj().resolve_conj()))
    return 2 * (left @ right.mT).flatten(1)[:, :length]


def _powers(base: Tensor, n: int) -> Tensor:
    """base^0 .. base^(n-1), (E, n, N), by doubling: a complex exponential costs as much as twenty products."""
    powers, factor = torch.ones_like(base)[:, None], base[:, None]
    while powers.shape[1] < n:
        powers, factor = torch.cat([powers, powers * factor], 1), factor * factor
    return powers[:, :n]


def long_conv(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """Same contract as reference.long_conv, by FFT over 2 L points, so that the circle does not close."""
    L = u.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    n = 2 * L
    spectrum = torch.fft.rfft(x.mT, n=n) * torch.fft.rfft(kernel.to(dtype), n=n)
    y = torch.fft.irfft(spectrum, n=n)[..., :L].mT
    return (y if D is None else torch.addcmul(y, D.to(dtype), x)).to(u.dtype)


def ssm_scan(
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.ssm_scan.

    Inside a chunk the output is a convolution plus what the state before the chunk still contributes; a chunk ends
    after CHUNK tokens, or where a document begins in any row. Kept for backward: one state a chunk, and powers of A
    that all chunks share.
    """
    (batch, L, E), N = u.shape, A.shape[1]
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    h = torch.zeros(batch, E, N, dtype=A.dtype, device=u.device) if initial_state is None else initial_state
    bounds = [*range(0, L, CHUNK), L]
    if starts is not None:
        bounds = sorted({*bounds, *starts.any(0).nonzero().flatten().tolist()})
    longest = max(j - i for i, j in itertools.pairwise(bounds))
    powers = torch.exp(A[..., None] * torch.arange(longest + 1, device=u.device))  # (E, N, Q+1)
    kernel = 2 * (C[..., None] * powers[..., :-1]).sum(1).real  # (E, Q)
    ys = []
    for i, j in itertools.pairwise(bounds):
        n = j - i
        if starts is not None:
            h = torch.where(starts[:, i, None, None], 0.0, h)
        carried = 2 * torch.einsum("ben,enq->beq", h * C, powers[..., 1 : n + 1]).real
        y = carried.mT + (long_conv(x[:, i:j], kernel[:, :n]) if n > 1 else x[:, i:j] * kernel[:, 0])
        ys.append(y)
        into = torch.einsum("bqe,enq->ben", x[:, i:j].to(A.dtype), powers[..., :n].flip(-1))
        h = powers[..., n] * h + into
    y = torch.cat(ys, dim=1)
    return (y if D is None else torch.addcmul(y, D.to(dtype), x)).to(u.dtype), h
