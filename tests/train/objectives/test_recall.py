"""Tasks of recall: every answer follows from what stands before it, and without recall there is only a floor."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crossover.files import read_json
from crossover.train.config import DataConfig, ModelSpec, ObjectiveSpec, RunConfig, TrainConfig
from crossover.train.data import DataError
from crossover.train.data.tokenizer import load_tokenizer
from crossover.train.objectives import open_objective
from crossover.train.objectives.recall import TASKS, Task
from crossover.train.objectives.recall.needle import Needle
from crossover.train.trainer import Trainer
from torch import Tensor

pytestmark = pytest.mark.quick

ALL = pytest.mark.parametrize("name", TASKS)
ASKED = -100


TEXTS: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _texts(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Documents for the one task that needs them."""
    TEXTS[:] = [tmp_path_factory.mktemp("texts")]
    for i in range(40):
        (TEXTS[0] / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 12)


def data(name: str, **options: Any) -> DataConfig:
    return DataConfig(**options, **({"source": str(TEXTS[0]), "val_fraction": 0.25} if name == "needle" else {}))


def task(name: str, length: int = 64, **options: Any) -> Task:
    objective = open_objective(run(name, length, **options))
    assert isinstance(objective, Task)
    return objective


def run(name: str, length: int, folder: Path = Path("runs"), **options: Any) -> RunConfig:
    return RunConfig(
        name="run",
        out=folder,
        model=ModelSpec(preset="gpt2", d_model=32, n_layers=1, set=(f"max_positions={2 * length}",)),
        data=data(name),
        objective=ObjectiveSpec(kind=name, options=options),
        train=TrainConfig(batch_size=5, seq_len=length, steps=2, sample_tokens=16, final_eval_tokens=400),
    )


# How each task is solved by one who has read a row up to the position where it is asked.


def value_after(before: list[int], key: list[int]) -> int:
    """What stood after the only earlier place of a key."""
    n = len(key)
    (place,) = [i for i in range(len(before) - n) if before[i : i + n] == key]
    return before[place + n]


def solve(t: Task, before: list[int]) -> int:
    last, options = before[-1], t.options
    if t.name == "mqar":
        return value_after(before, [last])
    if t.name in ("copying", "palindrome"):
        cut = before.index(t.vocab_size - 1)
        string, n_told = before[:cut], len(before) - cut - 1
        return string[n_told] if t.name == "copying" else string[-1 - n_told]
    if t.name == "selective_copying":
        n_asked = before.count(t.vocab_size - 1)
        return [symbol for symbol in before if 0 < symbol < t.vocab_size - 1][n_asked - 1]
    if t.name == "induction":
        return value_after(before, [last])
    if t.name == "parity":
        return 1 + before.count(2) % 2
    if t.name == "word_problem":
        every = list(itertools.permutations(range(options.things)))
        at = list(range(options.things))  # where each thing is
        for symbol in before:
            at = [every[symbol - 1][place] for place in at]
        return 1 + every.index(tuple(at))
    if t.name == "stack":
        stacks = collections.defaultdict(list)
        for act, symbol in zip(before[:-1:2], before[1::2], strict=True):
            if act <= options.stacks:
                stacks[act].append(symbol)
            else:
                assert stacks[act - options.stacks].pop() == symbol
        return stacks[last - options.stacks][-1]
    if t.name == "phonebook":
        colon = len(before) - 1 - before[::-1].index(1)
        return value_after(before, before[colon - options.letters :])
    if t.name == "multikey":
        return value_after(before, [1, last])
    if t.name == "needle":
        text = t.data.tokenizer.decode(before)
        told, question = text.rpartition(" The ")[::2]
        key, _, digits = question.partition(" is ")
        return ord(told.partition(f" The {key} is ")[2][len(digits)])
    assert t.name == "variable_tracking"
    given = {name: value for name, value in zip(before[:-2:2], before[1:-2:2], strict=True) if name}
    while last < 2 + options.variables:
        last = given[last]
    return last


@ALL
@pytest.mark.parametrize("length", [64, 77])
def test_every_answer_follows_from_what_was_read(name: str, length: int) -> None:
    t = task(name, length)
    rows = [row for step in range(3) for row in t.rows(step)] + t.held_out(640)
    lengths = set()
    for tokens, answers in rows:
        assert len(tokens) == len(answers) <= length
        assert 0 <= tokens.min() <= tokens.max() < t.vocab_size
        asked = np.flatnonzero(answers != ASKED)
        assert len(asked)
        assert [solve(t, tokens[: i + 1].tolist()) for i in asked] == answers[asked].tolist()
        lengths.add(len(tokens))
    assert max(lengths) > length - 8  # and rows are as long as they can be


@ALL
def test_rows_fit_any_length_from_the_shortest(name: str) -> None:
    t = task(name)
    for length in range(t.least_length(), t.least_length() + 9):
        tokens, answers = t.row(np.random.default_rng(length), length)
        assert len(tokens) <= length
        assert (answers != ASKED).any()


def most_common_share(n: int, symbols: int) -> float:
    """The mean share of the most frequent of n symbols that are drawn at random."""

    def none_above(most: int) -> float:
        ways = np.zeros(n + 1)  # of so many draws, over the product of factorials
        ways[0] = 1
        for _ in range(symbols):
            ways = np.convolve(ways, [1 / math.factorial(i) for i in range(most + 1)])[: n + 1]
        return ways[n] * math.factorial(n) / symbols**n

    return sum(1 - none_above(most) for most in range(n)) / n


@pytest.mark.parametrize(
    ("name", "length", "floor", "n_answers"),
    [
        ("mqar", 64, 1 / 8, 8),
        ("mqar", 1024, 1 / 8, 8),
        ("selective_copying", 54, most_common_share(6, 10), 1),
        ("copying", 24, most_common_share(12, 26), 1),
        ("palindrome", 24, most_common_share(12, 26), 1),
        ("induction", 40, most_common_share(38, 16), 1),
        ("parity", 10, 1 / 2 + 1 / 20, 4),
        ("word_problem", 30, (1 + 29 / 120) / 30, 1),
        ("multikey", 64, 1 / 4, 1),
        ("stack", 64, 0.327, 4),
        ("variable_tracking", 64, 1 / 2, 1),
    ],
)
def test_without_recall_no_more_than_the_floor_can_be_had(name: str, length: int, floor: float, n_answers: int) -> None:
    found = task(name).floor(length)
    error = math.sqrt(
        floor * (1 - floor) / (512 * n_answers)
    )  # answers of a row that depend on each other count as one
    assert abs(found - floor) < 3.5 * error


def test_floors_know_symbols_that_are_rarely_an_answer() -> None:
    assert task("multikey", values=4096).floor(64) == pytest.approx(1 / 4, abs=0.06)
    assert task("variable_tracking", values=4096).floor(64) == pytest.approx(1 / 2, abs=0.08)


def test_a_value_is_not_told_by_its_place() -> None:
    t, right, n_rows = task("variable_tracking", 32, hops=1), 0, 600
    for tokens, answers in (t.row(np.random.default_rng(i), 32) for i in range(n_rows)):
        place = int(np.flatnonzero(tokens[:-2:2] == tokens[-1])[0])
        given = [int(value) for value in tokens[1 : 2 * place : 2] if value >= 2 + t.options.variables]
        right += given[-1] == answers[-1]  # what was assigned last before the variable
    assert abs(right / n_rows - 1 / 2) < 3.5 * math.sqrt(1 / 4 / n_rows)


@ALL
def test_floors_are_far_from_what_recall_reaches(name: str) -> None:
    assert 0 < task(name).floor(64) < 0.6


@ALL
def test_what_is_judged_was_never_learned_from(name: str) -> None:
    t = task(name)
    learned = {row[0].tobytes() for step in range(20) for row in t.rows(step)}
    judged = [row[0].tobytes() for row in t.held_out(64 * 20)]
    assert not learned & set(judged)
    tuned = open_objective(
        RunConfig(objective=ObjectiveSpec(kind=name), data=data(name, held_out="tuning"), train=t.train)
    )
    assert not {row[0].tobytes() for row in tuned.held_out(64 * 20)} & {*learned, *judged}


@pytest.mark.parametrize(
    ("name", "length", "options", "said"),
    [
        ("mqar", 31, {}, "mqar with pairs=8, vocab=64 needs rows of 32 symbols, more than train.seq_len=31: raise"),
        ("mqar", 64, {"pairs": 40}, "pairs=40 needs as many different keys.*has 31: give objective.vocab=82 or more"),
        ("multikey", 64, {"needles": 20}, "needles=20 need as many different keys and values.*values=16: raise these"),
        ("variable_tracking", 64, {"chains": 17}, "need 51 variables and 17 values.*variables=32"),
        ("stack", 64, {"stacks": 0}, "objective.stacks=0 must be at least 1"),
        ("parity", 2, {}, "parity needs rows of 3"),
        ("multikey", 64, {"needles": 1}, "objective.needles=1 must be at least 2"),
        ("copying", 64, {"longest": 100}, "objective.longest=100 must be at most 64"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(name: str, length: int, options: dict[str, Any], said: str) -> None:
    def opened() -> None:
        t = task(name, length, **options)
        t.check(run(name, length).model.configure(t.vocab_size))

    with pytest.raises(ValueError, match=said) as refused:
        opened()
    assert "\n" not in str(refused.value)


def test_a_task_takes_no_data_and_no_encoder() -> None:
    with pytest.raises(DataError, match="the task mqar makes its own rows: leave --data text out"):
        open_objective(RunConfig(objective=ObjectiveSpec(kind="mqar"), data=DataConfig(source="text")))
    t = task("mqar")
    with pytest.raises(ValueError, match="of kind encoder, and the objective is for decoders"):
        t.check(ModelSpec(preset="bert", d_model=32, n_layers=1).configure(t.vocab_size))


def test_a_run_is_tested_at_multiples_of_its_length_as_far_as_positions_go(tmp_path: Path) -> None:
    config = run("mqar", 32, tmp_path, longest=4, test_rows=3)
    assert Trainer(config, open_objective(config)).fit().exit_code == 0
    result, info = (read_json(config.directory / name) for name in ("result.json", "run.json"))
    tested = result["accuracy_by_length"]
    assert "accuracy_by_depth" not in result
    assert [entry["context_len"] for entry in tested] == [32, 64, 128]
    assert [entry["status"] for entry in tested] == ["done", "done", "beyond_positions"]
    assert [entry.get("n_answers") for entry in tested] == [24, 24, None]
    assert all(0 <= entry["accuracy"] <= 1 for entry in tested[:2])
    assert 0 <= result["val_accuracy"] <= 1
    assert info["corpus"]["made"] == "rows that are made as they are needed (pairs 8, vocab 64)"
    assert result["sample"].startswith("answered ")
    tokenizer = load_tokenizer(config.directory)
    assert tokenizer.vocab_size == 64
    assert tokenizer.encode(tokenizer.decode([3, 63, 0])).tolist() == [3, 63, 0]


def test_lengths_that_rows_do_not_fill_are_said_to_be(tmp_path: Path) -> None:
    config = run("phonebook", 64, tmp_path, letters=1, longest=4, test_rows=3)
    config = dataclasses.replace(config, model=ModelSpec(preset="lstm", d_model=16, n_layers=1))
    assert Trainer(config, open_objective(config)).fit().exit_code == 0
    tested = read_json(config.directory / "result.json")["accuracy_by_length"]
    assert [entry["status"] for entry in tested] == ["done", "done", "rows_are_shorter"]  # of 26 names


def test_a_needle_is_tested_at_every_depth_of_held_out_text(tmp_path: Path) -> None:
    config = run("needle", 80, tmp_path, longest=1, test_rows=4)
    objective = open_objective(config)
    assert isinstance(objective, Needle)
    assert Trainer(config, objective).fit().exit_code == 0
    result = read_json(config.directory / "result.json")
    assert [entry["depth"] for entry in result["accuracy_by_depth"]] == [0, 0.25, 0.5, 0.75, 1]
    held_out = objective.corpus.val.tobytes()
    for tokens, _ in objective.held_out(80 * 30):
        around = objective.data.tokenizer.to_bytes(tokens)
        before, behind, _ = re.split(rb" The [a-z]{3} is (?:\d{3}\. )?", around, maxsplit=2)
        assert before in held_out
        assert behind in held_out


def test_answers_that_are_right_count_as_right() -> None:
    t = task("mqar")
    batch = t.collate(t.rows(0))

    class Model:
        """Answers 50 where that or a greater symbol is right, and is right elsewhere."""

        def hidden(self, tokens: Tensor) -> tuple[Tensor, None, Tensor]:
            return tokens, None, torch.zeros(())

        def logits(self, _: Tensor) -> Tensor:
            return F.one_hot(batch.targets.clamp(0, 50), 64).float()

    right = batch.targets[batch.targets != ASKED] <= 50
    terms = t.terms(Model(), batch)
    assert terms["accuracy"] == right.float().mean() < 1
    nats = math.log(63 + math.e)
    expected = nats - right.float().mean().item()
    assert terms["loss"].item() == pytest.approx(expected, rel=1e-5)
