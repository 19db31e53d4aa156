"""LSTM (Hochreiter & Schmidhuber 1997) with forget gates (Gers et al. 2000): the baseline before all others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...kernels import ops
from ...options import Width
from ..layers import inner_width, linear, linear_flops
from ..mixer import Mixer, State, Zeros
from ..step import Step


@dataclass(frozen=True, kw_only=True)
class LSTMConfig:
    """Options of LSTM."""

    expand: Width = 1
    """E / D, where E is the number of cells."""


@dataclass
class LSTMState(State):
    """State of LSTM, constant in the context length."""

    lstm: Tensor
    """Output and cell of the last token, (B, 2, E), float32."""


class LSTM(Mixer[LSTMConfig, LSTMState]):
    """One LSTM layer and a projection back to the residual stream."""

    Config = LSTMConfig
    State = LSTMState

    def __init__(self, d_model: int, config: LSTMConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        E = self.d_inner = inner_width(config.expand, d_model)
        self.in_proj = linear(d_model, 4 * E, bias=True)
        self.weight = nn.Parameter(torch.empty(4 * E, E).uniform_(-(E**-0.5), E**-0.5))
        self.out_proj = linear(E, d_model, scale=residual_scale)
        with torch.no_grad():
            self.in_proj.bias[E : 2 * E] = 1.0  # forget gates start open (Jozefowicz et al. 2015, section 4.2)

    def forward(
        self, x: Tensor, state: LSTMState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, LSTMState | None]:
        """See Mixer.forward."""
        y, lstm = ops.lstm_scan(self.in_proj(x), self.weight, None if state is None else state.lstm, starts)
        return self.out_proj(y), None if state is None else LSTMState(lstm)

    def describe_step(self, step: Step, x: Tensor, state: LSTMState) -> Tensor:
        """See Mixer.describe_step."""
        y = step.lstm_cell(step.linear(self.in_proj, x), self.weight, state.lstm)
        return step.linear(self.out_proj, y)

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {"lstm": Zeros((2, self.d_inner), at_least=torch.float32)}

    def flops_per_token(self, context_len: float) -> float:
        """Projections, the recurrent product, and 10 operations per cell for the gates."""
        return linear_flops(self) + 2 * self.weight.numel() + 10 * self.d_inner
