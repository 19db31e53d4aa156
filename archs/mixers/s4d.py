"""S4D, the diagonal state space model (Gu et al. 2022, arXiv:2206.11893), S4D-Lin, with S4's gated output.

Training is one FFT convolution; with a state or document starts it runs as the equivalent recurrence.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ..layers import linear, linear_flops
from ..mixer import Mixer, State


@dataclass(frozen=True, kw_only=True)
class S4DConfig:
    """Options of S4D; the defaults are the authors'."""

    d_state: int = 64
    """Real states per channel: N = d_state / 2 conjugate pairs."""
    dt_min: float = 1e-3
    """Smallest initial step size."""
    dt_max: float = 1e-1
    """Largest initial step size."""


@dataclass
class S4DState(State):
    """Constant in the context length."""

    ssm: Tensor
    """h, (B, D, N), complex64."""


class S4D(Mixer[S4DConfig, S4DState]):
    """y = GLU(out_proj(gelu(K * u + D u))), where K is the kernel of a diagonal SSM per channel."""

    Config = S4DConfig
    no_weight_decay = frozenset({"log_dt", "A_log", "A_imag"})
    # the authors train these at 0.001 beside 0.004 for the rest
    lr_scale = MappingProxyType({"log_dt": 0.25, "A_log": 0.25, "A_imag": 0.25})

    def __init__(self, d_model: int, config: S4DConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        if config.d_state % 2:
            raise ValueError(f"d_state={config.d_state} is odd: poles come in conjugate pairs")
        N = config.d_state // 2
        self.log_dt = nn.Parameter(torch.empty(d_model).uniform_(math.log(config.dt_min), math.log(config.dt_max)))
        # S4D-Lin: A[n] = -1/2 + i pi n (section 4.1)
        self.A_log = nn.Parameter(torch.full((d_model, N), math.log(0.5)))  # log(-Re A): the real part stays negative
        self.A_imag = nn.Parameter(torch.arange(N).mul(math.pi).repeat(d_model, 1))
        self.C = nn.Parameter(torch.randn(d_model, N, 2) * 0.5**0.5)  # complex normal, variance one
        self.D = nn.Parameter(torch.randn(d_model))
        self.out_proj = linear(d_model, 2 * d_model, scale=residual_scale)

    def _discretize(self) -> tuple[Tensor, Tensor]:
        """dt A and C B, (D, N) complex each, by zero-order hold with B = 1 (table 1 of the paper)."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        A = torch.complex(-torch.exp(self.A_log.to(dtype)), self.A_imag.to(dtype))
        dtA = A * torch.exp(self.log_dt.to(dtype))[:, None]
        return dtA, torch.view_as_complex(self.C.to(dtype)) * (torch.exp(dtA) - 1) / A

    def forward(
        self, x: Tensor, state: S4DState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, S4DState | None]:
        """See Mixer.forward."""
        A, C = self._discretize()
        if state is None and starts is None:
            y = ops.long_conv(x, ops.ssm_kernel(A, C, x.shape[1]), self.D)
        else:
            y, ssm = ops.ssm_scan(x, A, C, self.D, None if state is None else state.ssm, starts)
            state = None if state is None else S4DState(ssm)
        return F.glu(self.out_proj(F.gelu(y))), state

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4DState:
        """See Mixer.init_state."""
        wide = torch.complex128 if (dtype or torch.get_default_dtype()) == torch.float64 else torch.complex64
        return S4DState(torch.zeros(batch_size, *self.A_log.shape, device=device, dtype=wide))

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence: a complex multiply-add (8) and the real part of an output product (4) per state."""
        return linear_flops(self) + 12 * self.A_log.numel()

    def sequence_flops(self, seq_len: int) -> float:
        """The convolution: three FFTs of 2 L points (5 n log2 n each) and the kernel (2 N L) per channel."""
        fft = 3 * 5 * 2 * seq_len * math.log2(2 * seq_len)
        return seq_len * linear_flops(self) + self.d_model * (fft + 2 * self.config.d_state * seq_len)
