"""Plain PyTorch: FFT for whole sequences, chunks where a state comes in or out or documents begin."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..operators import is_traced, opaque
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
    """Same contract as reference.long_conv, by FFT over at least 2 L points, so that the circle does not close."""
    dtype = torch.promote_types(u.dtype, torch.float32)
    kernel = kernel.to(dtype)
    if D is not None:  # the skip connection is part of what the present token contributes
        kernel = kernel + F.pad(D.to(dtype)[:, None], (0, kernel.shape[1] - 1))
    return _Convolution.apply(u.to(dtype), kernel).to(u.dtype)


class _Convolution(torch.autograd.Function):
    """(B, L, E) and (E, L) to (B, L, E), contiguous whatever the FFT prefers: what follows is elementwise.

    Written out because PyTorch makes the gradient of a real FFT by a complex one, which is twice the work. Backward is
    plain PyTorch, and so can be differentiated in turn.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor) -> Tensor:
        x_spectrum, kernel_spectrum = _spectrum(x.mT), _spectrum(kernel)
        ctx.save_for_backward(x, kernel, x_spectrum, kernel_spectrum)
        return _signal(x_spectrum * kernel_spectrum, x.shape[1]).mT.contiguous()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, kernel, x_spectrum, kernel_spectrum = ctx.saved_tensors
        if torch.is_grad_enabled():  # what forward computed is a constant to whoever differentiates this
            x_spectrum, kernel_spectrum = _spectrum(x.mT), _spectrum(kernel)
        (grad_y,) = grad_outputs
        L, spectrum = grad_y.shape[1], _spectrum(grad_y.mT)
        grad_x = grad_kernel = None
        if ctx.needs_input_grad[0]:
            grad_x = _signal(spectrum * kernel_spectrum.conj(), L).mT.contiguous()
        if ctx.needs_input_grad[1]:
            grad_kernel = _signal((spectrum * x_spectrum.conj()).sum(0), L)
        return grad_x, grad_kernel


def _points(length: int) -> int:
    """Points of an FFT for sequences of a length: 2, 3 or 5 times a power of two, which FFTs are fast for."""
    if is_traced():  # any length must give the same graph
        return 2 * length
    return min(m << max(0, -(-(2 * length - 1) // m) - 1).bit_length() for m in (2, 3, 5))


def _spectrum(x: Tensor) -> Tensor:
    """(..., L) -> (..., points / 2 + 1)."""
    return torch.fft.rfft(x, n=_points(x.shape[-1]))


def _signal(spectrum: Tensor, length: int) -> Tensor:
    """The inverse of `_spectrum`, which is wrong beyond the length."""
    return torch.fft.irfft(spectrum, n=_points(length))[..., :length]


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
