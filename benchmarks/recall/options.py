"""Options of `crossover bench recall`. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...options import Length, Range, Size
from ...train.config import Count
from ..harness.options import Place
from .plan import PRESETS, find_model

__all__ = ["RecallConfig"]


@dataclass(frozen=True, kw_only=True)
class RecallConfig(Place):
    """Train small models on tasks of recall and state tracking: which one solves what, how soon, and how far.

    Every model learns every task at every rate, two layers without feed-forward blocks, until a validation finds 99.9 %
    of the answers right or the steps are over; its best rate counts. Finished runs of the same settings are kept, so
    the same command goes on where it stopped.
    """

    preset: Literal["cpu", "all", "frontier"] = "cpu"
    """What is taken where --tasks or --models names none: 'cpu', nine models on mqar, selective_copying, induction and
    parity; 'all', on all tasks; 'frontier', models that differ in the size of their state on mqar with eight pairs, for
    what is recalled against bytes of state."""

    tasks: tuple[str, ...] = ()
    """Tasks: mqar, selective_copying, copying, induction, palindrome, parity, word_problem, stack, phonebook, multikey,
    variable_tracking, needle, and those that --import brings."""

    models: tuple[str, ...] = ()
    """Models, by what their layers are: transformer, transformer_nope (without positions), s4d, h3, mamba, mamba2,
    gated_deltanet, hybrid (mamba, then attention without positions), lstm; with other options of their mixers as
    NAME@KEY=VALUE (mamba@d_state=64)."""

    lrs: Annotated[tuple[float, ...], Range(above=0)] = (1e-3, 3e-3, 1e-2)
    """Peak learning rates, in increasing order; the best of a model counts."""

    seeds: Length = 1
    """Runs of each kind, with seeds 0, 1, ...; fewer than 3 say nothing of noise."""

    steps: Count | None = None
    """Optimizer steps of a run that does not solve its task before; when not given, those of the task's settings."""

    batch_size: Count = 64
    """Rows of a step."""

    d_model: Size = 64
    """Width of every model."""

    n_layers: Size = 2
    """Layers of every model."""

    solved: Annotated[float, Range(above=0, at_most=0.999)] = 0.97
    """Accuracy from which on a task is called solved."""

    dry_run: bool = False
    """Print what is to be done and how long it takes here at most, and do nothing."""

    out: Path = Path("runs/recall")
    """Folder of the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            if self.n_layers < (least := len(find_model(name).presets)):
                raise ValueError(f"--models {name} has {least} kinds of layers: give --n-layers {least} or more")
        for option, values in (("tasks", self.tasks), ("models", self.models), ("lrs", [f"{lr:g}" for lr in self.lrs])):
            if len(set(values)) < len(values):
                raise ValueError(f"--{option} names one twice: {' '.join(values)}")
        if not self.lrs:
            raise ValueError("--lrs names none")
        if list(self.lrs) != sorted(self.lrs):
            raise ValueError(f"--lrs must increase, got {' '.join(f'{lr:g}' for lr in self.lrs)}")
        if self.dry_run and self.fresh:
            raise ValueError("--dry-run says what is left to do in --out: leave --fresh out")

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks to be learned."""
        return self.tasks or PRESETS[self.preset].tasks

    @property
    def chosen_models(self) -> tuple[str, ...]:
        """The models that learn them."""
        return self.models or PRESETS[self.preset].models
