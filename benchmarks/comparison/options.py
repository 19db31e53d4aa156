"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...options import Length, Positive, Range, Size
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

    params: Count = 300_000
    """Parameters of every model, reached within 2 % (1M, 500k)."""

    repeats: Size = 1
    """Processes that measure the same, one after the other, each after all models have had the one before: 3 or more
    where speeds are to be told apart, for which the demo has no time."""

    baseline: str | None = None
    """Architecture that the report compares the others with; when not given, the Transformer if it is among --archs, or
    else the first of them."""

    eval_tokens: Count = 8_192
    """Held-out tokens read by one validation on the way, always the same ones; the final one reads eight times more."""

    seq_len: Annotated[tuple[int, ...], Range(1, 2**32)] = (128, 512)
    """Tokens per training sequence. With several lengths every model is trained at each of them, on as many tokens in
    a step and in all, and reads held-out documents at each, also beyond the trained one. A length is reported where
    8 held-out documents have so many tokens. Objectives with rows of their own, such as tasks of recall, take one
    length: 64 or 128 when none is given. Of stdlib, 26 of 30 have 1,024, 21 have 4,096, 10 have 16,384, 6 have
    32,768 and 3 have 65,536."""

    carry: bool = False
    """Train every run with the state carried from window to window (`crossover train --train.carry`), which models with
    attention cannot do: leave them out of --archs."""

    equal: Literal["tokens", "flops", "seconds"] = "tokens"
    """What every run gets: as many tokens, or as many FLOPs of training as the baseline spends in --steps at the
    shortest --seq-len, in as many steps as that makes, or as many --seconds of training, however many steps those are.
    For seconds all models of a seed and length are held in memory, and --jobs of them train at a time, in turns of two
    seconds, so that what slows the machine down slows all alike."""

    seconds: Positive | None = None
    """Seconds of training of every run with --equal seconds; --steps is then for the trials of --tune-lr alone."""

    position_len: Length | None = None
    """Longest length at which loss by position is evaluated, on the same texts for all; when not given, 4 times the
    shortest --seq-len, or twice the longest."""

    length_tokens: Annotated[Count, Range(2**16)] = 2**16
    """Held-out tokens read at each length, where there are several."""

    tune_lr: bool = False
    """Find the peak learning rate of each model first, and compare with what was found: in short runs at rates that are
    factors of two apart, judged on documents that nothing else reads. Every trial is kept in OUT/tuning."""

    tune_share: Annotated[float, Range(above=0, at_most=1)] = 0.25
    """Share of --steps that a trial of the last round of --tune-lr takes; those before take 1/2 and 1/4 of it."""

    dry_run: bool = False
    """Print what is to be done and how long it takes here, and do nothing. Where no finished run in --out tells, models
    train some steps for that; what they show is kept in the cache folder."""

    out: Path = Path("runs/compare")
    """Folder of the comparison."""

    def __post_init__(self) -> None:
        for part in (Models, Budget, Place, CellsConfig):
            part.__post_init__(self)
        if self.baseline is not None and self.baseline not in self.archs:
            raise ValueError(f"--baseline {self.baseline} is not among --archs {' '.join(self.archs)}")
        if self.dry_run and self.fresh:
            raise ValueError("--dry-run says what is left to do in --out: leave --fresh out")
        if self.tune_lr and self.optim.lr is not None:
            raise ValueError(f"--tune-lr finds a rate for each model: leave --optim.lr {self.optim.lr:g} out")
        if (self.equal == "seconds") != (self.seconds is not None):
            raise ValueError("--equal seconds and --seconds S, the time that every run trains, go together: give both")
        if self.position_len is not None and self.position_len < self.seq_len[-1]:
            raise ValueError(f"--position-len {self.position_len} is shorter than --seq-len {self.seq_len[-1]}")
