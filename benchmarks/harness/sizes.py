"""Sizes and costs of each architecture at the same number of parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    options: tuple[str, ...]
    """What a ModelSpec must set besides the number of parameters."""
    flops_at: Mapping[int, float]
    """Training FLOPs of a token (three times the forward pass), mean over a sequence, by trained length."""
    state_bytes: int
    """State of one sequence of the trained length."""
    lr: float
    """Peak learning rate tuned for this architecture."""

    @property
    def flops_per_token(self) -> float:
        """Training FLOPs of a token at the first length."""
        return next(iter(self.flops_at.values()))


def size_arch(arch: str, *, n_params: int, vocab_size: int, seq_len: int, others: Sequence[int] = ()) -> SizedArch:
    """Solves the architecture for a number of parameters and says what it costs, without allocating it.

    Args:
        arch: its name.
        n_params: parameters.
        vocab_size: tokens of the vocabulary.
        seq_len: trained length.
        others: further lengths at which it is trained: learned positions reach to the longest of all.

    Raises:
        ValueError: if no legal size comes within 2 %.
    """
    from ...archs import build, configure, presets

    config, longest, options = configure(arch, n_params=n_params, vocab_size=vocab_size), max(seq_len, *others, 0), ()
    if others and config.max_positions is not None and config.max_positions < longest:
        config = configure(arch, n_params=n_params, vocab_size=vocab_size, max_positions=longest)
        options = (f"max_positions={longest}",)
    lm = build(config, device="meta")
    return SizedArch(
        arch=arch,
        label=presets.find(arch).label,
        config=config,
        n_params=lm.n_params,
        n_active_params=lm.n_active_params,
        options=options,
        flops_at={length: 3 * lm.mean_flops_per_token(length) for length in (seq_len, *others)},
        # an encoder has none
        state_bytes=sum(s.nbytes for s in lm.init_state(1, seq_len, device="meta")) if config.kind != "encoder" else 0,
        lr=presets.learning_rate(arch),
    )
