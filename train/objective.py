"""Objectives, behind one interface: the rows of a step -> a batch -> the terms of a loss -> metrics.

A loss is a sum of means. Each term is a mean over so many things (targets, masked tokens, pairs), a count that the host
knows before the forward pass. Counts are added over the parts of a batch and over processes, and each part's mean is
weighed by its share: accumulation, padding and any number of processes then give the gradient of the whole batch, for
every objective alike. The load balance of experts is no such mean: it is judged within each forward pass.

An objective is one file in train/objectives/ and one line in its registry; tests/train/test_objectives.py tests it by
that, on the data that its `example` writes.
"""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from .score import BITS_PER_BYTE, Score

if TYPE_CHECKING:
    from ..archs import ModelConfig, States
    from .config import RunConfig, TrainConfig
    from .data import Data

__all__ = ["BITS_PER_BYTE", "Batch", "Judge", "NoOptions", "Objective", "Score"]

Row = TypeVar("Row")
B = TypeVar("B", bound="Batch")


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Some rows as tensors. Subclasses add them, rows first."""

    counts: Mapping[str, int]
    """Number of elements that each term is a mean over."""

    def to(self, device: torch.device) -> Self:
        """The same batch with its tensors on a device."""
        tensors = {name: value.to(device) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return dataclasses.replace(self, **tensors)


@dataclass(frozen=True, kw_only=True)
class NoOptions:
    """Options of an objective that has none."""


class Judge(Protocol):
    """The metrics of held-out rows, which may be of any length."""

    def __call__(self, rows: Sequence[Any], *, rows_at_once: int, what: str) -> dict[str, float]:
        """Reads so many rows in one forward pass; `what` says what is being done."""
        ...


class Objective(abc.ABC, Generic[Row, B]):
    """An objective on one data set. It is made before any model, and holds none but teachers and references."""

    Config: ClassVar[type[Any]] = NoOptions
    """Frozen dataclass of options, every field with a default."""
    kinds: ClassVar[tuple[str, ...]] = ("decoder",)
    """Values of ModelConfig.kind that can learn it."""
    score: ClassVar[Score] = BITS_PER_BYTE
    """The one number by which runs are compared; `metrics` gives it."""
    weights: ClassVar[Mapping[str, float]] = {}
    """Factors of the terms in the loss: 1 unless given; a term of weight 0 is recorded and not learned."""

    has_windows: ClassVar[bool] = False
    """Whether every row is train.seq_len tokens of running text, so that the length of rows is free to choose."""

    seq_len: ClassVar[int] = 128
    """Where it has no windows, train.seq_len of a comparison that is told none."""

    carries: ClassVar[bool] = False
    """Whether it follows train.carry: then rows read on from step to step, and it has `begins` and `terms_from`."""

    facts: ClassVar[frozenset[str]] = frozenset()
    """Names among `metrics` of what is no curve, such as bytes read: it goes to the result alone."""

    data: Data
    """Data to learn from: the tokenizer, and the entries of run.json."""
    seed: int
    """Seed of the order of the data."""
    train: TrainConfig
    """Sizes of a batch and of evaluations."""

    @classmethod
    @abc.abstractmethod
    def load(cls, run: RunConfig, options: Any, *, progress: bool = False) -> Self:
        """Loads the data of a run.

        Args:
            run: its data, seed and train sections are used.
            options: an instance of Config.
            progress: show bars on a terminal.

        Raises:
            ValueError: if the data cannot be used.
        """

    @classmethod
    def example(cls, folder: Path) -> tuple[Path, Any]:
        """Writes a small data set that shows what it learns from, by which tests/train/test_objectives.py tests it.

        Here it is short texts; an objective of other data overrides this. The same is written at every call: some
        sixty rows or more, none longer than 48 bytes.

        Args:
            folder: an empty folder, for the data and what the options name.

        Returns:
            The value of run.data.source, and options, an instance of Config.
        """
        lines = [json.dumps({"text": f"Document {i} has {i * i} words."}) for i in range(60)]
        (folder / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder / "texts.jsonl", cls.Config()

    def check(self, config: ModelConfig) -> None:
        """Raises ValueError, with the remedy, unless models of this config can learn the objective from its data."""
        if config.kind not in self.kinds:
            raise ValueError(
                f"this model is of kind {config.kind}, and the objective is for {' and '.join(self.kinds)}s"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Adds what only this objective needs of a model, such as a head."""
        return model

    @abc.abstractmethod
    def rows(self, step: int) -> Sequence[Row]:
        """The rows of one update, over all processes: a pure function of (seed, step). Rank r of R takes [r::R]."""

    @abc.abstractmethod
    def held_out(self, max_tokens: int) -> Sequence[Row]:
        """Fixed rows to be judged by: as many as `max_tokens` allow, and at least one."""

    @abc.abstractmethod
    def collate(self, rows: Sequence[Row]) -> B:
        """Rows as tensors on the host, with their counts."""

    @abc.abstractmethod
    def terms(self, model: Any, batch: B) -> dict[str, Tensor]:
        """The mean of each term of batch.counts, a scalar; what varies between calls is drawn by the batch.

        Of nothing (a count of 0) a term is finite, and depends on the parameters as ever: a part of a batch, or a
        process, may have none of what it counts.
        """

    def begins(self, step: int) -> np.ndarray:
        """The rows of a step, (n,) bool, that do not go on from those of the step before: a function of seed and step.

        The state of such a row is emptied. At step 0 these are all rows.
        """
        raise NotImplementedError

    def terms_from(self, model: Any, batch: B, state: States) -> tuple[dict[str, Tensor], Any]:
        """As `terms`, of rows that go on from a state; and the state after them."""
        raise NotImplementedError

    def metrics(self, means: Mapping[str, float], rows: Sequence[Row]) -> dict[str, float]:
        """Makes what is written down of held-out rows, from the means of the terms over all of them."""
        return dict(means)

    @abc.abstractmethod
    def n_tokens(self, rows: Sequence[Row]) -> int:
        """Tokens of rows, as throughput and the x axis of learning curves count them."""

    def flops_per_token(self, model: Any) -> float:
        """FLOPs of training for each of these tokens."""
        return model.training_flops_per_token(self.train.seq_len)

    def sample(self, model: Any) -> str | None:
        """Something to read at each validation: a pure function of the weights."""
        return None

    def examine(self, model: Any, *, judge: Judge, poll: Callable[[], None]) -> dict[str, Any]:
        """Entries of result.json that are found once, at the end.

        Args:
            model: the trained model.
            judge: gives the metrics of rows, by the loop that every validation goes through.
            poll: to be called now and then by what does not go through it; may raise.
        """
        return {}

    @abc.abstractmethod
    def experiment(self) -> dict[str, Any]:
        """Returns what a resume must not change, as JSON values: its name as "kind", options, digests."""

    def sample_len(self, model: Any, n_read: int) -> int:
        """Tokens to write in `sample` after reading some: as many as are asked for, and as positions go."""
        n_positions = model.config.max_positions
        return self.train.sample_tokens if n_positions is None else min(self.train.sample_tokens, n_positions - n_read)

    @property
    def forward_tokens(self) -> int:
        """Tokens of one forward pass in training, which evaluations do not exceed either."""
        return self.train.batch_size * self.train.seq_len // self.train.grad_accumulation
