"""Common part of the state space models S4D and S4: states in real coordinates, and the recurrence in chunks.

A conjugate pair of states, h and its conjugate, is two real ones, (Re h, Im h).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .documents import document_ids

P = ParamSpec("P")
R = TypeVar("R")

CHUNK = 64
"""Tokens of a chunk, between two materialized states."""


def coordinates(h: Tensor) -> Tensor:
    """(..., N) complex -> (..., 2 N) real."""
    return torch.cat([h.real, h.imag], dim=-1)


def paired(h: Tensor) -> Tensor:
    """The inverse of `coordinates`."""
    return torch.complex(*h.chunk(2, dim=-1))


def output_row(C: Tensor) -> Tensor:
    """The row vectors that take (Re h, Im h) to 2 Re (C h), (..., N) complex -> (..., 2 N) real."""
    return 2 * coordinates(C.conj())


def without_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Multiplies in the precision of the arguments: a state sums over a whole sequence, too much for bfloat16."""

    @functools.wraps(function)
    def wide(*args: P.args, **kwargs: P.kwargs) -> R:
        x = next(iter((*args, *kwargs.values())))
        assert isinstance(x, Tensor)
        with torch.autocast(x.device.type, enabled=False):
            return function(*args, **kwargs)

    return wide


def scan_in_chunks(
    u: Tensor,
    into: Tensor,
    out: Tensor,
    advance: Callable[[Tensor, int], Tensor],
    D: Tensor | None,
    initial_state: Tensor | None,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Computes h[t] = A h[t-1] + b u[t] and y[t] = c h[t] + D u[t] from powers of A that all chunks share.

    Inside a chunk of Q tokens the output is a convolution plus what the state before the chunk still contributes. Both
    are matrix products over all chunks at once; only the state goes from chunk to chunk.

    Args:
        u: input, (B, L, E).
        into: A^t b for t < min(L, CHUNK), (E, Q, 2 N).
        out: c A^t for t <= min(L, CHUNK), (E, Q + 1, 2 N).
        advance: takes h, (E, B, 2 N), and n <= Q to A^n h.
        D: skip connection, (E,).
        initial_state: (B, E, N) complex.
        starts: (B, L) bool.

    Returns:
        y, (B, L, E), in u's dtype, and the state after u[:, L-1], (B, E, N), complex.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    batch, L, E = u.shape
    h = into.new_zeros(E, batch, into.shape[2]) if initial_state is None else coordinates(initial_state).transpose(0, 1)
    # the document of every token, and before the first token that of the initial state
    ids = None if starts is None else F.pad(document_ids(starts), (1, 0))
    whole = L - L % CHUNK
    ys = []
    for first, last in ((0, whole), (whole, L)):
        if first < last:
            Q = min(CHUNK, last - first)
            chunks = x[:, first:last].permute(2, 0, 1).unflatten(2, (-1, Q)).contiguous()
            ids_here = None if ids is None else ids[:, first : last + 1]
            y, h = _scan_equal_chunks(chunks, h, ids_here, into[:, :Q], out[:, : Q + 1], advance)
            ys.append(y)
    y = torch.cat(ys, dim=2).permute(1, 2, 0)
    y = y if D is None else torch.addcmul(y, D.to(dtype), x)
    return y.to(u.dtype), paired(h).transpose(0, 1).contiguous()


def _scan_equal_chunks(
    x: Tensor, h: Tensor, ids: Tensor | None, into: Tensor, out: Tensor, advance: Callable[[Tensor, int], Tensor]
) -> tuple[Tensor, Tensor]:
    """x, (E, B, L / Q, Q), h before it and ids, (B, 1 + L), of h and of the tokens -> y, (E, B, L), and h after it."""
    Q = x.shape[3]
    kernel = (out[:, :-1] @ into[:, :1].mT)[..., 0]  # (E, Q)
    if ids is None:
        inside, leaving, sees = _convolve(x, kernel), x, None
    else:
        before, here = ids[:, :-1:Q, None], ids[:, 1:].unflatten(1, (-1, Q))  # (B, L / Q, 1), (B, L / Q, Q)
        inside = _convolve_documents(x, kernel, here)
        leaving = torch.where(here == here[..., -1:], x, 0)
        sees = here == before  # which tokens the state before their chunk reaches
    added = (leaving.flatten(1, 2) @ into.flip(1)).unflatten(1, x.shape[1:3])  # (E, B, L / Q, 2 N)
    states = []
    for c in range(x.shape[2]):
        # what no token of the chunk sees is not multiplied by zero: it may be no number
        states.append(h if sees is None else torch.where(sees[:, c, :1], h, 0))
        kept = h if sees is None else torch.where(sees[:, c, -1:], h, 0)
        h = advance(kept, Q) + added[:, :, c]
    carried = (torch.stack(states, dim=2).flatten(1, 2) @ out[:, 1:].mT).view_as(x)
    y = inside + (carried if sees is None else torch.where(sees, carried, 0))
    return y.flatten(2), h


def _convolve(x: Tensor, kernel: Tensor) -> Tensor:
    """y[t] = sum over s <= t of kernel[t - s] x[s] in each chunk, (E, B, L / Q, Q)."""
    return (x.flatten(1, 2) @ _toeplitz(kernel)).view_as(x)


def _convolve_documents(x: Tensor, kernel: Tensor, ids: Tensor) -> Tensor:
    """The sum of `_convolve` over the tokens s of t's own document; ids (B, L / Q, Q).

    By halves, so that no row needs a matrix of its own: a token of one block and one of the next are in the same
    document where both are in that of the first block's last token, a condition on each of the two alone.
    """
    Q = x.shape[3]
    padding = (0, (1 << (Q - 1).bit_length()) - Q)
    x, kernel, ids = (F.pad(t, padding) for t in (x, kernel, ids))
    matrix = _toeplitz(kernel)
    y, n = x * matrix[:, :1, None, :1], 1
    while n < x.shape[3]:
        pair, x_pair = (t.unflatten(-1, (-1, 2 * n)) for t in (ids, x))  # two blocks of n tokens in the last axis
        meets = pair == pair[..., n - 1 : n]
        left = torch.where(meets[..., :n], x_pair[..., :n], 0)
        right = (left.flatten(1, -2) @ matrix[:, :n, n : 2 * n]).view_as(left)
        y = y + F.pad(torch.where(meets[..., n:], right, 0), (n, 0)).flatten(-2)
        n *= 2
    return y[..., :Q]


def _toeplitz(kernel: Tensor) -> Tensor:
    """kernel[t - s] at [s, t], zero below the diagonal, (E, Q, Q)."""
    Q = kernel.shape[1]
    return F.pad(kernel, (Q - 1, 0)).unfold(1, Q, 1).flip(1)
