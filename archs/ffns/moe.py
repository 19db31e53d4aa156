"""A mixture of SwiGLU experts without dropped tokens, routed as in Jamba (arXiv:2403.19887) and Mixtral (2401.04088).

Router weights are the softmax over all experts, not renormalized over the chosen ones, as in Jamba's code.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...options import Range, Size
from ..ffn import FFN, default_d_ff
from ..layers import linear, linear_flops
from ..step import Step


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    """Options of MoE."""

    n_experts: Size = 16
    """Experts in the layer."""
    top_k: Size = 2
    """Experts that each token uses."""
    d_ff: Size | None = None
    """Inner width of one expert; None means 8/3 d_model, up to a multiple of 8."""
    balance_weight: Annotated[float, Range(0)] = 0.01
    """Weight of the load-balancing loss (Switch Transformer, arXiv:2101.03961, eq. 4); 0 turns it off."""

    def __post_init__(self) -> None:
        if self.top_k > self.n_experts:
            raise ValueError(f"top_k={self.top_k} must be at most n_experts={self.n_experts}")


class MoE(FFN[MoEConfig]):
    """y = sum over the top_k experts e of p[e] expert_e(x), with p = softmax(router(x))."""

    Config = MoEConfig

    def __init__(self, d_model: int, config: MoEConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        d_ff = default_d_ff(d_model) if config.d_ff is None else config.d_ff
        n = config.n_experts
        self.router = linear(d_model, n)
        self.gate_up_proj = nn.Parameter(torch.empty(n, 2 * d_ff, d_model).uniform_(-(d_model**-0.5), d_model**-0.5))
        bound = residual_scale * d_ff**-0.5
        self.down_proj = nn.Parameter(torch.empty(n, d_model, d_ff).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See FFN.forward. The auxiliary loss is top_k-normalized: 1 times its weight at perfect balance."""
        tokens = x.flatten(0, -2)  # (T, D)
        probs = self.router(tokens).to(torch.promote_types(x.dtype, torch.float32)).softmax(-1)  # (T, n_experts)
        weight, expert = probs.topk(self.config.top_k, dim=-1)  # (T, top_k)
        order = expert.flatten().argsort(stable=True)  # assignments, sorted by expert
        # not bincount, for which the host would wait
        counts = expert.new_zeros(self.config.n_experts).scatter_add_(0, expert.flatten(), torch.ones_like(order))
        token = order // self.config.top_k
        gate, up = ops.grouped_mm(tokens[token], self.gate_up_proj, counts).chunk(2, dim=-1)
        y = ops.grouped_mm(ops.swiglu(gate, up), self.down_proj, counts) * weight.flatten()[order, None]
        y = torch.zeros_like(tokens, dtype=y.dtype).index_add(0, token, y)
        if tokens.shape[0] == 0:  # whose means are no numbers
            return y.to(x.dtype).view_as(x), probs.sum()
        load = counts / counts.sum()
        balance = self.config.balance_weight * self.config.n_experts * (load * probs.mean(0)).sum()
        return y.to(x.dtype).view_as(x), balance

    def describe_step(self, step: Step, x: Tensor) -> Tensor:
        """See FFN.describe_step."""
        scores = step.linear(self.router, x)
        return step.experts(x, scores, self.gate_up_proj, self.down_proj, self.config.top_k)

    def flops_per_token(self) -> float:
        """FLOPs of the router and of top_k experts."""
        per_expert = (self.gate_up_proj.numel() + self.down_proj.numel()) / self.config.n_experts
        return linear_flops(self) + 2 * self.config.top_k * per_expert

    @property
    def n_inactive_params(self) -> int:
        """Parameters of the experts that one token does not use."""
        total = self.gate_up_proj.numel() + self.down_proj.numel()
        return total - total // self.config.n_experts * self.config.top_k
