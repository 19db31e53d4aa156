"""A needle in real text: the one task whose rows are made of documents."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np

from ....options import Range
from ...config import RunConfig
from ...data import Corpus, check_lengths, load_corpus
from ...objective import Judge
from .task import BY_DEPTH, NOT_ASKED, Row, Task, TaskConfig

__all__ = ["Needle"]

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Where needles are hidden when a model is tested: at the beginning of the text, ..., right before the question."""


@dataclass(frozen=True, kw_only=True)
class NeedleConfig(TaskConfig):
    """Options of Needle."""

    letters: Annotated[int, Range(1, 16)] = 3
    """Letters of a key."""
    digits: Annotated[int, Range(1, 16)] = 3
    """Digits of a value."""


class Needle(Task):
    """A sentence "The KEY is VALUE." hidden in a document, and "The KEY is" at its end: the value is asked for.

    The "needle in a haystack" of RULER (2404.06654) with a key of random letters and a value of random digits, in
    documents of --data: rows to learn from are of training documents, those to be judged by of held-out ones. A text
    begins anywhere in a document and may go on into the next.
    """

    Config = NeedleConfig
    name = "needle"
    seq_len = 128

    def __init__(self, options: Any, corpus: Corpus, **settings: Any) -> None:
        self.corpus = corpus
        super().__init__(options, **settings)

    def opened(self) -> Corpus:
        """See Task.opened."""
        return self.corpus

    @classmethod
    def load(cls, run: RunConfig, options: Any, *, progress: bool = False) -> Self:
        """See Objective.load."""
        corpus = load_corpus(run.data, progress=progress)
        return cls(options, corpus, seed=run.seed, train=run.train, held_out=run.data.held_out)

    @classmethod
    def example(cls, folder: Path) -> tuple[Path, Any]:
        """See Objective.example."""
        source, _ = super(Task, cls).example(folder)
        return source, cls.Config(longest=2, test_rows=5)

    @property
    def vocab_size(self) -> int:
        """That of the tokenizer."""
        return self.corpus.tokenizer.vocab_size

    def least_length(self) -> int:
        """The needle and the question, without text: the longest of many, as tokens may be of several bytes."""
        drawn = (self._sentences(np.random.default_rng(i)) for i in range(200))
        return max(len(needle) + len(question) + len(answer) - 1 for needle, question, answer in drawn)

    def check(self, config: Any) -> None:
        """See Objective.check."""
        super().check(config)
        check_lengths(self.corpus, self.train.seq_len)

    def trained_row(self, rng: np.random.Generator) -> Row:
        """See Task.trained_row."""
        return self._hidden(rng, self.corpus.train, self.train.seq_len, rng.random())

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        return self._hidden(rng, self.corpus.val, length, DEPTHS[rng.integers(len(DEPTHS))])

    def _hidden(self, rng: np.random.Generator, stream: np.ndarray, length: int, depth: float) -> Row:
        needle, question, answer = self._sentences(rng)
        asked = np.concatenate([question, answer[:-1]])
        n_text = max(0, min(length - len(needle) - len(asked), len(stream)))
        first = rng.integers(len(stream) - n_text + 1)
        text = stream[first : first + n_text].astype(np.int64)
        cut = round(depth * n_text)
        tokens = np.concatenate([text[:cut], needle, text[cut:], asked])
        answers = np.full(len(tokens), NOT_ASKED)
        answers[-len(answer) :] = answer
        return tokens, answers

    def _sentences(self, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Needle, question and answer, each tokenized by itself, so that the answer is the same tokens in both."""
        key = "".join(map(chr, ord("a") + rng.integers(26, size=self.options.letters)))
        value = "".join(map(str, rng.integers(10, size=self.options.digits)))
        question, answer, end = map(self.corpus.tokenizer.encode, (f" The {key} is ", value, ". "))
        return np.concatenate([question, answer, end]), question, answer

    def examine(self, model: Any, *, judge: Judge, poll: Callable[[], None]) -> dict[str, Any]:
        """As Task.examine, and accuracy by depth at the trained length."""
        found = super().examine(model, judge=judge, poll=poll)
        length, by_depth = self.train.seq_len, []
        for depth in DEPTHS:
            rngs = (np.random.default_rng([BY_DEPTH, int(100 * depth), i]) for i in range(self.options.test_rows))
            rows = [self._hidden(rng, self.corpus.val, length, depth) for rng in rngs]
            judged = judge(rows, rows_at_once=self.train.batch_size, what=f"answering at depth {depth:.0%}")
            by_depth.append({"depth": depth, "accuracy": judged["accuracy"]})
        return {**found, "accuracy_by_depth": by_depth}
