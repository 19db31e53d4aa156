"""H3 (Fu et al. 2022, arXiv:2212.14052): linear attention whose sums over the past are two state space models.

The shift SSM remembers the last tokens exactly, which lets a token be compared with those just before it; the diagonal
SSM, S4D's, carries what passed the comparison. Written with the kernels that the SSMs stand for.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
from einops import rearrange
from torch import Tensor, nn

from ...kernels import ops
from ...options import Size
from ..layers import StepSizes, linear, linear_flops
from ..mixer import Mixer, State, Zeros
from ..step import Step
from .s4d import Init, StateSize, discretize, initial_poles, parameter


@dataclass(frozen=True, kw_only=True)
class H3Config(StepSizes):
    """Options of H3; the defaults are the authors'."""

    d_state: StateSize = 64
    """Real states per channel of the diagonal SSM: N = d_state / 2 conjugate pairs."""
    d_conv: Size = 64
    """K, states of the shift SSM: the tokens that it remembers, the current one included."""
    head_dim: Size = 1
    """P. A head multiplies all pairs of its keys and values, so that its state holds P x P channels."""
    init: Init = "lin"
    """Initial poles of the diagonal SSM, as in S4D."""


@dataclass
class H3State(State):
    """State of H3, constant in the context length."""

    conv: Tensor
    """The state of the shift SSM, its last K - 1 inputs, (B, K-1, D)."""
    ssm: Tensor
    """The state of the diagonal SSM, (B, P, P, H, N), complex64; keys before values."""


class H3(Mixer[H3Config, H3State]):
    """y = out_proj(q SSM_diag(SSM_shift(k) v^T)) per head, with one diagonal SSM for all entries of a head (eq. 1)."""

    Config = H3Config
    State = H3State
    no_weight_decay = frozenset({"log_dt", "A_log", "A_imag"})
    lr_scale = MappingProxyType({"log_dt": 0.25, "A_log": 0.25, "A_imag": 0.25})  # as in S4D

    def __init__(self, d_model: int, config: H3Config, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        if d_model % config.head_dim:
            raise ValueError(f"d_model={d_model} is not divisible by head_dim={config.head_dim}")
        H, K = d_model // config.head_dim, config.d_conv
        self.in_proj = linear(d_model, 3 * d_model)  # q, k, v
        self.shift_weight = nn.Parameter(torch.empty(d_model, K).uniform_(-(K**-0.5), K**-0.5))
        with torch.no_grad():
            self.shift_weight[:, -1] += torch.randn(d_model)  # the skip connection of the shift SSM
        A = initial_poles(config.init, config.d_state)
        self.log_dt = nn.Parameter(torch.empty(H).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        self.A_log, self.A_imag = (parameter(t.repeat(H, 1)) for t in (torch.log(-A.real), A.imag))
        self.C = nn.Parameter(torch.randn(H, len(A), 2) * 0.5**0.5)
        self.D = nn.Parameter(torch.randn(H))
        self.out_proj = linear(d_model, d_model, scale=residual_scale)

    def forward(
        self, x: Tensor, state: H3State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, H3State | None]:
        """See Mixer.forward."""
        P = self.config.head_dim
        q, k, v = self.in_proj(x).chunk(3, dim=-1)  # (B, L, D) each
        conv, ssm = (None, None) if state is None else (state.conv, state.ssm)
        k, conv = ops.causal_conv1d(k, self.shift_weight, initial_state=conv, starts=starts)
        k, v = rearrange(k, "b l (h i) -> b i 1 l h", i=P), rearrange(v, "b l (h j) -> b 1 j l h", j=P)
        kv, ssm = self._remember(k * v, ssm, starts)
        y = (rearrange(q, "b l (h i) -> b i 1 l h", i=P) * kv).sum(1)
        y = self.out_proj(rearrange(y, "b j l h -> b l (h j)"))
        return y, None if state is None or ssm is None else H3State(conv, ssm)

    def describe_step(self, step: Step, x: Tensor, state: H3State) -> Tensor:
        """See Mixer.describe_step."""
        P, weights = self.config.head_dim, (self.log_dt, self.A_log, self.A_imag, self.C)
        q, k, v = step.linear(self.in_proj, x).chunk(3, dim=-1)
        k = step.convolve(k, self.shift_weight, None, state.conv)
        kv = step.diagonal_scan(step.outer(k, v, P), discretize, weights, self.D, state.ssm)
        return step.linear(self.out_proj, step.inner(q, kv, P))

    def _remember(self, kv: Tensor, h: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The diagonal SSM on (B, P, P, L, H), and its state (B, P, P, H, N) where it is given one or starts.

        The entries of a head share one SSM: they are rows of the batch, not channels.
        """
        A, C = discretize(self.log_dt, self.A_log, self.A_imag, self.C)
        u = kv.flatten(0, 2)
        if h is None and starts is None:
            y = ops.long_conv(u, ops.ssm_kernel(A, C, u.shape[1]), self.D)
        else:
            rows = kv.shape[:3]
            starts = None if starts is None else starts.repeat_interleave(rows[1] * rows[2], dim=0)
            y, h = ops.ssm_scan(u, A, C, self.D, None if h is None else h.flatten(0, 2), starts)
            h = h.unflatten(0, rows)
        return y.view_as(kv), h

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        P = self.config.head_dim
        return {
            "conv": Zeros((self.config.d_conv - 1, self.d_model)),
            "ssm": Zeros((P, P, *self.A_log.shape), at_least=torch.complex64),
        }

    def flops_per_token(self, context_len: float) -> float:
        """Projections, gates, 2 K D for the shift, and 12 N in each channel of the diagonal SSM."""
        channels = self.d_model * self.config.head_dim  # H P P
        return self._gated_flops() + 12 * channels * self.A_log.shape[1]

    def sequence_flops(self, seq_len: int) -> float:
        """Projections, gates and shift, and a convolution: two FFTs per channel, and a kernel and its FFT per head."""
        H, channels = len(self.A_log), self.d_model * self.config.head_dim
        fft = 5 * 2 * seq_len * math.log2(2 * seq_len)
        kernel = 2 * self.config.d_state * seq_len
        return seq_len * self._gated_flops() + (2 * channels + H) * fft + H * kernel

    def _gated_flops(self) -> float:
        """FLOPs that both forms share, per token: projections, shift, products with v and q."""
        return linear_flops(self) + 2 * self.shift_weight.numel() + 3 * self.d_model * self.config.head_dim
