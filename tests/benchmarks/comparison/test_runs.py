import io
import json
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import build
from crossover.benchmarks.comparison import runs as training
from crossover.benchmarks.comparison.compare import run_configs, with_lengths_of
from crossover.benchmarks.comparison.options import CompareConfig
from crossover.benchmarks.comparison.runs import (
    MetricsTail,
    TrainingProcess,
    arguments,
    check_resumable,
    differences,
    is_done,
    share_threads,
    train_in_turns,
    train_runs,
    training_tasks,
)
from crossover.benchmarks.harness.options import ARCHS
from crossover.benchmarks.harness.progress import Progress, Schedule, Task
from crossover.benchmarks.harness.sizes import size_arch
from crossover.train.command_line import parse
from crossover.train.config import DataConfig, ModelSpec, ObjectiveSpec, RunConfig, TrainConfig
from crossover.train.run import train
from crossover.train.runtime import MemoryKills
from crossover.train.score import BITS_PER_BYTE

from ..fake_runs import append_line, write_json

pytestmark = pytest.mark.quick

DIGEST = "c0ffee" * 10 + "abcd"


@pytest.fixture
def runs(tmp_path: Path) -> list[RunConfig]:
    config = CompareConfig(
        archs=("mamba", "lstm"), params=100_000, seeds=2, steps=20, seq_len=(256,), out=tmp_path, threads=1
    )
    sizes = {arch: size_arch(arch, n_params=100_000, vocab_size=256, seq_len=64) for arch in config.archs}
    return run_configs(config, sizes, longest=10_000)


def record(run: RunConfig, *, status: str = "done", digest: str = DIGEST) -> None:
    corpus = {"digest": digest}
    info = {"arch": run.model.preset, "seed": run.seed, "config": run.to_dict(), "corpus": corpus}
    write_json(run.directory / "run.json", info)
    write_json(run.directory / "result.json", {"status": status})


def test_the_printed_command_makes_exactly_the_run(runs: list[RunConfig]) -> None:
    for run in runs:
        assert parse(arguments(run), "train") == run


def test_a_comparison_has_every_architecture_once_before_the_second_seed(runs: list[RunConfig]) -> None:
    assert [run.name for run in runs] == ["lstm-s0", "mamba-s0", "lstm-s1", "mamba-s1"]


def test_runs_of_a_comparison_differ_in_model_seed_and_rate_only(runs: list[RunConfig]) -> None:
    assert [run.train.tensorboard for run in runs] == [run.out / "tb" / run.name for run in runs]
    train = {replace(run.train, tensorboard=None) for run in runs}
    same = {
        replace(run, name="", seed=0, model=runs[0].model, optim=runs[0].optim, train=TrainConfig()) for run in runs
    }
    assert len(same) == len(train) == 1
    assert len({replace(run.optim, lr=None) for run in runs}) == 1


def test_loss_by_position_stays_within_the_held_out_text(tmp_path: Path) -> None:
    config = CompareConfig(archs=("mamba",), seeds=1, seq_len=(64,), out=tmp_path)
    sizes = {"mamba": size_arch("mamba", n_params=100_000, vocab_size=256, seq_len=64)}
    assert run_configs(config, sizes, longest=10_000)[0].train.position_len == 256
    assert run_configs(config, sizes, longest=100)[0].train.position_len == 100
    with pytest.raises(ValueError, match="--position-len 500 is more than the 100 tokens"):
        run_configs(replace(config, position_len=500), sizes, longest=100)


def at_lengths(tmp_path: Path, *lengths: int, archs: tuple[str, ...] = ("lstm", "gpt2"), **options: Any) -> Any:
    config = CompareConfig(archs=archs, params=300_000, seq_len=lengths, out=tmp_path, **options)
    sizes = {
        arch: size_arch(arch, n_params=300_000, vocab_size=256, seq_len=lengths[0], others=lengths[1:])
        for arch in archs
    }
    return run_configs(config, sizes, longest=100_000), sizes


def test_every_model_is_trained_at_every_length_on_as_many_tokens(tmp_path: Path) -> None:
    runs, sizes = at_lengths(tmp_path, 96, 480, 1440, seeds=2, steps=7)
    assert [run.name for run in runs[:3]] == ["gpt2-l96-s0", "lstm-l96-s0", "gpt2-l480-s0"]
    assert len({run.name for run in runs}) == len(runs) == 2 * 3 * 2
    assert {run.train.batch_size * run.train.seq_len for run in runs} == {1440}
    assert {(run.train.steps, run.train.position_len) for run in runs} == {(7, 2880)}
    assert {run.train.lengths for run in runs} == {(96, 480, 1440)}
    assert {run.train.tensorboard.name == run.name for run in runs} == {True}
    for run in runs:
        assert run.model.configure(256) == sizes[run.model.preset].config  # the same model at every length
        assert parse(arguments(run), "train") == run
    assert sizes["gpt2"].config.max_positions == 1440
    assert abs(sizes["gpt2"].n_params / 300_000 - 1) <= 0.02


def test_one_length_keeps_names_batch_and_model(tmp_path: Path) -> None:
    runs, _ = at_lengths(tmp_path, 96, seeds=1)
    assert [run.name for run in runs] == ["gpt2-s0", "lstm-s0"]
    assert {(run.train.batch_size, run.train.lengths, run.model.set, run.train.carry) for run in runs} == {
        (2048 // 96, (), (), False)
    }
    assert all(run.train.carry for run in at_lengths(tmp_path, 96, carry=True)[0])


def test_an_objective_of_rows_of_its_own_has_one_length_where_none_is_given() -> None:
    def lengths(kind: str, **options: Any) -> tuple[int, ...]:
        return with_lengths_of(CompareConfig(objective=ObjectiveSpec(kind=kind), **options)).seq_len

    assert lengths("next_token") == CompareConfig.seq_len
    assert (lengths("induction"), lengths("needle"), lengths("pairs")) == ((64,), (128,), (128,))
    assert lengths("induction", seq_len=(48,)) == (48,)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seq_len": (250, 1000, 1600), "batch_size": 8}, "--seq-len 1600 does not divide .*nearest that does is 2000"),
        ({"seq_len": (64, 4096), "batch_size": 8}, "--seq-len 4096 is more than the 512 tokens .*--batch-size 64"),
        ({"seq_len": (256, 64)}, "--seq-len must be increasing"),
    ],
)
def test_lengths_that_do_not_fit_a_step_are_refused_with_what_would(options: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        CompareConfig(**options)


def test_equal_flops_are_equal_within_two_percent_over_models_and_lengths(tmp_path: Path) -> None:
    runs, sizes = at_lengths(tmp_path, 64, 512, archs=("transformer", "mamba", "lstm"), equal="flops", steps=60)
    spent = [sizes[run.model.preset].flops_at[run.train.seq_len] * run.train.n_tokens for run in runs]
    budget = 60 * 2048 * sizes["transformer"].flops_per_token
    assert all(abs(flops / budget - 1) <= 0.02 for flops in spent)
    assert len({run.train.steps for run in runs}) > 2
    for run in runs:  # what the trainer counts as spent
        model = build(run.model.configure(256), device="meta")
        assert sizes[run.model.preset].flops_at[run.train.seq_len] == model.training_flops_per_token(run.train.seq_len)
    with pytest.raises(ValueError, match="give more --steps"):
        at_lengths(tmp_path, 64, 512, archs=("transformer", "mamba", "lstm"), equal="flops", steps=3)


def test_equal_seconds_are_the_same_for_all_whatever_the_steps(tmp_path: Path) -> None:
    runs, sizes = at_lengths(tmp_path, 64, 512, equal="seconds", seconds=30.0, steps=60)
    same, _ = at_lengths(tmp_path, 64, 512, equal="seconds", seconds=30.0, steps=70)
    assert runs == same
    assert {run.train.seconds for run in runs} == {30.0}
    assert {(task.kind, task.cost) for task in training_tasks(runs, sizes)} == {("timed train", 30.0)}
    assert all(parse(arguments(run), "train") == run for run in runs)
    for options in ({"equal": "seconds"}, {"seconds": 5.0}):
        with pytest.raises(ValueError, match=r"--equal seconds and --seconds S, .* go together: give both"):
            CompareConfig(**options)  # pyright: ignore[reportArgumentType]


def test_models_of_a_seed_and_length_train_together_in_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, _ = at_lengths(tmp_path, 64, 512, archs=("lstm", "gpt2", "mamba"), equal="seconds", seconds=1.0, seeds=2)
    record(runs[1])  # is done
    found = []

    def train(group: list[RunConfig], *_: object, logs: Path, jobs: int) -> dict[str, str]:
        assert jobs == len(group)
        (folder,) = {run.turns for run in group}
        assert folder is not None
        slots = [path.name for path in folder.glob("slot-*")]
        found.append(([run.name for run in group], (folder / "runs").read_text().split(), len(slots)))
        return {group[0].name: "on purpose"}

    monkeypatch.setattr(training, "train_runs", train)
    progress = Progress(Schedule([]), stream=io.StringIO())
    failures = train_in_turns(runs, progress, logs=tmp_path, jobs=2)
    names = [[run.name for run in runs[i : i + 3]] for i in range(0, 12, 3)]
    assert found == [(group, [name for name in group if name != runs[1].name], 2) for group in names]
    assert failures == {group[0]: "on purpose" for group in names}


def test_a_run_of_before_there_were_times_and_turns_is_the_same_run(runs: list[RunConfig]) -> None:
    before = runs[0].to_dict()
    del before["turns"], before["train"]["seconds"]
    assert differences(replace(runs[0], turns=Path("elsewhere")), before) == []
    looking = replace(runs[0], train=replace(runs[0].train, layer_stats_every=7, profile=True))
    assert differences(looking, before) == differences(runs[0], looking.to_dict()) == []
    timed = replace(runs[0], train=replace(runs[0].train, seconds=9.0))
    assert differences(timed, before) == ["train.seconds 0.0 instead of 9.0"]
    assert differences(runs[0], timed.to_dict()) == ["train.seconds 9.0 instead of 0.0"]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_architecture_is_sized_within_two_percent(arch: str) -> None:
    sized = size_arch(arch, n_params=300_000, vocab_size=256, seq_len=128)
    assert abs(sized.n_params / 300_000 - 1) <= 0.02
    assert 0 < sized.n_active_params <= sized.n_params
    assert sized.flops_per_token > 3 * sized.n_active_params  # at least a multiply-add per weight, three passes
    assert sized.state_bytes > 0


def test_finished_runs_are_recognized(runs: list[RunConfig]) -> None:
    assert not is_done(runs[0])
    record(runs[0], status="interrupted")
    assert not is_done(runs[0])
    record(runs[0])
    assert is_done(runs[0])
    check_resumable(runs, DIGEST)


def test_a_run_of_other_settings_is_not_overwritten(runs: list[RunConfig]) -> None:
    record(replace(runs[0], train=replace(runs[0].train, steps=999)))
    with pytest.raises(ValueError, match=r"lstm-s0 holds another run \(train.steps 999 instead of 20\).*--fresh"):
        check_resumable(runs, DIGEST)


def test_a_run_of_before_states_were_carried_is_one_that_carries_none(runs: list[RunConfig]) -> None:
    recorded = runs[0].to_dict()
    del recorded["train"]["carry"]
    assert differences(runs[0], recorded) == []
    carrying = replace(runs[0], train=replace(runs[0].train, carry=True))
    assert differences(carrying, recorded) == ["train.carry False instead of True"]
    assert differences(runs[0], carrying.to_dict()) == ["train.carry True instead of False"]


def test_a_run_on_other_data_is_not_overwritten(runs: list[RunConfig]) -> None:
    record(runs[0], digest="f00d" * 16)
    with pytest.raises(ValueError, match="data with digest f00df00df00d instead of c0ffeec0ffee"):
        check_resumable(runs, DIGEST)


def test_progress_reads_what_is_appended(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    tail = MetricsTail(path)
    assert tail.read() == (0, 0.0, "")
    append_line(path, json.dumps({"step": 10, "train/loss": 2.0}) + '\n{"step": 2')
    assert tail.read() == (10, 0.0, "")
    write_json(tmp_path / "run.json", {"score": {**BITS_PER_BYTE.to_dict(), "name": "likeness", "unit": "alike"}})
    append_line(path, '0, "seconds": 1.5, "val/likeness": 2.5}\n')
    assert tail.read() == (20, 1.5, ", 2.50 alike")
    assert tail.read() == (20, 1.5, ", 2.50 alike")


def test_threads_are_shared_among_runs_that_train_at_once() -> None:
    assert share_threads(None, 8, device="cpu", n_runs=5) == (5, 1)
    assert share_threads(2, 8, device="cpu", n_runs=5) == (2, 4)
    assert share_threads(1, 8, device="cpu", n_runs=5) == (1, 8)
    assert share_threads(4, 2, device="cpu", n_runs=5) == (4, 1)


def test_as_many_runs_train_at_once_as_are_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    class Training:
        def __init__(self, run: RunConfig, log: Path, kills: object) -> None:
            started.append(run.name)
            self.run, self.child, self.left = run, self, 2
            assert len(started) - len(ended) <= 2

        def poll(self) -> int | None:
            self.left -= 1
            if self.left <= 0:
                ended.append(self.run.name)
            return None if self.left > 0 else 1

        def progress(self) -> tuple[float, str]:
            return 0.5, ""

        def failure(self) -> str:
            return "failed: on purpose"

    ended: list[str] = []
    monkeypatch.setattr(training, "TrainingProcess", Training)
    monkeypatch.setattr(training, "is_done", lambda run: run.name == "b")
    runs = [RunConfig(name=name, out=tmp_path) for name in "abcde"]
    tasks = [Task(name=name, kind="train", cost=1.0) for name in "abcde"]
    progress = Progress(Schedule(tasks, at_once={"train": 2}), stream=io.StringIO())
    failures = train_runs(runs, progress, logs=tmp_path, jobs=2)
    assert started == ended == ["a", "c", "d", "e"]
    assert failures == dict.fromkeys("acde", "failed: on purpose")
    assert progress.schedule.done == "5/5"


@pytest.mark.skipif(sys.platform != "linux", reason="runs are forked on Linux only")
def test_a_run_from_the_warm_server_learns_the_same_bits_and_one_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 12)
    of_all = TrainConfig(
        batch_size=2, seq_len=32, eval_tokens=256, final_eval_tokens=256, position_len=32, log_every=1,
        threads=torch.get_num_threads(), precision="fp32",
    )  # fmt: skip
    ours, forked, endless = (
        RunConfig(
            name=name,
            out=tmp_path,
            model=ModelSpec(preset="mamba", n_params=60_000),
            data=DataConfig(source=str(text)),
            train=replace(of_all, steps=steps),
        )
        for name, steps in (("ours", 4), ("forked", 4), ("endless", 10**6))
    )
    assert train(ours).exit_code == 0
    tasks = [Task(name=name, kind="train", cost=1.0) for name in ("forked", "endless")]
    progress = Progress(Schedule(tasks), stream=io.StringIO())
    assert train_runs([forked], progress, logs=tmp_path) == {}

    def losses(run: RunConfig) -> list[float]:
        lines = (run.directory / "metrics.jsonl").read_text().splitlines()
        return [record["train/loss"] for record in map(json.loads, lines) if "train/loss" in record]

    assert losses(forked) == losses(ours)
    assert len(losses(ours)) == 4

    run = TrainingProcess(endless, tmp_path / "endless.log", MemoryKills())
    while not run.progress()[0]:
        assert run.child.poll() is None
        time.sleep(0.05)
    run.child.ask_to_stop(signal.SIGKILL)
    assert run.child.wait(20) == -signal.SIGKILL
    assert (run.failure() or "").startswith("killed from outside (SIGKILL)")


def test_options_of_an_objective_are_the_same_however_they_are_given() -> None:
    by_file = RunConfig(objective=ObjectiveSpec(options={"packing": "reset"}))
    by_words = RunConfig(objective=ObjectiveSpec(set=("packing=reset",)))
    assert parse(arguments(by_file), "train").objective.all_options() == {"packing": "reset"}
    assert differences(by_file, by_words.to_dict()) == []
    assert differences(RunConfig(), by_file.to_dict()) == ["objective.options.packing reset instead of None"]
    assert differences(by_file, RunConfig().to_dict()) == ["objective.options.packing None instead of reset"]
