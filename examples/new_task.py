"""Adds a task of recall and trains a small model on it: `python examples/new_task.py`.

In this folder commands take it too: `crossover train --import new_task --objective newest --train.seq-len 33`, and
`crossover bench recall --import new_task --tasks newest` sets nine models against each other on it.

The task is to follow variables that are set again and again: of pairs of a variable and its value, the value that the
variable at the end has had last is asked for.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from crossover.archs import build
from crossover.train import TrainConfig, register_objective
from crossover.train.objectives.recall import NOT_ASKED, Row, Task, TaskConfig


@dataclass(frozen=True, kw_only=True)
class NewestConfig(TaskConfig):
    """Options of Newest."""

    variables: int = 3
    """Different variables."""
    values: int = 6
    """Different values."""


class Newest(Task):
    """The last value of a variable that has had several."""

    Config = NewestConfig
    name = "newest"

    @property
    def vocab_size(self) -> int:
        """The filler, which this task has no use for, variables, and values."""
        return 1 + self.options.variables + self.options.values

    def least_length(self) -> int:
        """Every variable with a value, and one of them again."""
        return 2 * self.options.variables + 1

    def row(self, rng: np.random.Generator, length: int) -> Row:
        """See Task.row."""
        n_pairs, n = (length - 1) // 2, self.options.variables
        variables = np.concatenate([np.arange(n), rng.integers(n, size=n_pairs - n)])
        rng.shuffle(variables)
        values = rng.integers(self.options.values, size=n_pairs)
        asked = rng.integers(n)
        tokens = np.append(np.stack([1 + variables, 1 + n + values], axis=1).ravel(), 1 + asked)
        answers = np.full(len(tokens), NOT_ASKED)
        answers[-1] = 1 + n + values[np.flatnonzero(variables == asked)[-1]]
        return tokens, answers


register_objective("newest", Newest)


def main() -> None:
    """Shows a row, and what a model makes of the task."""
    torch.manual_seed(0)
    options: Any = NewestConfig()
    task = Newest(options, seed=0, train=TrainConfig(seq_len=13, batch_size=128))
    tokens, answers = task.row(np.random.default_rng(0), 13)
    print(f"{' '.join(map(str, tokens))} -> {answers[-1]}")

    lm = build("lstm", d_model=64, n_layers=1, vocab_size=task.vocab_size)
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for step in range(200):
        terms = task.terms(lm, task.collate(task.rows(step)))
        optimizer.zero_grad()
        terms["loss"].backward()
        optimizer.step()
    with torch.no_grad():
        found = task.terms(lm, task.collate(task.held_out(10_000)))
    print(f"{found['accuracy']:.3f} of the answers are right; {task.floor(13):.3f} without recall")


if __name__ == "__main__":
    main()
