"""Measured limits of a GPU, from which the floors of its kernels follow, and the clocks that measure."""

from __future__ import annotations

import importlib
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..harness.limits import Limits
from ..harness.timing import rounds, timed

__all__ = ["Clock", "CpuClock", "CudaClock", "Timing", "machine", "measure_limits"]

_FLUSH_BYTES = 256 << 20
"""Bytes written between two runs, so that none finds its inputs in the cache: several times the largest cache."""
_LONGEST_LEAD = 0.02
"""Seconds that the GPU is kept busy at most while the CPU runs ahead. Beyond it launching is part of the time."""
_CYCLES_PER_SECOND = 2e9
"""An upper bound of any GPU's clock rate."""
_MOST_REPEATS = 200


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Times of one piece of work."""

    ms: float
    """Median of what the device takes, with everything launched before it begins."""
    launch_ms: float
    """Median of what the CPU takes to launch it."""
    repeats: int


Clock = Callable[[Callable[[], object]], Timing]
"""Times a work, which it calls once before it begins to count."""


class CudaClock:
    """Times on the GPU between two events; caches are emptied before each run.

    Before the first event the GPU is kept busy for longer than the CPU takes to launch the work: what is measured is
    the GPU's time alone, as in a model, where the CPU runs ahead, and not how fast Python launches one small kernel.
    """

    def __init__(self, device: torch.device, *, seconds: float) -> None:
        """Spends about that many seconds on each work."""
        self.seconds = seconds
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)

    def __call__(self, work: Callable[[], object]) -> Timing:
        """Calls it once to warm up, once to see how long it takes, and then as often as there is time for."""
        work()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        work()
        launch = time.perf_counter() - begin
        torch.cuda.synchronize()
        whole = time.perf_counter() - begin
        n = int(min(_MOST_REPEATS, max(3, self.seconds / max(whole, 1e-6))))
        if whole > self.seconds:
            n = 1
        cycles = int(1.5 * launch * _CYCLES_PER_SECOND) if launch < _LONGEST_LEAD else 0
        launches, events = [], []
        for _ in range(n):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self._flush.zero_()
            if cycles:
                torch.cuda._sleep(cycles)
            first.record()
            begin = time.perf_counter()
            work()
            launches.append(time.perf_counter() - begin)
            last.record()
            events.append((first, last))
        torch.cuda.synchronize()
        ms = [first.elapsed_time(last) for first, last in events]
        return Timing(ms=statistics.median(ms), launch_ms=1e3 * statistics.median(launches), repeats=n)


class CpuClock:
    """Times on the CPU, where launching and running are one."""

    def __init__(self, *, seconds: float) -> None:
        """Spends about that many seconds on each work."""
        self.seconds = seconds

    def __call__(self, work: Callable[[], object]) -> Timing:
        """Calls it once to warm up, and then as often as there is time for."""
        work()
        seconds = [timed(torch.device("cpu"), work) for _ in rounds(self.seconds)]
        ms = 1e3 * statistics.median(seconds)
        return Timing(ms=ms, launch_ms=ms, repeats=len(seconds))


def measure_limits(device: torch.device, clock: Clock, *, quick: bool) -> Limits:
    """Copy bandwidth (read and write), the rate of a large bf16 product of random numbers, that of exponentials.

    Args:
        device: cuda, or for tests cpu, where no exponentials are measured.
        clock: times the three.
        quick: whether small sizes will do, which measure nothing but that everything works.
    """
    n = 1 << (20 if quick else 30)
    source, target = torch.zeros(n, dtype=torch.int8, device=device), torch.empty(n, dtype=torch.int8, device=device)
    copy = clock(lambda: target.copy_(source))
    size = 128 if quick else 8192
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    product = clock(lambda: a @ b)
    return Limits(
        bytes=2 * n / copy.ms * 1e3,
        flops=2 * size**3 / product.ms * 1e3,
        exps=_exp_rate(device, clock, repeats=64 if quick else 4096) if device.type == "cuda" else None,
    )


def _exp_rate(device: torch.device, clock: Clock, *, repeats: int) -> float:
    kernels = importlib.import_module(".triton_kernels", __package__)
    programs = 16 * torch.cuda.get_device_properties(device).multi_processor_count  # all that fit at once
    timing = clock(lambda: kernels.exponentials(programs, repeats, device))
    return programs * kernels.BLOCK * repeats / timing.ms * 1e3


def machine(device: torch.device) -> dict[str, Any]:
    """The GPU with its clocks and what nvidia-smi says of it, and the versions that decide about speed."""
    found: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cpus": os.cpu_count()}
    if device.type != "cuda":
        return {**found, "device": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        **found,
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory": properties.total_memory,
        "triton": importlib.import_module("triton").__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **_smi(),
    }


def _smi() -> dict[str, str]:
    fields = (
        "driver_version",
        "clocks.sm",
        "clocks.max.sm",
        "clocks.mem",
        "temperature.gpu",
        "power.draw",
        "power.limit",
    )
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", "--id=0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return {"nvidia-smi": f"not available ({type(error).__name__})"}
    return dict(zip(fields, (value.strip() for value in done.stdout.strip().split(",")), strict=False))
