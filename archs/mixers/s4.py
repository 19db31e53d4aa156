"""S4 (Gu et al. 2021, arXiv:2111.00396): HiPPO-LegS in its normal-plus-low-rank form, with the block of S4D.

The authors' code trains C (1 - Ab^L), the output matrix of a kernel truncated at one longest L, and cuts shorter
kernels from that one. Here C itself is the parameter: the kernel is exact at every length, and equals the recurrence.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels import ops
from ..layers import StepSizes, linear_flops
from ..step import Step
from .s4d import S4D, S4DConfig, S4DState, StateSize, legs_normal_form, parameter


@dataclass(frozen=True, kw_only=True)
class S4Config(StepSizes):
    """Options of S4; the defaults are the authors'."""

    d_state: StateSize = 64
    """Real states per channel: N = d_state / 2 conjugate pairs."""


class S4(S4D):
    """S4D whose state matrix is A - P P^* with an input matrix B, discretized by the bilinear rule."""

    Config = S4Config
    no_weight_decay = S4D.no_weight_decay | {"P", "B"}
    lr_scale = MappingProxyType({**S4D.lr_scale, "P": 0.25, "B": 0.25})

    def __init__(self, d_model: int, config: S4Config, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, S4DConfig(**asdict(config), init="legs"), residual_scale=residual_scale)
        _, P, B = legs_normal_form(config.d_state)
        self.P, self.B = (parameter(F.pad(t[:, None], (0, 1)).repeat(d_model, 1, 1)) for t in (P, B))  # (D, N, 2)

    def kernel(self, length: int) -> Tensor:
        """See S4D.kernel."""
        return ops.dplr_kernel(*self._scaled(), length)

    def scan(self, x: Tensor, h: Tensor | None, starts: Tensor | None) -> tuple[Tensor, Tensor]:
        """See S4D.scan."""
        return ops.dplr_scan(x, *self._scaled(), self.D, h, starts)

    def describe_step(self, step: Step, x: Tensor, state: S4DState) -> Tensor:
        """See Mixer.describe_step."""
        weights = self.log_dt, self.A_log, self.A_imag, self.P, self.B, self.C
        y = step.dplr_scan(x, lambda *_: self._scaled(), weights, self.D, state.ssm)
        return step.glu(step.linear(self.out_proj, step.gelu(y)))

    def _scaled(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt A, sqrt(dt) P, dt B and C, (D, N) complex each: the same system with steps of one."""
        dtype = torch.promote_types(self.A_log.dtype, torch.float32)
        log_dt = self.log_dt.to(dtype)[:, None]
        A = torch.complex(-torch.exp(self.A_log.to(dtype)), self.A_imag.to(dtype))
        P, B, C = (torch.view_as_complex(t.to(dtype)) for t in (self.P, self.B, self.C))
        dt = torch.exp(log_dt)
        return dt * A, torch.exp(log_dt / 2) * P, dt * B, C

    def flops_per_token(self, context_len: float) -> float:
        """The recurrence, per state: a complex product (6), the input (4), the rank-one term (8) and the output (4)."""
        return linear_flops(self) + 22 * self.A_log.numel()

    def kernel_flops(self, length: int) -> float:
        """The kernel of one channel: as in S4D, of 2 sqrt(L) vectors, each a product with a power of the state matrix.

        Those powers are not counted: a whole batch shares them.
        """
        return super().kernel_flops(length) + 4 * self.config.d_state**2 * math.sqrt(length)
