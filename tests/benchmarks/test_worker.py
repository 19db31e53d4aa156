import resource
import sys

import pytest
import torch
from crossover.archs import configure
from crossover.benchmarks.config import MeasureConfig
from crossover.benchmarks.worker import _Bench, limit_memory, measure, repeat_in_time_box
from crossover.train.runtime import choose_precision

CPU = torch.device("cpu")


def bench(arch: str = "mamba", context_len: int = 16, precision: str = "fp32") -> _Bench:
    settings = MeasureConfig(tokens_per_batch=32, decode_tokens=2, time_box=0.01, min_repeats=2)
    config = configure(arch, d_model=32, n_layers=1)
    return _Bench(config, context_len, settings, device=CPU, precision=choose_precision(precision, CPU))


@pytest.mark.parametrize(("seconds", "n_repeats"), [(2.0, 5), (3.0, 4), (100.0, 3)])
def test_repeats_fill_the_time_box_and_slow_phases_get_the_fewest(seconds: float, n_repeats: int) -> None:
    now = 0.0

    def run() -> float:
        nonlocal now
        now += seconds
        return seconds

    assert repeat_in_time_box(run, time_box=10, min_repeats=3, clock=lambda: now) == [seconds] * n_repeats


@pytest.mark.parametrize("phase", ["decode", "prefill", "train"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_state_bytes_do_not_depend_on_the_phase(phase: str, precision: str) -> None:
    one = bench("transformer", precision=precision)
    found = measure(one, phase)
    assert found["status"] == "done", found
    dtype = torch.bfloat16 if precision == "bf16" else None
    assert found["state_bytes"] == sum(s.nbytes for s in one.lm.init_state(1, 16, dtype=dtype))


def test_a_state_that_is_not_what_init_state_says_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    one = bench()
    monkeypatch.setattr(one, "_declared_bytes", lambda batch_size: 1)
    found = measure(one, "prefill")
    assert found["status"] == "failed"
    assert "init_state says 1" in found["error"]


def test_decoding_starts_every_repeat_from_the_same_context() -> None:
    one, lengths = bench("transformer"), []
    forward = one.lm.forward

    def spy(tokens: torch.Tensor, state: list) -> object:
        lengths.append(int(next(v for v in vars(state[0]).values() if isinstance(v, int) or v.ndim == 0)))
        return forward(tokens, state)

    one.lm.forward = spy  # pyright: ignore[reportAttributeAccessIssue]
    assert measure(one, "decode")["status"] == "done"
    assert set(lengths) == {16, 17}


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
    one = bench()

    def fail() -> None:
        raise error

    monkeypatch.setattr(one, "train", fail)
    found = measure(one, "train")
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
