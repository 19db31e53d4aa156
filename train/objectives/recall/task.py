"""What tasks of recall have in common: rows from a generator, and their score, the share of answers that are right."""

from __future__ import annotations

import abc
import collections
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ....options import Range
from ...config import DataConfig, RunConfig, TrainConfig
from ...data import Data, DataError
from ...data.tokenizer import SymbolTokenizer
from ...objective import Judge, Objective, Score
from ..next_token import Tokens

if TYPE_CHECKING:
    from ....archs import ModelConfig

__all__ = ["BY_DEPTH", "NOT_ASKED", "Row", "Task", "TaskConfig"]

FORMAT = "task 1"
"""Part of every digest; changed when rows are made in another way."""

NOT_ASKED = -100
"""Answer where nothing is asked: the target that a loss does not count."""

FILLER = 0
"""The symbol that means nothing, in every vocabulary."""

_TRAINING, _HELD_OUT, _TUNING, _TESTED, _GUESSED, BY_DEPTH = range(1, 7)
"""Streams of random numbers, the first of the numbers that seed a row: no row of one is a row of another but by chance.
"""

_NEARLY = 0.8
"""Share of a tested length that rows must fill: a shorter one tests less than it says."""

_GUESSES = 512
"""Rows by which a guess is judged, and as many that it is learned from."""

Row: TypeAlias = tuple[np.ndarray, np.ndarray]
"""What is read, (L,) int64, and what is to be answered at each position, (L,) int64, NOT_ASKED elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Options of every task."""

    longest: Annotated[int, Range(1, 64)] = 16
    """Longest length that is tested in the end, in trained lengths: 1, 2, 4, ... of them up to this one."""
    test_rows: Annotated[int, Range(1, 2**20)] = 256
    """Rows that are tested at each length."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TaskData(Data):
    """The vocabulary of a task; there are as many rows as are asked for."""

    @property
    def n_tokens(self) -> tuple[int, int]:
        """See Data.n_tokens: nothing is stored."""
        return 0, 0


class Task(Objective[Row, Tokens]):
    """Answers at some positions of a row, judged by the share that is right.

    Rows are `train.seq_len` symbols long, or a little less where the task's own parts do not fill that; tests are made
    at that length and at multiples of it. `floor` is what can be had without recalling anything.
    """

    Config: ClassVar[type[Any]] = TaskConfig
    score = Score(name="accuracy", unit="accuracy", words="accuracy of the answers", better="higher")
    weights: ClassVar[Mapping[str, float]] = {"accuracy": 0.0}
    seq_len = 64
    name: ClassVar[str]
    """Name of the task, by which `--objective` knows it."""

    def __init__(
        self, options: Any, *, seed: int, train: TrainConfig, held_out: Literal["validation", "tuning"] = "validation"
    ) -> None:
        self.options, self.seed, self.train = options, seed, train
        self._judged = _TUNING if held_out == "tuning" else _HELD_OUT
        self.data = self.opened()

    def opened(self) -> Data:
        """What rows are made of: nothing but the vocabulary, unless a task has documents."""
        return _data(self.name, self.made_of(), self.vocab_size)

    @classmethod
    def load(cls, run: RunConfig, options: Any, *, progress: bool = False) -> Self:
        """See Objective.load; a task has no data but what it makes."""
        if run.data.source != DataConfig().source:
            raise DataError(f"the task {cls.name} makes its own rows: leave --data {run.data.source} out")
        return cls(options, seed=run.seed, train=run.train, held_out=run.data.held_out)

    @classmethod
    def example(cls, folder: Path) -> tuple[Path, Any]:
        """A vocabulary of so few symbols that how often each is the answer is learned at once."""
        return Path(DataConfig().source), cls.Config(**cls.small(), longest=2, test_rows=4)

    @classmethod
    def small(cls) -> dict[str, Any]:
        """Options of a task of few symbols."""
        return {}

    @property
    @abc.abstractmethod
    def vocab_size(self) -> int:
        """Symbols that there are, the filler among them."""

    @abc.abstractmethod
    def least_length(self) -> int:
        """Symbols of the shortest row."""

    @abc.abstractmethod
    def row(self, rng: np.random.Generator, length: int) -> Row:
        """Draws a row of at most so many symbols; of that length or nearly."""

    def trained_row(self, rng: np.random.Generator) -> Row:
        """Draws a row to learn from."""
        return self.row(rng, self.train.seq_len)

    def made_of(self) -> dict[str, Any]:
        """The options that decide what rows are."""
        tests = {field.name for field in dataclasses.fields(TaskConfig)}
        return {key: value for key, value in dataclasses.asdict(self.options).items() if key not in tests}

    def check(self, config: ModelConfig) -> None:
        """See Objective.check."""
        super().check(config)
        if self.train.seq_len < self.least_length():
            options = ", ".join(f"{key}={value}" for key, value in self.made_of().items())
            raise ValueError(
                f"the task {self.name}{' with ' * bool(options)}{options} needs rows of {self.least_length()} symbols, "
                f"more than train.seq_len={self.train.seq_len}: raise --train.seq-len (--seq-len of a comparison)"
                f"{' or change these by --objective.set' * bool(options)}"
            )

    def rows(self, step: int) -> list[Row]:
        """See Objective.rows."""
        return [
            self.trained_row(np.random.default_rng([_TRAINING, self.seed, step, i]))
            for i in range(self.train.batch_size)
        ]

    def held_out(self, max_tokens: int) -> list[Row]:
        """Rows of the trained length, the same for every seed."""
        n_rows = max(1, max_tokens // self.train.seq_len)
        return list(self._drawn(self._judged, self.train.seq_len, range(n_rows)))

    def _drawn(self, stream: int, length: int, numbers: Iterable[int]) -> Iterator[Row]:
        return (self.row(np.random.default_rng([stream, length, i]), length) for i in numbers)

    def collate(self, rows: Sequence[Row]) -> Tokens:
        """Fills up at the end, where no causal model sees it."""
        longest = max(len(tokens) for tokens, _ in rows)
        tokens = np.full((len(rows), longest), FILLER, np.int64)
        answers = np.full((len(rows), longest), NOT_ASKED, np.int64)
        for i, (read, asked) in enumerate(rows):
            tokens[i, : len(read)], answers[i, : len(read)] = read, asked
        n_asked = int((answers != NOT_ASKED).sum())
        return Tokens(
            counts={"loss": n_asked, "accuracy": n_asked, "aux_loss": self.n_tokens(rows)},
            tokens=torch.from_numpy(tokens),
            targets=torch.from_numpy(answers),
        )

    def terms(self, model: Any, batch: Tokens) -> dict[str, Tensor]:
        """Nats per answer, the share of answers that are right, and the auxiliary loss of the layers."""
        x, _, aux_loss = model.hidden(batch.tokens)
        logits = model.logits(x)
        asked = batch.targets != NOT_ASKED
        n_asked = asked.sum().clamp(min=1)
        nats = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="sum", ignore_index=NOT_ASKED)
        right = ((logits.argmax(-1) == batch.targets) & asked).sum()
        return {"loss": nats / n_asked, "accuracy": right / n_asked, "aux_loss": aux_loss}

    def n_tokens(self, rows: Sequence[Row]) -> int:
        """Symbols that are read."""
        return sum(len(tokens) for tokens, _ in rows)

    def sample(self, model: Any) -> str:
        """The first answers to a held-out row beside those that are right."""
        (row,) = self.held_out(1)
        batch = self.collate([row]).to(next(model.parameters()).device)
        given = model.logits(model.hidden(batch.tokens)[0]).argmax(-1)[0].cpu().numpy()
        asked = np.flatnonzero(row[1] != NOT_ASKED)[: max(1, self.train.sample_tokens // 8)]
        given, right = (self.data.tokenizer.decode(answers[asked]) for answers in (given, row[1]))
        return f"answered {given} (right: {right})"

    def examine(self, model: Any, *, judge: Judge, poll: Callable[[], None]) -> dict[str, Any]:
        """Accuracy at the trained length and at multiples of it, each with the floor there."""
        n_positions, found = model.config.max_positions, []
        factors = [2**power for power in range(self.options.longest.bit_length())]
        for length in (self.train.seq_len * factor for factor in factors if factor <= self.options.longest):
            poll()
            entry: dict[str, Any] = {"context_len": length, "accuracy": None, "floor": self.floor(length)}
            if n_positions is not None and length > n_positions:
                found.append({**entry, "status": "beyond_positions"})
                continue
            rows = list(self._drawn(_TESTED, length, range(self.options.test_rows)))
            if max(len(tokens) for tokens, _ in rows) < _NEARLY * length:
                found.append({**entry, "status": "rows_are_shorter"})
                continue
            rows_at_once = max(1, self.forward_tokens // length)
            accuracy = judge(rows, rows_at_once=rows_at_once, what=f"answering at {length:,} symbols")["accuracy"]
            n_answers = sum(int((asked != NOT_ASKED).sum()) for _, asked in rows)
            found.append({**entry, "accuracy": accuracy, "n_answers": n_answers, "status": "done"})
        return {"accuracy_by_length": found}

    def floor(self, length: int) -> float:
        """The accuracy without recall at a length: that of the best of four guesses, on rows that are made for it.

        They are the answer that is most frequent, the one that is most frequent after the symbol where it is asked
        for, and, of the symbols from the least to the greatest that is ever an answer, the one that is most frequent in
        the row, and the last one read.
        """
        always: collections.Counter[int] = collections.Counter()
        after: dict[int, collections.Counter[int]] = collections.defaultdict(collections.Counter)
        for tokens, answers in self._drawn(_GUESSED, length, range(_GUESSES)):
            for i in np.flatnonzero(answers != NOT_ASKED):
                always[int(answers[i])] += 1
                after[int(tokens[i])][int(answers[i])] += 1
        symbols = np.arange(self.vocab_size)
        is_answer = (min(always) <= symbols) & (symbols <= max(always))
        most = always.most_common(1)[0][0]
        best = {symbol: counts.most_common(1)[0][0] for symbol, counts in after.items()}
        right, n_asked = np.zeros(4), 0
        for tokens, answers in self._drawn(_GUESSED, length, range(_GUESSES, 2 * _GUESSES)):
            where = np.flatnonzero(answers != NOT_ASKED)
            in_row = int((np.bincount(tokens, minlength=self.vocab_size) * is_answer).argmax())
            places = np.maximum.accumulate(np.where(is_answer[tokens], np.arange(len(tokens)), 0))
            asked_after = [best.get(int(symbol), most) for symbol in tokens[where]]
            guesses = (most, asked_after, in_row, tokens[places[where]])
            right += [(answers[where] == guess).sum() for guess in guesses]
            n_asked += len(where)
        return float(right.max() / n_asked)

    def experiment(self) -> dict[str, Any]:
        """See Objective.experiment."""
        return {"kind": self.name, **self.made_of()}


def _data(name: str, made_of: Mapping[str, Any], vocab_size: int) -> TaskData:
    told = f" ({', '.join(f'{key} {value}' for key, value in made_of.items())})" if made_of else ""
    digest = hashlib.sha256(json.dumps([FORMAT, name, made_of]).encode()).hexdigest()
    return TaskData(
        name=name,
        digest=digest,
        documents_digest=digest,
        n_train_documents=0,
        n_val_documents=0,
        skipped={},
        tokenizer=SymbolTokenizer(vocab_size),
        train_bytes=0,
        val_bytes=0,
        reference_bits_per_byte={},
        made=f"rows that are made as they are needed{told}",
    )
