"""Tasks that look up a value by its key, among others like it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np

from ....options import Range
from .task import FILLER, NOT_ASKED, Row, Task, TaskConfig

__all__ = ["Mqar", "MultiKey", "Phonebook", "VariableTracking"]

Several = Annotated[int, Range(2, 2**12)]
"""Of one alone a guess would be the answer."""


@dataclass(frozen=True, kw_only=True)
class MqarConfig(TaskConfig):
    """Options of Mqar."""

    pairs: Several = 8
    """Pairs of a key and its value in a row."""
    vocab: Annotated[int, Range(4, 2**16)] = 64
    """Symbols, one half of them keys and the other half values."""

    def __post_init__(self) -> None:
        if self.pairs > self.vocab // 2 - 1:
            raise ValueError(
                f"objective.pairs={self.pairs} needs as many different keys, and objective.vocab={self.vocab} has "
                f"{self.vocab // 2 - 1}: give objective.vocab={2 * self.pairs + 2} or more"
            )


class Mqar(Task):
    """Multi-query associative recall: pairs of key and value, then every key once more, at which its value is asked.

    As in Zoology (2312.04927), but keys are at even places among filler that are drawn evenly, and in random order: by
    its power law the order of the keys tells some of the answers. Values of a row differ from each other: with equal
    ones among them, guessing would do better than one in `pairs`.
    """

    Config = MqarConfig
    name = "mqar"

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"pairs": 3, "vocab": 8}

    @property
    def vocab_size(self) -> int:
        """The filler and the keys, and as many values or one more."""
        return self.options.vocab

    def least_length(self) -> int:
        """The pairs, and a key at every other place."""
        return 4 * self.options.pairs

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n, half = self.options.pairs, self.vocab_size // 2
        tokens, answers = np.full(length, FILLER), np.full(length, NOT_ASKED)
        keys = tokens[0 : 2 * n : 2] = 1 + rng.choice(half - 1, n, replace=False)
        values = tokens[1 : 2 * n : 2] = half + rng.choice(self.vocab_size - half, n, replace=False)
        places = 2 * n + 2 * rng.choice(length // 2 - n, n, replace=False)
        tokens[places], answers[places] = keys, values
        return tokens, answers


@dataclass(frozen=True, kw_only=True)
class PhonebookConfig(TaskConfig):
    """Options of Phonebook."""

    letters: Annotated[int, Range(1, 8)] = 2
    """Letters of a name."""
    digits: Annotated[int, Range(1, 16)] = 3
    """Digits of a number."""


_LETTERS, _DIGITS = 26, 10


class Phonebook(Task):
    """Names and their numbers, as many entries as there is room for, and one of the names again: its number is asked.

    The digits are asked for one after the other, each after those before it (2402.01032). Here names are of
    random letters, no two of a row are the same, and numbers are of random digits.
    """

    Config = PhonebookConfig
    name = "phonebook"

    @property
    def vocab_size(self) -> int:
        """The filler, which also ends an entry, what stands between a name and its number, letters and digits."""
        return 2 + _LETTERS + _DIGITS

    @property
    def _asked(self) -> int:
        """Symbols of the question: a name, what follows it, and all digits but the last."""
        return self.options.letters + self.options.digits

    def least_length(self) -> int:
        """An entry and the question."""
        return self._asked + 2 + self._asked

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n_letters, n_digits = self.options.letters, self.options.digits
        n = min((length - self._asked) // (self._asked + 2), _LETTERS**n_letters)
        names = rng.choice(_LETTERS**n_letters, n, replace=False)[:, None]
        entries = np.full((n, self._asked + 2), FILLER)
        entries[:, :n_letters] = 2 + names // _LETTERS ** np.arange(n_letters) % _LETTERS
        entries[:, n_letters] = 1
        entries[:, n_letters + 1 : -1] = 2 + _LETTERS + rng.integers(_DIGITS, size=(n, n_digits))
        asked = entries[rng.integers(n)]
        tokens = np.concatenate([entries.ravel(), asked[:-2]])
        answers = np.full(len(tokens), NOT_ASKED)
        answers[-n_digits:] = asked[n_letters + 1 : -1]
        return tokens, answers


@dataclass(frozen=True, kw_only=True)
class MultiKeyConfig(TaskConfig):
    """Options of MultiKey."""

    needles: Several = 4
    """Needles in a row, of which one is asked for."""
    keys: Annotated[int, Range(1, 2**12)] = 32
    """Different keys."""
    values: Annotated[int, Range(2, 2**12)] = 16
    """Different values."""
    words: Annotated[int, Range(1, 2**12)] = 32
    """Different symbols that hide the needles."""

    def __post_init__(self) -> None:
        if self.needles > min(self.keys, self.values):
            raise ValueError(
                f"objective.needles={self.needles} need as many different keys and values, and there are "
                f"objective.keys={self.keys} and objective.values={self.values}: raise these"
            )


class MultiKey(Task):
    """Needles of a key and its value at random places in noise, and one of the keys at the end: its value is asked.

    The form that a small model can learn of "multi-key needle in a haystack" of RULER (2404.06654): symbols for
    words, random ones for the essay, and a marker for the sentence of a needle.
    """

    Config = MultiKeyConfig
    name = "multikey"

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"needles": 2, "values": 4}

    @property
    def vocab_size(self) -> int:
        """The filler, the marker, keys, values, and words."""
        return 2 + self.options.keys + self.options.values + self.options.words

    def least_length(self) -> int:
        """The needles, and the question."""
        return 3 * self.options.needles + 2

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n, n_keys, n_values = self.options.needles, self.options.keys, self.options.values
        keys = 2 + rng.choice(n_keys, n, replace=False)
        values = 2 + n_keys + rng.choice(n_values, n, replace=False)
        tokens, answers = rng.integers(2 + n_keys + n_values, self.vocab_size, length), np.full(length, NOT_ASKED)
        # the places of needles of three symbols are those of one symbol in a row that is shorter by the other two
        places = np.sort(rng.choice(length - 2 - 2 * n, n, replace=False)) + 2 * np.arange(n)
        tokens[places], tokens[places + 1], tokens[places + 2] = 1, keys, values
        asked = rng.integers(n)
        tokens[-2:], answers[-1] = (1, keys[asked]), values[asked]
        return tokens, answers


@dataclass(frozen=True, kw_only=True)
class VariableTrackingConfig(TaskConfig):
    """Options of VariableTracking."""

    chains: Several = 2
    """Values that are assigned to variables."""
    hops: Annotated[int, Range(0, 64)] = 2
    """Assignments from variable to variable after each."""
    values: Annotated[int, Range(2, 2**12)] = 16
    """Different values."""
    variables: Annotated[int, Range(1, 2**12)] = 32
    """Different variables."""

    def __post_init__(self) -> None:
        needed = self.chains * (self.hops + 1)
        if needed > self.variables or self.chains > self.values:
            raise ValueError(
                f"objective.chains={self.chains} with objective.hops={self.hops} need {needed} variables and "
                f"{self.chains} values, and there are objective.variables={self.variables} and "
                f"objective.values={self.values}: raise these"
            )


class VariableTracking(Task):
    """Values assigned to variables, and these to others; the value of a variable at the end of a chain is asked.

    The form that a small model can learn of "variable tracking" of RULER (2404.06654): an assignment is two
    symbols, the variable and what it gets, at random places among filler; values are assigned first, or what was
    assigned last before a variable would often be its value, and then the chains go on by turns. RULER asks for all
    variables of a value, which takes several answers.
    """

    Config = VariableTrackingConfig
    name = "variable_tracking"

    @classmethod
    def small(cls) -> dict[str, Any]:
        """See Task.small."""
        return {"hops": 1, "values": 4}

    @property
    def vocab_size(self) -> int:
        """The filler, the question mark, variables, and values."""
        return 2 + self.options.variables + self.options.values

    def least_length(self) -> int:
        """The assignments, and the question."""
        return 2 * self.options.chains * (self.options.hops + 1) + 2

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n, n_links, n_variables = self.options.chains, self.options.hops + 1, self.options.variables
        variables = 2 + rng.choice(n_variables, (n, n_links), replace=False)
        values = 2 + n_variables + rng.choice(self.options.values, n, replace=False)
        given = np.concatenate([values[:, None], variables[:, :-1]], axis=1)
        # which chain goes on at each of the places, in their order
        turns = np.append(rng.permutation(n), rng.permutation(np.repeat(np.arange(n), n_links - 1)))
        places = 2 * np.sort(rng.choice(length // 2 - 1, n * n_links, replace=False))
        tokens, answers = np.full(length // 2 * 2, FILLER), np.full(length // 2 * 2, NOT_ASKED)
        for chain in range(n):
            tokens[places[turns == chain]], tokens[places[turns == chain] + 1] = variables[chain], given[chain]
        asked = rng.integers(n)
        tokens[-2:], answers[-1] = (1, variables[asked, -1]), values[asked]
        return tokens, answers
