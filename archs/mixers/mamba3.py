"""Mamba-3 (ICLR 2026, arXiv:2603.15569), SISO: a trapezoidal rule and states that rotate, without a convolution.

The equation implemented is that of `Mamba3`. Its ingredients are the paper's: the two-term drive, rotations that depend
on the data, RMSNorm on B and C and then a bias of each head, the gate without a norm after it. What follows was settled
without the authors' code at hand, and may differ from it: A is one learned number per head, as in Mamba-2; all pairs of
states rotate; their rates are one projection that the heads share, without bounds; all weights start as in Mamba-2, and
the biases of B and C at one. The many inputs and outputs of the paper's other variant (MIMO) are not here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ..layers import RMSNorm, default_head_dim, linear, linear_flops, step_bias
from ..mixer import Mixer, State

SMALLEST_STEP = 1e-9
"""Step sizes stop here: the scan divides by them."""


@dataclass(frozen=True, kw_only=True)
class Mamba3Config:
    """Options of Mamba-3."""

    d_state: int = 128
    """N, states per channel, in pairs that rotate."""
    expand: float = 2
    """E / D."""
    head_dim: int | None = None
    """P, channels that share a decay; None means the largest power of two up to 64 that leaves at least three heads."""
    chunk_len: int | None = None
    """About how many tokens the scan computes at once; None leaves it to the operation. Changes speed and rounding."""
    dt_min: float = 1e-3
    """Smallest initial step size, itself at least 1e-4."""
    dt_max: float = 1e-1
    """Largest initial step size."""


@dataclass
class Mamba3State(State):
    """Constant in the context length."""

    ssm: Tensor
    """h, (B, H, P, N), float32, in a frame that does not rotate, as are all B and C."""
    x: Tensor
    """The last input of the scan, (B, H, P), which drives the next token too."""
    B: Tensor
    """B of the last token, in that frame, (B, H, N), float32."""
    angle: Tensor
    """How far the states have rotated in all, (B, H, N / 2), radians in [0, 2 pi), float32."""


class Mamba3(Mixer[Mamba3Config, Mamba3State]):
    """out_proj(silu(z) (C[t] h[t] + D x[t])) with states that decay and rotate, driven by this token and the last:

        h[t] = R[t] (a h[t-1] + (1 - l) dt a x[t-1] B[t-1]^T) + l dt x[t] B[t]^T,

    a = exp(dt A), dt = softplus(. + dt_bias) and l = sigmoid(.) per head, and R[t] rotates state i against state
    i + N / 2 by the angle dt theta[i]. B = norm(.) + B_bias, C = norm(.) + C_bias; z, x and all dots are projections.
    """

    Config = Mamba3Config
    no_weight_decay = frozenset({"A_log", "D", "dt_bias", "B_bias", "C_bias"})

    def __init__(self, d_model: int, config: Mamba3Config, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        E, N = int(config.expand * d_model), config.d_state
        if N % 2:
            raise ValueError(f"d_state={N} is odd: states rotate in pairs")
        self.d_inner, self.head_dim = E, config.head_dim or default_head_dim(E)
        self.n_heads, rest = divmod(E, self.head_dim)
        if rest:
            raise ValueError(f"d_inner={E} is not divisible by head_dim={self.head_dim}")
        H = self.n_heads
        self.widths = [E, E, N, N, H, H, N // 2]  # z, x, B, C, dt, l, theta
        self.in_proj = linear(d_model, sum(self.widths))
        self.B_norm, self.C_norm = RMSNorm(N, 1e-5), RMSNorm(N, 1e-5)
        self.B_bias, self.C_bias = nn.Parameter(torch.ones(H, N)), nn.Parameter(torch.ones(H, N))
        self.A_log = nn.Parameter(torch.empty(H).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(H))
        self.dt_bias = step_bias(H, config.dt_min, config.dt_max)
        self.out_proj = linear(E, d_model, scale=residual_scale)

    def forward(
        self, x: Tensor, state: Mamba3State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State | None]:
        """See Mixer.forward."""
        z, x, B, C, dt, mix, theta = self.in_proj(x).split(self.widths, dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide)).clamp(min=SMALLEST_STEP)  # (B, L, H)
        # scores see differences of angles only, so they may run on across documents
        angle = (dt[..., None] * theta.to(wide)[:, :, None]).cumsum(1)  # (B, L, H, N / 2)
        angle = angle if state is None else state.angle[:, None] + angle
        cos, sin = angle.cos(), angle.sin()
        B, C = (
            _rotate_back(norm(t).to(wide)[:, :, None] + bias.to(wide), cos, sin)
            for norm, t, bias in ((self.B_norm, B, self.B_bias), (self.C_norm, C, self.C_bias))
        )  # (B, L, H, N)
        x = x.unflatten(-1, (self.n_heads, -1))
        y, ssm = self._scan(x.to(wide), B, C, dt, mix.to(wide).sigmoid(), state, starts)
        out = self.out_proj(ops.swiglu(z, y.to(z.dtype).flatten(2)))
        if state is None:
            return out, None
        # clones: the state must not keep whole sequences alive
        return out, Mamba3State(ssm, x[:, -1].clone(), B[:, -1].clone(), angle[:, -1].remainder(2 * math.pi))

    def _scan(
        self, x: Tensor, B: Tensor, C: Tensor, dt: Tensor, mix: Tensor, state: Mamba3State | None, starts: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """y, (B, L, H, P), with the skip, and h after the last token.

        In the frame that does not rotate, what a token itself adds to the state, own[t] = l dt x[t] B[t]^T, is left for
        the token after it, which has another share of the same x B^T to add: h - own is one scan with one drive,

            h[t] - own[t] = a (h[t-1] - own[t-1]) + a (own[t-1] + (1 - l) dt x[t-1] B[t-1]^T),

        and own[t] reaches y[t] by the product of C[t] and B[t]. A given state has its own[t-1] in it already.
        """
        h, x_before, B_before = (None, None, None) if state is None else (state.ssm, state.x, state.B)
        x_last, B_last = _shifted(x, x_before), _shifted(B, B_before)
        A, own = -torch.exp(self.A_log.to(dt.dtype)), mix * dt
        if starts is not None:
            x_last = x_last.masked_fill(starts[..., None, None], 0)
        # ops.ssd multiplies by dt
        drive = torch.exp(dt * A) * (_shifted(own, None) / dt + 1 - mix)
        inputs = (drive[..., None] * x_last, dt, A, B_last, C)
        y, before = ops.ssd(*inputs, initial_state=h, starts=starts, chunk_len=self.config.chunk_len)
        y = y + (own * (B * C).sum(-1) + self.D.to(dt.dtype))[..., None] * x
        return y, before + (own[:, -1, :, None] * x[:, -1])[..., None] * B[:, -1, :, None]

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba3State:
        """See Mixer.init_state."""
        H, P, N = self.n_heads, self.head_dim, self.config.d_state
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        return Mamba3State(
            ssm=torch.zeros(batch_size, H, P, N, device=device, dtype=wide),
            x=torch.zeros(batch_size, H, P, device=device, dtype=dtype),
            B=torch.zeros(batch_size, H, N, device=device, dtype=wide),
            angle=torch.zeros(batch_size, H, N // 2, device=device, dtype=wide),
        )

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: 7 E N for the decay, two drives and the output of the state."""
        return self._flops_outside() + 7 * self.d_inner * self.config.d_state

    def sequence_flops(self, seq_len: int) -> float:
        """As Mamba-2's, with B and C of every head: 2 Q (H N + E) a token within and 4 E N into and out of the state.

        The state decays once a chunk, for 2 E N. Q is 64 unless given.
        """
        Q, E, N = min(seq_len, self.config.chunk_len or 64), self.d_inner, self.config.d_state
        scan = 2 * Q * (self.n_heads * N + E) + 4 * E * N + 2 * E * N / Q
        return seq_len * (self._flops_outside() + scan)

    def _flops_outside(self) -> float:
        """Per token: projections; 3 H N each to rotate B and C, and 2 H N for their product; 2 E for the skip."""
        return linear_flops(self) + 8 * self.n_heads * self.config.d_state + 2 * self.d_inner


def _shifted(t: Tensor, before: Tensor | None) -> Tensor:
    """What each token sees of the one before it: t one place later along the length, `before` or zeros at the front."""
    first = torch.zeros_like(t[:, :1]) if before is None else before[:, None].to(t.dtype)
    return torch.cat([first, t[:, :-1]], dim=1)


def _rotate_back(t: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turns the pairs (t[i], t[i + N / 2]) of the last axis by -angle[i]."""
    a, b = t.chunk(2, dim=-1)
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=-1)
