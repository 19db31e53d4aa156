"""Plain PyTorch: FFT for whole sequences, chunks where a state comes in or out or documents begin."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..operators import opaque
from ..state_space import CHUNK, coordinates, output_row, paired, scan_in_chunks, without_autocast
from . import reference


@opaque(lambda A, C, length: A.real.new_empty(A.shape[0], length))
@without_autocast
def ssm_kernel(A: Tensor, C: Tensor, length: int) -> Tensor:
    """Same contract as reference.ssm_kernel, as one small matrix product per channel.

    With t = i T + j the power splits, exp(A t) = exp(A T)^i exp(A)^j: sqrt(L) powers of each kind instead of L, so no
    (E, N, L) tensor exists.
    """
    T = math.isqrt(length - 1) + 1
    left = _powers(torch.exp(A * T), -(-length // T)) * C[:, None]  # (E, L/T, N)
    right = _powers(torch.exp(A), T)  # (E, T, N)
    return (output_row(left) @ coordinates(right).mT).flatten(1)[:, :length]


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


@without_autocast
def ssm_scan(
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.ssm_scan."""
    if u.shape[1] == 1:  # a decode step: the powers would cost more than the step
        return reference.ssm_scan(u, A, C, D, initial_state, starts)
    return _in_chunks(u, A, C, D, initial_state, starts)


@opaque(lambda u, A, C, D, initial_state, starts: (u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)))
def _in_chunks(
    u: Tensor, A: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor | None, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    powers = _powers(torch.exp(A), min(u.shape[1], CHUNK) + 1)  # (E, Q + 1, N)
    into, out = coordinates(powers[:, :-1]), output_row(powers * C[:, None])

    def advance(h: Tensor, n: int) -> Tensor:
        return coordinates(paired(h) * powers[:, n, None])

    return scan_in_chunks(u, into, out, advance, D, initial_state, starts)
