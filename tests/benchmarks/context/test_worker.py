import dataclasses
import resource
import sys
import time
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from crossover.archs import State, build
from crossover.benchmarks.context import measure
from crossover.benchmarks.context.jobs import PHASES
from crossover.benchmarks.context.measure import Bench
from crossover.benchmarks.context.options import MeasureConfig
from crossover.benchmarks.context.worker import attempt, limit_memory
from crossover.train.runtime import PeakMemory, choose_precision

CPU = torch.device("cpu")


def make_bench(arch: str = "mamba", context_len: int = 16, precision: str = "fp32") -> Bench:
    settings = MeasureConfig(tokens_per_batch=32, decode_tokens=2, time_box=0.01, min_repeats=3)
    memory, lm = PeakMemory(CPU), build(arch, d_model=32, n_layers=1)
    options = {"device": CPU, "precision": choose_precision(precision, CPU), "memory": memory}
    return Bench.of(lm, context_len, settings, **options)


@pytest.mark.quick
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_bytes_do_not_depend_on_the_phase(phase: str, precision: str) -> None:
    bench = make_bench("transformer", precision=precision)
    found = attempt(bench, phase)
    assert found["status"] == "done", found
    with torch.no_grad():
        state = bench._prefilled(bench._tokens(1, 16), 16)
    assert found["state_bytes"] == sum(storages(state).values())


def storages(state: Sequence[State]) -> dict[int, int]:
    """Bytes that tensors of a state hold, by address."""
    tensors = [value for layer in state for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}


@pytest.mark.parametrize(("warm_up", "repeats"), [(0.1, 2), (0.001, 3)])
def test_training_whose_warm_up_overruns_the_box_is_repeated_twice(
    warm_up: float, repeats: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seconds = iter([warm_up, 0.25, 0.5, 0.5, 0.5])

    def fill_the_box(device: torch.device, work: object) -> float:
        time.sleep(0.01)
        return next(seconds)

    monkeypatch.setattr(measure, "timed", fill_the_box)
    found = attempt(make_bench(), "train")
    assert (found["status"], found["repeats"]) == ("done", repeats)
    if repeats == 2:
        assert found["spread"] == (32 / 0.5, 32 / 0.25)


def test_a_decode_slower_than_the_box_keeps_its_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "timed", lambda device, work: 100.0)
    assert attempt(make_bench(), "decode")["repeats"] >= 3


@pytest.mark.parametrize(("arch", "most"), [("transformer", 4), ("lstm", 8)])
def test_as_many_sequences_are_continued_as_fit(arch: str, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench(arch, context_len=48)
    with torch.no_grad():
        one = sum(storages(bench.driver.read(bench._tokens(1, 48), 48 + 2, None)).values())
    # what is known to be too much is not tried; of what is tried, 8 sequences of the Transformer turn out to be
    limit = 40 * one if arch == "transformer" else 11 * one
    bench.settings = dataclasses.replace(bench.settings, max_batch=100 if arch == "lstm" else 9)
    object.__setattr__(bench.settings, "memory_limit", limit)
    tried: list[int] = []
    selected = bench.driver.selected

    def crowded(state: object, rows: list[int]) -> object:
        tried.append(len(rows))
        if len(rows) > 4 and arch == "transformer":
            raise MemoryError
        return selected(state, rows)

    monkeypatch.setattr(bench.driver, "selected", crowded)
    found = attempt(bench, "decode_many")
    assert (found["status"], found["batch_size"]) == ("done", most), found
    assert max(tried) == 8


@pytest.mark.parametrize(("phase", "n_read"), [("long_prompt", 46), ("long_answer", 2)])
def test_a_request_has_the_length_of_the_context(phase: str, n_read: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bench, served = make_bench("mamba", context_len=48), []
    read, decoder = bench.driver.read, bench.driver.decoder

    def reading(tokens: torch.Tensor, *more: Any) -> object:
        served.append([tokens.shape[1], 0])
        return read(tokens, *more)

    def writing(state: object) -> object:
        step = decoder(state)

        def one(token: torch.Tensor) -> object:
            served[-1][1] += 1
            return step(token)

        return one

    monkeypatch.setattr(bench.driver, "read", reading)
    monkeypatch.setattr(bench.driver, "decoder", writing)
    found = attempt(bench, phase)
    assert found["status"] == "done", found
    assert [n_read, 48 - n_read] in served[1:]  # the first warms up
    assert found["tokens_per_second"] == pytest.approx(48 / found["seconds"])


def test_an_unexpected_error_leaves_its_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = make_bench()
    monkeypatch.setattr(bench, "_declared_bytes", lambda batch_size: 1)
    assert attempt(bench, "prefill")["status"] == "failed"
    assert "Traceback" in capsys.readouterr().err


def test_a_state_that_is_not_what_init_state_says_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()
    monkeypatch.setattr(bench, "_declared_bytes", lambda batch_size: 1)
    found = attempt(bench, "prefill")
    assert found["status"] == "failed"
    assert "init_state says 1" in found["error"]


def test_decoding_starts_every_repeat_from_the_same_context() -> None:
    bench, lengths = make_bench("transformer"), []
    forward = bench.driver.model.forward

    def spy(tokens: torch.Tensor, state: list) -> object:
        lengths.append(state[0].length)
        return forward(tokens, state)

    bench.driver.model.forward = spy  # pyright: ignore[reportAttributeAccessIssue]
    assert attempt(bench, "decode")["status"] == "done"
    assert set(lengths) == {16, 17}


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "status"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4 bytes."), "out_of_memory"),
        (torch.OutOfMemoryError("CUDA out of memory."), "out_of_memory"),
        (MemoryError(), "out_of_memory"),
        (RuntimeError("std::bad_alloc"), "out_of_memory"),
        (RuntimeError("shapes do not fit"), "failed"),
    ],
)
def test_errors_are_told_apart(error: Exception, status: str, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = make_bench()

    def fail() -> None:
        raise error

    monkeypatch.setattr(bench, "train", fail)
    found = attempt(bench, "train")
    assert found["status"] == status
    assert found["error"]


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA limits allocations on Linux only")
def test_the_limit_is_never_above_that_of_the_system(monkeypatch: pytest.MonkeyPatch) -> None:
    set_limits = []
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (100, 200))
    monkeypatch.setattr(resource, "setrlimit", lambda kind, limits: set_limits.append((kind, limits)))
    limit_memory(150, CPU)
    limit_memory(300, CPU)
    assert set_limits == [(resource.RLIMIT_DATA, (150, 200)), (resource.RLIMIT_DATA, (200, 200))]
