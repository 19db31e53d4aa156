"""Mamba-2 (Dao & Gu 2024, arXiv:2405.21060), initialized as in the authors' code. Step sizes are not clamped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...options import Size, Width
from ..layers import RMSNorm, StepSizes, decay_rates, default_head_dim, inner_width, linear, linear_flops, step_bias
from ..mixer import Mixer, State, Zeros
from ..step import Step


@dataclass(frozen=True, kw_only=True)
class Mamba2Config(StepSizes):
    """Options of Mamba-2; the defaults are the authors'."""

    d_state: Size = 128
    """N, states per channel."""
    d_conv: Size = 4
    """K, taps of the short convolution."""
    expand: Width = 2
    """E / D."""
    head_dim: Size | None = None
    """P, channels that share a decay; None means the largest power of two up to 64 that leaves at least three heads."""
    n_groups: Size = 1
    """G, groups of heads that share B and C, and of channels that the norm treats apart."""
    chunk_len: Size | None = None
    """About how many tokens the scan computes at once; None leaves it to the operation. Changes speed and rounding."""


@dataclass
class Mamba2State(State):
    """State of Mamba-2, constant in the context length."""

    conv: Tensor
    """The last K - 1 inputs of the convolution, (B, K-1, E + 2 G N)."""
    ssm: Tensor
    """h, (B, H, P, N), float32."""


class Mamba2(Mixer[Mamba2Config, Mamba2State]):
    """z, xBC, dt = in_proj(u); x, B, C = silu(conv(xBC)); out_proj(norm(SSD(x, dt, A, B, C) silu(z))). Figure 6."""

    Config = Mamba2Config
    State = Mamba2State
    no_weight_decay = frozenset({"A_log", "D", "dt_bias"})

    def __init__(self, d_model: int, config: Mamba2Config, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        E, K = inner_width(config.expand, d_model), config.d_conv
        P = default_head_dim(E, n_groups=config.n_groups) if config.head_dim is None else config.head_dim
        self.d_inner, self.head_dim = E, P
        self.n_heads, rest = divmod(E, self.head_dim)
        if rest:
            raise ValueError(f"d_inner={E} is not divisible by head_dim={self.head_dim}")
        if self.n_heads % config.n_groups:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_groups={config.n_groups}")
        H, self.d_xBC = self.n_heads, E + 2 * config.n_groups * config.d_state  # the convolution's x, B and C
        self.in_proj = linear(d_model, E + self.d_xBC + H)
        self.conv_weight = nn.Parameter(torch.empty(self.d_xBC, K).uniform_(-(K**-0.5), K**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(self.d_xBC).uniform_(-(K**-0.5), K**-0.5))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H))
        self.norm = RMSNorm(E, 1e-5)
        self.out_proj = linear(E, d_model, scale=residual_scale)
        self.dt_bias = step_bias(H, config.dt_min, config.dt_max)

    def forward(
        self, x: Tensor, state: Mamba2State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, Mamba2State | None]:
        """See Mixer.forward."""
        z, xBC, dt = self.in_proj(x).split([self.d_inner, self.d_xBC, self.n_heads], dim=-1)
        A = decay_rates(self.A_log)
        if state is not None and starts is None and x.shape[1] == 1:
            y, state = self._one_token(xBC, dt, A, state)
        else:
            y, state = self._many_tokens(xBC, dt, A, state, starts)
        y = ops.gated_rms_norm(y.flatten(2), z, self.norm.weight, self.norm.eps, self.config.n_groups)
        return self.out_proj(y), state

    def _many_tokens(
        self, xBC: Tensor, dt: Tensor, A: Tensor, state: Mamba2State | None, starts: Tensor | None
    ) -> tuple[Tensor, Mamba2State | None]:
        """Runs the convolution and the scan: y, (B, L, H, P), and the state after them."""
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        xBC, conv = ops.causal_conv1d(xBC, self.conv_weight, self.conv_bias, "silu", initial_state=conv, starts=starts)
        G, N = self.config.n_groups, self.config.d_state
        x, B, C = xBC.split([self.d_inner, G * N, G * N], dim=-1)
        x, B, C = x.unflatten(-1, (self.n_heads, -1)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        # the bias goes to the scan, which adds it in float32: in bfloat16 it would lose the smallest step sizes
        y, ssm = ops.ssd(
            x, dt, A, B, C, self.D,
            dt_bias=self.dt_bias, dt_softplus=True, initial_state=ssm, starts=starts, chunk_len=self.config.chunk_len,
        )  # fmt: skip
        return y, None if state is None else Mamba2State(conv, ssm)

    def _one_token(self, xBC: Tensor, dt: Tensor, A: Tensor, state: Mamba2State) -> tuple[Tensor, Mamba2State]:
        """Runs the convolution and the scan at length 1, in one operation."""
        inputs = (
            xBC[:, 0], dt[:, 0], state.conv, state.ssm,
            self.conv_weight, self.conv_bias, A, self.D, self.dt_bias,
        )  # fmt: skip
        y, conv, ssm = ops.state_update(*inputs, in_place=self.may_write_in_place(*inputs))
        return y[:, None], Mamba2State(conv, ssm)

    def describe_step(self, step: Step, x: Tensor, state: Mamba2State) -> Tensor:
        """See Mixer.describe_step."""
        bc = self.config.n_groups * self.config.d_state
        z, xBC, dt = step.linear(self.in_proj, x).split([self.d_inner, self.d_xBC, self.n_heads], dim=-1)
        xBC = step.convolve(xBC, self.conv_weight, self.conv_bias, state.conv, "silu")
        x, B, C = xBC.split([self.d_inner, bc, bc], dim=-1)
        dt, decay = step.decays(dt, self.dt_bias, step.derived(decay_rates, self.A_log))
        y = step.heads_scan(x, dt, decay, B, C, self.D, state.ssm)
        y = step.rms_norm(y, self.norm.weight, self.norm.eps, gate=z, n_groups=self.config.n_groups)
        return step.linear(self.out_proj, y)

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {
            "conv": Zeros((self.config.d_conv - 1, self.d_xBC)),
            "ssm": Zeros((self.n_heads, self.head_dim, self.config.d_state), at_least=torch.float32),
        }

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: 5 E N for decay, drive and output of the state."""
        return self._flops_outside() + 5 * self.d_inner * self.config.d_state

    def sequence_flops(self, seq_len: int) -> float:
        """The matrix products of chunks of Q tokens, 2 Q (G N + E) a token within and 4 E N into and out of the state.

        The state decays once a chunk, for 2 E N. Q is 64 unless given.
        """
        chunk_len = 64 if self.config.chunk_len is None else self.config.chunk_len
        Q, E, N = min(seq_len, chunk_len), self.d_inner, self.config.d_state
        scan = 2 * Q * (self.config.n_groups * N + E) + 4 * E * N + 2 * E * N / Q
        return seq_len * (self._flops_outside() + scan)

    def _flops_outside(self) -> float:
        """Per token: projections, the convolution, and 2 E for the skip."""
        return linear_flops(self) + 2 * self.conv_weight.numel() + 2 * self.d_inner
