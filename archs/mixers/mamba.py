"""Mamba (Gu & Dao 2023, arXiv:2312.00752). B is discretized by Euler, as in the authors' code."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...options import Size, Width
from ..layers import RMSNorm, StepSizes, decay_rates, inner_width, linear, linear_flops, step_bias
from ..mixer import Mixer, State, Zeros
from ..step import Step


@dataclass(frozen=True, kw_only=True)
class MambaConfig(StepSizes):
    """Options of Mamba; the defaults are the paper's."""

    d_state: Size = 16
    """N, states per channel."""
    d_conv: Size = 4
    """K, taps of the short convolution."""
    expand: Width = 2
    """E / D."""
    dt_rank: Size | None = None
    """Rank of the step-size projection; None means ceil(d_model / 16)."""
    inner_norm: bool = False
    """Whether the step size, B and C pass through an RMSNorm each (Jamba, arXiv:2403.19887, section 6.4)."""


@dataclass
class MambaState(State):
    """State of Mamba, constant in the context length."""

    conv: Tensor
    """The last K - 1 inputs of the convolution, (B, K-1, E)."""
    ssm: Tensor
    """h, (B, E, N), float32."""


class Mamba(Mixer[MambaConfig, MambaState]):
    """x, z = in_proj(u); x = silu(conv(x)); y = SSM(A, B(x), C(x), dt(x))(x) silu(z); out_proj(y). Section 3.4."""

    Config = MambaConfig
    State = MambaState
    no_weight_decay = frozenset({"A_log"})

    def __init__(self, d_model: int, config: MambaConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        E, N, K = inner_width(config.expand, d_model), config.d_state, config.d_conv
        self.d_inner = E
        self.dt_rank = math.ceil(d_model / 16) if config.dt_rank is None else config.dt_rank
        self.in_proj = linear(d_model, 2 * E)
        self.conv_weight = nn.Parameter(torch.empty(E, K).uniform_(-(K**-0.5), K**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(E).uniform_(-(K**-0.5), K**-0.5))
        self.x_proj = linear(E, self.dt_rank + 2 * N)
        self.dt_proj = linear(self.dt_rank, E)  # its bias is dt_bias
        self.A_log = nn.Parameter(torch.arange(1.0, N + 1).log().repeat(E, 1))  # A = -(1..N): S4D-Real (section 3.6)
        self.D = nn.Parameter(torch.ones(E))
        self.out_proj = linear(E, d_model, scale=residual_scale)
        if config.inner_norm:
            self.dt_norm, self.B_norm, self.C_norm = (RMSNorm(n, 1e-6) for n in (self.dt_rank, N, N))
        self.dt_bias = step_bias(E, config.dt_min, config.dt_max)

    def forward(
        self, x: Tensor, state: MambaState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, MambaState | None]:
        """See Mixer.forward."""
        x, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        x, conv = ops.causal_conv1d(x, self.conv_weight, self.conv_bias, "silu", initial_state=conv, starts=starts)
        delta, B, C = self.x_proj(x).split([self.dt_rank, self.config.d_state, self.config.d_state], dim=-1)
        if self.config.inner_norm:
            delta, B, C = self.dt_norm(delta), self.B_norm(B), self.C_norm(C)
        A = decay_rates(self.A_log)
        # the bias goes to the scan, which adds it in float32: in bfloat16 it would lose the smallest step sizes
        y, ssm = ops.selective_scan(
            x, self.dt_proj(delta), A, B, C, self.D, z,
            delta_bias=self.dt_bias, delta_softplus=True, initial_state=ssm, starts=starts,
        )  # fmt: skip
        return self.out_proj(y), None if state is None else MambaState(conv, ssm)

    def describe_step(self, step: Step, x: Tensor, state: MambaState) -> Tensor:
        """See Mixer.describe_step."""
        N = self.config.d_state
        x, z = step.linear(self.in_proj, x).chunk(2, dim=-1)
        x = step.convolve(x, self.conv_weight, self.conv_bias, state.conv, "silu")
        dt, B, C = step.linear(self.x_proj, x).split([self.dt_rank, N, N], dim=-1)
        if self.config.inner_norm:
            dt, B, C = step.norm(self.dt_norm, dt), step.norm(self.B_norm, B), step.norm(self.C_norm, C)
        A = step.derived(decay_rates, self.A_log)
        y = step.selective_scan(x, step.linear(self.dt_proj, dt), A, B, C, self.D, z, self.dt_bias, state.ssm)
        return step.linear(self.out_proj, y)

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {
            "conv": Zeros((self.config.d_conv - 1, self.d_inner)),
            "ssm": Zeros((self.d_inner, self.config.d_state), at_least=torch.float32),
        }

    def flops_per_token(self, context_len: float) -> float:
        """Projections, the convolution, 9 E N for the scan and 2 E for skip and gate."""
        return linear_flops(self) + 2 * self.conv_weight.numel() + 9 * self.A_log.numel() + 2 * self.d_inner
