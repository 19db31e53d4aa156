"""Truncated backpropagation through time: windows that follow each other are read like one text."""

import dataclasses
import itertools
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crossover.archs import States, build
from crossover.files import read_json_lines
from crossover.train.carry import Carried, check_carry
from crossover.train.checkpoint import newest
from crossover.train.config import ModelSpec, OptimConfig, RunConfig, TrainConfig
from crossover.train.data import Corpus
from crossover.train.evaluate import origin
from crossover.train.learner import Learner, accumulate_gradients, split_rows
from crossover.train.objectives.next_token import NextToken
from crossover.train.objectives.pairs import Pairs
from crossover.train.runtime import choose_precision
from crossover.train.trainer import ResumeError, Trainer
from crossover.train.warm_up import warm_up
from safetensors.torch import load_file
from torch import Tensor

pytestmark = pytest.mark.quick
CONSTANT = ("gated_deltanet", "h3", "lstm", "mamba", "mamba2", "mamba3", "s4", "s4d")
CPU = torch.device("cpu")
FP32 = choose_precision("fp32", CPU)
ROWS, L = 8, 12


def corpus_of(corpus: Corpus, n_tokens: int) -> Corpus:
    """The corpus with documents of a few tokens, so that some begin where a window does."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(1, 99, n_tokens, dtype=np.uint8)
    tokens[generator.random(n_tokens) < 0.2] = corpus.separator
    return dataclasses.replace(corpus, train=tokens)


def text(corpus: Corpus, packing: str = "concat", **train: Any) -> NextToken:
    settings: dict[str, Any] = {"batch_size": ROWS, "seq_len": L, "carry": True} | train
    return NextToken(corpus, seed=0, train=TrainConfig(**settings), packing=packing)


def learner(arch: str, objective: NextToken) -> Learner:
    return Learner(build(arch, d_model=32, n_layers=1, vocab_size=256), objective)


def tensors_of(parts: Sequence[States]) -> list[Tensor]:
    return [tensor for part in parts for layer in part for tensor in layer.tensors().values()]


@pytest.mark.parametrize("packing", ["concat", "reset"])
@pytest.mark.parametrize("arch", CONSTANT)
def test_windows_that_follow_each_other_are_predicted_like_one_as_long_as_they(
    arch: str, packing: str, corpus: Corpus
) -> None:
    objective, n_steps = text(corpus_of(corpus, 3000), packing), 3
    model = learner(arch, objective)
    lm: Any = model.model
    carried = Carried(lm, ROWS, 2)
    whole, losses = np.stack(objective.rows(0))[:, :1], []
    for step in range(n_steps):
        rows = objective.rows(step)
        whole = np.concatenate([whole, np.stack(rows)[:, 1:]], axis=1)
        batches = [objective.collate(part) for part in split_rows(rows, 2)]
        states = carried.before(objective.begins(step))
        losses.append(accumulate_gradients(model, objective, batches, precision=FP32, states=states)["loss"])
        assert not any(tensor.requires_grad for tensor in tensors_of(states))
    batch = objective.collate(list(whole))
    with torch.no_grad():
        expected = lm.token_losses(batch.tokens, batch.targets, starts=batch.starts)
    torch.testing.assert_close(torch.stack(losses), expected.mean(0).view(n_steps, L).mean(1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("packing", ["concat", "reset"])
def test_a_row_reads_on_and_begins_where_its_text_wraps_round_or_a_document_is_read_apart(
    packing: str, corpus: Corpus
) -> None:
    tokens = np.arange(1000, 1200)
    tokens[::5] = corpus.separator
    counted = dataclasses.replace(corpus, train=tokens)

    def rows(step: int, **train: Any) -> np.ndarray:
        return np.stack(text(counted, packing, **train).rows(step))

    def positions(step: int) -> np.ndarray:
        return (rows(step) - 1000 - np.arange(L + 1)).max(1)

    np.testing.assert_array_equal(rows(0), rows(0, carry=False))
    np.testing.assert_array_equal(rows(7, batch_size=2 * ROWS)[:ROWS], rows(7))
    reasons = set()
    for step in range(40):
        begins, now = text(counted, packing).begins(step), positions(step)
        jumps = now != positions(step - 1) + L if step else np.ones(ROWS, dtype=bool)
        starts = (packing == "reset") & (tokens[now - 1] == corpus.separator)
        assert (begins == (jumps | starts)).all()
        assert (now[jumps] < L).all() or step == 0
        reasons |= {*zip(jumps.tolist(), starts.tolist(), strict=True)}
    assert {(True, False), (False, False), (False, True)} - {(False, packing != "reset")} <= reasons


def run_of(folder: Path, arch: str = "mamba", set_: Sequence[str] = (), **train: Any) -> RunConfig:
    settings: dict[str, Any] = {
        "carry": True,
        **{"steps": 4, "batch_size": 4, "seq_len": 16, "precision": "bf16", "log_every": 1, "checkpoint_every": 0},
        **{"eval_every": 0, "eval_tokens": 64, "final_eval_tokens": 64, "position_len": 0, "sample_tokens": 0},
    }
    return RunConfig(
        name="run",
        out=folder,
        model=ModelSpec(preset=arch, d_model=32, n_layers=2 if arch in ("jamba", "samba") else 1, set=tuple(set_)),
        optim=OptimConfig(lr=3e-3, schedule="constant"),
        train=TrainConfig(**(settings | train)),
    )


def fit(run: RunConfig, corpus: Corpus) -> None:
    assert Trainer(run, NextToken(corpus, seed=0, train=run.train)).fit().exit_code in (0, 143)


def tensors(run: RunConfig, file: str) -> dict[str, Tensor]:
    latest = newest(run.directory / "checkpoints")
    assert latest is not None
    return load_file(latest / file)


def losses(run: RunConfig) -> list[float]:
    lines = read_json_lines(run.directory / "metrics.jsonl")
    return [line["train/loss"] for line in lines if "train/loss" in line]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("crossover.train.trainer.warm_up", lambda *_: None)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mixers", ['["mamba"]', '["s4d"]'])  # whose states are real, and complex
def test_a_resumed_run_goes_on_from_the_states_it_had(
    mixers: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [run_of(tmp_path / name, "custom", [f"pattern={mixers}"], grad_accumulation=2) for name in "ab"]
    straight, broken = runs
    fit(straight, corpus)
    original, calls = NextToken.terms_from, itertools.count(1)

    def stopping(self: NextToken, *given: Any) -> Any:
        if torch.is_grad_enabled() and next(calls) == 4:  # two parts a step
            signal.raise_signal(signal.SIGTERM)
        return original(self, *given)

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "terms_from", stopping)
        fit(broken, corpus)
    assert len(losses(broken)) == 2
    fit(broken, corpus)
    assert losses(broken) == losses(straight)
    for file in ("model.safetensors", "optimizer.safetensors", "carried.safetensors"):
        found, expected = tensors(broken, file), tensors(straight, file)
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
    carried = tensors(straight, "carried.safetensors")
    assert {tensor.dtype for tensor in carried.values()} <= {torch.float32, torch.complex64}  # under bf16, too
    assert all(len(tensor) == 4 and tensor.any() for tensor in carried.values())


@pytest.mark.usefixtures("quick")
def test_what_was_carried_decides_the_run_and_may_be_taken_up_in_other_parts(tmp_path: Path, corpus: Corpus) -> None:
    plain, run = run_of(tmp_path / "a", carry=False, steps=2), run_of(tmp_path / "b", steps=2)
    for each in (plain, run):
        fit(each, corpus)
    assert losses(plain)[0] == pytest.approx(losses(run)[0], abs=1e-3)  # the first window follows nothing; bf16
    model = build(run.model.configure(256))
    saved = tensors(run, "carried.safetensors")
    for n_parts in (1, 2, 4):
        carried = Carried(model, 4, n_parts)
        carried.load(saved)
        assert [part.n_rows for part in carried.parts] == [4 // n_parts] * n_parts
        assert all(torch.equal(tensor, saved[name]) for name, tensor in carried.tensors().items())
    with pytest.raises(ValueError, match="another number of rows"):
        Carried(model, 2).load(saved)
    with pytest.raises(ResumeError, match="carry"):
        fit(dataclasses.replace(run, train=dataclasses.replace(run.train, carry=False, steps=3)), corpus)


@pytest.mark.parametrize(
    ("arch", "options", "said"),
    [
        ("transformer", (), "attention"),
        ("jamba", ("attention_every=2", "attention_offset=1"), "attention"),
        ("samba", (), "attention"),
        ("mamba", ("positions=learned", "max_positions=64"), "max_positions=64"),
    ],
)
def test_a_model_that_cannot_read_on_for_ever_is_refused(
    arch: str, options: tuple[str, ...], said: str, tmp_path: Path, corpus: Corpus
) -> None:
    run = run_of(tmp_path, arch, options)
    with pytest.raises(ValueError, match=said) as error:
        Trainer(run, NextToken(corpus, seed=0, train=run.train))
    assert "turn it off" in str(error.value)
    assert "\n" not in str(error.value)


def test_an_objective_whose_rows_stand_alone_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    run = run_of(tmp_path)
    pairs = Pairs.__new__(Pairs)
    pairs.train = run.train
    with pytest.raises(ValueError, match="rows that read on"):
        check_carry(pairs, run.model.configure(256))


def test_the_warm_up_runs_what_training_will(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[States] = []
    original = NextToken.terms_from
    monkeypatch.setattr(NextToken, "terms_from", lambda *args: given.append(args[3]) or original(*args))
    warm_up(ModelSpec(preset="lstm", d_model=32, n_layers=1).configure(256), text(corpus), CPU, FP32)
    assert [state.n_rows for state in given] == [ROWS]


def test_a_carried_state_that_is_not_finite_is_found_where_it_enters(corpus: Corpus) -> None:
    objective = text(corpus)
    model = learner("lstm", objective)
    lm: Any = model.model
    state = lm.init_state(ROWS, 1)
    state[0].lstm.fill_(torch.inf)
    batch = objective.collate(objective.rows(0))
    assert origin(model, batch, FP32) == ""
    assert "model.backbone.blocks.0.mixer" in origin(model, batch, FP32, state)
