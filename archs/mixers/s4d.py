"""S4D, the diagonal state space model (Gu et al. 2022, arXiv:2206.11893), with S4's gated output.

Training is one FFT convolution; with a state or document starts it runs as the equivalent recurrence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...options import Range
from ..layers import StepSizes, linear, linear_flops
from ..mixer import Mixer, State, Zeros
from ..step import Step

StateSize = Annotated[int, Range(2, 2**10)]
"""Real states per channel, in pairs; HiPPO's matrix of more would take minutes to diagonalise."""
Init = Literal["lin", "inv", "legs", "real"]


@dataclass(frozen=True, kw_only=True)
class S4DConfig(StepSizes):
    """Options of S4D; the defaults are the authors'."""

    d_state: StateSize = 64
    """Real states per channel: N = d_state / 2 conjugate pairs."""
    init: Init = "lin"
    """Initial poles: "lin", "inv", "legs" or "real" (S4D-Lin, S4D-Inv, S4D-LegS, S4D-Real). Training may move them to
    anywhere in the left half plane: S4D-Real starts on the real axis and is not held there."""


@dataclass
class S4DState(State):
    """State of S4D and S4, constant in the context length."""

    ssm: Tensor
    """h, (B, D, N), complex64."""


def initial_poles(init: str, d_state: int) -> Tensor:
    """Initial poles of S4D, one of each conjugate pair, (d_state / 2,) complex (section 4 of the paper).

    S4D-LegS takes the diagonal of S4's normal form, S4D-Inv and S4D-Lin are simple laws like it, and S4D-Real takes the
    slowest eigenvalues of HiPPO-LegS itself, which are real.

    Raises:
        ValueError: if the name is not one of them, or d_state is odd.
    """
    if d_state % 2:
        raise ValueError(f"d_state={d_state} is odd: poles come in conjugate pairs")
    # complex numbers are at least complex64, whatever the default precision is
    wide = torch.promote_types(torch.get_default_dtype(), torch.float32)
    n, N = torch.arange(d_state // 2, dtype=wide), d_state
    if init == "lin":
        return torch.complex(torch.full_like(n, -0.5), n * math.pi)
    if init == "inv":
        return torch.complex(torch.full_like(n, -0.5), N / math.pi * (N / (2 * n + 1) - 1))
    if init == "legs":
        return legs_normal_form(d_state)[0]
    if init == "real":
        return torch.complex(-(n + 1.0), torch.zeros_like(n))
    raise ValueError(f"init={init!r}, expected 'lin', 'inv', 'legs' or 'real'")


def hippo_legs(d_state: int) -> tuple[Tensor, Tensor]:
    """The HiPPO-LegS matrices A, (d_state, d_state), and B, (d_state,), in float64 (S4, arXiv:2111.00396, eq. 2)."""
    n = torch.arange(d_state, dtype=torch.float64)
    B = (2 * n + 1).sqrt()
    return -torch.outer(B, B).tril(-1) - torch.diag(n + 1), B


def legs_normal_form(d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    """HiPPO-LegS in the basis where it is diagonal plus rank one, V^* A V = diag(poles) - P P^* (S4, theorem 1).

    A + p p^T with p = B / sqrt(2) is normal, -1/2 plus a skew-symmetric matrix; V holds its eigenvectors.

    Returns:
        The poles, P = V^* p and V^* B for one of each conjugate pair, (d_state / 2,) each, the slowest pole first. The
        phases of eigenvectors are free, and chosen so that P and V^* B are real.
    """
    A, B = hippo_legs(d_state)
    skew = A + (torch.outer(B, B) + torch.eye(d_state, dtype=A.dtype)) / 2
    frequency, V = torch.linalg.eigh(-1j * skew)  # ascending, in pairs of opposite sign
    frequency, V = frequency[d_state // 2 :], V[:, d_state // 2 :]
    B = (V.mH @ B.to(V.dtype)).abs()
    poles = torch.complex(torch.full_like(frequency, -0.5), frequency)
    precision = torch.promote_types(torch.get_default_dtype(), torch.float32)
    return poles.to(precision.to_complex()), (B / 2**0.5).to(precision), B.to(precision)


def discretize(log_dt: Tensor, A_log: Tensor, A_imag: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """dt A and C B, (E, N) complex each, by zero-order hold with B = 1 (table 1 of the paper), at least in float32.

    Args:
        log_dt: logarithm of the step sizes, (E,).
        A_log: logarithm of -Re A, (E, N).
        A_imag: Im A, (E, N).
        C: real and imaginary parts, (E, N, 2).
    """
    dtype = torch.promote_types(A_log.dtype, torch.float32)
    A = torch.complex(-torch.exp(A_log.to(dtype)), A_imag.to(dtype))
    dtA = A * torch.exp(log_dt.to(dtype))[:, None]
    return dtA, torch.view_as_complex(C.to(dtype)) * (torch.exp(dtA) - 1) / A


def parameter(t: Tensor) -> nn.Parameter:
    """A parameter of the default precision."""
    return nn.Parameter(t.to(torch.get_default_dtype()))


class S4D(Mixer[S4DConfig, S4DState]):
    """y = GLU(out_proj(gelu(K * u + D u))), where K is the kernel of a diagonal SSM per channel."""

    Config = S4DConfig
    State = S4DState
    no_weight_decay = frozenset({"log_dt", "A_log", "A_imag"})
    # the authors train these at 0.001 beside 0.004 for the rest
    lr_scale = MappingProxyType({"log_dt": 0.25, "A_log": 0.25, "A_imag": 0.25})

    def __init__(self, d_model: int, config: S4DConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        A = initial_poles(config.init, config.d_state)
        N = len(A)
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        # log(-Re A): the real part stays negative
        self.A_log, self.A_imag = (parameter(t.repeat(d_model, 1)) for t in (torch.log(-A.real), A.imag))
        self.C = nn.Parameter(torch.randn(d_model, N, 2) * 0.5**0.5)  # complex normal, variance one
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = linear(d_model, 2 * d_model, scale=residual_scale)

    def kernel(self, length: int) -> Tensor:
        """The convolution's kernel, (D, length)."""
        return ops.ssm_kernel(*discretize(self.log_dt, self.A_log, self.A_imag, self.C), length)

    def scan(self, x: Tensor, h: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """The recurrence: x and y (B, L, D), h (B, D, N) before and after."""
        A, C = discretize(self.log_dt, self.A_log, self.A_imag, self.C)
        return ops.ssm_scan(x, A, C, self.D, h, starts)

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, S4DState | None]:
        """See Mixer.forward."""
        if state is None and starts is None:
            y = ops.long_conv(x, self.kernel(x.shape[1]), self.D)
        else:
            y, ssm = self.scan(x, None if state is None else state.ssm, starts)
            state = None if state is None else S4DState(ssm)
        return F.glu(self.out_proj(F.gelu(y))), state

    def describe_step(self, step: Step, x: Tensor, state: S4DState) -> Tensor:
        """See Mixer.describe_step."""
        weights = self.log_dt, self.A_log, self.A_imag, self.C
        y = step.diagonal_scan(x, discretize, weights, self.D, state.ssm)
        return step.glu(step.linear(self.out_proj, step.gelu(y)))

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {"ssm": Zeros(tuple(self.A_log.shape), at_least=torch.complex64)}

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: a complex multiply-add (8) and the real part of an output product (4) per state."""
        return linear_flops(self) + 12 * self.A_log.numel()

    def sequence_flops(self, seq_len: int) -> float:
        """The convolution: three FFTs of 2 L points (5 n log2 n each) and the kernel per channel."""
        fft = 3 * 5 * 2 * seq_len * math.log2(2 * seq_len)
        return seq_len * linear_flops(self) + self.d_model * (fft + self.kernel_flops(seq_len))

    def kernel_flops(self, length: int) -> float:
        """The kernel of one channel, 2 N L."""
        return 2 * self.config.d_state * length
