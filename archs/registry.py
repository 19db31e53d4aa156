"""The names that a layer pattern may use. To add a mixer: write archs/mixers/<name>.py, then add its line here."""

from __future__ import annotations

from .ffn import FFN
from .ffns.mlp import MLP
from .ffns.moe import MoE
from .mixer import Mixer
from .mixers.attention import Attention
from .mixers.lstm import LSTM
from .mixers.mamba import Mamba
from .mixers.s4d import S4D

MIXERS: dict[str, type[Mixer]] = {
    "attention": Attention,
    "lstm": LSTM,
    "mamba": Mamba,
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
