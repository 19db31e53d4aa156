"""Options as frozen dataclasses: an annotation says type and range of a field, and one function checks them all.

    d_state: Size = 16
    init: Literal["lin", "inv"] = "lin"
    dropout: Annotated[float, Range(0, below=1)] = 0.0

It stands below the four folders, which all may import it, and imports nothing heavy.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import difflib
import functools
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

__all__ = [
    "Length",
    "Positive",
    "Range",
    "Share",
    "Size",
    "Width",
    "check",
    "check_table",
    "count",
    "from_plain",
    "nearest",
    "shown",
]

T = TypeVar("T")

_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}
_MAX_FLOAT = 3e38  # what float32 holds, in which models and optimizers compute
_MAX_COUNT_DIGITS = 18  # more than any number of steps or tokens, and what 64 bits hold
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Path: "a path",
    tuple: "a list",
    list: "a list",
    dict: "a table",
}


@dataclass(frozen=True)
class Range:
    """Bounds of a number, or of every entry of a list; None is no bound."""

    at_least: float | None = None
    at_most: float | None = None
    above: float | None = None
    below: float | None = None

    def broken(self, value: float) -> str | None:
        """What a number must be and is not; None where it lies within."""
        if self.at_least is not None and not value >= self.at_least:
            return f"at least {self.at_least}"
        if self.above is not None and not value > self.above:
            return f"more than {self.above}"
        if self.at_most is not None and not value <= self.at_most:
            return f"at most {self.at_most}"
        if self.below is not None and not value < self.below:
            return f"less than {self.below}"
        return None


Size = Annotated[int, Range(1, 2**18)]
"""Heads, channels, states, experts: an axis of a parameter. No three of them have more products than 64 bits hold."""
Length = Annotated[int, Range(1, 2**32)]
"""Tokens."""
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(0, 1)]
Width = Annotated[float, Range(above=0, at_most=2**10)]
"""A width as a multiple of another."""


def check(config: Any, prefix: str = "") -> None:
    """Checks every option of a dataclass by its annotation. Lists become tuples where the annotation says so.

    Args:
        config: an instance of the dataclass.
        prefix: where its options stand, for messages: "optim.", or "--" for those of a command line.

    Raises:
        ValueError: naming the option, its value and what it must be: "optim.lr=-1 must be more than 0".
    """
    for name, hint in _hints(type(config)).items():
        value = getattr(config, name)
        path = prefix + (name.replace("_", "-") if prefix.endswith("--") else name)
        fitted = _fit(hint, value, path)
        if fitted is not value:
            object.__setattr__(config, name, fitted)


def from_plain(cls: type[T], values: Mapping[str, Any], prefix: str = "") -> T:
    """Makes a dataclass of JSON or TOML values, all of them checked first.

    Args:
        cls: the dataclass; its fields may be dataclasses.
        values: values of its fields by name. An integer may be text that `count` reads, such as "1M".
        prefix: where they stand, for messages: "optim.".

    Raises:
        ValueError: for a key that there is not, with the nearest one, a missing one, or a value of another type or
            out of its range, with the dotted path.
    """
    known = [field.name for field in dataclasses.fields(cls) if field.init]  # pyright: ignore[reportArgumentType]
    for key in values:
        if key not in known:
            hint = nearest(key, known) if known else ": there are no options"
            raise ValueError(f"unknown key {prefix}{shown(key, quote=False)}{hint}")
    hints = _hints(cls)
    fitted = {key: _fit(hints.get(key, Any), value, f"{prefix}{key}", plain=True) for key, value in values.items()}
    required = {field.name for field in dataclasses.fields(cls) if _is_required(field)}  # pyright: ignore[reportArgumentType]
    if missing := sorted(required - set(values)):
        names = ", ".join(prefix + name for name in missing)
        raise ValueError(f"{names} {'is' if len(missing) == 1 else 'are'} missing")
    return cls(**fitted)


def check_table(values: Mapping[str, Any], kinds: Mapping[str, Any], where: Path | str) -> None:
    """Checks the entries of a table that is read by their dotted paths; others may stand beside them.

    Args:
        values: a JSON object.
        kinds: the annotation of each entry; where it allows None, the entry may be missing.
        where: names the table in messages: a file.

    Raises:
        ValueError: naming the file and the entry.
    """
    for path, kind in kinds.items():
        value: Any = values
        passed: list[str] = []
        try:
            for name in path.split("."):
                if value is not None:
                    _require(isinstance(value, Mapping), ".".join(passed), value, "a table")
                    value = value.get(name)
                passed.append(name)
            if value is None and not _takes_none(kind):
                raise ValueError(f"{path} is missing")
            _fit(kind, value, path)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from None


def count(text: str) -> int:
    """Reads a whole number as people write it: "500k", "1M", "1.3B", "5e5", "1_000_000".

    Raises:
        ValueError: if the text is not a number, not a whole one, or has more than 18 digits.
    """
    number = text.strip()
    scale = _SUFFIXES.get(number[-1:].lower(), 1)
    try:
        value = Decimal(number[:-1] if scale > 1 else number)
    except InvalidOperation:
        raise ValueError(f"{shown(text)} is not a whole number such as 500, 500k, 1M or 5e5") from None
    if value.is_finite() and value and value.adjusted() + len(str(scale)) > _MAX_COUNT_DIGITS:
        raise ValueError(f"{shown(text)} is too large: numbers have at most {_MAX_COUNT_DIGITS} digits")
    if not value.is_finite() or value.adjusted() < -_MAX_COUNT_DIGITS or value * scale != int(value * scale):
        raise ValueError(f"{shown(text)} is not a whole number such as 500, 500k, 1M or 5e5")
    return int(value * scale)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar known word, or all of them."""
    known = sorted(known)
    match = difflib.get_close_matches(str(word)[:80], known, n=1)
    if match:
        return f"; did you mean {match[0]!r}?"
    more = f" and {len(known) - 40} more" if len(known) > 40 else ""
    return f"; known are {', '.join(known[:40])}{more}"


def shown(value: Any, *, quote: bool = True) -> str:
    """A value for a message, at most some forty characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 200:
        return f"an integer of {value.bit_length():,} bits"  # too many digits may have no text
    text = str(value) if isinstance(value, str | Path) and not quote else repr(value)
    return text if len(text) <= 48 else f"{text[:40]} ..."


@functools.cache
def _hints(cls: type[Any]) -> dict[str, Any]:
    """Annotations of the fields of a dataclass; none where they name what only a type checker can see."""
    try:
        hints = typing.get_type_hints(cls, include_extras=True)
    except NameError:
        return {}
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def _takes_none(hint: Any) -> bool:
    kinds = typing.get_args(hint)
    if typing.get_origin(hint) is Annotated:
        return _takes_none(kinds[0])
    return hint is Any or (typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in kinds)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _fit(hint: Any, value: Any, path: str, *, plain: bool = False) -> Any:
    """A value as its annotation wants it, or a ValueError; `plain` ones are of a file, which writes what is richer."""
    origin, kinds = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        fitted = _fit(kinds[0], value, path, plain=plain)
        for bounds in kinds[1:]:
            if isinstance(bounds, Range):
                _check_range(bounds, fitted, path)
        return fitted
    if origin in (types.UnionType, typing.Union):
        return _fit_one_of(kinds, value, path, plain)
    if hint is Any or isinstance(hint, TypeVar):
        return value
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        if isinstance(value, hint):  # which has checked itself
            return value
        _require(isinstance(value, Mapping), path, value, "a table")
        return from_plain(hint, value, f"{path}.")
    hint = origin or hint
    if hint in (Mapping, collections.abc.Mapping, dict):
        _require(isinstance(value, Mapping) and all(isinstance(key, str) for key in value), path, value, "a table")
        inner = kinds[1] if kinds else Any
        return value if inner is Any else {k: _fit(inner, v, f"{path}.{k}", plain=plain) for k, v in value.items()}
    if hint is Literal:
        _require(any(value == k and type(value) is type(k) for k in kinds), path, value, _words(Literal[kinds]))
        return value
    if hint in (tuple, list, Sequence, collections.abc.Sequence):
        return _fit_list(hint, kinds, value, path, plain)
    if plain and isinstance(value, str) and hint in (int, Path):
        try:
            return count(value) if hint is int else Path(value)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if hint is float:
        _require(isinstance(value, int | float) and not isinstance(value, bool), path, value, "a number")
        number: Any = value
        _require(-1e300 <= number <= 1e300, path, value, "a finite number")
        _require(abs(number) <= _MAX_FLOAT, path, value, f"a number that float32 holds, at most {_MAX_FLOAT:g}")
        return float(number) if plain else number
    if isinstance(hint, type):
        fits = isinstance(value, hint) and (hint is not int or not isinstance(value, bool))
        _require(fits, path, value, _words(hint))
        is_small = not isinstance(value, int) or -(2**63) <= value < 2**64
        _require(is_small, path, value, "a whole number that 64 bits hold")
    return value


def _words(hint: Any) -> str:
    """What a value of a type is called."""
    kinds = typing.get_args(hint)
    origin = typing.get_origin(hint) or hint
    if origin is Annotated:
        return _words(kinds[0])
    if origin is Literal:
        return f"one of {', '.join(map(repr, kinds))}"
    return _WORDS.get(origin) or ("a table" if dataclasses.is_dataclass(hint) else f"of type {origin.__name__}")


def _fit_one_of(kinds: Sequence[Any], value: Any, path: str, plain: bool) -> Any:
    others = [kind for kind in kinds if kind is not type(None)]
    if value is None and len(others) < len(kinds):
        return None
    if len(others) == 1:
        return _fit(others[0], value, path, plain=plain)
    for is_plain in (False, True) if plain else (False,):  # text is text before it is read as a number
        for kind in others:
            with contextlib.suppress(ValueError):
                return _fit(kind, value, path, plain=is_plain)
    raise ValueError(f"{path}={shown(value)} must be {' or '.join(map(_words, others))}")


def _fit_list(hint: Any, kinds: Sequence[Any], value: Any, path: str, plain: bool) -> Any:
    _require(isinstance(value, list | tuple), path, value, "a list")
    if hint is tuple and kinds and kinds[-1] is not Ellipsis:
        _require(len(kinds) == len(value), path, value, f"a list of {len(kinds)} entries")
    else:
        kinds = (kinds[0] if kinds else Any,) * len(value)
    entries = [
        _fit(kind, entry, f"{path}[{i}]", plain=plain) for i, (kind, entry) in enumerate(zip(kinds, value, strict=True))
    ]
    if hint is tuple:
        return value if isinstance(value, tuple) and value == tuple(entries) and not plain else tuple(entries)
    return entries if plain or isinstance(value, tuple) else value


def _check_range(bounds: Range, value: Any, path: str) -> None:
    for number in value if isinstance(value, tuple | list) else () if value is None else (value,):
        if (broken := bounds.broken(number)) is not None:
            raise ValueError(f"{path}={shown(value)} must be {broken}")


def _require(condition: bool, path: str, value: Any, what: str) -> None:
    if not condition:
        raise ValueError(f"{path}={shown(value)} must be {what}")
