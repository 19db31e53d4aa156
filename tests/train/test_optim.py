import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from crossover.archs import build
from crossover.train.config import OptimConfig
from crossover.train.optim import adamw, learning_rate, param_groups, set_learning_rate
from torch import nn

pytestmark = pytest.mark.quick


class Recurrence(nn.Module):
    """A layer with exceptions, as mixers state them."""

    no_weight_decay = frozenset({"A_log"})
    lr_scale: Mapping[str, float] = {"dt": 0.1}

    def __init__(self) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.zeros(4, 2))
        self.dt = nn.Parameter(torch.zeros(4))
        self.proj = nn.Linear(4, 4)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Recurrence(), Recurrence()])
        self.head = nn.Linear(4, 8, bias=False)
        self.head.weight = self.embedding.weight


def by_name(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """(weight decay, rate scale) of each parameter; fails where one is listed twice."""
    listed = [(name, (group["weight_decay"], group["lr_scale"])) for group in groups for name, _ in group["params"]]
    assert len(listed) == len(dict(listed))
    return dict(listed)


def test_groups_follow_the_names_that_classes_give() -> None:
    expected = {"embedding.weight": (0.1, 1.0)}
    for i in range(2):
        expected |= {
            f"layers.{i}.A_log": (0.0, 1.0),
            f"layers.{i}.dt": (0.0, 0.1),
            f"layers.{i}.proj.weight": (0.1, 1.0),
            f"layers.{i}.proj.bias": (0.0, 1.0),
        }
    assert by_name(param_groups(Tied(), 0.1)) == expected


@pytest.mark.parametrize("arch", ["transformer", "s4d", "mamba", "jamba", "lstm"])
def test_every_parameter_of_every_architecture_is_in_one_group(arch: str) -> None:
    model = build(arch, d_model=32, n_layers=8 if arch == "jamba" else 2, vocab_size=16)
    modules = dict(model.named_modules())
    expected = {}
    for name, parameter in model.named_parameters():
        owner, _, own = name.rpartition(".")
        exempt = parameter.ndim < 2 or own in getattr(modules[owner], "no_weight_decay", ())
        expected[name] = (0.0 if exempt else 0.1, getattr(modules[owner], "lr_scale", {}).get(own, 1.0))
    assert by_name(param_groups(model, 0.1)) == expected
    assert {decay for decay, _ in expected.values()} == {0.0, 0.1}


def test_groups_survive_deepcopy_and_meta() -> None:
    before = by_name(param_groups(Tied(), 0.1))
    assert by_name(param_groups(copy.deepcopy(Tied()), 0.1)) == before
    with torch.device("meta"):
        assert by_name(param_groups(Tied(), 0.1)) == before


def test_a_tied_parameter_is_exempt_where_one_owner_says_so() -> None:
    model = Tied()
    model.layers[1].proj.weight = model.layers[0].A_log = nn.Parameter(torch.zeros(4, 4))  # pyright: ignore
    assert by_name(param_groups(model, 0.1))["layers.0.A_log"] == (0.0, 1.0)


def test_owners_that_disagree_about_the_rate_are_an_error() -> None:
    model = Tied()
    model.layers[1].proj.bias = model.layers[0].dt  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match=r"layers\.0\.dt is tied to layers\.1\.proj\.bias with another lr_scale"):
        param_groups(model, 0.1)


def test_frozen_parameters_are_left_out() -> None:
    model = Tied()
    model.embedding.weight.requires_grad_(False)
    assert "embedding.weight" not in by_name(param_groups(model, 0.1))


def test_an_update_decays_matrices_only_and_scales_the_rate() -> None:
    model = Recurrence()
    nn.init.ones_(model.proj.weight)
    nn.init.ones_(model.A_log)
    optimizer = adamw(model, OptimConfig(weight_decay=0.5))
    set_learning_rate(optimizer, 1e-2)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    model.dt.grad = torch.ones_like(model.dt)
    optimizer.step()
    torch.testing.assert_close(model.proj.weight, torch.full((4, 4), 1 - 1e-2 * 0.5))
    torch.testing.assert_close(model.A_log, torch.ones(4, 2))
    torch.testing.assert_close(model.dt, torch.full((4,), -1e-3))  # the first update of Adam is the rate itself


def rates(steps: int, **options: Any) -> list[float]:
    config = OptimConfig(**options)
    return [learning_rate(step, peak=2.0, steps=steps, config=config) for step in range(steps)]


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
def test_warm_up_rises_in_equal_steps_to_the_peak(schedule: str) -> None:
    assert rates(40, schedule=schedule, warmup=0.1)[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])


def test_cosine_falls_to_its_floor_at_the_last_step() -> None:
    values = rates(100, schedule="cosine", warmup=0.0, min_lr_ratio=0.1)
    assert values[49] == pytest.approx((2.0 + 0.2) / 2)  # half way
    assert values[24] == pytest.approx(0.2 + 1.8 * (1 + math.cos(math.pi / 4)) / 2)
    assert values[-1] == pytest.approx(0.2)
    assert values == sorted(values, reverse=True)


def test_wsd_stays_at_the_peak_and_then_falls_in_equal_steps() -> None:
    values = rates(100, schedule="wsd", warmup=0.05, decay=0.2, min_lr_ratio=0.0)
    assert values[5:80] == [2.0] * 75
    assert values[80:] == pytest.approx([2.0 * (1 - (i + 1) / 20) for i in range(20)])


def test_constant_stays_at_the_peak() -> None:
    assert rates(20, schedule="constant", warmup=0.0) == [2.0] * 20


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "constant"])
@pytest.mark.parametrize("steps", [1, 2, 3, 7])
def test_short_runs_have_rates_too(schedule: str, steps: int) -> None:
    values = rates(steps, schedule=schedule)
    assert all(0 < value <= 2.0 for value in values)


def test_a_run_of_warm_up_only_ends_at_the_peak() -> None:
    assert rates(10, warmup=1.0)[-1] == 2.0


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.Adafactor])
def test_any_optimizer_and_schedule_honours_the_scales_of_groups_with_a_rate(optimizer: type) -> None:
    model = build("s4d", d_model=16, n_layers=1)
    groups = param_groups(model, 0.1, lr=0.02)
    assert {group["lr"] / group["lr_scale"] for group in groups} == {0.02}
    assert {group["lr_scale"] for group in groups} == {1.0, 0.25}
    made = optimizer(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda step: 0.5**step)
    made.step()
    schedule.step()
    assert [group["lr"] for group in made.param_groups] == [0.01 * group["lr_scale"] for group in groups]
    assert all("lr" not in group for group in param_groups(model, 0.1))
