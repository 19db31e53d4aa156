"""One update: what is learned, and from how many."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import pytest
import torch
from crossover.train.learner import Learner, accumulate_gradients, split_rows
from crossover.train.objective import Batch, Objective
from crossover.train.runtime import choose_precision
from torch import Tensor, nn

pytestmark = pytest.mark.quick
FP32 = choose_precision("fp32", torch.device("cpu"))


class Numbers(Objective[float, Batch]):
    """The mean of scale x over the positive rows; the square root of its variance is recorded."""

    weights: ClassVar[Mapping[str, float]] = {"spread": 0.0}

    @classmethod
    def load(cls, run: Any, options: Any, *, progress: bool = False) -> "Numbers":
        raise NotImplementedError

    def rows(self, step: int) -> Sequence[float]:
        return [1.0, 2.0, -1.0, -2.0, 4.0]

    def held_out(self, max_tokens: int) -> Sequence[float]:
        return self.rows(0)

    def collate(self, rows: Sequence[float]) -> Batch:
        self.x = torch.tensor([row for row in rows if row > 0])
        return Batch(counts={"loss": len(self.x), "spread": len(self.x)})

    def terms(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        y = model.weight.flatten() * self.x
        mean = y.sum() / max(len(y), 1)
        return {"loss": mean, "spread": (y - y).square().sum().sqrt()}  # whose gradient is NaN

    def n_tokens(self, rows: Sequence[float]) -> int:
        return len(rows)

    def experiment(self) -> dict[str, Any]:
        return {"kind": "numbers"}


@pytest.mark.parametrize("n_parts", [1, 2, 5])
def test_parts_without_a_row_that_counts_add_nothing(n_parts: int) -> None:
    model, objective = nn.Linear(1, 1, bias=False), Numbers()
    learner = Learner(model, objective)
    gradient, loss = torch.zeros(1, 1), 0.0
    for part in split_rows(objective.rows(0), n_parts):  # apart, as the example remembers its last batch
        batch = objective.collate(part)
        whole = 3
        means = accumulate_gradients(learner, objective, [batch], precision=FP32)
        assert model.weight.grad is not None
        gradient += model.weight.grad * batch.counts["loss"] / whole
        loss += means["loss"].item() * batch.counts["loss"] / whole
        model.zero_grad()
    torch.testing.assert_close(gradient, torch.full((1, 1), 7 / 3))
    assert loss == pytest.approx(model.weight.item() * 7 / 3)


def test_a_term_of_weight_zero_is_recorded_and_its_gradient_is_never_taken() -> None:
    model, objective = nn.Linear(1, 1, bias=False), Numbers()
    batch = objective.collate([1.0, 3.0])
    means = accumulate_gradients(Learner(model, objective), objective, [batch], precision=FP32)
    assert means["spread"].item() == 0.0
    assert model.weight.grad is not None
    assert model.weight.grad.item() == pytest.approx(2.0)
