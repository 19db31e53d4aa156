"""A mixer, an architecture made of it, and an objective, which crossover gets by importing this module.

The mixer is a token shift, as RWKV has it in its feed-forward layers (arXiv:2305.13048): each channel blends a token
with the one before. A stack of n layers sees n tokens back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from crossover.archs import Mixer, State, Zeros, register_mixer, register_preset
from crossover.train import register_objective
from crossover.train.objective import Score
from crossover.train.objectives.next_token import NextToken, Tokens
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class TokenShiftConfig:
    """Options of TokenShift."""

    share: float = 0.5
    """Initial share of the token itself in the blend, the rest being of the one before."""


@dataclass
class TokenShiftState(State):
    """Constant in the context length."""

    last: Tensor
    """The last token, (B, D); zeros before the first."""


class TokenShift(Mixer[TokenShiftConfig, TokenShiftState]):
    """y[t] = out_proj(a x[t] + (1 - a) x[t-1]), with a share a for each channel."""

    Config = TokenShiftConfig
    State = TokenShiftState

    def __init__(self, d_model: int, config: TokenShiftConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        self.share = nn.Parameter(torch.full((d_model,), config.share))
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(residual_scale)

    def forward(
        self, x: Tensor, state: TokenShiftState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, TokenShiftState | None]:
        """See Mixer.forward."""
        first = torch.zeros_like(x[:, :1]) if state is None else state.last[:, None].to(x.dtype)
        tokens = torch.cat([first, x], dim=1)
        before = tokens[:, :-1]
        if starts is not None:
            before = torch.where(starts[..., None], 0.0, before)
        y = self.out_proj(torch.lerp(before, x, self.share.to(x.dtype)))
        if state is None:
            return y, None
        return y, TokenShiftState(tokens[:, -1].to(state.last.dtype, copy=True))  # a view would keep all tokens alive

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {"last": Zeros((self.d_model,), at_least=torch.float32)}

    def flops_per_token(self, context_len: float) -> float:
        """One projection, and three operations per channel."""
        return 2 * self.d_model**2 + 3 * self.d_model


def token_shift(attention_every: int = 4) -> Mapping[str, Any]:
    """Token shift, with attention in the last of each `attention_every` layers."""
    return {"pattern": (*["token_shift+mlp"] * (attention_every - 1), "attention+mlp")}


class Accuracy(NextToken):
    """Language modelling, judged by the share of tokens that the model would guess right."""

    score = Score(name="accuracy", unit="accuracy", words="share of tokens guessed right", better="higher")
    weights: ClassVar[Mapping[str, float]] = {"accuracy": 0.0}  # recorded and not learned

    def collate(self, rows: Sequence[np.ndarray]) -> Tokens:
        """See Objective.collate."""
        batch = super().collate(rows)
        return dataclasses.replace(batch, counts={**batch.counts, "accuracy": batch.counts["loss"]})

    def terms(self, model: Any, batch: Tokens) -> dict[str, Tensor]:
        """Nats per token, the auxiliary loss of the layers, and the share of right guesses."""
        x, _, aux_loss = model.hidden(batch.tokens, starts=batch.starts)
        right = model.logits(x).argmax(-1) == batch.targets
        return {"loss": model.cross_entropy(x, batch.targets), "aux_loss": aux_loss, "accuracy": right.float().mean()}

    def metrics(self, means: Mapping[str, float], rows: Sequence[np.ndarray]) -> dict[str, float]:
        """The loss in nats per token, bits per byte, and the share of right guesses."""
        return {**super().metrics(means, rows), "accuracy": means["accuracy"]}

    def experiment(self) -> dict[str, Any]:
        """See Objective.experiment."""
        return {**super().experiment(), "kind": "accuracy"}


register_mixer("token_shift", TokenShift)
register_preset("token_shift", token_shift, label="Token shift", learning_rate=4e-3)
register_objective("accuracy", Accuracy)
