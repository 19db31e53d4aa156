"""The definition, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(
    B="B L N",
    C="B L N",
    B_bias="H N",
    C_bias="H N",
    drive="B L H",
    angle="B L H A",
    before="B H N",
    gives=("B L H N wide", "B L H N wide", "B L H wide", "B H N wide"),
    where={"2 A at most N": lambda sizes: 2 * sizes.get("A", 0) <= sizes["N"]},
)
def turned_heads(
    B: Tensor,
    C: Tensor,
    B_bias: Tensor,
    C_bias: Tensor,
    drive: Tensor,
    angle: Tensor | None = None,
    before: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives every head of Mamba-3 its B and C, b[t] = R[t] (B[t] + B_bias) and c[t] = R[t] (C[t] + C_bias).

    R[t] turns the pairs (s[2 i], s[2 i + 1]) of states by angle[t, i]; states beyond the last angle stay
    (arXiv:2603.15569, section 3.2). b comes a token late and multiplied, as the trapezoidal rule drives a state by it.

    Args:
        B: (B, L, N), which the heads share.
        C: (B, L, N), likewise.
        B_bias: (H, N).
        C_bias: (H, N).
        drive: what b of the token before is multiplied by, (B, L, H).
        angle: radians, (B, L, H, A); nothing turns when None.
        before: b of the token before the first, (B, H, N); zeros when None.

    Returns:
        drive[t] b[t-1] and c, (B, L, H, N) each, the products b[t] c[t], (B, L, H), and b of the last token, (B, H, N),
        zeros where there is none; all at least in float32.
    """
    dtype = torch.promote_types(B.dtype, torch.float32)
    n = 0 if angle is None else 2 * angle.shape[-1]

    def turned(t: Tensor, bias: Tensor) -> Tensor:
        heads = t.to(dtype)[:, :, None] + bias.to(dtype)  # (B, L, H, N)
        if angle is None:
            return heads
        cos, sin = angle.to(dtype).cos(), angle.to(dtype).sin()
        a, b = heads[..., :n:2], heads[..., 1:n:2]
        pairs = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=-1)
        return torch.cat([pairs.flatten(-2), heads[..., n:]], dim=-1)

    b, c = turned(B, B_bias), turned(C, C_bias)
    first = b.new_zeros(b.shape[0], 1, *b.shape[2:]) if before is None else before[:, None].to(dtype)
    late = torch.cat([first, b], dim=1)  # (B, L+1, H, N)
    return drive.to(dtype)[..., None] * late[:, :-1], c, (b * c).sum(-1), late[:, -1]
