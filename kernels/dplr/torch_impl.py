"""Plain PyTorch: the kernel from its generating function, the recurrence in chunks by powers of the dense matrix.

Powers are taken in real coordinates, (Re h, Im h): a conjugate pair is two real states, and the rank-one part, which
mixes the members of all pairs, is linear over the reals only.
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..long_conv.torch_impl import long_conv
from . import reference
from .reference import solve

CHUNK = 64  # tokens between two materialized states of dplr_scan
CAUCHY = 1 << 24  # elements of the Cauchy matrices, (E, N, L/2), that exist at a time


def dplr_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Same contract as reference.dplr_kernel, by S4's algorithm 1: an inverse FFT of the truncated generating function.

    Many channels of a long kernel go in groups, whose Cauchy matrices are computed again for backward.
    """
    C = C - _after(A, P, C, length)
    group = max(1, CAUCHY // (A.shape[1] * (length // 2 + 1)))
    if len(A) <= group:
        spectrum = _generating_function(A, P, B, C, length)
    else:
        groups = zip(*(t.split(group) for t in (A, P, B, C)), strict=True)
        spectra = [checkpoint(_generating_function, *g, length, use_reentrant=False) for g in groups]
        spectrum = torch.cat(spectra)  # pyright: ignore[reportArgumentType]
    return torch.fft.irfft(spectrum, n=length)


def _generating_function(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """sum_t z^t C Ab^t Bb over all t >= 0 at the roots of unity z = exp(-2 i pi k / L), k = 0 .. L/2; (E, L/2 + 1).

    That is C (1 - z Ab)^-1 Bb = 2 C (2 (1 - z) - (1 + z) (A - P P^*))^-1 B. The phase exp(-i f), f = pi k / L, is taken
    out of 1 - z = 2i sin(f) exp(-i f) and of 1 + z = 2 cos(f) exp(-i f): what is left, R = (2i sin(f) - cos(f) A)^-1,
    has no pole at z = -1. Woodbury's identity then needs four Cauchy sums: C R B, C R P, P^* R B and P^* R P.
    """
    f = torch.arange(length // 2 + 1, device=A.device, dtype=A.real.dtype) * (math.pi / length)
    s, c = 2 * torch.sin(f), torch.cos(f)
    # with its conjugate, x / (i s - c a) is (2i s Re x - 2 c Re (x a^*)) / (c^2 |a|^2 - s^2 - 2i s c Re a)
    real, square = A.real[..., None], (A.real.square() + A.imag.square())[..., None]
    poles = torch.complex(square * c.square() - s.square(), real * (-2 * s * c)).reciprocal()  # (E, N, L/2 + 1)
    x = torch.stack([C * B, C * P, P.conj() * B, P.conj() * P], dim=1)  # (E, 4, N)
    numerators = torch.cat([x.real, (x * A.conj()[:, None]).real], dim=1)
    sums = numerators @ torch.view_as_real(poles).flatten(-2)  # (E, 8, L + 2), real and imaginary parts in turn
    left, right = torch.view_as_complex(sums.unflatten(-1, (-1, 2))).chunk(2, dim=1)
    CB, CP, PB, PP = (2 * (1j * s * left - c * right)).unbind(1)
    return torch.polar(torch.ones_like(f), f) * (CB - c * CP * PB / (1 + c * PP))


def _after(A: Tensor, P: Tensor, C: Tensor, length: int) -> Tensor:
    """C Ab^L, (E, N) complex: what it takes off C is the part of the kernel after the first L steps."""
    # the last squarings cost more than a few products with a vector
    squares = _squares(_transition(A, P), max(1, length // 8))
    # numbers at the end of float32's range take twice the time, and beside C they are nothing
    rest = F.hardshrink(_times_power(_row(C), squares, length)[:, 0], 1e-30)
    return _paired(rest).conj() / 2


def dplr_scan(
    u: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.dplr_scan.

    Inside a chunk the output is a convolution plus what the state before the chunk still contributes; a chunk ends
    after CHUNK tokens, or where a document begins in any row.
    """
    batch, L, E = u.shape
    if L == 1:  # a decode step: the matrix would cost more than the step
        return reference.dplr_scan(u, A, P, B, C, D, initial_state, starts)
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    bounds = [*range(0, L, CHUNK), L]
    if starts is not None:
        bounds = sorted({*bounds, *starts.any(0).nonzero().flatten().tolist()})
    longest = max(j - i for i, j in itertools.pairwise(bounds))
    squares = _squares(_transition(A, P), longest)
    out = _krylov(_row(C), squares)  # (E, Q, 2 N): C Ab^t
    into = _krylov(_coordinates(solve(A, P, B))[:, None], [S.mT for S in squares])  # (E, Q, 2 N): Ab^t Bb
    kernel = (into @ out[:, :1].mT)[..., 0]  # (E, Q)
    first = out @ squares[0]  # of the state before a chunk, the first token sees Ab h
    h = x.new_zeros(E, batch, 2 * A.shape[1]) if initial_state is None else _coordinates(initial_state).transpose(0, 1)
    ys = []
    for i, j in itertools.pairwise(bounds):
        n = j - i
        if starts is not None:
            h = torch.where(starts[:, i, None], 0.0, h)
        carried = h @ first[:, :n].mT  # (E, B, n)
        ys.append(carried.permute(1, 2, 0) + long_conv(x[:, i:j], kernel[:, :n]))
        # states are rows, so that they take the transposed matrix
        h = _times_power(h, [S.mT for S in squares], n) + x[:, i:j].permute(2, 0, 1) @ into[:, :n].flip(1)
    y = torch.cat(ys, dim=1)
    return (y if D is None else torch.addcmul(y, D.to(dtype), x)).to(u.dtype), _paired(h).transpose(0, 1).contiguous()


def _transition(A: Tensor, P: Tensor) -> Tensor:
    """Ab as real matrices, (E, 2 N, 2 N): h -> Ab h for columns (Re h, Im h)."""
    N = A.shape[1]
    eye = torch.eye(N, dtype=A.dtype, device=A.device)
    basis = torch.cat([eye, 1j * eye])[:, None]  # (2 N, 1, N)
    return _coordinates(2 * solve(A, P, basis) - basis).permute(1, 2, 0)


def _coordinates(h: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2 N) real."""
    return torch.cat([h.real, h.imag], dim=-1)


def _row(C: Tensor) -> Tensor:
    """The row vectors that take (Re h, Im h) to 2 Re (C h), (E, 1, 2 N)."""
    return 2 * _coordinates(C.conj())[:, None]


def _paired(h: Tensor) -> Tensor:
    """(..., 2 N) real -> (..., N) complex."""
    return torch.complex(*h.chunk(2, dim=-1))


def _squares(A: Tensor, n: int) -> list[Tensor]:
    """A, A^2, A^4, ..., up to a power of at most n."""
    squares = [A]
    while 2 ** len(squares) <= n:
        squares.append(squares[-1] @ squares[-1])
    return squares


def _krylov(v: Tensor, squares: list[Tensor]) -> Tensor:
    """v A^t for rows v (E, 1, 2 N) and t below twice the power of the last of A's squares, (E, t, 2 N)."""
    for square in squares:
        v = torch.cat([v, v @ square], dim=1)
    return v


def _times_power(v: Tensor, squares: list[Tensor], n: int) -> Tensor:
    """v A^n for rows v, (E, rows, 2 N)."""
    *lower, last = squares
    for _ in range(n >> len(lower)):
        v = v @ last
    for k, square in enumerate(lower):
        if n >> k & 1:
            v = v @ square
    return v
