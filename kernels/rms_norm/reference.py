"""The definition, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes weight x / sqrt(mean(x^2) + eps) over the last axis.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (..., D), in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.to(dtype)).to(x.dtype)
