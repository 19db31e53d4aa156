"""Gated DeltaNet (Yang, Kautz & Hatamizadeh 2024, arXiv:2412.06464): a memory of keys and values that can be revised.

Equations, widths and initial values are those of the authors' code (NVlabs/GatedDeltaNet, 5ddd1e4) and of its
successor by the first author (flash-linear-attention, bc3b101): keys are 3/4 and values 3/2 as wide as the model, so
that a layer has about 6 D^2 parameters; queries are scaled by 1 / sqrt(N), which the norm of the output takes out again
but for its eps; convolutions have no bias; projections and convolutions start with PyTorch's weights, where
flash-linear-attention has normal ones.

What differs: a head's keys have at most 128 channels by default, theirs 128 to 256; b has no bias, as in
flash-linear-attention; and the output projection starts smaller in deep models, as in all of this project. What is
missing: more heads of values than of keys.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...options import Size, Width
from ..layers import RMSNorm, StepSizes, decay_rates, linear, linear_flops, step_bias
from ..mixer import Mixer, State, Zeros
from ..step import Step

CHUNK = 64
"""Tokens that a sequence is computed in chunks of, for the count of FLOPs."""


@dataclass(frozen=True, kw_only=True)
class GatedDeltaNetConfig(StepSizes):
    """Options of Gated DeltaNet."""

    n_heads: Size | None = None
    """H; None means as many as make all keys together about 3/4 of d_model wide."""
    d_state: Size | None = None
    """N, channels of a key; None means the largest power of two up to 128 that leaves at least three heads."""
    expand: Width = 2
    """P / N, channels of a value to those of a key."""
    d_conv: Size = 4
    """K, taps of the short convolutions."""
    negative_eigenvalues: bool = False
    """Whether the writing strength reaches 2 instead of 1, so that a state can change its sign (arXiv:2411.12537)."""


@dataclass
class GatedDeltaNetState(State):
    """State of Gated DeltaNet, constant in the context length."""

    conv: Tensor
    """The last K - 1 inputs of the convolutions, (B, K-1, 2 H N + H P)."""
    memory: Tensor
    """S, (B, H, P, N), float32."""


class GatedDeltaNet(Mixer[GatedDeltaNetConfig, GatedDeltaNetState]):
    """out_proj(norm(o) silu(z)) per head, where S = a S (I - b k k^T) + b v k^T and o = S q. Section 3.

    q, k, v = silu(conv(x)), then |q| = |k| = 1; a = exp(-exp(A_log) softplus(dt + dt_bias)), b = sigmoid(.); the inputs
    of all, and z, are projections of the layer's input.
    """

    Config = GatedDeltaNetConfig
    State = GatedDeltaNetState
    no_weight_decay = frozenset({"A_log", "dt_bias"})

    def __init__(self, d_model: int, config: GatedDeltaNetConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        H, N = _heads(d_model, config)
        P, K = int(config.expand * N), config.d_conv
        if not P:
            raise ValueError(f"expand={config.expand} of d_state={N} leaves no channel of a value: use a larger one")
        self.n_heads, self.d_state, self.head_dim = H, N, P
        self.d_qkv = H * (2 * N + P)
        self.in_proj = linear(d_model, self.d_qkv + H * P + 2 * H)  # q, k and v; z; dt and b
        self.conv_weight = nn.Parameter(torch.empty(self.d_qkv, K).uniform_(-(K**-0.5), K**-0.5))
        self.A_log = nn.Parameter((16 * (1 - torch.rand(H))).log())  # uniform in (0, 16]: zero would have no logarithm
        self.dt_bias = step_bias(H, config.dt_min, config.dt_max)
        self.norm = RMSNorm(P, 1e-5)
        self.out_proj = linear(H * P, d_model, scale=residual_scale)

    def forward(
        self, x: Tensor, state: GatedDeltaNetState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, GatedDeltaNetState | None]:
        """See Mixer.forward."""
        H, N, P = self.n_heads, self.d_state, self.head_dim
        qkv, z, dt, b = self.in_proj(x).split([self.d_qkv, H * P, H, H], dim=-1)
        conv, memory = (None, None) if state is None else (state.conv, state.memory)
        qkv, conv = ops.causal_conv1d(qkv, self.conv_weight, None, "silu", initial_state=conv, starts=starts)
        q, k, v = (t.unflatten(-1, (H, -1)) for t in qkv.split([H * N, H * N, H * P], dim=-1))
        q, k = _scaled_to(N**-0.5, q), _scaled_to(1, k)
        log_decay, beta = self._log_decay(dt), self._writing_strength(b)
        o, memory = ops.gated_delta_rule(q, k, v, log_decay, beta, initial_state=memory, starts=starts)
        o = ops.swiglu(z.unflatten(-1, (H, P)), self.norm(o)).flatten(2)
        return self.out_proj(o), None if state is None else GatedDeltaNetState(conv, memory)

    def _log_decay(self, dt: Tensor) -> Tensor:
        """log a, (B, L, H), in float32: in bfloat16 the bias would lose the smallest step sizes."""
        dtype = torch.promote_types(dt.dtype, torch.float32)
        return decay_rates(self.A_log).to(dtype) * F.softplus(dt.to(dtype) + self.dt_bias.to(dtype))

    def _writing_strength(self, b: Tensor) -> Tensor:
        """b, (B, L, H), in float32, as log a."""
        dtype = torch.promote_types(b.dtype, torch.float32)
        return torch.sigmoid(b.to(dtype)) * (2 if self.config.negative_eigenvalues else 1)

    def describe_step(self, step: Step, x: Tensor, state: GatedDeltaNetState) -> Tensor:
        """See Mixer.describe_step."""
        H, N, P = self.n_heads, self.d_state, self.head_dim
        qkv, z, dt, b = step.linear(self.in_proj, x).split([self.d_qkv, H * P, H, H], dim=-1)
        qkv = step.convolve(qkv, self.conv_weight, None, state.conv, "silu")
        q, k, v = qkv.split([H * N, H * N, H * P], dim=-1)
        q, k = (step.rms_norm(t, scale, 1e-6 / N, n_groups=H) for t, scale in ((q, 1 / N), (k, N**-0.5)))
        _, decay = step.decays(dt, self.dt_bias, step.derived(decay_rates, self.A_log))
        beta = step.sigmoid(b, times=2 if self.config.negative_eigenvalues else 1)
        o = step.norm(self.norm, step.delta_rule(q, k, v, decay, beta, state.memory))
        return step.linear(self.out_proj, step.swiglu(z, o))

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {
            "conv": Zeros((self.config.d_conv - 1, self.d_qkv)),
            "memory": Zeros((self.n_heads, self.head_dim, self.d_state), at_least=torch.float32),
        }

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: 7 P N a head, one for the decay and two each to look up k, to write and to look up q."""
        return self._flops_outside() + 7 * self.n_heads * self.head_dim * self.d_state

    def sequence_flops(self, seq_len: int) -> float:
        """Chunks of Q = 64 tokens, per head and token: 2 Q (2 N + P) for products within, Q (N + P) for the solve.

        Into and out of the state go 6 P N, and it decays once a chunk, for P N.
        """
        Q, N, P = min(seq_len, CHUNK), self.d_state, self.head_dim
        scan = 2 * Q * (2 * N + P) + Q * (N + P) + 6 * P * N + P * N / Q
        return seq_len * (self._flops_outside() + self.n_heads * scan)

    def _flops_outside(self) -> float:
        """Per token: projections and the convolutions."""
        return linear_flops(self) + 2 * self.conv_weight.numel()


def _scaled_to(length: float, x: Tensor) -> Tensor:
    """length x / |x| over the last axis."""
    N = x.shape[-1]
    # the root mean square is |x| / sqrt(N)
    weight = x.new_full((N,), length * N**-0.5, dtype=torch.promote_types(x.dtype, torch.float32))
    return ops.rms_norm(x, weight, 1e-6 / N)


def _heads(d_model: int, config: GatedDeltaNetConfig) -> tuple[int, int]:
    """(H, N)."""
    width = 3 * d_model / 4
    H, N = config.n_heads, config.d_state
    if N is None:
        least = 3 if H is None else H
        N = next((n for n in (128, 64, 32, 16, 8, 4, 2) if least * n <= width), 1)
    return max(1, round(width / N)) if H is None else H, N
