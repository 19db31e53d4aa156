"""Common part of the Triton kernels of several operations: device functions and launch options.

Exponentials are powers of two, the only ones that the hardware has. Kernels compute in float32 and run on Triton 3.6 to
3.9, compiled or in the interpreter (TRITON_INTERPRET=1).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources

from .dispatch import Unsupported
from .operators import kernels_run, without_kernels

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)

MOST_PROGRAMS = (2**31 - 1, 2**16 - 1, 2**16 - 1)
"""Limits of the axes of a grid on every NVIDIA GPU."""


@dataclass(frozen=True)
class Launch:
    """A call of `launch`."""

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    """Compile-time constants of the kernel, num_warps and num_stages."""


_launches: list[Launch] | None = None


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
    """Runs a kernel; every launch of the project passes through here.

    Args:
        kernel: a triton.jit function.
        grid: number of programs along each axis.
        arguments: its run-time arguments in order; None for an absent tensor, which the kernel knows at compile time.
        options: its compile-time constants by name, num_warps and num_stages.

    Raises:
        Unsupported: if the grid is too large, or the device's registers or shared memory are too small.
    """
    if _launches is not None:
        _launches.append(Launch(kernel, grid, arguments, options))
    if not kernels_run():
        return
    if any(n > most for n, most in zip(grid, MOST_PROGRAMS, strict=False)):
        raise Unsupported(f"a grid of {grid} programs is larger than {MOST_PROGRAMS}")
    # Triton launches on the current device, which need not be that of the tensors
    with torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor))):
        try:
            # Triton 3.10 stops contracting to fused multiply-add unless asked
            kernel[grid](*arguments, **options, enable_fp_fusion=True)
        except OutOfResources as error:
            raise Unsupported(str(error)) from error


def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a program may have: the device's; no bound where there is no GPU."""
    if device.type != "cuda":
        return 1 << 30
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@contextlib.contextmanager
def record_launches() -> Iterator[list[Launch]]:
    """Collects the launches inside the block instead of making them: with tensors on "meta", what would be compiled."""
    global _launches
    previous, _launches = _launches, []
    try:
        with without_kernels():
            yield _launches
    finally:
        _launches = previous


@triton.jit
def exp(x):
    """e^x."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def sigmoid(x):
    """1 / (1 + e^-x)."""
    return 1.0 / (1.0 + exp(-x))


@triton.jit
def silu(x):
    """x sigmoid(x)."""
    return x * sigmoid(x)


@triton.jit
def silu_slope(x):
    """The derivative of silu at x."""
    s = sigmoid(x)
    return s * (1.0 + x * (1.0 - s))


@triton.jit
def softplus(x):
    """log(1 + e^x); below e^x = 1/64, where 1 + e^x rounds too much away, by its series."""
    e = exp(tl.minimum(x, 20.0))
    series = e * (1.0 - e * (0.5 - e * (0.33333333 - 0.25 * e)))
    return tl.where(x > 20.0, x, tl.where(e < 0.015625, series, tl.log2(1.0 + e) * LOG_2))
