"""Sequence-model backbones under one contract: `build("mamba", n_params=1_000_000, vocab_size=256)`."""

from . import presets
from .config import ModelConfig
from .ffn import FFN
from .mixer import Mixer, State
from .model import Backbone, Block, LanguageModel, LMOutput
from .presets import available, build, configure
from .registry import FFNS, MIXERS, register_mixer

__all__ = [
    "FFN",
    "FFNS",
    "MIXERS",
    "Backbone",
    "Block",
    "LMOutput",
    "LanguageModel",
    "Mixer",
    "ModelConfig",
    "State",
    "available",
    "build",
    "configure",
    "presets",
    "register_mixer",
]
