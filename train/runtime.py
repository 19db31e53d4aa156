"""The process around a run: device, arithmetic, allocator, memory and time meters, signals."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import platform
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.nn.functional as F

__all__ = [
    "Interrupted",
    "MemoryKills",
    "PeakMemory",
    "Precision",
    "Stopwatch",
    "bf16_speedup",
    "choose_device",
    "choose_precision",
    "is_out_of_memory",
    "keep_freed_memory",
    "says_out_of_memory",
    "signals_held",
    "stop_signals",
]


def choose_device(name: str) -> torch.device:
    """Returns the device called `name`; "auto" is CUDA where there is one, else the CPU.

    One with a number becomes the current one, on which streams are made and foreign kernels run.

    Raises:
        ValueError: if this machine or this build of PyTorch has no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # an absent CUDA is an AssertionError
        reason = str(error).partition("\n")[0]
        raise ValueError(f"train.device={name} cannot be used here ({reason}): choose cpu or auto") from None
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)
    return device


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the matrix products, and why it was chosen. Parameters, states and sums are float32 either way."""

    name: str
    """fp32 or bf16."""
    reason: str
    speedup: float | None = None
    """How many times as fast products were in bf16 as in fp32; None where that decided nothing."""

    def autocast(self, device: torch.device) -> torch.autocast:
        """Returns the context in which the forward pass runs."""
        return torch.autocast(device.type, dtype=torch.bfloat16, enabled=self.name == "bf16")


def choose_precision(setting: str, device: torch.device, *, d_model: int = 256) -> Precision:
    """Resolves "auto": bf16 autocast where it pays, fp32 elsewhere.

    On a CPU with instructions for it that is where `bf16_speedup` finds it faster for models of this width; without
    them PyTorch emulates it, at a fourth of the speed of fp32.
    """
    if setting != "auto":
        return Precision(setting, "as asked for")
    if device.type == "cuda":
        supported = torch.cuda.is_bf16_supported(including_emulation=False)
        return Precision("bf16" if supported else "fp32", f"this GPU has {'' if supported else 'no '}bf16 arithmetic")
    if device.type != "cpu" or not (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return Precision("fp32", f"this {device.type} has no bf16 instructions that are known to pay")
    width = min(d_model, _WIDEST)
    speedup = bf16_speedup(width)
    found = f"products of width {width} run {speedup:.2f} times as fast in bf16 as in fp32 on this CPU"
    return Precision("bf16" if speedup >= _PAYS else "fp32", f"{found}; {_PAYS:g} is asked for", speedup)


_PAYS = 1.2
"""Least speedup of products for bf16: they are about half of a training step, and what is gained must be worth it."""
_WIDEST = 256
"""Width in channels from which on the speedup hardly grows."""
_ROWS, _ROUNDS = 512, 5


@functools.cache
def bf16_speedup(d_model: int) -> float:
    """Measures how many times as fast products of a training step are under bf16 autocast, once in a process.

    Two projections, D to 2 D and back, of 512 tokens, forward and backward, with the casts that autocast makes: in
    turns with float32, the median of the ratios, which takes some tens of milliseconds. It is the time that one thread
    computes, so that what else runs on the machine does not decide.
    """
    generator = torch.Generator().manual_seed(0)
    x, up, down = (
        torch.randn(shape, generator=generator).requires_grad_()
        for shape in ((_ROWS, d_model), (2 * d_model, d_model), (d_model, 2 * d_model))
    )

    def seconds(enabled: bool) -> float:
        start = time.thread_time()
        with torch.enable_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            y = F.linear(F.linear(x, up), down)
        torch.autograd.grad(y, (x, up, down), y.detach())
        return time.thread_time() - start

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        ratios = [seconds(False) / seconds(True) for _ in range(1 + _ROUNDS)]
    finally:
        torch.set_num_threads(threads)
    return statistics.median(ratios[1:])  # the first calls prepare the products


def keep_freed_memory() -> bool:
    """Tells glibc to keep freed blocks for the next step instead of returning them to the kernel.

    By default every block over 32 MB is mapped and unmapped anew, and each training step faults all its pages in again.
    With this, models of 1M parameters at 8192 tokens a step took 5 to 45 times fewer page faults and 7 to 20 % less CPU
    time, and their peak memory was the same within 3 %. Returns False where the C library is not glibc or refuses.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    m_trim_threshold, m_mmap_threshold, m_mmap_max, largest = -1, -3, -4, 2**31 - 1
    trimmed = mallopt(m_trim_threshold, largest)
    # glibc before 2.35 refuses a mapping threshold over 32 MB: there, forbid mappings altogether.
    return bool(trimmed and (mallopt(m_mmap_threshold, largest) or mallopt(m_mmap_max, 0)))


def check_memory(n_bytes: int, device: torch.device) -> None:
    """Raises MemoryError unless the machine of a CPU has so much: the system would promise it, and fail much later."""
    held = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if device.type == "cpu" else n_bytes
    if n_bytes > held:
        raise MemoryError(f"training needs {n_bytes / 2**30:,.0f} GiB or more, and the machine has {held / 2**30:,.0f}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: on the CPU, PyTorch reports this as a plain RuntimeError."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and says_out_of_memory(str(error))


def says_out_of_memory(text: str) -> bool:
    """Whether a message, such as the last line of a process that died, says that memory ran out."""
    signs = (
        "can't allocate memory",
        "Cannot allocate memory",
        "not enough memory",
        "out of memory",
        "bad_alloc",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "MemoryError",
    )
    return any(sign in text for sign in signs)


class MemoryKills:
    """Tells children that the system has killed for want of memory from those that something else has."""

    def __init__(self) -> None:
        """Knows of those before."""
        self._known = _memory_kills()

    def explain_one(self) -> bool:
        """Whether the system has killed one more than was asked about."""
        found = _memory_kills() > self._known
        self._known += found
        return found


def _memory_kills() -> int:
    """Processes killed for want of memory in the control group of this one (cgroups(7)), or else in the system.

    0 where nothing counts them, as outside Linux.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines():
            _, controllers, group = line.split(":", 2)
            group = group.lstrip("/")
            if not controllers:
                path = Path("/sys/fs/cgroup", group, "memory.events")
            elif "memory" in controllers.split(","):
                path = Path("/sys/fs/cgroup/memory", group, "memory.oom_control")
            else:
                continue
            if path.exists() and (count := _counter(path, "oom_kill")) is not None:
                return count
        return _counter(Path("/proc/vmstat"), "oom_kill") or 0
    return 0


def _counter(path: Path, name: str) -> int | None:
    for line in path.read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(" ")
        if key == name:
            return int(value)
    return None


class PeakMemory:
    """The most memory used since construction, in bytes, above what was used before it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.method = self.method_on(device)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._before = torch.cuda.memory_allocated(device)  # what a warm-up has left, such as cuBLAS's workspace
            return
        if sys.platform == "linux":
            if platform.libc_ver()[0] == "glibc":
                ctypes.CDLL(None).malloc_trim(0)  # what the start-up freed must not hide what the model takes
            with contextlib.suppress(OSError):  # read-only in some containers: then the peak includes the start-up's
                Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far (proc(5))
            self._before = _proc_status("VmRSS")
        else:
            self._before = _peak_resident()

    @staticmethod
    def method_on(device: torch.device) -> str:
        """How it is measured on a device, in words."""
        if device.type == "cuda":
            return "torch.cuda.max_memory_allocated minus what was allocated before the model was built"
        before = "the resident set" if sys.platform == "linux" else "its peak"
        return f"peak resident set of the process minus {before} before the model was built"

    def peak_bytes(self) -> int:
        """Returns the peak so far."""
        if self._device.type == "cuda":
            return max(0, torch.cuda.max_memory_allocated(self._device) - self._before)
        # VmHWM and not ru_maxrss: a child inherits ru_maxrss from the process that started it.
        peak = _proc_status("VmHWM") if sys.platform == "linux" else _peak_resident()
        return max(0, peak - self._before)


def _proc_status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return _peak_resident()  # kernels that leave the field out


def _peak_resident() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


class Stopwatch:
    """Counts the seconds and tokens of training alone: evaluation, saving and sampling happen while it stands.

    `seconds` counts everything. The first step of a process pays for compilation and first touches of memory, so
    `tokens_per_second` leaves it out.
    """

    def __init__(
        self,
        *,
        seconds: float = 0.0,
        before: float = 0.0,
        warm_seconds: float = 0.0,
        warm_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Continues from the `state` of an earlier process."""
        self.seconds = seconds
        self.before = before
        """`seconds` before the last step."""
        self._warm_seconds = warm_seconds
        self._warm_tokens = warm_tokens
        self._clock = clock
        self._is_warm = False
        self._lap_seconds, self._lap_tokens = 0.0, 0

    @property
    def state(self) -> dict[str, Any]:
        """Arguments of the constructor to continue."""
        warm = {"warm_seconds": self._warm_seconds, "warm_tokens": self._warm_tokens}
        return {"seconds": self.seconds, "before": self.before, **warm}

    @contextlib.contextmanager
    def step(self) -> Iterator[Callable[[int], None]]:
        """Times one training step, which says on how many tokens. A step that raises is not counted."""
        start, counted = self._clock(), list[int]()
        yield counted.append
        elapsed, tokens = self._clock() - start, sum(counted)
        self.before, self.seconds = self.seconds, self.seconds + elapsed
        self._lap_seconds += elapsed
        self._lap_tokens += tokens
        if self._is_warm:
            self._warm_seconds += elapsed
            self._warm_tokens += tokens
        self._is_warm = True

    def lap(self) -> float:
        """Returns tokens per second since the last lap, and starts the next."""
        rate = self._lap_tokens / self._lap_seconds if self._lap_seconds else 0.0
        self._lap_seconds, self._lap_tokens = 0.0, 0
        return rate

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens per second without the first step of each process; None before a second step."""
        return self._warm_tokens / self._warm_seconds if self._warm_seconds else None


class Interrupted(KeyboardInterrupt):
    """The user or the scheduler asked this process to stop (SIGINT, SIGTERM, or SIGHUP of a closed terminal)."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum

    @property
    def exit_code(self) -> int:
        """The exit code by which a shell says that a signal ended a process: 129, 130 or 143."""
        return 128 + self.signum


_held: list[list[int]] = []
"""Signals that wait for the end of a block of `signals_held`; of blocks in each other the outermost is the first."""


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Lets the signals of `stop_signals(at_once=True)` wait for the end of the block: what it starts is noted too."""
    _held.append([])
    try:
        yield
    finally:
        waiting = _held.pop()
        if waiting and _held:
            _held[-1] += waiting
        elif waiting:
            raise Interrupted(waiting[0])


@contextlib.contextmanager
def stop_signals(*, at_once: bool = False) -> Iterator[Callable[[], None]]:
    """Turns SIGHUP, SIGINT and SIGTERM inside the block into `Interrupted`.

    The first signal waits until the caller calls the yielded function, which raises it where stopping is safe; a second
    signal acts as it would outside the block. With `at_once` every signal raises where it arrives.

    A signal that was ignored before stays so: `nohup` ignores SIGHUP, and a shell starts `command &` of a script with
    SIGINT ignored. Outside the main thread, where Python allows no handlers, nothing is raised.
    """
    received: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        if at_once and _held:
            _held[-1].append(signum)
            return
        if at_once:
            raise Interrupted(signum)
        if received:
            signal.signal(signum, previous[signum])
            signal.raise_signal(signum)
        received.append(signum)

    def poll() -> None:
        if received:
            raise Interrupted(received[0])

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = [
        signum
        for signum in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        if in_main_thread and signal.getsignal(signum) is not signal.SIG_IGN
    ]
    previous: dict[int, Any] = {signum: signal.signal(signum, handler) for signum in signals}
    try:
        yield poll
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)
