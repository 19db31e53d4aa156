"""SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from ..ffn import FFN, default_d_ff
from ..layers import linear, linear_flops


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of MLP."""

    d_ff: int | None = None
    """Inner width; None means 8/3 d_model, up to a multiple of 8."""


class MLP(FFN[MLPConfig]):
    """y = down(silu(gate(x)) up(x))."""

    Config = MLPConfig

    def __init__(self, d_model: int, config: MLPConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        d_ff = config.d_ff or default_d_ff(d_model)
        self.gate_proj = linear(d_model, d_ff)
        self.up_proj = linear(d_model, d_ff)
        self.down_proj = linear(d_ff, d_model, scale=residual_scale)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """See FFN.forward."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x)), None

    def flops_per_token(self) -> float:
        """The three projections."""
        return linear_flops(self)
