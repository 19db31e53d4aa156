"""The contract of objectives over their registry. A new objective is tested by being registered.

Each learns the data that its `example` writes, with a small model of each kind that it accepts. Values and gradients
are compared in float64 wherever one process computes them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crossover.files import read_json, read_json_lines
from crossover.train.checkpoint import newest
from crossover.train.evaluate import evaluate
from crossover.train.learner import Learner, Update, split_rows
from crossover.train.objective import Objective
from crossover.train.optim import adamw
from crossover.train.trainer import Trainer
from safetensors.torch import load_file
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.multiprocessing.spawn import spawn

from .objective_cases import FP32, Case, cases, in_two_processes, terms_and_gradient

CASES = list(cases())
# objectives that differ in their rows alone, as tasks do, have one computation between them
COMPUTED = list({(c.cls.terms, c.cls.collate, c.preset, str(c.options)): c for c in reversed(CASES)}.values())[::-1]
over_the_registry = pytest.mark.parametrize("case", CASES, ids=str)
over_what_computes = pytest.mark.parametrize("case", COMPUTED, ids=str)


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy that runs before a model has tests of its own."""
    monkeypatch.setattr("crossover.train.trainer.warm_up", lambda *_: None)


def tensors(objective: Objective[Any, Any], rows: Sequence[Any]) -> list[dict[str, Any]]:
    """Collates each row alone into what a model is given."""
    return [vars(objective.collate([row])) for row in rows]


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def differ(found: Any, expected: Any) -> bool:
    try:
        assert_same(found, expected)
    except AssertionError:
        return True
    return False


@over_the_registry
def test_rows_are_a_function_of_seed_and_step(case: Case, tmp_path: Path) -> None:
    states = itertools.count()

    def rows(step: int, seed: int = 0) -> list[dict[str, Any]]:
        objective = case.learner(tmp_path, seed=seed).objective
        objective.rows(step + 1)  # what was asked for before
        torch.manual_seed(next(states))  # and the generators of the process
        return tensors(objective, objective.rows(step))

    assert len(rows(4)) == 7
    assert_same(rows(4), rows(4))
    assert differ(rows(4), rows(5))
    assert differ(rows(4), rows(4, seed=1))


@over_the_registry
def test_the_rows_of_all_processes_make_the_batch(case: Case, tmp_path: Path) -> None:
    objective = case.learner(tmp_path).objective
    rows = objective.rows(2)
    shares = [tensors(objective, rows[rank::3]) for rank in range(3)]
    assert_same([shares[i % 3][i // 3] for i in range(len(rows))], tensors(objective, rows))
    assert sum(objective.n_tokens(rows[rank::3]) for rank in range(3)) == objective.n_tokens(rows)


@over_what_computes
def test_each_term_is_a_mean_over_its_count(case: Case, tmp_path: Path) -> None:
    learner = case.learner(tmp_path, balance=False)
    objective, draw = learner.objective, np.random.default_rng(0)
    rows = list(objective.rows(0))
    sums = []
    for n_parts in (1, 2, 3, 5):
        order, cuts = draw.permutation(len(rows)), np.sort(draw.choice(range(1, len(rows)), n_parts - 1, replace=False))
        total: dict[str, Tensor] = {}
        for part in np.split(order, cuts):
            batch = objective.collate([rows[i] for i in part])
            terms = learner(batch)
            assert terms.keys() == batch.counts.keys() >= objective.weights.keys()
            assert all(term.shape == () for term in terms.values())
            for name, count in batch.counts.items():
                for key, value in ((name, terms[name].detach() * count), (f"count of {name}", torch.tensor(count))):
                    total[key] = total.get(key, 0) + value
        sums.append(total)
    for total in sums[1:]:
        torch.testing.assert_close(total, sums[0], rtol=1e-6, atol=1e-6)  # the router of experts is in float32


@over_what_computes
def test_parts_give_the_gradient_of_the_whole(case: Case, tmp_path: Path) -> None:
    learner = case.learner(tmp_path, balance=False)
    rows = learner.objective.rows(0)
    whole = terms_and_gradient(learner, learner.objective, [rows])
    assert any(value.count_nonzero() > 10 for value in whole.values())
    for n_parts in (2, 3, 4):  # of seven rows, so that the last part is shorter
        parts = terms_and_gradient(learner, learner.objective, split_rows(rows, n_parts))
        torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-8)


def test_two_processes_give_the_gradient_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # by which processes find the function
    spawn(in_two_processes, (COMPUTED, tmp_path), nprocs=2)
    found = torch.load(tmp_path / "found.pt")
    assert len(found) == 2 * len(COMPUTED)
    assert {name: gap for name, gap in found.items() if not gap < 1e-5} == {}


@over_what_computes
def test_a_term_of_weight_zero_is_not_learned(case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learner = case.learner(tmp_path)
    objective = learner.objective
    rows, original, weights = objective.rows(0), objective.terms, objective.weights

    def gradient(name: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        def terms(model: Any, batch: Any) -> dict[str, Tensor]:
            found = original(model, batch)
            return found | {name: change(found[name])}

        monkeypatch.setattr(objective, "terms", terms)
        found = terms_and_gradient(learner, objective, [rows])
        return {key: value for key, value in found.items() if key != name}

    for name in objective.collate(rows).counts:
        monkeypatch.setattr(objective, "weights", {**weights, name: 0.0})
        assert_same(gradient(name, lambda term: 5 - 3 * term), gradient(name, lambda term: term))


@over_what_computes
def test_an_evaluation_does_not_depend_on_the_rows_at_once(case: Case, tmp_path: Path) -> None:
    learner = case.learner(tmp_path, balance=False)
    objective = learner.objective
    rows = objective.held_out(250)
    assert len(rows) > 3
    found = [
        evaluate(learner, objective, rows, precision=FP32, rows_at_once=rows_at_once)
        for rows_at_once in (len(rows), 1, 3)
    ]
    assert isinstance(found[0][objective.score.name], float)
    for values in found[1:]:
        assert values == pytest.approx(found[0], rel=1e-5)


@over_the_registry
def test_held_out_rows_are_fixed_fill_a_number_of_tokens_and_are_never_none(case: Case, tmp_path: Path) -> None:
    objective = case.learner(tmp_path).objective
    few, more = objective.held_out(100), objective.held_out(250)
    assert len(objective.held_out(1)) == 1
    assert 1 < len(few) < len(more)
    assert objective.n_tokens(few) <= 100
    assert objective.n_tokens(more) <= 250
    assert_same(tensors(objective, objective.held_out(250)), tensors(objective, more))


@over_the_registry
def test_what_a_resume_holds_fast_tells_objectives_and_options_apart(case: Case, tmp_path: Path) -> None:
    held = case.open(tmp_path)[1].experiment()
    assert json.loads(json.dumps(held)) == held
    assert held["kind"] == case.name
    default = dataclasses.replace(case, options={}).open(tmp_path / "data")[1].experiment()
    assert (held == default) == (case.options == {})


@over_what_computes
def test_a_resumed_run_is_the_run_that_was_never_stopped(case: Case, tmp_path: Path) -> None:
    def fit(out: str, steps: int) -> dict[str, Any]:
        settings: dict[str, Any] = {"steps": steps, "batch_size": 6, "grad_accumulation": 2, "eval_every": 3}
        run, objective = case.open(tmp_path / out, **settings)
        torch.manual_seed(len(out) + steps)  # a new process starts with other generators
        assert Trainer(run, objective).fit().exit_code == 0
        latest, result = newest(run.directory / "checkpoints"), read_json(run.directory / "result.json")
        assert latest is not None
        logged = [
            {key: value for key, value in line.items() if key != "seconds" and not key.startswith("perf/")}
            for line in read_json_lines(run.directory / "metrics.jsonl")
        ]
        results = {key: value for key, value in result.items() if key.startswith("val_") or key in ("tokens", "sample")}
        assert results[objective.score.key] is not None
        weights, state = (load_file(latest / f"{name}.safetensors") for name in ("model", "optimizer"))
        return {"metrics": logged, "results": results, "weights": weights, "optimizer": state}

    whole, half = fit("whole", 6), fit("parts", 3)
    assert differ(half["weights"], whole["weights"])
    parts = fit("parts", 6)
    assert (parts["metrics"], parts["results"]) == (whole["metrics"], whole["results"])
    for kind in ("weights", "optimizer"):
        assert_same(parts[kind], whole[kind])


@over_the_registry
def test_a_model_learns_it(case: Case, tmp_path: Path) -> None:
    run, _ = case.open(tmp_path)
    learner = case.learner(tmp_path, dtype=torch.float32)
    objective, optimizer = learner.objective, adamw(learner, run.optim)
    update = Update(learner, objective, optimizer, precision=FP32, clip=1.0)
    losses = [update([objective.collate(objective.rows(step))], lr=1e-2)["loss"] for step in range(40)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:3])


# that each architecture can be traced is tested with the architectures
@pytest.mark.parametrize("case", [case for case in COMPUTED if case.preset != "jamba"], ids=str)
def test_batches_of_other_counts_run_the_same_graph(case: Case, tmp_path: Path) -> None:
    torch._dynamo.reset()
    learner: Learner = case.learner(tmp_path, dtype=torch.float32)
    batch, counter = learner.objective.collate(learner.objective.rows(0)), CompileCounter()
    compiled = torch.compile(learner, fullgraph=True, backend=counter)
    expected = learner(batch)
    for more in range(3):
        counts = {name: count + more for name, count in batch.counts.items()}
        torch.testing.assert_close(compiled(dataclasses.replace(batch, counts=counts)), expected)
    assert counter.frame_count == 1
