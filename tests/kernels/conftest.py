"""Poisons memory that operations allocate, so that what they do not write shows, and mends Triton's interpreter."""

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every empty tensor of floating type with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def _longer_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """More tokens in a tile are fewer operations for the interpreter, which pays for each and not for its size."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from crossover.kernels.causal_conv1d import triton_kernels as conv
        from crossover.kernels.selective_scan import triton_kernels as scan

        monkeypatch.setattr(conv, "configuration", lambda E: {"SPAN": 32, "T": 32, "BLOCK": 16, "num_warps": 1})
        for name in ("forward_configuration", "backward_configuration"):
            choose = getattr(scan, name)
            monkeypatch.setattr(scan, name, lambda E, N, choose=choose: choose(E, N) | {"T": 8})


class GuardBands:
    """Bands around what an operation reads and around what it allocates."""

    MARGIN, MARK = 64, 12345.0

    @classmethod
    def surrounded(cls, t: torch.Tensor) -> torch.Tensor:
        """A copy, strided, in the middle of NaN."""
        if not t.is_floating_point():
            return t
        outer = torch.full([n + 2 * cls.MARGIN for n in t.shape], float("nan"), dtype=t.dtype)
        return outer[tuple(slice(cls.MARGIN, cls.MARGIN + n) for n in t.shape)].copy_(t)

    @classmethod
    @contextlib.contextmanager
    def watched(cls) -> Iterator[list[torch.Tensor]]:
        """Gives torch.empty memory between marks, lists it, and checks in the end that no mark was overwritten."""
        allocated: list[torch.Tensor] = []
        empty = torch.empty

        def banded(*size: Any, **others: Any) -> torch.Tensor:
            if others not in ({}, {"dtype": torch.float32}):
                return empty(*size, **others)
            shape = torch.Size(size[0] if isinstance(size[0], tuple) else size)
            allocated.append(torch.full((shape.numel() + 2 * cls.MARGIN,), cls.MARK))
            return allocated[-1][cls.MARGIN : -cls.MARGIN].fill_(float("nan")).view(shape)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch, "empty", banded)
            yield allocated
        bands = [band for memory in allocated for band in (memory[: cls.MARGIN], memory[-cls.MARGIN :])]
        assert all((band == cls.MARK).all() for band in bands)


@pytest.fixture
def guard_bands() -> type[GuardBands]:
    """See GuardBands."""
    return GuardBands


def _poisoned(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(allocate)
    def with_nan(*args: Any, **kwargs: Any) -> torch.Tensor:
        made = allocate(*args, **kwargs)
        if made.device.type == "meta" or isinstance(made, torch._subclasses.FakeTensor):
            return made
        return made.fill_(float("nan")) if made.is_floating_point() or made.is_complex() else made

    return with_nan


def _widen_bfloat16_products() -> None:
    """The interpreter keeps bfloat16 as 16-bit integers and multiplies these in tl.dot; a GPU multiplies the values."""
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    create_dot = InterpreterBuilder.create_dot

    def widened(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, *others: Any) -> TensorHandle:
        return create_dot(self, widened(a), widened(b), *others)

    InterpreterBuilder.create_dot = dot  # pyright: ignore[reportAttributeAccessIssue]


def _patch_quickly() -> None:
    """At every call of a device function the interpreter looks through Triton's whole language for what to patch, which
    is half of its time. What there is to patch does not change."""
    from triton.runtime import interpreter

    @functools.cache
    def builtins_of(package: Any) -> list[tuple[str, Any]]:
        return [(name, m) for name, m in inspect.getmembers(package) if interpreter.tl.core.is_builtin(m)]

    def patch(package: Any, builder: Any, scope: Any) -> None:
        for name, member in builtins_of(package):
            if getattr(package, name) is member:  # an outer call has not patched it
                interpreter._patch_attr(package, name, member, builder, scope)

    interpreter._patch_builtin = patch


if os.environ.get("TRITON_INTERPRET") == "1":
    _widen_bfloat16_products()
    _patch_quickly()
