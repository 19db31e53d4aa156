import gzip
import json
import math
import re
import signal
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import pytest
import torch
from crossover.archs import LanguageModel, build, presets
from crossover.files import read_json, read_json_lines
from crossover.kernels import dispatch
from crossover.train.checkpoint import newest
from crossover.train.config import ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig
from crossover.train.data import Corpus, train_batch
from crossover.train.evaluate import evaluate
from crossover.train.learner import Learner
from crossover.train.objectives.next_token import NextToken, Tokens
from crossover.train.record import provenance
from crossover.train.runtime import choose_precision
from crossover.train.score import Score
from crossover.train.trainer import Outcome, ResumeError, Trainer
from crossover.train.turns import Turns
from crossover.train.verdict import store_verdict
from safetensors.torch import load_file
from torch import Tensor

TORCH = re.escape(torch.__version__)
ALLOCATOR = "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."


@pytest.fixture(autouse=True)
def _no_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests count the calls of a model; the toy that runs before it has tests of its own."""
    monkeypatch.setattr("crossover.train.trainer.warm_up", lambda *_: None)


def config(tmp_path: Path, arch: str = "lstm", schedule: Any = "cosine", **train: Any) -> RunConfig:
    """A run of six steps that takes a fraction of a second."""
    n_layers, options = (2, ("attention_every=2", "attention_offset=1")) if arch == "jamba" else (1, ())
    settings: dict[str, Any] = {
        **{"steps": 6, "batch_size": 4, "seq_len": 16, "precision": "fp32", "log_every": 1, "checkpoint_every": 0},
        **{"eval_every": 0, "eval_tokens": 64, "final_eval_tokens": 64, "position_len": 32, "sample_tokens": 4},
    }
    return RunConfig(
        name="run",
        out=tmp_path,
        model=ModelSpec(preset=arch, d_model=32, n_layers=n_layers, set=options),
        optim=OptimConfig(lr=3e-3, schedule=schedule),
        train=TrainConfig(**(settings | train)),
    )


def objective(run: RunConfig, corpus: Corpus) -> NextToken:
    return NextToken(corpus, seed=run.seed, train=run.train, **run.objective.options)


def fit(run: RunConfig, corpus: Corpus, **options: Any) -> Outcome:
    return Trainer(run, objective(run, corpus), **options).fit()


def changed(run: RunConfig, **train: Any) -> RunConfig:
    values = run.to_dict()
    values["train"] |= train
    return RunConfig.from_dict(values)


def metrics(run: RunConfig, key: str = "train/loss") -> list[tuple[int, float]]:
    return [(line["step"], line[key]) for line in read_json_lines(run.directory / "metrics.jsonl") if key in line]


def tensors(run: RunConfig, file: str = "model.safetensors") -> dict[str, Tensor]:
    latest = newest(run.directory / "checkpoints")
    assert latest is not None
    return load_file(latest / file)


Terms = dict[str, Tensor]


def replace_loss(monkeypatch: pytest.MonkeyPatch, change: Callable[[int, Terms], Terms]) -> None:
    """Passes the terms of every training call through `change`, which is given the number of the call from 1 on."""
    original, calls = NextToken.terms, []

    def terms(self: NextToken, model: Any, batch: Tokens) -> Terms:
        found = original(self, model, batch)
        if not torch.is_grad_enabled():
            return found
        calls.append(1)
        return change(len(calls), found)

    monkeypatch.setattr(NextToken, "terms", terms)


def after_step(step: int, action: Callable[[], None]) -> Callable[[int, Any], Any]:
    def change(call: int, found: Any) -> Any:
        if call == step:
            action()
        return found

    return change


@pytest.mark.quick
def test_a_run_leaves_what_benchmarks_read(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, eval_every=3, checkpoint_every=3)
    outcome = fit(run, corpus, command=["crossover", "train"])
    assert outcome.exit_code == 0
    record, result = read_json(run.directory / "run.json"), read_json(run.directory / "result.json")
    assert result == json.loads(json.dumps(outcome.result))
    model = build(run.model.configure(256))
    assert record["arch"] == result["arch"] == "lstm"
    assert record["n_params"] == result["n_params"] == model.n_params
    assert record["flops_per_token"] == 3 * model.mean_flops_per_token(16)
    assert record["state_bytes"] == sum(state.nbytes for state in model.init_state(1, 16))
    assert record["corpus"] == corpus.summary()
    assert record["model"] == model.config.to_dict()
    assert RunConfig.from_dict(record["config"]) == run
    assert record["backends"] == result["backend"] != {}
    assert record["doctor"] is None  # it was never run on this machine
    assert {"precision", "peak_memory_method", "git_commit", "command"} <= set(record["provenance"])
    assert (result["status"], result["error"], result["seed"]) == ("done", None, 0)
    assert (result["steps"], result["tokens"]) == (6, 6 * 4 * 16)
    assert result["train_flops"] == pytest.approx(6 * 4 * 16 * 3 * model.mean_flops_per_token(16))
    assert result["corpus_digest"] == corpus.digest
    assert result["device"] == "cpu"
    assert [entry["stop"] for entry in result["position_bits_per_byte"]] == [1, 2, 4, 8, 16, 32]
    assert isinstance(result["sample"], str)
    assert result["val_bits_per_byte"] == metrics(run, "val/bits_per_byte")[-1][1]
    assert [step for step, _ in metrics(run, "val/bits_per_byte")] == [3, 6]
    assert result["val_bits_per_byte"] == pytest.approx(result["val_loss"] / math.log(2))
    line = read_json_lines(run.directory / "metrics.jsonl")[0]
    assert set(line) == {
        "step", "tokens", "seconds", "train/loss", "train/aux_loss", "train/lr", "train/grad_norm",
        "perf/tokens_per_second", "perf/peak_bytes",
    }  # fmt: skip
    assert sorted(path.name for path in (run.directory / "checkpoints").glob("step-*")) == [
        "step-00000003",
        "step-00000006",
    ]


def test_a_model_learns(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, steps=40, log_every=40)
    fit(run, corpus)
    losses = dict(metrics(run))
    assert losses[1] > 5.0  # ln 256 = 5.5
    assert losses[40] < 0.7 * losses[1]


def test_the_final_validation_is_that_of_the_saved_weights(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path)
    result = fit(run, corpus).result
    saved = LanguageModel.from_pretrained(run.directory / "checkpoints" / "step-00000006")
    judge = objective(run, corpus)
    precision = choose_precision("fp32", torch.device("cpu"))
    found = evaluate(Learner(saved, judge), judge, judge.held_out(64), precision=precision, rows_at_once=4)
    assert found["bits_per_byte"] == result["val_bits_per_byte"]


@pytest.mark.quick
@pytest.mark.parametrize("arch", ["transformer", "mamba", "jamba", "lstm"])
def test_an_interrupted_run_continues_bit_for_bit(
    arch: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = config(tmp_path / "a", arch, eval_every=2), config(tmp_path / "b", arch, eval_every=2)
    assert fit(straight, corpus).exit_code == 0
    with monkeypatch.context() as patch:
        replace_loss(patch, after_step(3, lambda: signal.raise_signal(signal.SIGTERM)))
        outcome = fit(broken, corpus)
    assert outcome.exit_code == 143
    assert (outcome.result["status"], outcome.result["steps"]) == ("interrupted", 3)
    torch.manual_seed(99)  # a new process starts with other generators
    assert fit(broken, corpus).exit_code == 0
    assert read_json(broken.directory / "run.json")["resumed_from_step"] == 3
    assert metrics(broken) == metrics(straight)
    assert metrics(broken, "val/loss") == metrics(straight, "val/loss")
    for file in ("model.safetensors", "optimizer.safetensors"):
        expected = tensors(straight, file)
        for name, value in tensors(broken, file).items():
            assert torch.equal(value, expected[name]), name
    results = [read_json(run.directory / "result.json") for run in (straight, broken)]
    for key in ("val_bits_per_byte", "position_bits_per_byte", "sample", "tokens"):
        assert results[0][key] == results[1][key]


def test_lines_beyond_the_checkpoint_are_dropped_on_resume(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, checkpoint_every=2)

    def crash() -> None:
        raise KeyError("as if killed at step 4")

    with monkeypatch.context() as patch:
        replace_loss(patch, after_step(4, crash))
        with pytest.raises(KeyError):
            fit(run, corpus)
    assert [step for step, _ in metrics(run)] == [1, 2, 3]
    fit(run, corpus)
    assert [step for step, _ in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert read_json(run.directory / "run.json")["resumed_from_step"] == 2


@pytest.mark.parametrize("arch", ["transformer", "lstm"])
def test_accumulated_gradients_equal_those_of_the_large_batch(arch: str, tmp_path: Path, corpus: Corpus) -> None:
    torch.set_default_dtype(torch.float64)
    try:
        whole, parts = config(tmp_path / "a", arch), config(tmp_path / "b", arch, grad_accumulation=4)
        for run in (whole, parts):
            fit(run, corpus)
    finally:
        torch.set_default_dtype(torch.float32)
    for key in ("train/loss", "train/grad_norm"):
        for (_, value), (_, other) in zip(metrics(whole, key), metrics(parts, key), strict=True):
            assert value == pytest.approx(other, rel=1e-6)  # sums in another order; float32 inside some operations
    expected = tensors(whole)
    for name, value in tensors(parts).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)


def test_the_auxiliary_loss_is_trained_with_the_loss(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, moved = config(tmp_path / "a", steps=1), config(tmp_path / "b", steps=1)
    fit(plain, corpus)
    replace_loss(monkeypatch, lambda call, found: {"loss": 0 * found["loss"], "aux_loss": found["loss"]})
    fit(moved, corpus)
    assert metrics(moved, "train/grad_norm") == metrics(plain, "train/grad_norm")
    assert metrics(moved, "train/aux_loss") == metrics(plain, "train/loss")


def test_clipping_bounds_the_gradient_and_records_its_norm(tmp_path: Path, corpus: Corpus) -> None:
    values = config(tmp_path / "a", steps=1).to_dict()
    runs = []
    for name, clip in (("free", 0.0), ("clipped", 1e-3)):
        values["optim"] |= {"clip": clip, "eps": 1.0, "weight_decay": 0.0}  # eps 1: the update grows with the gradient
        runs.append(RunConfig.from_dict(values | {"name": name}))
        fit(runs[-1], corpus)
    free, clipped = (tensors(run, "optimizer.safetensors") for run in runs)
    norm = metrics(runs[0], "train/grad_norm")[0][1]
    assert metrics(runs[1], "train/grad_norm")[0][1] == norm  # before clipping

    def first_moment(state: dict[str, Tensor]) -> float:
        moments = [value.pow(2).sum() for name, value in state.items() if name.endswith("/exp_avg")]
        return math.sqrt(sum(moments)) / 0.1  # beta_1 = 0.9

    assert first_moment(free) == pytest.approx(norm, rel=1e-4)
    assert first_moment(clipped) == pytest.approx(1e-3, rel=1e-2)


def test_evaluating_and_sampling_do_not_change_the_training(tmp_path: Path, corpus: Corpus) -> None:
    quiet = config(tmp_path / "a", "jamba", steps=3, sample_tokens=0, position_len=0)
    busy = config(tmp_path / "b", "jamba", steps=3, eval_every=1)
    fit(quiet, corpus)
    fit(busy, corpus)
    assert metrics(quiet) == metrics(busy)


def test_the_data_are_those_of_seed_and_step_in_parts(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = NextToken.terms

    def terms(self: NextToken, model: Any, batch: Tokens) -> Any:
        if torch.is_grad_enabled():
            seen.append(torch.cat([batch.tokens, batch.targets[:, -1:]], dim=1))
        return original(self, model, batch)

    monkeypatch.setattr(NextToken, "terms", terms)
    run = changed(config(tmp_path), steps=2, grad_accumulation=2)
    fit(RunConfig.from_dict(run.to_dict() | {"seed": 5}), corpus)
    expected = [train_batch(corpus, seed=5, step=step, batch_size=4, seq_len=16) for step in range(2)]
    assert torch.equal(torch.cat(seen), torch.from_numpy(np.concatenate(expected)))


def test_another_seed_is_another_run(tmp_path: Path, corpus: Corpus) -> None:
    losses = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run = RunConfig.from_dict(config(tmp_path, steps=2).to_dict() | {"name": name, "seed": seed})
        fit(run, corpus)
        losses.append(metrics(run))
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("arch", ["transformer", "s4d", "mamba", "jamba", "lstm"])
def test_parameters_stay_float32_under_bf16(arch: str, tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, arch, steps=2, precision="bf16")
    result = fit(run, corpus).result
    assert result["precision"] == "bf16"
    assert {value.dtype for value in tensors(run).values()} == {torch.float32}
    assert {value.dtype for value in tensors(run, "optimizer.safetensors").values()} == {torch.float32}


def test_the_learning_rate_is_the_one_tuned_for_the_architecture(tmp_path: Path, corpus: Corpus) -> None:
    values = config(tmp_path).to_dict()
    values["optim"] |= {"lr": None, "schedule": "constant", "warmup": 0.0}
    run = RunConfig.from_dict(values)
    fit(run, corpus)
    assert metrics(run, "train/lr")[0][1] == presets.learning_rate("lstm")
    assert read_json(run.directory / "run.json")["config"]["optim"]["lr"] == presets.learning_rate("lstm")


def test_a_model_from_its_pattern_needs_a_learning_rate(tmp_path: Path, corpus: Corpus) -> None:
    spec = ModelSpec(preset="custom", d_model=16, n_layers=1, set=('pattern=["lstm"]',))
    with pytest.raises(ValueError, match=r"optim\.lr must be given"):
        fit(RunConfig(out=tmp_path, model=spec, train=config(tmp_path).train), corpus)


@pytest.mark.parametrize("packing", ["concat", "reset"])
def test_documents_are_forgotten_at_their_start_only_if_packing_says_so(
    packing: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = NextToken.terms

    def terms(self: NextToken, model: Any, batch: Tokens) -> Any:
        if batch.starts is not None:
            assert torch.equal(batch.starts[:, 1:], batch.tokens[:, :-1] == corpus.separator)
        seen.append(batch.starts is not None)
        return original(self, model, batch)

    monkeypatch.setattr(NextToken, "terms", terms)
    run = replace(config(tmp_path), objective=ObjectiveSpec(options={"packing": packing}))
    fit(run, corpus)
    assert set(seen) == {packing == "reset"}


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


def test_tokens_per_second_count_training_time_only(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = FakeClock()
    durations = {1: 50.0}  # compilation

    def train(call: int, found: Terms) -> Terms:
        clock.wait(durations.get(call, 2.0))
        return found

    def metrics_of(self: NextToken, means: object, rows: object) -> dict[str, float]:
        clock.wait(1000.0)
        return {"loss": 1.0, "bits_per_byte": 2.0}

    replace_loss(monkeypatch, train)
    monkeypatch.setattr(NextToken, "metrics", metrics_of)
    run = config(tmp_path, eval_every=1)
    result = fit(run, corpus, clock=clock).result
    assert result["train_seconds"] == 50.0 + 5 * 2.0
    assert result["tokens_per_second"] == 4 * 16 / 2.0
    assert metrics(run, "seconds")[-1][1] == 60.0
    assert metrics(run, "perf/tokens_per_second")[-1][1] == 32.0


def not_finite(call: int, found: Terms) -> Terms:
    return found | {"loss": found["loss"] * float("nan")} if call == 3 else found


def finite_with_infinite_gradient(call: int, found: Terms) -> Terms:
    if call == 3:
        found["loss"].register_hook(lambda gradient: gradient * float("inf"))
    return found


@pytest.mark.parametrize("change", [not_finite, finite_with_infinite_gradient])
def test_a_run_stops_before_an_update_that_is_not_finite(
    change: Callable[..., Any], tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates = []
    original = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: updates.append(1) or original(self))
    replace_loss(monkeypatch, change)
    run = config(tmp_path, checkpoint_every=1)
    outcome = fit(run, corpus)
    assert len(updates) == 2
    assert outcome.exit_code == 1
    assert outcome.result["status"] == "failed"
    assert "\n" not in outcome.result["error"]
    assert outcome.result["error"].startswith("step 3: the loss is ")
    assert all(value.isfinite().all() for value in tensors(run).values())


def infinite_weight(step: int) -> Callable[[torch.optim.Optimizer], None]:
    """An optimizer's step that makes one weight infinite at an update."""
    original, steps = torch.optim.AdamW.step, []

    def change(self: torch.optim.Optimizer) -> None:
        original(self)  # pyright: ignore[reportArgumentType]
        steps.append(1)
        if len(steps) == step:
            self.param_groups[0]["params"][0].data.view(-1)[-1] = math.inf

    return change


@pytest.mark.quick
@pytest.mark.parametrize(
    ("place", "change", "said"),
    [
        ("torch.optim.AdamW.step", infinite_weight(6), "held-out loss is nan (the weights of model."),
        (
            "crossover.train.objectives.next_token.bits_per_byte",
            lambda *_: math.inf,
            "held-out bits_per_byte is inf",
        ),
        (
            "crossover.train.objectives.next_token.NextToken.by_position",
            lambda *_, **__: [{"start": 0, "bits_per_byte": math.nan}],
            "held-out position_bits_per_byte 0 bits_per_byte is nan",
        ),
    ],
)
def test_a_number_that_is_not_finite_fails_the_run_before_it_is_written(
    place: str, change: Any, said: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, change)
    run = config(tmp_path, "transformer", checkpoint_every=4)
    outcome = fit(run, corpus)
    assert (outcome.exit_code, outcome.result["status"]) == (1, "failed")
    assert outcome.result["error"].startswith(f"step 6: after this update {said}")
    assert outcome.result["error"].endswith("try a lower --optim.lr or a longer --optim.warmup")
    assert read_json(run.directory / "result.json")["steps"] == 6
    assert all(value.isfinite().all() for value in tensors(run).values())


def test_weights_that_no_row_has_shown_to_be_infinite_are_not_saved(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.optim.AdamW, "step", infinite_weight(2))
    monkeypatch.setattr(NextToken, "terms", lambda self, model, batch: {
        name: model.embedding.weight[0].sum() for name in batch.counts
    })  # fmt: skip
    run = config(tmp_path, steps=3, checkpoint_every=1)
    outcome = fit(run, corpus)
    assert outcome.result["error"].startswith("step 2: after this update the weights of ")
    assert newest(run.directory / "checkpoints") == run.directory / "checkpoints" / "step-00000001"


@pytest.mark.parametrize("arch", ["mamba", "mamba2", "transformer", "gpt2"])
def test_activations_beyond_float_range_are_named_and_are_no_result(arch: str, tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, arch, steps=1, precision="bf16")
    run = replace(run, model=replace(run.model, n_layers=4), optim=replace(run.optim, lr=1e12))
    outcome = fit(run, corpus)
    assert outcome.result["status"] == "failed"
    assert "beyond float range" in outcome.result["error"]


def test_running_out_of_memory_is_a_result(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def allocate() -> None:
        raise RuntimeError(ALLOCATOR + "\nmore")

    replace_loss(monkeypatch, after_step(2, allocate))
    outcome = fit(config(tmp_path), corpus)
    assert outcome.exit_code == 3
    assert (outcome.result["status"], outcome.result["steps"]) == ("out_of_memory", 1)
    assert outcome.result["error"] == ALLOCATOR
    assert "out of memory at step 1" in capsys.readouterr().out


def test_running_out_of_memory_while_building_is_a_result_too(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossover.train import trainer

    def adamw(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(trainer, "adamw", adamw)
    outcome = fit(config(tmp_path), corpus)
    assert (outcome.exit_code, outcome.result["status"], outcome.result["error"]) == (3, "out_of_memory", "MemoryError")


def test_an_unexpected_error_is_recorded_and_not_swallowed(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise RuntimeError("shapes do not match")

    replace_loss(monkeypatch, after_step(2, fail))
    run = config(tmp_path)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fit(run, corpus)
    result = read_json(run.directory / "result.json")
    assert (result["status"], result["error"]) == ("failed", "RuntimeError: shapes do not match")


def test_a_disk_that_is_full_ends_the_run_with_one_line(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossover.train import checkpoint

    def full(*_: object, **__: object) -> None:
        raise OSError("cannot write the checkpoint: No space left on device")

    monkeypatch.setattr(checkpoint, "save", full)
    outcome = fit(config(tmp_path), corpus)
    assert (outcome.exit_code, outcome.result["status"]) == (1, "failed")
    assert "No space left" in outcome.result["error"]


def test_an_evaluation_that_fails_costs_no_step(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, broken = config(tmp_path / "a", eval_every=2), config(tmp_path / "b", eval_every=2)
    fit(straight, corpus)
    for place in ("metrics", "sample", "examine"):
        with monkeypatch.context() as patch:
            patch.setattr(NextToken, place, lambda *_, **__: {}["a mistake"])
            with pytest.raises(KeyError, match="a mistake"):
                fit(broken, corpus)
        step = 6 if place == "examine" else 2
        assert newest(broken.directory / "checkpoints") == broken.directory / "checkpoints" / f"step-{step:08d}"
    fit(broken, corpus)
    assert lines(broken) == lines(straight)


def test_held_out_rows_without_anything_to_predict_are_named(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path)
    judge, original = objective(run, corpus), NextToken.collate
    monkeypatch.setattr(
        NextToken, "collate", lambda self, rows: replace(original(self, rows), counts={"loss": 0, "aux_loss": 0})
    )
    learner = Learner(build(run.model.configure(256)), judge)
    with pytest.raises(ValueError, match="4 held-out rows have nothing to be judged by"):
        evaluate(
            learner, judge, judge.held_out(64), precision=choose_precision("fp32", torch.device("cpu")), rows_at_once=4
        )


def stopping(original: Callable[..., Any], *, after: bool) -> Callable[..., Any]:
    """The function, with a signal before or after its work."""

    def stopped(*args: Any, **options: Any) -> Any:
        if not after:
            signal.raise_signal(signal.SIGTERM)
        found = original(*args, **options)
        if after:
            signal.raise_signal(signal.SIGTERM)
        return found

    return stopped


def lines(run: RunConfig) -> list[dict[str, Any]]:
    """metrics.jsonl without what a clock or a meter says."""
    measured = ("seconds", "perf/tokens_per_second", "perf/peak_bytes")
    return [
        {key: value for key, value in line.items() if key not in measured}
        for line in read_json_lines(run.directory / "metrics.jsonl")
    ]


@pytest.mark.quick
@pytest.mark.parametrize(
    "places",
    [
        [("crossover.train.trainer.evaluate", False)],
        [("crossover.train.trainer.evaluate", True)],
        [("crossover.train.objectives.next_token.NextToken.sample", True)],
        [("crossover.train.checkpoint.save", True)],
        [("crossover.train.objectives.next_token.NextToken.by_position", False)],
        [
            ("crossover.train.trainer.evaluate", False),  # leaves a checkpoint of the last step without its validation
            ("crossover.train.objectives.next_token.NextToken.sample", True),
            ("crossover.train.objectives.next_token.NextToken.by_position", False),
        ],
    ],
)
def test_a_run_stopped_at_its_end_leaves_what_an_unbroken_one_does(
    places: list[tuple[str, bool]], tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossover.train import checkpoint, trainer

    straight, broken = (config(tmp_path / name, steps=2) for name in "ab")
    expected = fit(straight, corpus).result
    originals = {
        "evaluate": trainer.evaluate, "sample": NextToken.sample, "save": checkpoint.save,
        "by_position": NextToken.by_position,
    }  # fmt: skip
    for place, after in places:
        with monkeypatch.context() as patch:
            patch.setattr(place, stopping(originals[place.rpartition(".")[2]], after=after))
            assert fit(broken, corpus).exit_code == 143
    outcome = fit(broken, corpus)
    assert outcome.exit_code == 0
    assert lines(broken) == lines(straight)
    measured = {"train_seconds", "tokens_per_second", "peak_bytes"}
    assert {key: value for key, value in outcome.result.items() if key not in measured} == {
        key: value for key, value in expected.items() if key not in measured
    }
    assert read_json(broken.directory / "run.json")["backends"] == outcome.result["backend"] != {}


def test_training_ends_where_a_validation_is_as_good_as_asked_for(tmp_path: Path, corpus: Corpus) -> None:
    options = {"eval_every": 2, "schedule": "constant"}
    whole = config(tmp_path / "whole", **options)
    fit(whole, corpus)
    found = dict(metrics(whole, "val/bits_per_byte"))
    assert found[2] > found[4] > found[6]
    run = config(tmp_path / "short", stop_at=found[4], **options)
    first = fit(run, corpus)
    assert (first.exit_code, first.result["status"], first.result["steps"]) == (0, "done", 4)
    assert first.result["val_bits_per_byte"] == found[4]
    assert newest(run.directory / "checkpoints") == run.directory / "checkpoints" / "step-00000004"
    assert fit(run, corpus) == first
    assert fit(config(tmp_path / "short", **options), corpus).result["steps"] == 6  # and can go on
    assert dict(metrics(run, "val/bits_per_byte")) == found


@pytest.mark.usefixtures("interruptible")
def test_a_signal_during_validation_keeps_the_last_step(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, eval_every=2, eval_tokens=16 * 4 * 3)
    original, calls = NextToken.terms, []

    def terms(self: NextToken, model: Any, batch: Tokens) -> Any:
        if not torch.is_grad_enabled():
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
        return original(self, model, batch)

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "terms", terms)
        outcome = fit(run, corpus)
    assert outcome.exit_code == 130
    assert len(calls) == 2
    assert (outcome.result["status"], outcome.result["steps"]) == ("interrupted", 2)
    assert metrics(run, "val/loss") == []
    fit(run, corpus)
    assert [step for step, _ in metrics(run, "val/loss")] == [2, 4, 6]


def test_a_run_stopped_in_its_last_evaluation_only_finishes_that(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path)
    original = NextToken.by_position

    def stopped(self: NextToken, model: Any, windows: Any, **options: Any) -> Any:
        signal.raise_signal(signal.SIGTERM)
        return original(self, model, windows, **options)

    with monkeypatch.context() as patch:
        patch.setattr(NextToken, "by_position", stopped)
        before = fit(run, corpus)
    assert (before.exit_code, before.result["steps"]) == (143, 6)
    assert "position_bits_per_byte" not in before.result
    after = fit(run, corpus).result
    assert after["status"] == "done"
    assert after["position_bits_per_byte"] is not None
    for key in ("sample", "val_bits_per_byte", "peak_bytes", "tokens_per_second", "train_seconds"):
        assert after[key] == before.result[key] is not None


def test_a_resume_under_other_conditions_says_which_and_run_json_lists_them(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    from crossover.train import trainer

    run = config(tmp_path, schedule="constant", threads=torch.get_num_threads(), steps=1)
    fit(run, corpus)
    run = changed(run, steps=2)
    fit(run, corpus)  # under the same, without a warning
    monkeypatch.setattr(trainer, "provenance", lambda *told: provenance(*told) | {"torch": "9.9"})
    with pytest.warns(RuntimeWarning, match=rf"\(precision fp32 -> bf16, torch {TORCH} -> 9\.9\); run.json lists"):
        fit(changed(run, precision="bf16", steps=3), corpus)
    monkeypatch.setattr(trainer, "choose_precision", None)  # what a run has decided is not decided again
    fit(changed(run, precision="auto", steps=4), corpus)
    stretches = read_json(run.directory / "run.json")["stretches"]
    found = [(entry["from_step"], entry["precision"]) for entry in stretches]
    assert found == [(0, "fp32"), (1, "fp32"), (2, "bf16"), (3, "bf16")]


@pytest.mark.parametrize("kept", [0, 3])
def test_a_log_that_was_cut_short_is_noticed_on_resume(kept: int, tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, schedule="constant", steps=3, sample_tokens=0)
    fit(run, corpus)
    path = run.directory / "metrics.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:kept]))
    with pytest.warns(RuntimeWarning, match=f"has {kept} of the 4 lines written up to step 3: the others are lost"):
        fit(changed(run, steps=5), corpus)
    assert [line["step"] for line in lines(run)] == [*[1, 2, 3][:kept], 4, 5, 5]
    fit(changed(run, steps=6), corpus)  # which says it once


@pytest.mark.parametrize("name", ["run.json", "result.json", "metrics.jsonl", "tokenizer.json", "checkpoints", "tb"])
def test_what_is_in_the_way_of_a_run_is_one_sentence_before_any_work(
    name: str, tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, steps=1)
    path = run.directory / name
    if name in ("checkpoints", "tb"):
        path.parent.mkdir(parents=True)
        path.write_text("a file where a folder should be")
    else:
        (path / "inside").mkdir(parents=True)
    if name == "tb":
        with pytest.warns(RuntimeWarning, match="no more TensorBoard events"):
            assert fit(run, corpus).exit_code == 0
        return
    monkeypatch.setattr(Trainer, "_train", lambda *_: pytest.fail("it began"))
    with pytest.raises(ResumeError, match=rf"{name}.* choose another --out or --name") as refused:
        fit(run, corpus)
    assert "\n" not in str(refused.value)


def test_a_run_that_looks_into_its_layers_trains_the_same_to_the_bit(tmp_path: Path, corpus: Corpus) -> None:
    plain = config(tmp_path / "plain", "jamba", steps=5, log_every=2, grad_accumulation=2)
    seen = replace(changed(plain, layer_stats_every=3), out=tmp_path / "seen")
    for run in (plain, seen):
        assert fit(run, corpus).exit_code == 0
    for key in ("train/loss", "train/grad_norm"):
        steps = dict(metrics(seen, key))
        assert list(steps) == [1, 2, 3, 4, 5]
        assert metrics(plain, key) == [(step, steps[step]) for step in (1, 2, 4, 5)]
    for name, tensor in tensors(plain).items():
        assert torch.equal(tensor, tensors(seen)[name])
    for layer in ("layer_00", "layer_01"):
        for name in ("activation_rms", "gradient_rms", "update_ratio"):
            assert [step for step, _ in metrics(seen, f"{layer}/{name}")] == [3]


def test_a_profile_names_operations_layers_and_steps_and_changes_nothing(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, seen = config(tmp_path / "plain"), config(tmp_path / "seen", profile=True)
    for run in (plain, seen):
        fit(run, corpus)
    assert metrics(seen) == metrics(plain)
    assert not list(plain.directory.glob("*trace*"))
    (path,) = seen.directory.glob("*trace*")
    assert f"{path}    https://ui.perfetto.dev opens it" in capsys.readouterr().out
    trace = json.loads(gzip.decompress(path.read_bytes()))
    names = Counter(event["name"] for event in trace["traceEvents"] if event.get("ph") == "X")
    assert {name for name in names if name.startswith("step ")} == {"step 3", "step 4", "step 5"}
    assert names["layer_00"] == names["Optimizer.step#AdamW.step"] == 3
    assert any(name.startswith("crossover::") for name in names)
    assert "host_name" not in trace


def test_what_a_killed_writer_left_is_gone_after_the_next_start(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, steps=1)
    drafts = [run.directory / ".run.json.4194309.tmp", run.directory / "checkpoints" / "step-00000001.tmp-123"]
    drafts[1].mkdir(parents=True)
    drafts[0].write_text("{")
    fit(run, corpus)
    assert not any(path.exists() for path in drafts)


def test_a_directory_has_one_run_at_a_time(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path)
    run.directory.mkdir(parents=True)
    with (
        filelock.FileLock(run.directory / ".lock", is_singleton=False),
        pytest.raises(ResumeError, match="another process is training in"),
    ):
        fit(run, corpus)
    assert fit(run, corpus).exit_code == 0


def test_a_finished_run_is_left_alone_and_can_be_made_longer(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, schedule="constant")
    first = fit(run, corpus)
    before = (run.directory / "result.json").stat().st_mtime_ns
    assert fit(run, corpus) == first
    assert (run.directory / "result.json").stat().st_mtime_ns == before
    assert fit(changed(run, steps=8), corpus).result["steps"] == 8
    assert [step for step, _ in metrics(run)] == list(range(1, 9))
    with pytest.raises(ResumeError, match="is at step 8 already"):
        fit(run, corpus)


@pytest.mark.parametrize(
    ("section", "key", "value", "named"),
    [
        ("train", "batch_size", 2, "train.batch_size 4 -> 2"),
        ("train", "seq_len", 8, "train.seq_len 16 -> 8"),
        ("optim", "lr", 1e-3, "optim.lr 0.003 -> 0.001"),
        ("optim", "betas", [0.5, 0.9], r"optim.betas [0.9, 0.95] -> [0.5, 0.9]"),
        ("model", "d_model", 64, "model.d_model 32 -> 64"),
        ("objective", "options", {"packing": "reset"}, "objective.packing concat -> reset"),
        (None, "seed", 1, "seed 0 -> 1"),
    ],
)
def test_a_resume_with_other_settings_is_refused_and_they_are_listed(
    section: str | None, key: str, value: Any, named: str, tmp_path: Path, corpus: Corpus
) -> None:
    run = config(tmp_path, schedule="constant")
    fit(run, corpus)
    values = changed(run, steps=8).to_dict()
    (values if section is None else values[section])[key] = value
    with pytest.raises(ResumeError) as refused:
        fit(RunConfig.from_dict(values), corpus)
    assert f"({named})" in str(refused.value)


def test_a_schedule_that_falls_cannot_be_made_longer(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path)
    fit(run, corpus)
    with pytest.raises(ResumeError, match=r"optim\.schedule_steps 6 -> 8"):
        fit(changed(run, steps=8), corpus)


class Clock:
    """Seconds that pass when told to: those of training in every step, and many more outside of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, durations: Sequence[float]) -> None:
        self.now = 0.0
        left = iter(durations)
        replace_loss(monkeypatch, lambda _, found: (self.wait(next(left)), found)[1])
        for place in ("held_out", "examine"):
            original = getattr(NextToken, place)
            monkeypatch.setattr(NextToken, place, lambda *a, _f=original, **b: (self.wait(500), _f(*a, **b))[1])
        monkeypatch.setattr(Turns, "pass_on", lambda *_: self.wait(3000))

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


DURATIONS = (0.375, 1.5, 3.0, 0.125, 2.5, 4.0)
"""Of steps, the last of which is the one in which ten seconds end."""


@pytest.mark.quick
def test_a_time_ends_training_within_a_step_and_rates_follow_it(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, steps=2, seconds=10.0, eval_every=1, checkpoint_every=1, keep_checkpoints=9)
    result = fit(run, corpus, clock=Clock(monkeypatch, DURATIONS)).result
    assert (result["status"], result["steps"]) == ("done", 6)
    assert result["train_seconds"] == 11.5
    times = [seconds for _, seconds in metrics(run, "seconds")]
    assert sorted(set(times)) == [0.375, 1.875, 4.875, 5.0, 7.5, 11.5]
    assert [step for step, _ in metrics(run, "val/loss")] == [3, 5, 6]  # beyond 4, 6 and 10 seconds
    saved = sorted((run.directory / "checkpoints").glob("step-*"))
    assert [int(path.name[-8:]) for path in saved] == [2, 3, 4, 5, 6]
    falling = [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * (t - 0.5) / 9.5)) / 2 for t in (1.875, 4.875, 5.0, 7.5)]
    rates = [rate for _, rate in metrics(run, "train/lr")]
    assert rates == pytest.approx([0.0, 3e-3 * 0.375 / 0.5, *falling], abs=1e-6)  # warm-up for half a second


def test_an_interrupted_run_continues_its_time(tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    settings: dict[str, Any] = {"seconds": 10.0, "eval_every": 1}
    straight, broken = config(tmp_path / "a", **settings), config(tmp_path / "b", **settings)
    with monkeypatch.context() as patch:
        fit(straight, corpus, clock=Clock(patch, DURATIONS))
    with monkeypatch.context() as patch:
        clock = Clock(patch, DURATIONS)
        patch.setattr(Turns, "pass_on", lambda _, seconds: seconds == 5.0 and signal.raise_signal(signal.SIGTERM))
        assert fit(broken, corpus, clock=clock).exit_code == 143
    with monkeypatch.context() as patch:
        assert fit(broken, corpus, clock=Clock(patch, DURATIONS[4:])).exit_code == 0
    assert read_json(broken.directory / "run.json")["resumed_from_step"] == 4
    for key in ("seconds", "train/lr", "train/loss", "val/loss"):
        assert metrics(broken, key) == metrics(straight, key), key
    with pytest.raises(ResumeError, match=r"optim\.schedule_seconds 10\.0 -> 20\.0"):
        fit(changed(broken, seconds=20.0), corpus)
    with pytest.raises(ResumeError, match=r"optim\.schedule_seconds 10\.0 -> None, optim\.schedule_steps None -> 6"):
        fit(changed(broken, seconds=0.0), corpus)
    assert fit(broken, corpus).result["train_seconds"] == 11.5  # is done


def test_a_constant_rate_can_be_given_more_time_but_not_less(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = config(tmp_path, schedule="constant", seconds=3.0)
    clock = Clock(monkeypatch, [1.0] * 5)
    fit(run, corpus, clock=clock)
    with pytest.raises(ResumeError, match=r"at step 3 already, beyond train\.seconds=2\.0: give more seconds"):
        fit(changed(run, seconds=2.0), corpus)
    fit(changed(run, seconds=4.5), corpus, clock=clock)
    assert [seconds for _, seconds in metrics(run, "seconds")][-1] == 5.0


def test_a_resume_on_other_data_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    import dataclasses

    run = config(tmp_path)
    fit(run, corpus)
    with pytest.raises(ResumeError, match=r"data\.digest"):
        fit(run, dataclasses.replace(corpus, digest="other"))


def test_resume_must_needs_a_checkpoint_and_never_an_empty_directory(tmp_path: Path, corpus: Corpus) -> None:
    values = config(tmp_path).to_dict()
    must, never = (RunConfig.from_dict(values | {"resume": resume}) for resume in ("must", "never"))
    with pytest.raises(ResumeError, match="has no checkpoint to continue from"):
        fit(must, corpus)
    assert fit(never, corpus).exit_code == 0
    with pytest.raises(ResumeError, match="already holds a run"):
        fit(never, corpus)
    assert fit(must, corpus).exit_code == 0


def test_what_the_doctor_switched_off_takes_no_part_and_run_json_says_so(
    tmp_path: Path, corpus: Corpus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_switched_off", {})
    wrong = {("lstm_scan", backend): "wrong gradients" for backend in ("cpu", "torch")}
    store_verdict(["lstm_scan"], wrong)
    run = config(tmp_path, steps=1)
    fit(run, corpus)
    record = read_json(run.directory / "run.json")
    off = [{"op": "lstm_scan", "backend": backend, "reason": "wrong gradients"} for _, backend in wrong]
    assert record["doctor"]["switched_off"] == off
    assert record["doctor"]["ran"] <= record["provenance"]["started"]
    assert record["backends"]["lstm_scan"] == ["reference"]


def test_windows_longer_than_the_held_out_text_are_refused_before_anything_is_built(
    tmp_path: Path, corpus: Corpus
) -> None:
    run = config(tmp_path, position_len=10**6)
    with pytest.raises(ValueError, match=r"train\.position_len=1000000 is too long for a validation split"):
        fit(run, corpus)
    assert not run.directory.exists()


def test_a_model_is_read_as_far_as_its_positions_go(tmp_path: Path, corpus: Corpus) -> None:
    run = config(tmp_path, "gpt2", steps=1, position_len=32, sample_tokens=0)
    run = replace(run, model=replace(run.model, set=("max_positions=24",)))
    fit(run, corpus)
    assert read_json(run.directory / "result.json")["position_bits_per_byte"][-1]["stop"] == 24
    longer = replace(run, name="longer", train=replace(run.train, sample_tokens=128))
    assert len(fit(longer, corpus).result["sample"].encode()) <= 3 * 23  # a lone byte is written as three
    with pytest.raises(ValueError, match="16 tokens are more than max_positions=12"):
        fit(replace(run, model=replace(run.model, set=("max_positions=12",))), corpus)


def test_a_directory_that_cannot_be_made_is_one_sentence(tmp_path: Path, corpus: Corpus) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match=r"cannot write to .*choose another --out"):
        fit(config(tmp_path / "file"), corpus)


def with_model(tmp_path: Path, **model: Any) -> RunConfig:
    return replace(config(tmp_path), model=ModelSpec(**model))


def test_models_with_a_source_are_not_trained_on_text(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"reads a source and writes a target: learn --objective pairs"):
        fit(with_model(tmp_path, preset="seq2seq", d_model=32), corpus)


@pytest.mark.parametrize(
    "model",
    [
        {"preset": "bert", "d_model": 32},
        {"preset": "mamba", "d_model": 32, "set": ("bidirectional=true",)},
        {"preset": "transformer", "d_model": 32, "set": ("causal=false",)},
        {"preset": "custom", "d_model": 32, "n_layers": 2, "set": ('pattern=["lstm", "bidirectional"]',)},
    ],
)
def test_an_encoder_is_not_trained_to_predict_what_it_sees(
    model: dict[str, Any], tmp_path: Path, corpus: Corpus
) -> None:
    with pytest.raises(
        ValueError, match="a token sees those to come, the answers to predicting the next one: train a c"
    ):
        fit(with_model(tmp_path, **model), corpus)


@pytest.mark.parametrize("file", ["result.json", "checkpoints/step-00000006/manifest.json"])
def test_what_a_newer_version_wrote_is_refused_in_one_sentence_and_left_alone(
    file: str, tmp_path: Path, corpus: Corpus
) -> None:
    run = config(tmp_path)
    fit(run, corpus)
    path = run.directory / file
    path.write_text(path.read_text().replace('"format": 1', '"format": 2'))
    before = path.read_text()
    with pytest.raises(ResumeError, match=rf"{file} has format 2, newer than the 1 that is read here: up"):
        fit(run, corpus)
    assert path.read_text() == before


class Guessing(NextToken):
    """An objective that is judged by a share, of which more is better."""

    score = Score(name="accuracy", unit="right", words="share of right guesses", better="higher")

    def metrics(self, means: Any, rows: Any) -> dict[str, float]:
        return {"accuracy": 0.25 + means["loss"] / 100}


def test_an_objective_has_a_score_of_its_own(
    tmp_path: Path, corpus: Corpus, capsys: pytest.CaptureFixture[str]
) -> None:
    run = config(tmp_path)
    result = Trainer(run, Guessing(corpus, seed=0, train=run.train)).fit().result
    assert result["score"] == "accuracy"
    assert 0.25 < result["val_accuracy"] < 0.35
    assert "val_bits_per_byte" not in result
    assert metrics(run, "val/accuracy") == [(6, result["val_accuracy"])]
    assert read_json(run.directory / "run.json")["score"] == Guessing.score.to_dict()
    printed = capsys.readouterr().out
    assert f"held out: {result['val_accuracy']:.3f} right" in printed
    assert f"{result['val_accuracy']:.3f} share of right guesses after" in printed
    assert "zlib" not in printed
