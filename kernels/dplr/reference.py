"""The definitions: one Python step per token, each in O(N) by Woodbury's identity."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(A="E N complex", P="E N complex", B="E N complex", C="E N complex", length="L", gives=("E L",))
def dplr_kernel(A: Tensor, P: Tensor, B: Tensor, C: Tensor, length: int) -> Tensor:
    """Computes K[t] = C Ab^t Bb, the impulse response of dplr_scan, exactly for any length.

    Args:
        A: diagonal part of the state matrix times the step size, (E, N) complex; one of each conjugate pair, as below.
        P: rank-one part times the root of the step size, (E, N) complex: the state matrix is A - P P^*.
        B: input matrix times the step size, (E, N) complex.
        C: output matrix, (E, N) complex.
        length: L, number of steps.

    Returns:
        K, (E, L), real.
    """
    u = torch.zeros(1, length, len(A), dtype=A.real.dtype, device=A.device)
    u[:, 0] = 1
    return dplr_scan(u, A, P, B, C)[0][0].mT


@takes(
    u="B L E",
    A="E N complex",
    P="E N complex",
    B="E N complex",
    C="E N complex",
    D="E",
    initial_state="B E N complex",
    starts="B L bool",
    gives=("B L E", "B E N complex"),
)
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
    """Computes h[t] = Ab h[t-1] + Bb u[t] and y[t] = 2 Re (C h[t]) + D u[t] for x' = (A - P P^*) x + B u.

    The step is bilinear: M = (1 - (A - P P^*) / 2)^-1, Ab = M (1 + (A - P P^*) / 2), Bb = M B (S4, eq. 3, with a step
    size of one). Products with P^* run over both members of each conjugate pair.

    Args:
        u: input, (B, L, E).
        A: (E, N) complex, as in dplr_kernel; so are P, B and C.
        P: (E, N) complex.
        B: (E, N) complex.
        C: (E, N) complex.
        D: skip connection, (E,).
        initial_state: state before u[:, 0], (B, E, N) complex; zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.

    Returns:
        y, (B, L, E), in u's dtype, and the state after u[:, L-1], (B, E, N), complex.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device) if initial_state is None else initial_state
    ys = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        h = solve(A, P, 2 * h + B * x[:, t, :, None]) - h  # Ab = 2 M - 1
        ys.append(2 * (C * h).sum(-1).real)
    y = torch.stack(ys, dim=1)
    return (y if D is None else y + D.to(dtype) * x).to(u.dtype), h


def solve(A: Tensor, P: Tensor, v: Tensor) -> Tensor:
    """(1 - (A - P P^*) / 2)^-1 v for v (..., E, N), where Woodbury's identity inverts the rank-one part."""
    M = 1 / (1 - A / 2)
    inner = (P.conj() * M * v).sum(-1, keepdim=True).real / (1 + (P.conj() * M * P).sum(-1, keepdim=True).real)
    return M * (v - P * inner)
