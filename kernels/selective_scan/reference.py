"""The definition: one Python step per token, in float32 or float64, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import takes


@takes(
    u="B L E",
    delta="B L E",
    A="E N",
    B="B L N",
    C="B L N",
    D="E",
    z="B L E",
    delta_bias="E",
    initial_state="B E N",
    starts="B L bool",
    gives=("B L E", "B E N wide"),
)
def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] u[t] and y[t] = C[t] h[t] + D u[t] (arXiv:2312.00752, eq. 2).

    B is discretized by Euler, as in the authors' code; dt = softplus(delta + delta_bias) where asked for.

    Args:
        u: input, (B, L, E).
        delta: step size before bias and softplus, (B, L, E).
        A: diagonal state matrix, (E, N), negative.
        B: input projection, (B, L, N).
        C: output projection, (B, L, N).
        D: skip connection, (E,).
        z: gate, (B, L, E); y is multiplied by silu(z).
        delta_bias: added to delta, (E,).
        delta_softplus: whether dt is softplus(delta + delta_bias) or the sum itself.
        initial_state: state before u[:, 0], (B, E, N); zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.

    Returns:
        y, (B, L, E), in u's dtype, and the state after u[:, L-1], (B, E, N), in float32 (float64 for float64 inputs).
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    dt = delta.to(dtype) if delta_bias is None else delta.to(dtype) + delta_bias.to(dtype)
    dt = F.softplus(dt) if delta_softplus else dt
    x = u.to(dtype)
    h = x.new_zeros(x.shape[0], *A.shape) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            h = torch.where(starts[:, t, None, None], 0.0, h)
        decay = torch.exp(dt[:, t, :, None] * A.to(dtype))  # (B, E, N)
        h = decay * h + (dt[:, t] * x[:, t])[..., None] * B[:, t, None].to(dtype)
        ys.append((h * C[:, t, None].to(dtype)).sum(-1))
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D.to(dtype) * x
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(u.dtype), h
