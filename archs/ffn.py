"""The interface every channel mixer implements."""

from __future__ import annotations

from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from ..options import check
from .step import Step

C = TypeVar("C")


class FFN(nn.Module, Generic[C]):
    """Mixes channels, each token by itself."""

    Config: ClassVar[type[Any]]
    """Frozen dataclass of options, every field with a default."""

    def __init__(self, d_model: int, config: C, *, residual_scale: float = 1.0) -> None:
        """Builds the ffn for width `d_model`; `residual_scale` is as in Mixer."""
        super().__init__()
        self.d_model = d_model
        check(config)
        self.config = config
        self.residual_scale = residual_scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, L, D) -> (B, L, D), and an auxiliary loss to be added to the model's, a scalar, or None."""
        raise NotImplementedError

    def describe_step(self, step: Step, x: Tensor) -> Tensor:
        """Describes `forward` of one token for a compiled program (see step.py): x and y are (n_rows, D).

        A class that has none, and a subclass that does not say it again, is decoded by its forward pass.
        """
        raise NotImplementedError

    def flops_per_token(self) -> float:
        """Forward FLOPs of one token."""
        raise NotImplementedError

    @property
    def n_inactive_params(self) -> int:
        """Parameters that one token does not touch."""
        return 0


def default_d_ff(d_model: int) -> int:
    """8/3 of d_model, up to a multiple of 8: a gated ffn with the parameters of an ungated one four times as wide."""
    return -(-8 * d_model // 3 // 8) * 8
