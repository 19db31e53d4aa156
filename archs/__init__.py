"""Sequence-model backbones under one contract: `build("mamba", n_params=1_000_000, vocab_size=256)`."""

from . import presets
from .config import ModelConfig
from .decoding import Decoder
from .ffn import FFN
from .mixer import Mixer, State, Zeros
from .model import Backbone, Block, Features, LanguageModel, LMLoss, LMOutput
from .presets import PUBLISHED, available, build, configure, register_preset
from .registry import FFNS, MIXERS, register_ffn, register_mixer
from .seq2seq import Seq2Seq, Seq2SeqConfig, open_pretrained
from .state import States

__all__ = [
    "FFN",
    "FFNS",
    "MIXERS",
    "PUBLISHED",
    "Backbone",
    "Block",
    "Decoder",
    "Features",
    "LMLoss",
    "LMOutput",
    "LanguageModel",
    "Mixer",
    "ModelConfig",
    "Seq2Seq",
    "Seq2SeqConfig",
    "State",
    "States",
    "Zeros",
    "available",
    "build",
    "configure",
    "open_pretrained",
    "presets",
    "register_ffn",
    "register_mixer",
    "register_preset",
]
