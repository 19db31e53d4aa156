"""The definition, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(q="B L H 2P", k="B L H_kv 2P", positions="L int")
def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Rotates the pairs (x[i], x[i + P/2]) of each head by position * theta^(-2 i / P) (arXiv:2104.09864, eq. 34).

    Args:
        q: queries, (B, L, H, P) with P even.
        k: keys, (B, L, H_kv, P).
        positions: (L,) int64.
        theta: base of the wavelengths.

    Returns:
        q and k rotated, in their dtypes. Angles are in float64: positions may be large.
    """
    half = q.shape[-1] // 2
    exponents = torch.arange(half, device=q.device, dtype=torch.float64) / half
    angles = positions[:, None, None] * theta**-exponents  # (L, 1, P/2)

    def rotated(x: Tensor) -> Tensor:
        dtype = torch.promote_types(x.dtype, torch.float32)
        cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
        a, b = x.to(dtype).split(half, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)

    return rotated(q), rotated(k)
