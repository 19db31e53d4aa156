"""The names that a layer pattern may use. To add a mixer: write archs/mixers/<name>.py, then add its line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

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
        ValueError: for an unknown kind or option, with the most similar name, or a value that the option cannot have.
    """
    kinds = {**(MIXERS if section == "mixer" else FFNS), **(others or {})}
    if not isinstance(kind, str) or kind not in kinds:
        raise ValueError(f"unknown {section} {kind!r} in {named_in}{nearest(kind, kinds)}")
    try:
        return kinds[kind], from_plain(kinds[kind].Config, options, f"{path}.")
    except ValueError as error:
        if path in str(error):
            raise
        # of the class itself, which does not know where its options stand
        names = tuple(field.name for field in dataclasses.fields(kinds[kind].Config))
        raise ValueError(f"{path}{'.' if str(error).startswith(names) else ': '}{error}") from None
