"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...options import Length, Range, Size
from ...train.config import Count
from ..context.options import CellsConfig
from ..harness.options import Budget, Models, Place

__all__ = ["CompareConfig"]


@dataclass(frozen=True, kw_only=True)
class CompareConfig(CellsConfig, Place, Budget, Models):
    """Train every architecture at one budget, measure them against the context length, write the report.

    The defaults are a demo for two CPU cores: some minutes, under 4 GiB, no download. Finished runs and measurements of
    the same settings are kept, so the same command goes on where it stopped.
    """

    repeats: Size = 1
    """Processes that measure the same, one after the other, each after all models have had the one before: 3 or more
    where speeds are to be told apart, for which the demo has no time."""

    baseline: str | None = None
    """Architecture that the report compares the others with; when not given, the Transformer if it is among --archs, or
    else the first of them."""

    eval_tokens: Count = 8_192
    """Held-out tokens read by one validation on the way, always the same ones; the final one reads eight times more."""

    position_len: Length | None = None
    """Longest length at which loss by position is evaluated; 4 x --seq-len when not given."""

    tune_lr: bool = False
    """Find the peak learning rate of each model first, and compare with what was found: in short runs at rates that are
    factors of two apart, judged on documents that nothing else reads. Every trial is kept in OUT/tuning."""

    tune_share: Annotated[float, Range(above=0, at_most=1)] = 0.25
    """Share of --steps that a trial of the last round of --tune-lr takes; those before take 1/2 and 1/4 of it."""

    out: Path = Path("runs/compare")
    """Folder of the comparison."""

    def __post_init__(self) -> None:
        for part in (Models, Budget, Place, CellsConfig):
            part.__post_init__(self)
        if self.baseline is not None and self.baseline not in self.archs:
            raise ValueError(f"--baseline {self.baseline} is not among --archs {' '.join(self.archs)}")
        if self.tune_lr and self.optim.lr is not None:
            raise ValueError(f"--tune-lr finds a rate for each model: leave --optim.lr {self.optim.lr:g} out")
        if self.position_len is not None and self.position_len < self.seq_len:
            raise ValueError(f"--position-len {self.position_len} is shorter than --seq-len {self.seq_len}")
