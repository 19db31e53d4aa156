"""Triton code to measure a GPU: a kernel that takes exponentials and nothing else, and Triton's stopwatch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor

from ...kernels.triton_kernels import launch

BLOCK = 1024
"""Numbers of a program: eight for each of its threads, so that none waits for another."""


def exponentials(programs: int, repeats: int, device: torch.device) -> Tensor:
    """Takes `repeats` exponentials of each of programs x BLOCK numbers in registers; returns the last of them."""
    out = torch.empty(programs, BLOCK, dtype=torch.float32, device=device)
    launch(_exponentials_kernel, (programs,), out, repeats, BLOCK=BLOCK, num_warps=4)
    return out


def do_bench_ms(work: Callable[[], object]) -> float:
    """Milliseconds of `work` by triton.testing.do_bench, whose clock also runs while the GPU waits for launches."""
    return triton.testing.do_bench(work, warmup=10, rep=50, return_mode="median")


@triton.jit
def _exponentials_kernel(out, repeats, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    x = i.to(tl.float32) / BLOCK
    for _ in range(repeats):
        x = tl.exp2(-x)
    tl.store(out + tl.program_id(0) * BLOCK + i, x)
