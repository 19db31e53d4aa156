"""A model with its objective, and one update of it: what trains, what warms up and what is timed."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..archs import States
from .finite import NonFiniteError
from .objective import Batch, Objective
from .optim import set_learning_rate
from .runtime import Precision

__all__ = ["Learner", "Update", "accumulate_gradients", "split_rows"]


class Learner(nn.Module):
    """The module that DDP wraps, FSDP2 shards and torch.compile compiles: their hooks run in `forward` alone."""

    def __init__(self, model: nn.Module, objective: Objective[Any, Any]) -> None:
        super().__init__()
        self.model = model
        self.objective = objective

    def forward(self, batch: Batch, state: States | None = None) -> Any:
        """The mean of each term of the objective, a dict; given a state, from there on, and the state after it."""
        if state is None:
            return self.objective.terms(self.model, batch)
        return self.objective.terms_from(self.model, batch, state)


def split_rows(rows: Sequence[Any], n_parts: int) -> list[Sequence[Any]]:
    """Rows in at most `n_parts` runs of equal length, the last one perhaps shorter."""
    size = -(-len(rows) // n_parts)
    return [rows[i : i + size] for i in range(0, len(rows), size)]


def accumulate_gradients(
    learner: nn.Module,
    objective: Objective[Any, Any],
    batches: Sequence[Batch],
    *,
    precision: Precision,
    world: int = 1,
    states: list[States] | None = None,
) -> dict[str, Tensor]:
    """Leaves the gradient of the whole batch, over all processes, in the parameters.

    Args:
        learner: a Learner, wrapped or not; its gradients are empty.
        objective: its objective.
        batches: the parts that this process has, run one after the other, to hold the activations of one at a time.
        precision: arithmetic of the forward pass.
        world: number of processes that share the batch; each has at least one part, and all have as many.
        states: what each part goes on from, in whose place the state after it is put; no gradient goes through it.

    Returns:
        The mean of each term over the whole batch, on the device.
    """
    device = next(learner.parameters()).device
    names = list(batches[0].counts)
    counts = torch.tensor([[batch.counts[name] for name in names] for batch in batches], dtype=torch.float64).sum(0)
    if world > 1:
        counts = _summed(counts.to(device))
    totals = dict(zip(names, counts.tolist(), strict=True))
    learned = {name: weight for name in names if (weight := objective.weights.get(name, 1.0))}
    means = {name: torch.zeros((), device=device) for name in names}
    for i, batch in enumerate(batches):
        _sync_gradients(learner, i == len(batches) - 1)
        with precision.autocast(device):
            if states is None:
                terms = learner(batch.to(device))
            else:
                terms, after = learner(batch.to(device), states[i])
                states[i] = after.detach()
        shares = {name: terms[name] * (batch.counts[name] / max(totals[name], 1)) for name in names}
        loss = sum((weight * shares[name] for name, weight in learned.items()), torch.zeros((), device=device))
        # also of a share that is zero: the wrappers of other processes wait for this one's gradient
        if loss.requires_grad:
            (loss * world).backward()  # wrappers average over processes
        means = {name: means[name] + share.detach() for name, share in shares.items()}
    if world > 1:
        summed = _summed(torch.stack(list(means.values())))
        means = dict(zip(names, summed.unbind(), strict=True))
    return means


class Update:
    """Makes one update, as in training and for timing: accumulate, clip, refuse what is not finite, step, clear."""

    def __init__(
        self,
        learner: nn.Module,
        objective: Objective[Any, Any],
        optimizer: torch.optim.Optimizer,
        *,
        precision: Precision,
        clip: float,
        world: int = 1,
    ) -> None:
        """Takes a Learner, wrapped or not, and its optimizer; `clip` bounds the norm of the gradient, 0 does not."""
        self._learner, self._objective, self._optimizer = learner, objective, optimizer
        self._precision, self._clip, self._world = precision, clip, world

    def __call__(
        self,
        batches: Sequence[Batch],
        lr: float,
        states: list[States] | None = None,
        *,
        look: Callable[[], None] | None = None,
    ) -> dict[str, float]:
        """Makes one update on the parts of a batch, with `states` as in `accumulate_gradients`.

        `look` is called when gradients are there, before they are clipped.

        Returns:
            The mean of each term, "loss" (the weighted sum, where no term has that name), and "grad_norm", the norm
            before clipping: read back from the device at once.

        Raises:
            NonFiniteError: before the update, if any of these is not finite.
        """
        set_learning_rate(self._optimizer, lr)
        means = accumulate_gradients(
            self._learner, self._objective, batches, precision=self._precision, world=self._world, states=states
        )
        if look is not None:
            look()
        norm = nn.utils.clip_grad_norm_(self._learner.parameters(), self._clip or math.inf)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # pyright: ignore[reportAttributeAccessIssue]
        found = torch.stack([value.to(norm.dtype) for value in (*means.values(), norm)]).tolist()
        values = dict(zip((*means, "grad_norm"), found, strict=True))
        if "loss" not in values:
            values["loss"] = sum(self._objective.weights.get(name, 1.0) * values[name] for name in means)
        # All: a NaN weight can leave the gradients finite, and a finite loss can have an infinite gradient.
        if not all(map(math.isfinite, values.values())):
            raise NonFiniteError(f"the loss is {values['loss']:.4g} and the gradient norm {values['grad_norm']:.4g}")
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return values


def _summed(values: Tensor) -> Tensor:
    """Values added over all processes."""
    dist.all_reduce(values)
    return values


def _sync_gradients(learner: Any, is_last: bool) -> None:
    """Tells a wrapper to average gradients over processes after the last part only."""
    if hasattr(learner, "set_requires_gradient_sync"):  # FSDP2
        learner.set_requires_gradient_sync(is_last)
    elif hasattr(learner, "require_backward_grad_sync"):  # DDP, whose no_sync() sets the same
        learner.require_backward_grad_sync = is_last
