"""Mamba-3 (ICLR 2026, arXiv:2603.15569), SISO: a trapezoidal rule and states that rotate, without a convolution.

Equations, defaults and initial values are those of the authors' code (state-spaces/mamba, e9594ce), and so are the
order of the projections, what is exempt from weight decay and the names of the weights: theirs fit once the axis of
length one is taken out of B_bias and C_bias. Since c69aaab their -A falls off more slowly than the softplus of the
first release, for the sake of stable training; so does this one.

What differs: heads of narrow models are smaller than theirs; a decay stops short of one by what float32 cannot see; and
angles are brought back into one turn where the state is handed over, not every 64 tokens. What is missing: many inputs
and outputs (MIMO), groups of heads with a B and C of their own, and the norm of the output, which is off by default.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...options import Positive, Share, Size, Width
from ..layers import RMSNorm, StepSizes, default_head_dim, inner_width, linear, linear_flops, step_bias
from ..mixer import Mixer, State, Zeros
from ..step import Step

SMALLEST_FADE = 1e-9
"""-A dt stops here, where exp(A dt) has long been one in float32: the scan's input is divided by it."""


@dataclass(frozen=True, kw_only=True)
class Mamba3Config(StepSizes):
    """Options of Mamba-3."""

    d_state: Size = 128
    """N, states per channel."""
    rope_fraction: Share = 0.5
    """Share of the states that rotate, in pairs of neighbours: the first ones."""
    expand: Width = 2
    """E / D."""
    head_dim: Size | None = None
    """P, channels that share a decay; None means the largest power of two up to 64 that leaves at least three heads."""
    chunk_len: Size | None = None
    """About how many tokens the scan computes at once; None leaves it to the operation. Changes speed and rounding."""
    A_min: Positive = 1e-4
    """Smallest -A."""


@dataclass
class Mamba3State(State):
    """State of Mamba-3, constant in the context length."""

    ssm: Tensor
    """h, (B, H, P, N), float32."""
    x: Tensor
    """The last input of the scan, (B, H, P), which drives the next token too."""
    B: Tensor
    """B of the last token, turned, (B, H, N), float32."""
    angle: Tensor
    """Angles by which B and C of the last token were turned, (B, H, n_angles), radians in [0, 2 pi), float32."""


class Mamba3(Mixer[Mamba3Config, Mamba3State]):
    """out_proj(silu(z) (h[t] C[t] + D x[t])) with states that decay and rotate, driven by this token and the last:

        h[t] = a (h[t-1] + (1 - l) dt x[t-1] B[t-1]^T) + l dt x[t] B[t]^T.

    Per head, a = exp(dt A), dt = softplus(. + dt_bias), -A = rate(.) and l = sigmoid(.); B[t] = R[t] (norm(.) + B_bias)
    and C[t] = R[t] (norm(.) + C_bias), where R[t] turns states 2 i and 2 i + 1 by the sum of dt pi tanh(theta[i]) up to
    token t: for C, earlier states have rotated. z, x, theta and all dots are projections; heads share those of B, C and
    theta.
    """

    Config = Mamba3Config
    State = Mamba3State
    no_weight_decay = frozenset({"D", "dt_bias"})

    def __init__(self, d_model: int, config: Mamba3Config, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        E, N = inner_width(config.expand, d_model), config.d_state
        self.d_inner, self.head_dim = E, default_head_dim(E) if config.head_dim is None else config.head_dim
        self.n_heads, rest = divmod(E, self.head_dim)
        if rest:
            raise ValueError(f"d_inner={E} is not divisible by head_dim={self.head_dim}")
        H, self.n_angles = self.n_heads, int(config.rope_fraction * N) // 2
        self.widths = [E, E, N, N, H, H, H, self.n_angles]  # z, x, B, C, dt, A, l, theta
        self.in_proj = linear(d_model, sum(self.widths))
        self.B_norm, self.C_norm = RMSNorm(N, 1e-5), RMSNorm(N, 1e-5)
        self.B_bias, self.C_bias = nn.Parameter(torch.ones(H, N)), nn.Parameter(torch.ones(H, N))
        self.D = nn.Parameter(torch.ones(H))
        self.dt_bias = step_bias(H, config.dt_min, config.dt_max)
        self.out_proj = linear(E, d_model, scale=residual_scale)

    def forward(
        self, x: Tensor, state: Mamba3State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, Mamba3State | None]:
        """See Mixer.forward."""
        z, x, B, C, dt, A, mix, theta = self.in_proj(x).split(self.widths, dim=-1)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))  # (B, L, H)
        fade = (dt * _rate(A.to(wide)).clamp(min=self.config.A_min)).clamp(min=SMALLEST_FADE)
        # scores see differences of angles only, so they may run on across documents
        turn = dt[..., None] * (math.pi * theta.to(wide).tanh())[:, :, None]  # (B, L, H, n_angles)
        if starts is None:
            angle = turn.cumsum(1) if state is None else state.angle[:, None] + turn.cumsum(1)
        else:  # but not those that are no numbers
            before = turn.new_zeros(len(turn), *turn.shape[2:]) if state is None else state.angle
            before, (turn,), _, _, lost = ops.isolated(starts, before, [turn], turn)
            angle = (before[:, None] + turn.cumsum(1)).masked_fill(lost[..., None, None], torch.nan)
        x = x.unflatten(-1, (self.n_heads, -1)).to(wide)
        own, rest = (share.to(wide).sigmoid() * dt for share in (mix, -mix))
        B, C = self.B_norm(B).to(wide), self.C_norm(C).to(wide)
        y, ssm, B_last = self._scan(x, B, C, angle, fade, own, rest, state, starts)
        out = self.out_proj(ops.swiglu(z, y.to(z.dtype).flatten(2)))
        if state is None:
            return out, None
        if not x.shape[1]:
            return out, state
        # clones: the state must not keep whole sequences alive
        x_last = x[:, -1].to(z.dtype, copy=True)
        return out, Mamba3State(ssm, x_last, B_last.clone(), angle[:, -1].remainder(2 * math.pi))

    def describe_step(self, step: Step, x: Tensor, state: Mamba3State) -> Tensor:
        """See Mixer.describe_step."""
        z, x, B, C, dt, A, mix, theta = step.linear(self.in_proj, x).split(self.widths, dim=-1)
        y = step.trapezoid_scan(
            x,
            (dt, A, mix, theta),
            self.dt_bias,
            (step.norm(self.B_norm, B), self.B_bias),
            (step.norm(self.C_norm, C), self.C_bias),
            self.D,
            (state.ssm, state.x, state.B, state.angle),
            A_min=self.config.A_min,
            least=SMALLEST_FADE,
        )
        return step.linear(self.out_proj, step.swiglu(z, y))

    def _scan(
        self,
        x: Tensor,
        B: Tensor,
        C: Tensor,
        angle: Tensor,
        fade: Tensor,
        own: Tensor,
        rest: Tensor,
        state: Mamba3State | None,
        starts: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """y, (B, L, H, P), with the skip, and h and the turned B after the last token.

        fade = -A dt, own = l dt, rest = (1 - l) dt; B and C, (B, L, N), are without biases and not turned.

        What a token itself adds to the state, own[t] x[t] B[t]^T, is left for the token after it, which has another
        share of the same x B^T to add: h' = h - own x B^T is one scan with one drive,

            h'[t] = a (h'[t-1] + (own[t-1] + rest[t]) x[t-1] B[t-1]^T),

        and what was left reaches y[t] by the product of C[t] and B[t]. A given state has its own[t-1] in it already.
        """
        h, x_before, B_before = (None, None, None) if state is None else (state.ssm, state.x, state.B)
        # ops.ssd has one A of each head: with fade for its dt, A is -1, and the fade that multiplies x is divided out
        drive = torch.exp(-fade) * (_shifted(own, None) + rest) / fade
        x_last = _shifted(x, x_before)
        turns = angle if self.n_angles else None
        driven_B, C, products, B_last = ops.turned_heads(B, C, self.B_bias, self.C_bias, drive, turns, B_before)
        if starts is not None:  # the drive, too, knows the token before
            x_last, driven_B = (t.masked_fill(starts[..., None, None], 0) for t in (x_last, driven_B))
        A = fade.new_full((self.n_heads,), -1)
        chunk_len = self.config.chunk_len
        y, before = ops.ssd(x_last, fade, A, driven_B, C, initial_state=h, starts=starts, chunk_len=chunk_len)
        y = torch.addcmul(y, (own * products + self.D.to(own.dtype))[..., None], x)
        left = (own[:, -1:, :, None] * x[:, -1:])[..., None] * B_last[:, None, :, None]  # of no token: nothing
        return y, before + left.sum(1), B_last

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        H, P, N = self.n_heads, self.head_dim, self.config.d_state
        return {
            "ssm": Zeros((H, P, N), at_least=torch.float32),
            "x": Zeros((H, P)),
            "B": Zeros((H, N), at_least=torch.float32),
            "angle": Zeros((H, self.n_angles), at_least=torch.float32),
        }

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: 7 E N for the decay, two drives and the output of the state."""
        return self._flops_outside() + 7 * self.d_inner * self.config.d_state

    def sequence_flops(self, seq_len: int) -> float:
        """The chunks of Mamba-2, with B and C of every head: a token takes 2 Q (H N + E) within its chunk.

        Into and out of the state go 4 E N, and it decays once a chunk, for 2 E N. Q is 64 unless given.
        """
        chunk_len = 64 if self.config.chunk_len is None else self.config.chunk_len
        Q, E, N = min(seq_len, chunk_len), self.d_inner, self.config.d_state
        scan = 2 * Q * (self.n_heads * N + E) + 4 * E * N + 2 * E * N / Q
        return seq_len * (self._flops_outside() + scan)

    def _flops_outside(self) -> float:
        """Per token: projections, 2 E for the skip, and for every head the biases of B and C and their product, 4 N.

        An angle takes 16 a head: 4 to find it, its sine and its cosine, and 12 to turn B and C.
        """
        H, N = self.n_heads, self.config.d_state
        return linear_flops(self) + 2 * self.d_inner + 4 * H * N + 16 * H * self.n_angles


def _rate(a: Tensor) -> Tensor:
    """1 + a from zero upwards and 1 / (1 - a) below it: positive, smooth, and slow to vanish."""
    return F.relu(a) + 1 / (1 - a.clamp(max=0))


def _shifted(t: Tensor, before: Tensor | None) -> Tensor:
    """Moves t one place along the length, so that each token sees the one before it; `before` or zeros go first."""
    first = torch.zeros_like(t[:, :1]) if before is None else before[:, None].to(t.dtype)
    return torch.cat([first, t[:, :-1]], dim=1)[:, : t.shape[1]]
