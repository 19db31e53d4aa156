"""Sizes and costs of each architecture at the same number of parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...archs import ModelConfig

__all__ = ["SizedArch", "size_arch"]


@dataclass(frozen=True, kw_only=True)
class SizedArch:
    """An architecture at the size of a comparison."""

    arch: str
    label: str
    """The architecture's name as written in text."""
    config: ModelConfig
    n_params: int
    n_active_params: int
    flops_per_token: float
    """Training FLOPs (three times the forward pass), mean over a sequence."""
    state_bytes: int
    """State of one sequence of the trained length."""
    lr: float
    """Peak learning rate tuned for this architecture."""


def size_arch(arch: str, *, n_params: int, vocab_size: int, seq_len: int) -> SizedArch:
    """Solves the architecture for a number of parameters and says what it costs, without allocating it.

    Raises:
        ValueError: if no legal size comes within 2 %.
    """
    from ...archs import build, configure, presets

    config = configure(arch, n_params=n_params, vocab_size=vocab_size)
    lm = build(config, device="meta")
    return SizedArch(
        arch=arch,
        label=presets.find(arch).label,
        config=config,
        n_params=lm.n_params,
        n_active_params=lm.n_active_params,
        flops_per_token=3 * lm.mean_flops_per_token(seq_len),
        # an encoder has none
        state_bytes=sum(s.nbytes for s in lm.init_state(1, seq_len, device="meta")) if config.kind != "encoder" else 0,
        lr=presets.learning_rate(arch),
    )
