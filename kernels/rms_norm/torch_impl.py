"""PyTorch's own rms_norm, after the gate where there is one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as reference.rms_norm."""
    return _unless_overflown(F.rms_norm(x, weight.shape, weight.to(x.dtype), eps), x)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """Same contract as reference.gated_rms_norm."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    gated = (x.to(dtype) * F.silu(z.to(dtype))).unflatten(-1, (n_groups, -1))
    normed = _unless_overflown(F.rms_norm(gated, gated.shape[-1:], None, eps), gated)
    return (normed.flatten(-2) * weight.to(dtype)).to(x.dtype)


def _unless_overflown(y: Tensor, x: Tensor) -> Tensor:
    """PyTorch makes a row zero whose squares are beyond float range. On the CPU one look says that no row has any."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    is_eager = x.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager and math.isfinite(torch.linalg.vector_norm(x.detach(), dtype=dtype)):
        return y
    norm = torch.linalg.vector_norm(x.detach(), dim=-1, keepdim=True, dtype=dtype)
    return y + torch.where(norm.isinf(), torch.nan, -0.0).to(y.dtype)  # -0 changes no bit of y, nor of its gradient
