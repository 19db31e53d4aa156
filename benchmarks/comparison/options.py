"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...options import Length, Range, Size
from ...train.config import Count
from ..context.options import CellsConfig
from ..harness.options import Budget, Models, Place

__all__ = ["CompareConfig", "LearningRateConfig"]


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

    out: Path = Path("runs/compare")
    """Folder of the comparison."""

    def __post_init__(self) -> None:
        for part in (Models, Budget, Place, CellsConfig):
            part.__post_init__(self)
        if self.baseline is not None and self.baseline not in self.archs:
            raise ValueError(f"--baseline {self.baseline} is not among --archs {' '.join(self.archs)}")
        if self.position_len is not None and self.position_len < self.seq_len:
            raise ValueError(f"--position-len {self.position_len} is shorter than --seq-len {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig(Place, Budget, Models):
    """Try several peak learning rates per architecture under one rule and say which is best.

    The rule: same steps, same data in the same order, same schedule; the best score on held-out rows wins. The rate
    is thus chosen on the same held-out rows that `crossover compare` reports, for every architecture alike. A winner at
    the end of the list means that the list is too short.
    """

    rates: Annotated[tuple[float, ...], Range(above=0)] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Peak learning rates to try."""

    steps: Count = 400
    """Optimizer steps of every run."""

    eval_tokens: Count = 65_536
    """Held-out tokens read by one validation, always the same ones."""

    out: Path = Path("runs/lr")
    """Folder that gets the runs and lr.csv."""

    def __post_init__(self) -> None:
        for part in (Models, Budget, Place):
            part.__post_init__(self)
        if not self.rates:
            raise ValueError("--rates names no learning rate")
        if self.optim.lr is not None:
            raise ValueError(f"--optim.lr {self.optim.lr:g} has no effect where rates are tried: give it to --rates")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"--rates names a rate twice: {' '.join(map(str, self.rates))}")
