import multiprocessing
import signal
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.train import runtime
from crossover.train.runtime import (
    Interrupted,
    MemoryKills,
    PeakMemory,
    Stopwatch,
    bf16_speedup,
    check_memory,
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
    says_out_of_memory,
    signals_held,
    stop_signals,
)

CPU = torch.device("cpu")


class FakeClock:
    """Seconds that pass when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.quick
def test_the_stopwatch_counts_training_only() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock=clock)
    for seconds, idle in ((10.0, 5.0), (2.0, 70.0), (3.0, 900.0)):
        with watch.step() as count:
            count(60)
            clock.now += seconds
        clock.now += idle
    assert watch.seconds == 15.0
    assert watch.tokens_per_second == 120 / 5.0  # without the first step
    assert watch.lap() == 180 / 15.0
    with watch.step() as count:
        count(60)
        clock.now += 6.0
    assert watch.lap() == 10.0


def test_the_stopwatch_continues_and_leaves_out_the_first_step_of_each_process() -> None:
    clock = FakeClock()
    first = Stopwatch(clock=clock)
    second = None
    for watch_number in range(2):
        watch = first if watch_number == 0 else (second := Stopwatch(**first.state, clock=clock))
        for seconds in (10.0, 2.0):
            with watch.step() as count:
                count(60)
                clock.now += seconds
    assert second is not None
    assert second.seconds == 24.0
    assert second.tokens_per_second == 30.0


def test_one_step_has_no_speed_yet() -> None:
    watch = Stopwatch(clock=FakeClock())
    with watch.step() as count:
        count(60)
        pass
    assert watch.tokens_per_second is None


def test_a_step_that_raises_is_not_counted() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock=clock)

    def failing_step() -> None:
        with watch.step() as count:
            count(60)
            clock.now += 1.0
            raise KeyError

    with pytest.raises(KeyError):
        failing_step()
    assert watch.seconds == 0.0


@pytest.mark.parametrize(
    ("amx", "avx512", "speedup", "expected"),
    [(False, False, 9.0, "fp32"), (True, False, 1.3, "bf16"), (False, True, 1.3, "bf16"), (False, True, 1.1, "fp32")],
)
def test_the_cpu_takes_bf16_only_where_it_has_instructions_for_it_that_pay(
    amx: bool, avx512: bool, speedup: float, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(runtime, "bf16_speedup", {140: speedup}.__getitem__)
    chosen = choose_precision("auto", CPU, d_model=140)
    assert chosen.name == expected
    assert chosen.speedup == (speedup if amx or avx512 else None)
    assert "bf16 instructions" in chosen.reason or f"products of width 140 run {speedup:.2f} times" in chosen.reason


def test_the_speed_of_bf16_is_measured_once_and_leaves_no_trace() -> None:
    random, threads = torch.get_rng_state(), torch.get_num_threads()
    with torch.no_grad():
        speedup = bf16_speedup(24)
    assert speedup > 0
    assert bf16_speedup(24) is speedup
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.get_num_threads() == threads


@pytest.mark.quick
@pytest.mark.parametrize(("name", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_sets_the_arithmetic_of_products(name: str, dtype: torch.dtype) -> None:
    weight = torch.ones(2, 2)
    with choose_precision(name, CPU).autocast(CPU):
        assert (weight @ weight).dtype == dtype
    assert weight.dtype == torch.float32


def test_a_device_that_is_not_here_is_one_sentence() -> None:
    absent = f"cuda:{torch.cuda.device_count()}"
    with pytest.raises(ValueError, match=rf"train\.device={absent} cannot be used here .*choose cpu or auto"):
        choose_device(absent)
    with pytest.raises(ValueError, match=r"train\.device=gpu cannot be used here"):
        choose_device("gpu")


def test_a_device_with_a_number_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    current: list[torch.device] = []
    monkeypatch.setattr(torch, "empty", lambda *_, **__: None)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert [choose_device(name).type for name in ("cuda:1", "cuda", "cpu")] == ["cuda", "cuda", "cpu"]
    assert current == [torch.device("cuda:1")]


def test_the_real_allocator_error_of_the_cpu_means_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_other_errors_are_told_apart(error: BaseException, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_counts_what_was_freed_again_and_not_what_was_there_before() -> None:
    size = 64 * 2**20
    before = torch.ones(size, dtype=torch.uint8)
    del before
    memory = PeakMemory(CPU)
    assert memory.peak_bytes() < size // 2
    inside = torch.ones(size, dtype=torch.uint8)
    del inside
    assert size * 0.9 < memory.peak_bytes() < size * 1.5


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="an allocator setting of glibc")
def test_freed_memory_is_used_again_without_page_faults() -> None:
    default, kept = _in_a_new_process(_page_faults)
    assert kept * 4 < default


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_does_not_inherit_the_peak_of_its_parent() -> None:
    held = bytearray(64 * 2**20)
    assert _in_a_new_process(_own_peak) < len(held) // 2


def _page_faults() -> tuple[int, int]:
    """Counts those of filling fresh tensors, as glibc is set by default and after keep_freed_memory()."""
    import resource

    def fill() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(20):
            torch.ones(64 * 2**20, dtype=torch.uint8)
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    default = fill()
    assert keep_freed_memory()
    fill()  # the heap grows until there is room
    return default, fill()


def _own_peak() -> int:
    return PeakMemory(CPU).peak_bytes()


def _in_a_new_process(function: Callable[[], Any]) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function).result(timeout=60)


@pytest.mark.quick
@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_where_it_is_safe(signum: signal.Signals) -> None:
    before = signal.getsignal(signum)
    with stop_signals() as poll:
        poll()
        signal.raise_signal(signum)
        with pytest.raises(Interrupted, match=f"stopped by {signum.name}"):
            poll()
    assert signal.getsignal(signum) == before


@pytest.mark.usefixtures("interruptible")
def test_a_second_signal_stops_at_once() -> None:
    with stop_signals():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGHUP, 129), (signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_where_stopping_is_always_safe_every_signal_raises_at_once(signum: signal.Signals, code: int) -> None:
    before = signal.getsignal(signum)
    with stop_signals(at_once=True):
        for _ in range(2):
            with pytest.raises(Interrupted) as stop:
                signal.raise_signal(signum)
            assert stop.value.exit_code == code
    assert signal.getsignal(signum) == before


@pytest.mark.quick
def test_a_signal_waits_until_what_is_started_is_noted() -> None:
    noted = []

    def start() -> None:
        with signals_held():
            with signals_held():
                signal.raise_signal(signal.SIGTERM)
                signal.raise_signal(signal.SIGINT)
                noted.append("inner")
            noted.append("outer")

    with stop_signals(at_once=True):
        with pytest.raises(Interrupted, match="SIGTERM"):
            start()
        with pytest.raises(Interrupted):
            signal.raise_signal(signal.SIGTERM)
    assert noted == ["inner", "outer"]


@pytest.mark.quick
@pytest.mark.parametrize(
    ("group", "file", "text"),
    [
        ("0::/jobs/one", "sys/fs/cgroup/jobs/one/memory.events", "max 3\noom 9\noom_kill {}\noom_group_kill 0\n"),
        ("7:cpu:/\n6:memory:/jobs", "sys/fs/cgroup/memory/jobs/memory.oom_control", "under_oom 0\noom_kill {}\n"),
        ("0::/../elsewhere", "proc/vmstat", "pgfault 12\noom_kill {}\n"),
    ],
)
def test_of_several_killed_processes_as_many_ran_out_of_memory_as_the_system_says(
    group: str, file: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "Path", lambda first, *rest: tmp_path / "/".join((first, *rest)).lstrip("/"))
    for name, content in (("proc/self/cgroup", group), (file, text.format(2))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    kills = MemoryKills()
    assert not kills.explain_one()
    (tmp_path / file).write_text(text.format(4))
    assert [kills.explain_one() for _ in range(3)] == [True, True, False]


def test_memory_on_a_gpu_is_counted_from_what_stood_before(monkeypatch: pytest.MonkeyPatch) -> None:
    used = {"now": 100, "most": 900}
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: used["now"])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: used["most"])
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: used.update(most=used["now"]))
    memory = PeakMemory(torch.device("cuda"))
    assert memory.peak_bytes() == 0
    used["most"] = 350
    assert memory.peak_bytes() == 250


@pytest.mark.parametrize("at_once", [False, True])
def test_a_signal_that_is_ignored_stays_ignored(at_once: bool) -> None:
    def send(signum: signal.Signals) -> None:
        signal.raise_signal(signum)
        poll()

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in `sh -c 'crossover compare &'`
    try:
        with stop_signals(at_once=at_once) as poll:
            send(signal.SIGINT)
            with pytest.raises(Interrupted, match="SIGTERM"):
                send(signal.SIGTERM)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize(
    ("text", "is_it"),
    [
        ("terminate called after throwing an instance of 'std::bad_alloc'", True),
        ("OSError: [Errno 12] Cannot allocate memory", True),
        ("MemoryError", True),
        ("torch.OutOfMemoryError: CUDA out of memory.", True),
        ("libgomp.so.1: cannot allocate memory in static TLS block", False),
        ("ValueError: no", False),
    ],
)
def test_last_words_tell_whether_memory_ran_out(text: str, is_it: bool) -> None:
    assert says_out_of_memory(text) is is_it


def test_a_model_that_no_memory_holds_is_out_of_memory_before_it_is_made() -> None:
    check_memory(2**20, torch.device("cpu"))
    check_memory(2**60, torch.device("cuda"))
    with pytest.raises(MemoryError, match=r"^training needs 1,073,741,824 GiB or more, and the machine has \d+$"):
        check_memory(2**60, torch.device("cpu"))
