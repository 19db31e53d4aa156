"""Tasks that give back what was read, all of it or the part that is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ....options import Range
from .task import FILLER, NOT_ASKED, Row, Task, TaskConfig

__all__ = ["Copying", "Induction", "Palindrome", "SelectiveCopying"]

Symbols = Annotated[int, Range(2, 2**16)]


class _Marked(Task):
    """A task with the option `symbols`, and a marker."""

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"symbols": 3}

    @property
    def vocab_size(self) -> int:
        """The filler, the symbols, and the marker."""
        return self.options.symbols + 2

    @property
    def marker(self) -> int:
        """The last symbol of the vocabulary."""
        return self.options.symbols + 1


@dataclass(frozen=True, kw_only=True)
class CopyingConfig(TaskConfig):
    """Options of Copying and Palindrome."""

    symbols: Symbols = 26
    """Different symbols that strings are made of."""


class Copying(_Marked):
    """A string of random symbols, a marker, and the string again: every symbol of it is asked for (2402.01032).

    Of 2 n symbols the first n are the string, and what is read after the marker are the answers themselves.
    """

    Config = CopyingConfig
    name = "copying"

    def least_length(self) -> int:
        """A symbol and the marker."""
        return 2

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        string = rng.integers(1, self.options.symbols + 1, length // 2)
        answers = self.answers(string)
        tokens = np.concatenate([string, [self.marker], answers[:-1]])
        return tokens, np.concatenate([np.full(len(string), NOT_ASKED), answers])

    def answers(self, string: np.ndarray) -> np.ndarray:
        """What is asked for after a string."""
        return string


class Palindrome(Copying):
    """A string of random symbols, a marker, and the string from its end to its beginning (2510.26692)."""

    name = "palindrome"

    def answers(self, string: np.ndarray) -> np.ndarray:
        """See Copying.answers."""
        return string[::-1]


@dataclass(frozen=True, kw_only=True)
class SelectiveCopyingConfig(TaskConfig):
    """Options of SelectiveCopying."""

    symbols: Symbols = 10
    """Different symbols to be copied."""
    tokens: Annotated[int, Range(1, 2**12)] = 6
    """Symbols in a row that are to be copied."""


class SelectiveCopying(_Marked):
    """Some symbols at random places among filler, and as many markers, at which they are asked for in their order.

    The places vary, so that what is to be kept is told by content (2312.00752, sec. 4.1.1; Jing et al. 2019).
    """

    Config = SelectiveCopyingConfig
    name = "selective_copying"

    def least_length(self) -> int:
        """The symbols and the markers."""
        return 2 * self.options.tokens

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n = self.options.tokens
        tokens, answers = np.full(length, FILLER), np.full(length, NOT_ASKED)
        places = np.sort(rng.choice(length - n, n, replace=False))
        tokens[places] = answers[-n:] = rng.integers(1, self.options.symbols + 1, n)
        tokens[-n:] = self.marker
        return tokens, answers


@dataclass(frozen=True, kw_only=True)
class InductionConfig(TaskConfig):
    """Options of Induction."""

    symbols: Symbols = 16
    """Different symbols that rows are made of."""


class Induction(_Marked):
    """Random symbols with a marker among them and at their end: what stood after it is asked for there.

    Induction heads (Olsson et al. 2022) with one answer a row, at the last position (2312.00752, sec. 4.1.2).
    """

    Config = InductionConfig
    name = "induction"

    def least_length(self) -> int:
        """The marker, a symbol, and the marker."""
        return 3

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        tokens, answers = rng.integers(1, self.options.symbols + 1, length), np.full(length, NOT_ASKED)
        first = rng.integers(length - 2)
        tokens[[first, -1]] = self.marker
        answers[-1] = tokens[first + 1]
        return tokens, answers
