"""What an operation takes and gives: axes, numbers and device of its tensors, described once, checked in one place.

    @takes(x="B L E", weight="E K", initial_state="B K-1 E", starts="B L bool", gives=("B L E", "B K-1 E"))
    def causal_conv1d(x, weight, initial_state=None, starts=None): ...

Axes of one name have one size in all tensors. An axis may also be a multiple, a difference or a number (`4E`, `K-1`,
`2`), and a leading `...` stands for any axes. Numbers are real floating ones of any precision unless the last word says
`complex` (which are of one precision), `bool`, `int` (of 32 or 64 bits) or `int64`. An integer argument is described by
the axis of which it is the size, any other by a tuple of what it may be. Tensors are on the device of the first one.
`starts` may have one row for all; nothing else is broadcast.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

Function = TypeVar("Function", bound=Callable[..., Any])
Sizes = dict[str, int]
Axes = tuple[tuple[str, int, int], ...]

KINDS = {
    "float": (torch.float32, torch.bfloat16, torch.float16, torch.float64),
    "complex": (torch.complex64, torch.complex128),
    "bool": (torch.bool,),
    "int": (torch.int64, torch.int32),
    "int64": (torch.int64,),
}

WHOLE: tuple[type[Any], ...] = (int, torch.SymInt)

MAY_BE_EMPTY = ("B", "L", "S", "T")
"""Axes of rows, tokens and keys."""

_described: dict[Callable[..., Any], Arguments] = {}


def takes(
    *,
    gives: tuple[str, ...] = (),
    where: Mapping[str, Callable[[Sizes], bool]] | None = None,
    **arguments: str | tuple[Any, ...],
) -> Callable[[Function], Function]:
    """Describes what a reference takes to the `Op` that is made of it. The function itself stays as it is.

    Args:
        gives: the outputs, of an operation whose implementations need not know what comes of no rows or no tokens.
            They have the precision of the first tensor, or if the last word is `wide` or `complex` at least float32.
            The one with the axes of `initial_state` is the state.
        where: what must hold besides, of the sizes by axis, and in words.
        arguments: by name, in the words that the head of this file defines.
    """

    def describe(reference: Function) -> Function:
        _described[reference] = Arguments(reference, arguments, gives, where or {})
        return reference

    return describe


def arguments_of(reference: Callable[..., Any]) -> Arguments | None:
    """What `takes` said of a function."""
    return _described.get(reference)


class _Tensor(NamedTuple):
    place: int
    """Place among the arguments."""
    name: str
    is_optional: bool
    words: str
    axes: Axes
    leading: bool
    """Whether any axes may come before these."""
    dtypes: tuple[torch.dtype, ...]


class Arguments:
    """The description of an operation. See `takes`."""

    def __init__(
        self,
        function: Callable[..., Any],
        described: Mapping[str, str | tuple[Any, ...]],
        gives: tuple[str, ...],
        where: Mapping[str, Callable[[Sizes], bool]],
    ) -> None:
        self._op, self._gives, self._where = function.__name__, gives, tuple(where.items())
        tensors, sizes, choices = [], [], []
        for index, (name, parameter) in enumerate(inspect.signature(function).parameters.items()):
            words, is_optional = described.get(name), parameter.default is not inspect.Parameter.empty
            if isinstance(words, tuple):
                choices.append((index, name, words))
            elif words is not None and "int" in str(parameter.annotation):
                sizes.append((index, name, words, parameter.default if is_optional else None))
            elif words is not None:
                axes, kind = _parsed(words)
                tensors.append(_Tensor(index, name, is_optional, words, axes, words.startswith("..."), KINDS[kind]))
        self._tensors, self._sizes, self._choices = tuple(tensors), tuple(sizes), tuple(choices)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], Sizes, Tensor]:
        """Checks a call, and gives every row its own `starts`.

        Args:
            args: arguments by position.
            kwargs: arguments by name, changed in place.

        Returns:
            The arguments by position, the sizes of the axes, and the first tensor.

        Raises:
            ValueError: in one line: the operation, the argument, what it is and what was expected.
        """
        given, sizes = len(args), {"": 1}
        first: Any = None
        precision: torch.dtype | None = None
        device: torch.device | None = None
        complex_numbers = KINDS["complex"]
        for index, name, choices in self._choices:
            value = args[index] if index < given else kwargs.get(name, choices[0])
            if value not in choices:
                raise ValueError(f"{self._op}: {name}={value!r}, expected one of {choices}")
        for index, name, axis, default in self._sizes:
            size = args[index] if index < given else kwargs.get(name, default)
            if size is not None or default is not None:
                if size is None or isinstance(size, bool) or not isinstance(size, WHOLE):
                    raise ValueError(f"{self._op}: {name}={size!r}, expected a whole number")
                least = 0 if axis in MAY_BE_EMPTY else 1
                if size < least:
                    raise ValueError(f"{self._op}: {name}={size}, expected at least {least}")
                sizes[axis] = size
        for index, name, is_optional, words, axes, leading, dtypes in self._tensors:
            t = args[index] if index < given else kwargs.get(name)
            if t is None:
                if is_optional:
                    continue
                if index >= given and name not in kwargs:
                    raise TypeError(f"{self._op}() is called without {name}")
            if t is None or not hasattr(t, "dtype"):
                raise ValueError(f"{self._op}: {name} is of {type(t)}, expected a tensor")
            dtype, shape = t.dtype, t.shape
            if dtype not in dtypes:
                raise ValueError(f"{self._op}: {name} is {dtype}, expected {_parsed(words)[1]}")
            if dtypes is complex_numbers:
                if precision not in (None, dtype):
                    raise ValueError(f"{self._op}: {name} is {dtype}, expected {precision} as the others")
                precision = dtype
            if first is None:
                first, device = t, t.device
            elif t.device != device:
                raise ValueError(f"{self._op}: {name} is on {t.device}, expected {device}")
            fits = len(shape) == len(axes)
            if leading:
                n = max(len(shape) - len(axes), 0)
                fits = len(shape) >= len(axes) and sizes.setdefault("...", shape[:n]) == shape[:n]
                shape = shape[n:]
            for (axis, factor, less), size in zip(axes, shape, strict=False):
                known = sizes.get(axis)
                if known is None:
                    known = sizes[axis] = (size + less) // factor
                    fits = fits and (known > 0 or axis in MAY_BE_EMPTY)
                if size != factor * known - less:
                    fits = False
            if fits:
                continue
            if name != "starts" or shape != (1, sizes["L"]):
                raise ValueError(f"{self._op}: {name} is {tuple(t.shape)}, expected {_words(words, axes, sizes)}")
            t = t.expand(sizes["B"], -1)
            if index < given:
                args = (*args[:index], t, *args[index + 1 :])
            else:
                kwargs[name] = t
        for words, holds in self._where:
            if not holds(sizes):
                found = ", ".join(f"{axis}={sizes[axis]}" for axis in sizes if axis in words.split())
                raise ValueError(f"{self._op}: {found}, expected {words}")
        return args, sizes, first

    def is_empty(self, sizes: Sizes) -> bool:
        """Whether there are no rows or no tokens, of which `nothing` says what comes."""
        return len(self._gives) > 0 and (sizes.get("B", 1) == 0 or sizes.get("L", 1) == 0)

    def nothing(self, args: tuple[Any, ...], kwargs: dict[str, Any], sizes: Sizes) -> Any:
        """What comes of no rows or no tokens: empty outputs, differentiable in all inputs, and the state as it was."""
        tensors: dict[str, Any] = {
            t.name: args[t.place] if t.place < len(args) else kwargs.get(t.name) for t in self._tensors
        }
        state = next((t.axes for t in self._tensors if t.name == "initial_state"), None)
        first = tensors[self._tensors[0].name]
        zero = sum(0 * t.real.sum() for t in tensors.values() if t is not None and t.requires_grad)
        outputs = []
        for words in self._gives:
            axes, kind = _parsed(words)
            dtype = first.dtype.to_real()
            if kind != "float":
                dtype = torch.promote_types(dtype, torch.float32)
            dtype = dtype.to_complex() if kind == "complex" else dtype
            made = first.new_zeros([factor * sizes[axis] - less for axis, factor, less in axes], dtype=dtype)
            if made.numel() == 0:
                made = (made + zero).to(dtype)
            elif axes == state and tensors["initial_state"] is not None:
                made = tensors["initial_state"].to(dtype)
            outputs.append(made)
        return outputs[0] if len(outputs) == 1 else tuple(outputs)


def looked_at(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
    """All that a check depends on, hashable; None where something is neither a plain tensor nor a plain value."""
    found: list[Any] = [len(args), *kwargs]
    for value in (*args, *kwargs.values()) if kwargs else args:
        kind = type(value)
        if kind is Tensor or kind is Parameter:
            found += value.shape, value.dtype, value.device
        elif value is None:
            found.append(None)
        elif kind in _PLAIN:
            found += kind, value
        else:
            return None
    return tuple(found)


_PLAIN = frozenset((bool, int, float, str))


def _parsed(words: str) -> tuple[Axes, str]:
    """Axes as (name, factor, less) for factor * name - less, and the last word. A number is a multiple of ""."""
    axes = words.removeprefix("...").split()
    kind = axes.pop() if axes and axes[-1] in (*KINDS, "wide") else "float"
    found = (re.fullmatch(r"(\d*)(\w*?)(?:-(\d+))?", axis) for axis in axes)
    return tuple((m[2], int(m[1] or 1), int(m[3] or 0)) for m in found if m), kind


def _words(words: str, axes: Axes, sizes: Sizes) -> str:
    """The expected shape in words, and in numbers as far as they are known."""
    names = [word for word in words.split() if word not in KINDS]
    known = [str(factor * sizes[axis] - less) if axis in sizes else "?" for axis, factor, less in axes]
    return f"({', '.join(names)}) = ({', '.join([*names[: len(names) - len(axes)], *known])})"
