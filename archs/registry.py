"""The names that a layer pattern may use. To add a mixer: write archs/mixers/<name>.py, then add its line here."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import Any

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


def register_mixer(name: str, mixer: type[Mixer]) -> None:
    """Makes `mixer` available to layer patterns under `name`, from outside the package.

    Raises:
        ValueError: if the name is taken, or could not stand in a pattern.
    """
    if name in MIXERS:
        raise ValueError(f"a mixer named {name!r} exists: {MIXERS[name].__module__}.{MIXERS[name].__name__}")
    if not name.isidentifier():
        raise ValueError(f"{name!r} is not an identifier, as names in a layer pattern must be")
    MIXERS[name] = mixer


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
        ValueError: for an unknown kind or option, with the most similar name.
    """
    kinds = {**(MIXERS if section == "mixer" else FFNS), **(others or {})}
    if kind not in kinds:
        raise ValueError(f"unknown {section} {kind!r} in {named_in}{nearest(kind, kinds)}")
    known = {f.name for f in dataclasses.fields(kinds[kind].Config)}
    for key in options:
        if key not in known:
            raise ValueError(f"unknown option {path}.{key}{nearest(key, known)}")
    return kinds[kind], kinds[kind].Config(**options)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar known word, or all of them."""
    known = sorted(known)
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(known)}"
