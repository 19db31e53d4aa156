"""Any causal mixer as an encoder: one reads left to right, a second one right to left, and their outputs are added.

Schuster & Paliwal 1997 (bidirectional recurrent networks); for Mamba Zhu et al. 2024 (Vision Mamba, arXiv:2401.09417).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import registry
from ..mixer import Mixer, State, Zeros

_NO_STATE = "a bidirectional mixer sees the tokens to come and has no state: generate with a decoder"


@dataclass(frozen=True, kw_only=True)
class BidirectionalConfig:
    """Options of Bidirectional."""

    causal: ClassVar[bool] = False

    of: str = "mamba"
    """The kind of mixer that runs in both directions."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Its options, the same for both directions."""

    def __post_init__(self) -> None:
        self.resolve()

    def resolve(self) -> tuple[type[Mixer], Any]:
        """The class that runs in both directions and its options."""
        return registry.resolve("mixer", self.of, self.options, named_in="of", path="options")


class Bidirectional(Mixer[BidirectionalConfig, State]):
    """y = forward(x) + reverse(backward(reverse(x))), where the two mixers have weights of their own.

    Packed documents and left padding stay apart in both directions. There is no state: the last token comes first.
    """

    Config = BidirectionalConfig

    def __init__(self, d_model: int, config: BidirectionalConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        cls, options = config.resolve()
        # the sum of two has the variance of one
        self.forwards: Mixer = cls(d_model, options, residual_scale=residual_scale * 0.5**0.5)
        self.backwards: Mixer = cls(d_model, options, residual_scale=residual_scale * 0.5**0.5)

    def forward(self, x: Tensor, state: State | None = None, *, starts: Tensor | None = None) -> tuple[Tensor, None]:
        """See Mixer.forward, but with no state.

        Raises:
            ValueError: if a state is given.
        """
        if state is not None:
            raise ValueError(_NO_STATE)
        ends = None
        if starts is not None:  # the last token of a document is the first from the right
            ends = torch.cat([starts[:, 1:], torch.ones_like(starts[:, :1])], dim=1).flip(1)
        y, _ = self.forwards(x, starts=starts)
        reverse_y, _ = self.backwards(x.flip(1), starts=ends)
        return y + reverse_y.flip(1), None

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """A ValueError: there is no state."""
        raise ValueError(_NO_STATE)

    def flops_per_token(self, context_len: float) -> float:
        """FLOPs of both directions."""
        return self.forwards.flops_per_token(context_len) + self.backwards.flops_per_token(context_len)

    def sequence_flops(self, seq_len: int) -> float:
        """FLOPs of both directions."""
        return self.forwards.sequence_flops(seq_len) + self.backwards.sequence_flops(seq_len)
