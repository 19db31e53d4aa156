"""Tasks in which every symbol changes a state, which is asked for."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ....options import Range
from .task import NOT_ASKED, Row, Task, TaskConfig

__all__ = ["Parity", "Stack", "WordProblem"]


class Parity(Task):
    """Zeros and ones: at every position it is asked whether the ones until there are even or odd (2411.12537).

    Rows to learn from have any length from 3 to the trained one.
    """

    name = "parity"

    @property
    def vocab_size(self) -> int:
        """The filler, zero, and one, which are also even and odd."""
        return 3

    def least_length(self) -> int:
        """The shortest row to learn from."""
        return 3

    def trained_row(self, rng: np.random.Generator) -> Row:
        """See Task.trained_row."""
        return self.row(rng, int(rng.integers(3, self.train.seq_len + 1)))

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        bits = rng.integers(0, 2, length)
        return 1 + bits, 1 + np.cumsum(bits) % 2


@dataclass(frozen=True, kw_only=True)
class WordProblemConfig(TaskConfig):
    """Options of WordProblem."""

    things: Annotated[int, Range(2, 6)] = 5
    """Things that are permuted: 5 is the group S5, which threshold circuits of constant depth cannot follow unless
    TC0 = NC1; 3 is S3, which they can."""


class WordProblem(Task):
    """Permutations: at every position the product of all until there is asked for (2404.08819)."""

    Config = WordProblemConfig
    name = "word_problem"

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"things": 2}

    @property
    def vocab_size(self) -> int:
        """The filler, and the permutations, of which the first changes nothing."""
        return 1 + len(_products(self.options.things))

    def least_length(self) -> int:
        """One permutation."""
        return 1

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        products = _products(self.options.things)
        drawn = rng.integers(len(products), size=length)
        return 1 + drawn, 1 + np.fromiter(itertools.accumulate(drawn, lambda a, b: products[a, b]), np.int64, length)


@functools.cache
def _products(n: int) -> np.ndarray:
    """Of the permutations of n things in their order, the number of the one that does a and then b, (n!, n!)."""
    permutations = list(itertools.permutations(range(n)))
    number = {permutation: i for i, permutation in enumerate(permutations)}
    return np.array([[number[tuple(b[i] for i in a)] for b in permutations] for a in permutations])


@dataclass(frozen=True, kw_only=True)
class StackConfig(TaskConfig):
    """Options of Stack."""

    stacks: Annotated[int, Range(1, 2**10)] = 4
    """Stacks, each by itself."""
    symbols: Annotated[int, Range(2, 2**16)] = 10
    """Different symbols that are put on them."""
    depth: Annotated[int, Range(1, 2**10)] = 8
    """Most symbols on one of them."""


class Stack(Task):
    """Symbols put on stacks and taken from them, last in first out: at each taking, what comes off is asked.

    An act is two symbols: which stack is put on or taken from, and what is put on or comes off (2510.26692).
    Acts are drawn at random among those that are possible.
    """

    Config = StackConfig
    name = "stack"

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"stacks": 2, "symbols": 2}

    @property
    def vocab_size(self) -> int:
        """The filler, putting on each stack, taking from each, and the symbols."""
        return 1 + 2 * self.options.stacks + self.options.symbols

    def least_length(self) -> int:
        """A symbol that is put on a stack and taken from it."""
        return 4

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n, depth = self.options.stacks, self.options.depth
        n_acts = length // 2
        stacks: list[list[int]] = [[] for _ in range(n)]
        which, takes = rng.integers(n, size=n_acts), rng.integers(2, size=n_acts)
        symbols = rng.integers(1 + 2 * n, self.vocab_size, n_acts)
        which[-1] = which[-2]  # so that there is something to be taken in the end
        takes[0], takes[-1] = 0, 1
        tokens, answers = np.empty(2 * n_acts, np.int64), np.full(2 * n_acts, NOT_ASKED)
        for i in range(n_acts):
            stack = stacks[which[i]]
            if not stack or (len(stack) < depth and not takes[i]):
                stack.append(int(symbols[i]))
                tokens[2 * i] = 1 + which[i]
            else:
                symbols[i] = answers[2 * i] = stack.pop()
                tokens[2 * i] = 1 + n + which[i]
            tokens[2 * i + 1] = symbols[i]
        return tokens, answers
