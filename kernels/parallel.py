"""Runs a compiled kernel on several threads.

numba has threads of its own, but without Intel's TBB no choice of them is safe everywhere: "omp" kills a process that
was forked after its first use, as a data loader's workers are, and "workqueue" kills one in which two threads start
kernels at once. Compiled kernels release the GIL, so ordinary threads do, and nothing global changes for other users of
numba.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from .dispatch import forced_backend
from .operators import kernels_run

SMALL = 1 << 16
"""Numbers up to which PyTorch's own elementwise operations cost less than one call of a kernel."""


@functools.cache
def _threads(process: int, n_threads: int) -> ThreadPoolExecutor:
    # a forked child has another id, and so never waits for its parent's threads
    return ThreadPoolExecutor(n_threads, thread_name_prefix="crossover-kernel")


def run(kernel: Callable[..., None], n_tasks: int, *arguments: object) -> None:
    """Calls kernel(first, last, *arguments) on ranges that make up 0 .. n_tasks, on torch.get_num_threads() threads.

    Tensors become arrays over their memory; of those that a kernel writes to, the last axis must be contiguous.
    """
    if not kernels_run():
        return
    compiled = cast(Any, kernel)
    if not compiled.is_made:  # numba fails the call of a thread that looks for the code while another one completes it
        compiled.make()
    arguments = tuple([as_array(x) if isinstance(x, Tensor) else x for x in arguments])
    n_threads = min(torch.get_num_threads(), n_tasks)
    if n_threads <= 1:
        kernel(0, n_tasks, *arguments)
        return
    bounds = [i * n_tasks // n_threads for i in range(n_threads + 1)]
    at_once(n_threads, lambda i: kernel(*bounds[i : i + 2], *arguments))


def at_once(n_threads: int, work: Callable[[int], None]) -> None:
    """Calls work(i) for i from 0 to n_threads - 1, each on a thread of its own."""
    threads = _threads(os.getpid(), n_threads)
    others = [threads.submit(work, i) for i in range(1, n_threads)]
    work(0)
    for other in others:
        other.result()


def floats(*shape: Any) -> Tensor:
    """New memory for numbers that a kernel writes: float32, whatever PyTorch's default is."""
    return torch.empty(*shape, dtype=torch.float32)


_TYPES = {torch.float32: ("<f4", 4), torch.bool: ("|b1", 1)}
"""NumPy's name and the bytes of a number: all that kernels take."""


class _Memory:
    """Memory of a tensor under NumPy's array interface, which keeps the tensor alive as long as an array looks at it.

    Not `Tensor.numpy`, after which the memory could never be given back: FSDP2 does that with every gathered weight.
    `numpy.from_dlpack` would do, but takes longer, and what older versions give with it must not be written to.
    """

    __slots__ = ("__array_interface__", "tensor")

    def __init__(self, x: Tensor) -> None:
        name, n = _TYPES[x.dtype]
        self.tensor = x
        self.__array_interface__ = {
            "version": 3,
            "typestr": name,
            "shape": tuple(x.shape),
            "strides": None if x.is_contiguous() else tuple([n * stride for stride in x.stride()]),
            "data": (x.data_ptr(), False),  # not read-only
        }


def as_array(x: Tensor) -> np.ndarray:
    """The tensor's memory, as kernels take it: copied only if its last axis is not contiguous."""
    if x.stride(-1) != 1:
        x = x.contiguous()
    return np.asarray(_Memory(x.resolve_neg() if x.is_neg() else x))


def rows(x: Tensor) -> Tensor:
    """The tensor as (T, D), one row for each token, each contiguous; copied only where it must be."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def is_small(x: Tensor) -> bool:
    """Whether plain PyTorch should do it, for kernels that save no more than passes over memory; not if forced.

    Nor while torch.compile or torch.export trace, which would then make one graph for small inputs and one for large.
    """
    return not torch.compiler.is_compiling() and x.numel() <= SMALL and forced_backend() is None
