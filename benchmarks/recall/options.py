"""Options of `crossover bench recall`. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...options import Length, Positive, Range, Size, nearest
from ...train.config import Count
from ..harness.options import Place
from .plan import MODELS, SETTINGS

__all__ = ["RecallConfig"]

QUICK_TASKS = ("mqar", "selective_copying", "induction", "parity")


@dataclass(frozen=True, kw_only=True)
class RecallConfig(Place):
    """Train small models on tasks of recall and state tracking: which one solves what, how soon, and how far.

    Every model learns every task at every rate, two layers without feed-forward blocks, until a validation finds 99.9 %
    of the answers right or the steps are over; its best rate counts. Finished runs of the same settings are kept, so
    the same command goes on where it stopped.
    """

    preset: Literal["cpu", "all"] = "cpu"
    """Tasks that are taken where --tasks names none: 'cpu' are mqar, selective_copying, induction and parity, 'all' are
    all."""

    tasks: tuple[str, ...] = ()
    """Tasks: mqar, selective_copying, copying, induction, palindrome, parity, word_problem, stack, phonebook, multikey,
    variable_tracking, needle, and those that --import brings."""

    models: tuple[str, ...] = tuple(MODELS)
    """Models: of which presets their layers have the mixers."""

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

    solved: Positive = 0.97
    """Accuracy from which on a task is called solved."""

    dry_run: bool = False
    """Print what is to be done and how long it takes here at most, and do nothing."""

    out: Path = Path("runs/recall")
    """Folder of the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.models:
            if name not in MODELS:
                raise ValueError(f"--models {name} is unknown{nearest(name, MODELS)}")
        for option in ("tasks", "models", "lrs"):
            values = getattr(self, option)
            if len(set(values)) < len(values):
                raise ValueError(f"--{option} names one twice: {' '.join(map(str, values))}")
        if not self.models or not self.lrs:
            raise ValueError(f"--{'lrs' if self.models else 'models'} names none")
        if list(self.lrs) != sorted(self.lrs):
            raise ValueError(f"--lrs must increase, got {' '.join(f'{lr:g}' for lr in self.lrs)}")
        if self.dry_run and self.fresh:
            raise ValueError("--dry-run says what is left to do in --out: leave --fresh out")

    @property
    def chosen_tasks(self) -> tuple[str, ...]:
        """The tasks to be learned."""
        return self.tasks or (QUICK_TASKS if self.preset == "cpu" else tuple(SETTINGS))
