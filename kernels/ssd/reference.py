"""The definition: one Python step per token, in float32 or float64, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import takes


@takes(
    x="B L H P",
    dt="B L H",
    A="H",
    B="B L G N",
    C="B L G N",
    D="H",
    z="B L H P",
    dt_bias="H",
    initial_state="B H P N",
    starts="B L bool",
    chunk_len="Q",
    gives=("B L H P", "B H P N wide"),
    where={"H a multiple of G": lambda size: size["H"] % size["G"] == 0},
)
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t]^T and y[t] = h[t] C[t] + D x[t] (arXiv:2405.21060, eq. 2).

    The decay is one number per head. H / G heads in a row share B and C; dt = softplus(dt + dt_bias) where asked for.

    Args:
        x: input, (B, L, H, P).
        dt: step size before bias and softplus, (B, L, H).
        A: state decay, (H,), negative.
        B: input projection, (B, L, G, N).
        C: output projection, (B, L, G, N).
        D: skip connection, (H,).
        z: gate, (B, L, H, P); y is multiplied by silu(z).
        dt_bias: added to dt, (H,).
        dt_softplus: whether the step size is softplus(dt + dt_bias) or the sum itself.
        initial_state: state before x[:, 0], (B, H, P, N); zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.
        chunk_len: about how many tokens are computed at once: a hint that changes speed and rounding, not meaning.

    Returns:
        y, (B, L, H, P), in x's dtype, and the state after x[:, L-1], (B, H, P, N), in float32 (float64 for float64
        inputs).
    """
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    dt = F.softplus(dt) if dt_softplus else dt
    u = x.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(H // G, dim=2) for t in (B, C))  # (B, L, H, N)
    h = u.new_zeros(batch, H, P, N) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(L):
        if starts is not None:
            h = torch.where(starts[:, t, None, None, None], 0.0, h)
        decay = torch.exp(dt[:, t] * A.to(dtype))  # (B, H)
        h = decay[..., None, None] * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, dim=1)
    y = y if D is None else y + D.to(dtype)[:, None] * u
    y = y if z is None else y * F.silu(z.to(dtype))
    return y.to(x.dtype), h
