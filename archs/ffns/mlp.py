"""The ffn of a Transformer: SwiGLU (Shazeer 2020, arXiv:2002.05202), or GELU (arXiv:1606.08415) without a gate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

from ...kernels import ops
from ...options import Size
from ..ffn import FFN, default_d_ff
from ..layers import linear, linear_flops
from ..step import Step

GATED = "swiglu"
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": ops.gelu_tanh,
}


@dataclass(frozen=True, kw_only=True)
class MLPConfig:
    """Options of MLP."""

    activation: Literal["swiglu", "gelu", "gelu_tanh"] = "swiglu"
    """"swiglu", "gelu" (BERT), or "gelu_tanh", its approximation by tanh (GPT-2)."""
    d_ff: Size | None = None
    """Inner width; None means 8/3 d_model, up to a multiple of 8, or 4 d_model without a gate."""
    bias: bool = False
    """Whether the projections have biases."""


class MLP(FFN[MLPConfig]):
    """y = down(silu(gate(x)) up(x)) for SwiGLU, y = down(activation(up(x))) for the others."""

    Config = MLPConfig

    def __init__(self, d_model: int, config: MLPConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        self.is_gated = config.activation == GATED
        d_ff = config.d_ff
        if d_ff is None:
            d_ff = default_d_ff(d_model) if self.is_gated else 4 * d_model
        if self.is_gated:
            self.gate_proj = linear(d_model, d_ff, bias=config.bias)
        self.up_proj = linear(d_model, d_ff, bias=config.bias)
        self.down_proj = linear(d_ff, d_model, bias=config.bias, scale=residual_scale)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        """See FFN.forward."""
        if self.is_gated:
            return self.down_proj(ops.swiglu(self.gate_proj(x), self.up_proj(x))), None
        return self.down_proj(UNGATED[self.config.activation](self.up_proj(x))), None

    def describe_step(self, step: Step, x: Tensor) -> Tensor:
        """See FFN.describe_step."""
        y = step.linear(self.up_proj, x)
        if self.is_gated:
            y = step.swiglu(step.linear(self.gate_proj, x), y)
        else:
            y = step.gelu(y, by_tanh=self.config.activation == "gelu_tanh")
        return step.linear(self.down_proj, y)

    def flops_per_token(self) -> float:
        """FLOPs of the two or three projections."""
        return linear_flops(self)
