"""The definitions: a sum over the past for the convolution, one Python step per token for the recurrence."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(A="E N complex", C="E N complex", length="L", gives=("E L",))
def ssm_kernel(A: Tensor, C: Tensor, length: int) -> Tensor:
    """Computes K[t] = 2 Re sum_n C[n] exp(A[n] t), a diagonal SSM's impulse response (S4D, arXiv:2206.11893, eq. 3).

    Args:
        A: discretized poles, log of the per-step factor (that is, dt A), (E, N) complex; one of each conjugate pair.
        C: residues, the product of output, input and discretization factors, (E, N) complex.
        length: L, number of steps.

    Returns:
        K, (E, L), real.
    """
    t = torch.arange(length, device=A.device)
    return 2 * (C[..., None] * torch.exp(A[..., None] * t)).sum(1).real


@takes(u="B L E", kernel="E L", D="E", gives=("B L E",))
def long_conv(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """Computes y[t] = sum_s kernel[s] u[t - s] + D u[t], each channel with its own kernel as long as the sequence.

    Args:
        u: input, (B, L, E).
        kernel: (E, L), real.
        D: skip connection, (E,).

    Returns:
        y, (B, L, E), in u's dtype.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x, k = u.to(dtype), kernel.to(dtype).T  # (L, E)
    ys = [(x[:, : t + 1].flip(1) * k[: t + 1]).sum(1) for t in range(u.shape[1])]
    y = torch.stack(ys, dim=1)
    return (y if D is None else y + D.to(dtype) * x).to(u.dtype)


@takes(
    u="B L E",
    A="E N complex",
    C="E N complex",
    D="E",
    initial_state="B E N complex",
    starts="B L bool",
    gives=("B L E", "B E N complex"),
)
def ssm_scan(
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes h[t] = exp(A) h[t-1] + u[t] and y[t] = 2 Re (C h[t]) + D u[t]: long_conv by ssm_kernel, with a state.

    Args:
        u: input, (B, L, E).
        A: discretized poles, (E, N) complex, as in ssm_kernel.
        C: residues, (E, N) complex.
        D: skip connection, (E,).
        initial_state: state before u[:, 0], (B, E, N) complex; zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.

    Returns:
        y, (B, L, E), in u's dtype, and the state after u[:, L-1], (B, E, N), complex.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    x = u.to(dtype)
    h = torch.zeros(u.shape[0], *A.shape, dtype=A.dtype, device=u.device) if initial_state is None else initial_state
    decay = torch.exp(A)
    ys = []
    for t in range(u.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        h = decay * h + x[:, t, :, None]
        ys.append(2 * (C * h).sum(-1).real)
    y = torch.stack(ys, dim=1)
    return (y if D is None else y + D.to(dtype) * x).to(u.dtype), h
