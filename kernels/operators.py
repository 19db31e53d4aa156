"""Functions that run kernels as custom operators of PyTorch: torch.compile takes each for one operation."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch._library.custom_ops import CustomOpDef


class _OfThread(threading.local):
    runs = True


_kernels = _OfThread()


def kernels_run() -> bool:
    """Whether kernels are to run, or only the memory for their results is to be made."""
    return _kernels.runs


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Makes kernels do nothing inside the block; other threads go on."""
    before, _kernels.runs = _kernels.runs, False
    try:
        yield
    finally:
        _kernels.runs = before


def operator(
    name: str,
    function: Callable[..., Any],
    *,
    device_types: str | None = None,
    mutates_args: Iterable[str] = (),
) -> CustomOpDef:
    """Makes a custom operator of a function, which itself stays callable.

    What the operator gives for tensors without memory, as torch.compile traces it, needs no second definition: the
    function makes its results, and no kernel fills them.

    Args:
        name: name of the operator, in the namespace crossover.
        function: annotated; gives new memory only. Kernels run by parallel.run or triton_kernels.launch.
        device_types: the only one it is for.
        mutates_args: names of the arguments that it writes to.
    """
    made = torch.library.custom_op(f"crossover::{name}", function, mutates_args=mutates_args, device_types=device_types)

    def fake(*arguments: Any, **named: Any) -> Any:
        with without_kernels():
            return function(*arguments, **named)

    made.register_fake(fake)
    return made
