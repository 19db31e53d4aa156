"""The definitions, in float32 or float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import takes


@takes(x="... D", weight="D")
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes weight x / sqrt(mean(x^2) + eps) over the last axis.

    Args:
        x: (..., D).
        weight: (D,).
        eps: added to the mean square.

    Returns:
        (..., D), in x's dtype; NaN where the squares of a row are beyond float range, as what is left of the row is not
        zero but unknown.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    wide = x.to(dtype)
    return (wide * _inverse_rms(wide, eps) * weight.to(dtype)).to(x.dtype)


@takes(
    x="... D",
    z="... D",
    weight="D",
    n_groups="G",
    where={"D a multiple of G": lambda size: size["D"] % size["G"] == 0},
)
def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """Computes rms_norm(x silu(z)), in each of `n_groups` groups of channels apart (Mamba-2, arXiv:2405.21060, 7.3).

    Args:
        x: (..., D).
        z: gate, (..., D).
        weight: (D,).
        eps: added to the mean square.
        n_groups: number of equal, consecutive groups of channels, each with its own mean square.

    Returns:
        (..., D), in x's dtype.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (n_groups, -1))
    normed = gated * _inverse_rms(gated, eps)
    return (normed.flatten(-2) * weight.to(dtype)).to(x.dtype)


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return scale.masked_fill(scale == 0, torch.nan)
