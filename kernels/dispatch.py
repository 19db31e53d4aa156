"""Chooses which implementation of an operation runs: reference, plain PyTorch, the CPU path or Triton."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import Sizes, arguments_of, looked_at
from .cases import Cases

P = ParamSpec("P")
R = TypeVar("R")

BACKENDS = ("reference", "torch", "cpu", "triton")
"""Every backend an operation may have, the judge first."""

KERNELS = ("cpu", "triton")
"""Those that compute in float32."""

DOUBLE = (torch.float64, torch.complex128)
"""Precisions that they do not take."""

REMEMBERED = 256
"""Calls of an operation that are not looked at again, at most: that would take as long as a small operation."""

# Plain globals: torch.compile guards on them, but cannot trace a ContextVar.
_forced: str | None = None
_record: dict[str, tuple[str, ...]] | None = None
_switched_off: dict[tuple[str, str], str] = {}


class Unsupported(Exception):
    """An implementation cannot take these arguments. The message says which one and why."""


class KernelFallbackWarning(UserWarning):
    """A slower implementation ran where a faster one was expected. Tests and benchmarks make this an error."""


@functools.cache
def triton_can_run() -> bool:
    """Whether Triton kernels can run here: on a GPU, or for tests in the interpreter (TRITON_INTERPRET=1)."""
    if importlib.util.find_spec("triton") is None:
        return False
    return os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every operation inside the block on one backend, and raises `Unsupported` instead of falling back.

    Raises:
        ValueError: if `name` is not one of BACKENDS.
    """
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}, expected one of {', '.join(BACKENDS)}")
    global _forced
    previous, _forced = _forced, name
    try:
        yield
    finally:
        _forced = previous


def forced_backend() -> str | None:
    """The backend that `use_backend` asks for here, or None."""
    return _forced


def switch_off(op: str, backend: str, reason: str) -> None:
    """Makes one operation pass a backend over in this process, without a warning. `use_backend` still runs it.

    Args:
        op: name of the operation.
        backend: any but the reference, which takes the place of plain PyTorch where that is switched off.
        reason: what is wrong with it, in one line.

    Raises:
        ValueError: if there is no such backend, or it is the reference.
    """
    if backend not in BACKENDS[1:]:
        raise ValueError(f"cannot switch off {backend!r}, expected one of {', '.join(BACKENDS[1:])}")
    _switched_off[op, backend] = reason


def switched_off() -> dict[tuple[str, str], str]:
    """The reasons of all that is switched off, by operation and backend."""
    return dict(_switched_off)


@contextlib.contextmanager
def record_backends() -> Iterator[dict[str, tuple[str, ...]]]:
    """Collects, inside the block, which backends ran for each operation: {"attention": ("torch",), ...}."""
    global _record
    previous, _record = _record, {}
    try:
        yield _record
    finally:
        _record = previous


def note(op: str, backend: str) -> None:
    """Tells `record_backends` which backend ran for an operation."""
    if _record is not None and backend not in (seen := _record.get(op, ())):
        _record[op] = tuple(sorted((*seen, backend)))


def no_kernel(name: str, wanted: str) -> str:
    """The message that kernels cannot do something, and what can."""
    return f'{name}: kernels have no {wanted}; run this under `with use_backend("reference"):`'


def transform() -> str | None:
    """What PyTorch does to functions here that kernels have no part in; None where it does nothing of the kind."""
    if forward_ad._current_level >= 0:
        return "forward-mode derivatives"
    if torch._C._functorch.maybe_current_level() is not None:  # pyright: ignore[reportAttributeAccessIssue]
        return "torch.func transforms (grad, vmap, jvp, ...)"
    return None


class _Call(NamedTuple):
    """What was found of the arguments of a call."""

    empty: Sizes | None
    """Sizes of the axes, of a call without rows or tokens."""
    device: torch.device
    dtype: torch.dtype
    """Those of the first tensor."""
    backends: tuple[str, ...]
    """Those to try, in this order."""


class Op(Generic[P, R]):
    """One operation and its interchangeable implementations, called like the reference.

    Arguments are checked here, before any implementation runs: see arguments.py for what is a ValueError. Every
    implementation has the reference's signature, agrees with it to the tolerance its test states, and raises
    `Unsupported` for arguments it cannot take. The device of the first argument decides which are tried, fastest
    first; the next one runs, with a `KernelFallbackWarning`, only where the one before raises `Unsupported`. What is
    switched off is not tried.
    Float64, which is for checking and not for speed, always runs plain PyTorch. Without rows or tokens nothing runs.
    Under forward-mode differentiation and the transforms of torch.func, to which a kernel is opaque (tangents would be
    zero), the reference runs, with a `KernelFallbackWarning`, and any other forced backend is a NotImplementedError.
    """

    def __init__(
        self,
        reference: Callable[P, R],
        *,
        torch: Callable[P, R],
        cpu: Callable[P, R] | None = None,
        triton: Callable[P, R] | None = None,
        cases: Cases | None = None,
    ) -> None:
        self.__name__, self.__doc__ = reference.__name__, reference.__doc__
        found = {"reference": reference, "torch": torch, "cpu": cpu, "triton": triton}
        self._implementations = {name: function for name, function in found.items() if function is not None}
        self._by_device = {
            device: tuple(name for name in names if name in self._implementations)
            for device, names in {"cuda": ("triton", "torch"), "cpu": ("cpu", "torch")}.items()
        }
        self._cases, self._arguments = cases, arguments_of(reference)
        self._right: dict[tuple[Any, ...], _Call] = {}
        """Calls whose arguments were right, by all that was looked at."""

    @property
    def cases(self) -> Cases:
        """The inputs that it is checked and timed on."""
        assert self._cases is not None, f"{self.__name__} has no cases"
        return self._cases

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that can run here, the reference first."""
        return tuple(self._implementations)

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Calls the reference's signature, on the implementation that the device and `use_backend` pick."""
        arguments: tuple[Any, ...] = args
        key = None if torch.compiler.is_compiling() else looked_at(args, kwargs)
        call = None if key is None else self._right.get(key)
        if call is None:
            arguments, call = self._checked(key, args, kwargs)
        empty, _, _, names = call
        if empty is not None and self._arguments is not None:
            return self._arguments.nothing(arguments, kwargs, empty)
        transformed = transform()
        if _forced is not None:
            self._check_forced(call, transformed)
            return self._run(_forced, *arguments, **kwargs)
        if transformed:
            message = f"{self.__name__}: the definition runs, step by step: kernels have no {transformed}"
            warnings.warn(message, KernelFallbackWarning, stacklevel=2)
            return self._run("reference", *arguments, **kwargs)
        if _switched_off:
            left = tuple(name for name in names if (self.__name__, name) not in _switched_off)
            names = left if "torch" in left else (*left, "reference")
        *fast, last = names
        for name in fast:
            try:
                return self._run(name, *arguments, **kwargs)
            except Unsupported as error:
                message = f"{self.__name__}: {name} is passed over: {error}"
                warnings.warn(message, KernelFallbackWarning, stacklevel=2)
        return self._run(last, *arguments, **kwargs)

    def _checked(
        self, key: tuple[Any, ...] | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], _Call]:
        """Checks a call and remembers it by its key: the arguments by position, `starts` for each row, and the call."""
        sizes, checked = None, args
        if self._arguments is None:
            x = next(iter((*args, *kwargs.values())))
        else:
            checked, sizes, x = self._arguments.check(args, kwargs)
            sizes = sizes if self._arguments.is_empty(sizes) else None
        assert isinstance(x, Tensor)
        names = ("torch",) if x.dtype in DOUBLE else self._by_device.get(x.device.type, ("torch",))
        call = _Call(sizes, x.device, x.dtype, names)
        if key is not None and key == looked_at(checked, kwargs):  # unless it gave every row its own `starts`
            if len(self._right) >= REMEMBERED:
                self._right.clear()
            self._right[key] = call
        return checked, call

    def _check_forced(self, call: _Call, transformed: str | None) -> None:
        """Raises unless the forced backend takes this call."""
        if transformed and _forced != "reference":
            raise NotImplementedError(no_kernel(f"{self.__name__}: {_forced}", transformed))
        if _forced not in self._implementations:
            raise Unsupported(f"{self.__name__} has no {_forced} implementation here, only {self.backends}")
        if call.dtype in DOUBLE and _forced in KERNELS:
            raise Unsupported(f"{self.__name__}: {_forced} computes in float32, not {call.dtype}")
        if _forced == "cpu" and call.device.type != "cpu":
            raise Unsupported(f"{self.__name__}: the inputs are on {call.device}, not on the CPU")

    def _run(self, name: str, *args: Any, **kwargs: Any) -> R:
        result = self._implementations[name](*args, **kwargs)
        note(self.__name__, name)
        return result
