"""What a model remembers between two tokens: a State for each of its layers, and States, the list of them.

Both are values and plain data: they go through `torch.utils._pytree`, `torch.save` and
`torch.load(..., weights_only=True)`. Their tensors are what a tree of them holds; numbers belong to its structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor
from torch.serialization import add_safe_globals
from torch.utils import _pytree

__all__ = ["State", "States", "joined_numbers", "per_row"]


@dataclass
class State:
    """The memory of a mixer between two tokens. Subclasses add fields: tensors, batch first, and plain numbers.

    A state is consumed by the call it is passed to: the callee may reuse its storage, so keep only the state that comes
    back, or `clone` first. A tensor without axes is a number that the device knows.
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        _register(cls, _flatten_state, lambda tensors, rest: cls(**dict(zip(rest[0], tensors, strict=True)), **rest[1]))

    def tensors(self) -> dict[str, Tensor]:
        """The tensor fields by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return next(len(t) for t in self.tensors().values() if t.dim())

    @property
    def nbytes(self) -> int:
        """Bytes held. True on any device, so `init_state(..., device="meta")` measures without allocating."""
        return sum(t.nbytes for t in self.tensors().values())

    def clone(self) -> Self:
        """A copy that shares no storage."""
        return self.map(torch.clone)

    def detach(self) -> Self:
        """A state with the same values outside the autograd graph, for truncated backpropagation."""
        return self.map(torch.detach)

    def select(self, rows: Tensor) -> Self:
        """The state of some batch rows, (n,) int64, with repeats allowed: beam search, finished sequences."""
        return self.map(lambda t: t.index_select(0, rows) if t.dim() else t)

    def forget(self, rows: Tensor) -> Self:
        """The state with nothing before the next token in some rows, (B,) bool: zeros, as `init_state` makes it."""
        return self.map(lambda t: torch.where(rows.view(-1, *[1] * (t.dim() - 1)), 0, t) if t.dim() else t)

    @classmethod
    def cat(cls, states: Sequence[Any]) -> Self:
        """One state of the rows of all: a subclass whose numbers may differ between rows says how.

        Raises:
            ValueError: if numbers differ here, for which no tensor has a place.
        """
        first, *others = states
        joined: dict[str, Any] = {}
        for name, value in vars(first).items():
            values = [value, *(getattr(state, name) for state in others)]
            if isinstance(value, Tensor) and value.dim():
                joined[name] = torch.cat(values)
            elif all(v is None if value is None else bool(v == value) for v in values):
                joined[name] = value
            else:
                raise ValueError(f"rows with different {cls.__name__}.{name} cannot be joined: {values}")
        return cls(**joined)

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """The state with a function applied to each of its tensors."""
        return type(self)(**{k: function(v) if isinstance(v, Tensor) else v for k, v in vars(self).items()})

    def as_precise_as(self, other: State) -> Self:
        """The state with each tensor in the dtype that it has in another."""
        mine, theirs = self.tensors(), other.tensors()
        changed = {name: t.to(theirs[name].dtype) for name, t in mine.items() if t.dtype != theirs.get(name, t).dtype}
        return dataclasses.replace(self, **changed) if changed else self


class States(list[State]):
    """The states of a model's layers: a list that is one value.

    It goes wherever a list of states goes. Entries are None where a layer keeps nothing.
    """

    wide: tuple[tuple[str, ...], ...] | None
    """The names of the tensors of each layer that are kept in float32 at least; None means none of them."""

    def __init__(self, layers: Iterable[Any] = (), wide: Iterable[Iterable[str]] | None = None) -> None:
        super().__init__(layers)
        self.wide = None if wide is None else tuple(tuple(names) for names in wide)

    @property
    def n_rows(self) -> int:
        """Rows of the batch."""
        return next(layer.n_rows for layer in self if layer is not None)

    @property
    def nbytes(self) -> int:
        """Bytes held by all layers, also on device="meta"."""
        return sum(layer.nbytes for layer in self if layer is not None)

    def clone(self) -> Self:
        """A copy that shares no storage, which a model may consume."""
        return self._map(State.clone)

    def detach(self) -> Self:
        """The same values outside the autograd graph, for truncated backpropagation."""
        return self._map(State.detach)

    def select(self, rows: Tensor | Sequence[int]) -> Self:
        """The states of some rows, (n,) int64 or a list of numbers, with repeats allowed."""
        device = next(t for layer in self if layer is not None for t in layer.tensors().values()).device
        index = torch.as_tensor(rows, dtype=torch.int64, device=device)
        return self._map(lambda layer: layer.select(index))

    def forget(self, rows: Tensor) -> Self:
        """The states with nothing before the next token in some rows, (B,) bool: another text begins there."""
        return self._map(lambda layer: layer.forget(rows))

    def to(self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None) -> Self:
        """The states on another device, or in the precision that `init_state(..., dtype=dtype)` has.

        As of a tensor, the first argument may be the dtype.
        """
        if isinstance(device, torch.dtype):
            device, dtype = None, device

        def moved(t: Tensor, is_wide: bool) -> Tensor:
            wanted = t.dtype
            if dtype is not None and (t.is_complex() or t.is_floating_point()):
                wanted = torch.promote_types(dtype, torch.float32) if is_wide else dtype
                wanted = wanted.to_complex() if t.is_complex() else wanted
            return t.to(device=device, dtype=wanted)

        def layer_to(layer: State, wide: Sequence[str]) -> State:
            tensors = {name: moved(t, name in wide) for name, t in layer.tensors().items()}
            return type(layer)(**{**vars(layer), **tensors})

        wide = self.wide or [()] * len(self)
        return self._of([None if s is None else layer_to(s, w) for s, w in zip(self, wide, strict=True)])

    @staticmethod
    def cat(parts: Iterable[States]) -> States:
        """The states of the rows of several batches, which may have read unlike numbers of tokens.

        Each row goes on as it would alone, for as many tokens as its own batch had room for; what no row of a batch
        sees any more is dropped. Reading how much that is waits for the device.

        Raises:
            ValueError: if there are none, or they are states of different models.
        """
        parts = [part if isinstance(part, States) else States(part) for part in parts]
        if not parts:
            raise ValueError("there are no states to join: give at least one")
        first = parts[0]
        if any([type(s) for s in part] != [type(s) for s in first] for part in parts):
            raise ValueError("states of different models cannot be joined")
        return first._of([None if s[0] is None else type(s[0]).cat(s) for s in zip(*parts, strict=True)])

    def _map(self, function: Callable[[State], State]) -> Self:
        return self._of([None if layer is None else function(layer) for layer in self])

    def _of(self, layers: Iterable[Any]) -> Self:
        return type(self)(layers, self.wide)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (list(self), self.wide)


def joined_numbers(parts: Sequence[tuple[int | Tensor, int]], device: torch.device) -> int | Tensor:
    """One number for the rows of several batches, each given with its rows: (B,) int64 unless all are the same."""
    first, _ = parts[0]
    if isinstance(first, int) and all(isinstance(n, int) and n == first for n, _ in parts):
        return first
    return torch.cat([torch.as_tensor(n, device=device).expand(rows) for n, rows in parts])


def per_row(number: int | Tensor) -> int | Tensor:
    """A number that may differ between rows, as what is added to positions, (L,) or (B, L)."""
    return number[:, None] if isinstance(number, Tensor) and number.dim() else number


def _register(cls: type[Any], flatten: Callable[[Any], Any], unflatten: Callable[[Any, Any], Any]) -> None:
    """Makes a class a node of PyTorch's trees, and one that `weights_only` may load.

    `flatten` gives keys and children, and what else the value holds.
    """

    def without_keys(value: Any) -> Any:
        pairs, rest = flatten(value)
        return [child for _, child in pairs], rest

    add_safe_globals([cls])
    name = f"{cls.__module__}.{cls.__qualname__}"
    _pytree.register_pytree_node(cls, without_keys, unflatten, serialized_type_name=name, flatten_with_keys_fn=flatten)


def _flatten_state(state: State) -> Any:
    tensors = state.tensors()
    numbers = {name: value for name, value in vars(state).items() if name not in tensors}
    return [(_pytree.GetAttrKey(name), value) for name, value in tensors.items()], [list(tensors), numbers]


def _flatten_states(states: States) -> Any:
    return [(_pytree.SequenceKey(i), layer) for i, layer in enumerate(states)], states.wide


_register(State, _flatten_state, lambda tensors, rest: State())
_register(States, _flatten_states, States)
