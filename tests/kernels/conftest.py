"""Poisons memory that operations allocate, so that what they do not write shows, and mends Triton's interpreter."""

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fills every empty tensor of floating type with NaN."""
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


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


if os.environ.get("TRITON_INTERPRET") == "1":
    _widen_bfloat16_products()
