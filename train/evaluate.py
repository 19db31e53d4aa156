"""The only evaluation loop there is: means of an objective's terms over held-out rows, then its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from .objective import Objective
from .runtime import Precision

__all__ = ["evaluate", "evaluating"]


@contextlib.contextmanager
def evaluating(model: nn.Module, precision: Precision) -> Iterator[None]:
    """Runs the block without gradients, in evaluation mode and in the arithmetic of training, and restores the mode."""
    was_training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), precision.autocast(device):
            yield
    finally:
        model.train(was_training)


def evaluate(
    learner: nn.Module,
    objective: Objective[Any, Any],
    rows: Sequence[Any],
    *,
    precision: Precision,
    rows_at_once: int,
    poll: Callable[[], None] = lambda: None,
) -> dict[str, float]:
    """The metrics of held-out rows.

    Args:
        learner: a Learner, wrapped or not.
        objective: its objective.
        rows: held-out rows, as `objective.held_out` gives them.
        precision: arithmetic of the forward pass.
        rows_at_once: rows of one forward pass.
        poll: called before each forward pass; stops the evaluation by raising.
    """
    device = next(learner.parameters()).device
    sums: dict[str, float] = {}
    counts: dict[str, int] = {}
    with evaluating(learner, precision):
        for first in range(0, len(rows), rows_at_once):
            poll()
            batch = objective.collate(rows[first : first + rows_at_once])
            for name, mean in learner(batch.to(device)).items():
                if batch.counts[name]:  # the mean over nothing may be NaN
                    sums[name] = sums.get(name, 0.0) + mean.item() * batch.counts[name]
                    counts[name] = counts.get(name, 0) + batch.counts[name]
    return objective.metrics({name: total / counts[name] for name, total in sums.items()}, rows)
