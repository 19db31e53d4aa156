"""The names that a layer pattern may use. To add a mixer: write archs/mixers/<name>.py, then add its line here."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from ..options import from_plain, nearest
from .ffn import FFN
from .ffns.mlp import MLP
from .ffns.moe import MoE
from .mixer import Mixer
from .mixers.attention import Attention
from .mixers.bidirectional import Bidirectional
from .mixers.gated_deltanet import GatedDeltaNet
from .mixers.h3 import H3
from .mixers.lstm import LSTM
from .mixers.mamba import Mamba
from .mixers.mamba2 import Mamba2
from .mixers.mamba3 import Mamba3
from .mixers.s4 import S4
from .mixers.s4d import S4D

T = TypeVar("T")

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "bidirectional": Bidirectional,
    "gated_deltanet": GatedDeltaNet,
    "h3": H3,
    "lstm": LSTM,
    "mamba": Mamba,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "s4": S4,
    "s4d": S4D,
}

FFNS: dict[str, type[FFN]] = {
    "mlp": MLP,
    "moe": MoE,
}


class UnknownName(ValueError):
    """Nothing is registered under a name; what would register it may not have been imported."""


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Makes `mixer` available to layer patterns under `name`, from outside the package.

    Raises:
        ValueError: if the name is taken by another one, or is no identifier, or `mixer` is no class of a mixer with a
            Config that is a dataclass.
    """
    check_class("mixer", mixer, Mixer)
    register(MIXERS, "mixer", name, mixer, mixer)


def register_ffn(name: str, ffn: type[FFN]) -> None:
    """Makes `ffn` available to layer patterns under `name`, as `register_mixer` does."""
    check_class("ffn", ffn, FFN)
    register(FFNS, "ffn", name, ffn, ffn)


def check_class(what: str, given: Any, base: type[Any]) -> None:
    """ValueError unless `given` is a class that can be registered as a `what`, whose base is given."""
    is_one = isinstance(given, type) and issubclass(given, base) and given is not base
    if not is_one or not dataclasses.is_dataclass(getattr(given, "Config", None)):
        raise ValueError(f"{given!r} is no {what}: a subclass of {base.__name__} with a dataclass Config")


def register(registry: dict[str, T], what: str, name: str, entry: T, code: Callable[..., Any]) -> None:
    """Adds an entry of outside the package to a registry; one that is defined anew takes the place of its former self.

    Args:
        registry: entries by name.
        what: says in messages what they are.
        name: name of the new one.
        entry: the new one.
        code: its class or function, or the one that the entry holds.

    Raises:
        ValueError: if the name is taken by another one, or is no identifier.
    """
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not an identifier, as the name of a {what} must be")
    if name in registry and _REGISTERED.get((what, name)) != _place(code):
        raise ValueError(f"there is a {what} named {name!r} already: choose another name")
    registry[name] = entry
    _REGISTERED[what, name] = _place(code)


_REGISTERED: dict[tuple[str, str], tuple[str, str]] = {}
"""Where the code of each entry of outside the package was defined."""


def _place(code: Callable[..., Any]) -> tuple[str, str]:
    """File and name of a class or function: the same when a module is read again, or is run as a script besides."""
    module = getattr(code, "__module__", "")
    return getattr(sys.modules.get(module), "__file__", None) or module, getattr(code, "__qualname__", repr(code))


def registered(what: str) -> list[str]:
    """Names of the mixers, ffns, presets or objectives of outside the package."""
    return [name for kind, name in _REGISTERED if kind == what]


def resolve(
    section: str,
    kind: str,
    options: Mapping[str, Any],
    *,
    named_in: str,
    path: str,
    others: Mapping[str, type[Any]] | None = None,
) -> tuple[type[Any], Any]:
    """The class of `kind`, and its options as an instance of its Config.

    Args:
        section: "mixer" or "ffn".
        kind: a name of MIXERS or FFNS.
        options: values of fields of the class's Config.
        named_in: where the kind was named, for the message.
        path: where the options were given, for the message.
        others: kinds that may stand here besides the registered ones.

    Raises:
        UnknownName: for an unknown kind, with the most similar name.
        ValueError: likewise for an unknown option, or for a value that it cannot have.
    """
    kinds = {**(MIXERS if section == "mixer" else FFNS), **(others or {})}
    if not isinstance(kind, str) or kind not in kinds:
        raise UnknownName(f"unknown {section} {kind!r} in {named_in}{nearest(kind, kinds)}")
    try:
        return kinds[kind], from_plain(kinds[kind].Config, options, f"{path}.")
    except ValueError as error:
        if path in str(error):
            raise
        # of the class itself, which does not know where its options stand
        names = tuple(field.name for field in dataclasses.fields(kinds[kind].Config))
        raise ValueError(f"{path}{'.' if str(error).startswith(names) else ': '}{error}") from None
