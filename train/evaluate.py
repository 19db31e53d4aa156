"""The only evaluation loop there is: means of an objective's terms over held-out rows, then its metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import States
from .finite import NonFiniteError, check_finite, first_bad_weight
from .objective import Batch, Objective
from .runtime import Precision

__all__ = ["evaluate", "evaluating", "origin"]


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

    Raises:
        NonFiniteError: naming the quantity and where it began, if a number is not finite.
        ValueError: if no row has anything to be judged by.
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
                    value = mean.item()
                    if not math.isfinite(value):
                        raise NonFiniteError(f"held-out {name} is {value}{origin(learner, batch, precision)}")
                    sums[name] = sums.get(name, 0.0) + value * batch.counts[name]
                    counts[name] = counts.get(name, 0) + batch.counts[name]
    if not sums:
        raise ValueError(f"{len(rows)} held-out rows have nothing to be judged by: hold out more")
    found = objective.metrics({name: total / counts[name] for name, total in sums.items()}, rows)
    check_finite(found, "held-out")
    return found


def origin(learner: nn.Module, batch: Batch, precision: Precision, state: States | None = None) -> str:
    """Says in parentheses where a Learner makes a number of a batch that is not finite; empty where it makes none.

    `state` is what the batch went on from, which this consumes.
    """
    if (name := first_bad_weight(learner)) is not None:
        return f" (the weights of {name} are not finite)"
    names: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, given: Any, made: Any) -> None:
            parts = made if isinstance(made, tuple) else (made,)
            if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in parts):
                names.append(name)

        return look

    hooks = [module.register_forward_hook(watch(name)) for name, module in learner.named_modules() if name]
    try:
        with evaluating(learner, precision):
            learner(batch.to(next(learner.parameters()).device), state)
    finally:
        for hook in hooks:
            hook.remove()
    return f" (activations of {names[0]} go beyond float range)" if names else ""
