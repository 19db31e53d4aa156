"""The parts that mixers and channel mixers share: projections, the norm, their FLOPs."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..kernels import ops


def linear(d_in: int, d_out: int, *, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    """A projection with weights uniform in +-scale / sqrt(d_in), PyTorch's default times `scale`, and a zero bias."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(scale)
        if bias:
            layer.bias.zero_()
    return layer


def linear_flops(module: nn.Module) -> float:
    """Forward FLOPs per token of every nn.Linear inside `module`."""
    return sum(2.0 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class RMSNorm(nn.Module):
    """weight x / rms(x) over the last axis (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return ops.rms_norm(x, self.weight, self.eps)
