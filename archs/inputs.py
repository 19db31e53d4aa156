"""What may enter a model: each check is made once, where the thing enters, and says what is wrong in a model's words.

Nothing here reads values, so that a model traces, vectorizes and runs ahead of its device as before; what only values
show, such as a token beyond the vocabulary, is left to the operation that reads them.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .mixer import Mixer, State
from .state import States

__all__ = [
    "check_count",
    "check_features",
    "check_lengths",
    "check_targets",
    "check_tokens",
    "kept",
    "marks_of",
    "n_padding_after",
    "starts_of",
    "taken",
    "turned",
]


def check_count(name: str, value: Any, *, least: int = 0) -> None:
    """ValueError unless a value is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral | torch.SymInt) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def check_tokens(tokens: Tensor, *, name: str = "tokens") -> None:
    """ValueError unless tokens are (B, L) whole numbers."""
    if not isinstance(tokens, Tensor):
        raise ValueError(f"{name} must be a tensor, (B, L) int64, not {type(tokens).__name__}")
    if tokens.dim() != 2:
        hint = f": use {name}[None] for one row" if tokens.dim() == 1 else ""
        raise ValueError(f"{name} must be (B, L), not {tuple(tokens.shape)}{hint}")
    if tokens.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64, not {_short(tokens.dtype)}")


def check_features(x: Tensor, d_model: int) -> None:
    """ValueError unless x is (B, L, d_model) in a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise ValueError(f"x must be a tensor, (B, L, {d_model}), not {type(x).__name__}")
    if x.dim() != 3 or x.shape[2] != d_model:
        raise ValueError(f"x must be (B, L, {d_model}), not {tuple(x.shape)}")
    if not x.dtype.is_floating_point:
        raise ValueError(f"x must be in a floating-point dtype, not {_short(x.dtype)}")


def check_targets(targets: Tensor, x: Tensor) -> None:
    """ValueError unless targets are (B, L) int64 for an x of (B, L, D)."""
    if not isinstance(targets, Tensor) or targets.shape != x.shape[:2]:
        found = tuple(targets.shape) if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be {tuple(x.shape[:2])} as the tokens that predict them, not {found}")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets must be int64, not {_short(targets.dtype)}")
    _check_device("targets", targets, x)


def check_lengths(name: str, lengths: Tensor, tokens: Tensor) -> None:
    """ValueError unless lengths are (B,) whole numbers for tokens of (B, L)."""
    if not isinstance(lengths, Tensor) or lengths.shape != tokens.shape[:1]:
        found = tuple(lengths.shape) if isinstance(lengths, Tensor) else type(lengths).__name__
        raise ValueError(f"{name} must be ({len(tokens)},), one length for each row, not {found}")
    if lengths.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"{name} must be int64, not {_short(lengths.dtype)}")
    _check_device(name, lengths, tokens)


def marks_of(name: str, marks: Tensor, x: Tensor) -> Tensor:
    """Marks of tokens, (B, L) bool, one row of which stands for all rows of x, (B, L, D).

    Raises:
        ValueError: if they are of another shape, dtype or device.
    """
    B, L = x.shape[:2]
    if not isinstance(marks, Tensor) or marks.dim() != 2 or marks.shape[1] != L or marks.shape[0] not in (B, 1):
        found = tuple(marks.shape) if isinstance(marks, Tensor) else type(marks).__name__
        raise ValueError(f"{name} must be ({B}, {L}), or (1, {L}) for all rows alike, not {found}")
    if marks.dtype != torch.bool:
        raise ValueError(f"{name} must be bool, not {_short(marks.dtype)}: use {name}.bool()")
    _check_device(name, marks, x)
    return marks.expand(B, L)


def starts_of(padding_mask: Tensor) -> Tensor:
    """The `starts` of a mask, (B, L) bool, that is True at real tokens: padding is a document of its own."""
    starts = torch.zeros_like(padding_mask)
    starts[:, 1:] = padding_mask[:, 1:] != padding_mask[:, :-1]
    return starts


def n_padding_after(padding_mask: Tensor) -> Tensor:
    """The padding at the end of each row of a mask, (B, L) bool, that is True at real tokens: (B, 1) int64."""
    return padding_mask.flip(1).int().argmax(1, keepdim=True)


def turned(t: Tensor, n: Tensor) -> Tensor:
    """Each row of t, (B, L, ...), turned by n, (B, 1), places to the right: what leaves at its end enters before it."""
    index = (torch.arange(t.shape[1], device=t.device) - n) % t.shape[1]
    return t.take_along_dim(index.view(*index.shape, *[1] * (t.dim() - 2)), 1)


def taken(state: Sequence[Any], mixers: Sequence[Any], x: Tensor) -> list[Any]:
    """The states of some layers, each in the precision that its layer computes with for an x of this dtype.

    What grows with the context stays in its own: to convert a cache at every token would cost more than to read it.

    Args:
        state: one for each layer, as init_state makes it; None for a layer that is to keep none.
        mixers: those of the layers.
        x: (B, L, D).

    Raises:
        ValueError: unless there is a state for each layer, in its layout, of as many rows as x and on its device.
    """
    if not isinstance(state, list | tuple):
        raise ValueError(f"state must be a list of states, as init_state makes it, not {type(state).__name__}")
    if len(state) != len(mixers):
        raise ValueError(f"state has {len(state)} entries for {len(mixers)} layers: use a state of this model")
    return [
        None if held is None else _ready(i, held, mixer, x)
        for i, (held, mixer) in enumerate(zip(state, mixers, strict=True))
    ]


def kept(states: Sequence[Any], mixers: Sequence[Any], given: Sequence[Any] | None = None) -> States:
    """The states of some layers as one value, each in the precision of what was given for it."""
    if given is not None:
        pairs = zip(states, given, strict=True)
        states = [state if state is None or old is None else state.as_precise_as(old) for state, old in pairs]
    if isinstance(given, States) and given.wide is not None:
        return States(states, given.wide)
    layouts = [{} if s is None else mixer.state_layout(0) for s, mixer in zip(states, mixers, strict=True)]
    return States(states, [[key for key, zeros in layout.items() if zeros.at_least is not None] for layout in layouts])


def _ready(i: int, state: State, mixer: Mixer, x: Tensor) -> State:
    layout, longer = mixer.state_layout(0), None  # an encoder says that it has none
    if not isinstance(state, mixer.State):
        name = type(mixer).__name__
        raise ValueError(f"state[{i}] is a {type(state).__name__} where {name} needs a {mixer.State.__name__}")
    held, n_rows, device, dtype, converted = vars(state), x.shape[0], x.device, x.dtype, {}
    for key, (shape, at_least) in layout.items():
        value: Tensor = held[key]
        if value.shape[1:] != shape:
            longer = longer or mixer.state_layout(1)
            _check_shape(f"state[{i}].{key} of {type(mixer).__name__}", value, shape, longer[key].shape)
        if value.shape[0] != n_rows:
            raise ValueError(f"state[{i}] is of {len(value)} rows and the input of {n_rows}")
        if value.device != device:
            _check_device(f"state[{i}].{key}", value, x)
        wanted = dtype if at_least is None or at_least is dtype else torch.promote_types(dtype, at_least)
        if value.dtype == wanted:
            continue
        kind = _numbers(at_least or torch.float32)
        if _numbers(value.dtype) != kind:
            raise ValueError(
                f"state[{i}].{key} of {type(mixer).__name__} must hold {kind} numbers, not {_short(value.dtype)}"
            )
        grows = shape != mixer.state_layout(1)[key].shape
        if kind != "whole" and not grows:
            converted[key] = value.to(wanted)
    return dataclasses.replace(state, **converted) if converted else state


def _check_shape(name: str, value: Tensor, shape: Sequence[int], other: Sequence[int]) -> None:
    """ValueError unless a value's axes after the batch are those of a layout, but for those that grow with the context.

    `other` are those of a longer context.
    """
    found = value.shape[1:]
    if len(found) != len(shape) or any(f != a and a == b for f, a, b in zip(found, shape, other, strict=True)):
        axes = "".join(f", {a}" if a == b else ", any" for a, b in zip(shape, other, strict=True))
        raise ValueError(f"{name} must be (B{axes}), not {tuple(value.shape)}")


def _check_device(name: str, tensor: Tensor, x: Tensor) -> None:
    if tensor.device != x.device:
        raise ValueError(f"{name} is on {tensor.device} and the input on {x.device}: move one of them")


def _numbers(dtype: torch.dtype) -> str:
    return "complex" if dtype.is_complex else "real" if dtype.is_floating_point else "whole"


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
