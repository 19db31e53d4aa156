"""Plain PyTorch: kernel and recurrence by powers of the dense matrix.

The authors' way to the kernel, an inverse FFT of its generating function from Cauchy sums (S4, algorithm 1), needs a
power of the dense matrix too, to truncate the kernel. Powers alone are as fast at 256 steps and three times as fast at
4096, in a fifth of the memory, and lose in float32 what the recurrence loses.

Powers are taken in real coordinates, (Re h, Im h): a conjugate pair is two real states, and the rank-one part, which
mixes the members of all pairs, is linear over the reals only.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import opaque
from ..state_space import CHUNK, coordinates, output_row, scan_in_chunks, without_autocast
from . import reference
from .reference import solve


@opaque(lambda A, P, B, C, length: A.real.new_empty(A.shape[0], length))
@without_autocast
def dplr_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Same contract as reference.dplr_kernel, as one small matrix product per channel.

    With t = i T + j it is C Ab^(i T) times Ab^j Bb: about sqrt(L) rows and as many columns, found by doubling.
    """
    bits = (length - 1).bit_length()
    squares = _squares(_transition(A, P), bits)
    columns = _columns(A, P, B, squares[: bits // 2])  # (E, T, 2 N)
    rows = _krylov(output_row(C)[:, None], squares[bits // 2 :])  # (E, at least L / T, 2 N)
    return (rows @ columns.mT).flatten(1)[:, :length]


@without_autocast
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
    """Same contract as reference.dplr_scan."""
    if u.shape[1] == 1:  # a decode step: the matrix would cost more than the step
        return reference.dplr_scan(u, A, P, B, C, D, initial_state, starts)
    return _in_chunks(u, A, P, B, C, D, initial_state, starts)


@opaque(lambda u, A, P, B, C, D, initial_state, starts: (u.new_empty(u.shape), A.new_empty(u.shape[0], *A.shape)))
def _in_chunks(
    u: Tensor,
    A: Tensor,
    P: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    Q = min(u.shape[1], CHUNK)
    squares = _squares(_transition(A, P), Q.bit_length())
    into = _columns(A, P, B, squares)[:, :Q]
    out = _krylov(output_row(C)[:, None], squares)[:, : Q + 1]

    def advance(h: Tensor, n: int) -> Tensor:
        for k, square in enumerate(squares):
            if n >> k & 1:
                h = h @ square.mT  # states are rows
        return h

    return scan_in_chunks(u, into, out, advance, D, initial_state, starts)


def _transition(A: Tensor, P: Tensor) -> Tensor:
    """Ab as real matrices, (E, 2 N, 2 N): h -> Ab h for columns (Re h, Im h)."""
    # reference.solve, written out: a diagonal M less an outer product, which is real
    M = 1 / (1 - A / 2)
    column, row = coordinates(M * P), coordinates((P.conj() * M).conj())
    scale = 2 / (1 + (P.conj() * M * P).sum(-1).real)
    Ab = 2 * M - 1
    N = A.shape[1]
    diagonal = torch.diag_embed(torch.cat([Ab.real, Ab.real], dim=-1))
    off_diagonal = torch.diag_embed(Ab.imag, -N) + torch.diag_embed(-Ab.imag, N)
    return diagonal + off_diagonal - column[..., None] * (scale[:, None] * row)[:, None]


def _squares(A: Tensor, n: int) -> list[Tensor]:
    """A, A^2, A^4, ..., n of them, at least A."""
    squares = [A]
    while len(squares) < n:
        squares.append(squares[-1] @ squares[-1])
    return squares


def _krylov(v: Tensor, squares: list[Tensor]) -> Tensor:
    """v S^t for rows v, (E, 1, 2 N), from n successive squares S, S^2, S^4, ...: t < 2^n, (E, 2^n, 2 N)."""
    for square in squares:
        v = torch.cat([v, v @ square], dim=1)
    return v


def _columns(A: Tensor, P: Tensor, B: Tensor, squares: list[Tensor]) -> Tensor:
    """Ab^t Bb for t < 2^n from the first n squares of Ab, (E, 2^n, 2 N)."""
    return _krylov(coordinates(solve(A, P, B))[:, None], [square.mT for square in squares])
