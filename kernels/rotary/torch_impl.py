"""Plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Same contract as reference.rotary."""
    cos, sin = table(q, positions, theta)
    return rotated(q, cos, sin), rotated(k, cos, sin)


def table(x: Tensor, positions: Tensor, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (L, P/2) each, in float32 or wider."""
    half = x.shape[-1] // 2
    exponents = torch.arange(half, device=x.device, dtype=torch.float64) / half
    angles = positions[:, None] * theta**-exponents
    dtype = torch.promote_types(x.dtype, torch.float32)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H, P) by the table's angles."""
    cos, sin = cos[:, None], sin[:, None]
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)
