"""Describes a model as plain data: what a TOML file holds and a checkpoint stores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from ..options import Positive, Range, Size, check, from_plain, nearest, shown
from .mixers.cross_attention import READERS, Reader
from .registry import resolve

__all__ = ["KINDS", "ModelConfig", "Options", "Seq2SeqConfig", "nearest"]

Options = Mapping[str, Mapping[str, Any]]

KINDS = ("decoder", "encoder", "seq2seq")
"""Kinds of models: a decoder reads left to right and predicts the next token, an encoder reads in both directions and
predicts masked tokens, a seq2seq model reads one sequence and predicts another."""

_SHARED = ("d_model", "vocab_size", "norm", "norm_eps", "prenorm", "bias", "positions", "max_positions")
_SOURCE_KEYS = ("pattern", "n_layers", "mixer", "ffn")


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A stack of `n_layers` layers; the pattern repeats from the first one on.

    An entry of `pattern` is "mixer" or "mixer+ffn". A name has its options in `mixer` or `ffn`, where "kind" picks the
    class and is the name itself by default:

        pattern = ["mamba+mlp", "mamba+moe", "attention+mlp", "mamba+moe"]
        [model.ffn.moe]
        n_experts = 16

    Raises:
        ValueError: for an unknown name, an unknown option or options that no layer uses, with the dotted path.
    """

    d_model: Size
    """D, width of the residual stream."""
    n_layers: Annotated[int, Range(1, 2**10)]
    """Number of layers."""
    vocab_size: Annotated[int, Range(1, 2**28)]
    """V, number of tokens in the vocabulary."""
    pattern: tuple[str, ...]
    """One entry per layer of a period."""
    mixer: Options = field(default_factory=dict)
    """Options of the mixers named in `pattern`."""
    ffn: Options = field(default_factory=dict)
    """Options of the ffns named in `pattern`."""
    norm: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norm of the residual stream: "rmsnorm" or "layernorm"."""
    norm_eps: Positive = 1e-5
    """Added to the mean square, or the variance, in every norm of the residual stream."""
    prenorm: bool = True
    """Whether a layer is x + f(norm(x)), with a norm after the last one; False is norm(x + f(x)), with a norm before
    the first one, as in BERT."""
    bias: bool = False
    """Whether the projections of every mixer and ffn that has an option `bias` have biases."""
    positions: Literal["none", "learned"] = "none"
    """Vectors that are added to the embeddings: "none", or "learned", one for each position in the document."""
    max_positions: Annotated[int, Range(1, 2**28)] | None = None
    """Longest context of learned positions, in tokens."""
    segments: Annotated[int, Range(0, 2**18)] = 0
    """Kinds of tokens, such as those of the first and of the second text of a pair: each has a vector that is added to
    the embeddings, as in BERT. 0 means that tokens have no kind."""
    head: Literal["linear", "mlm"] = "linear"
    """Head that makes logits of the last layer's output: "linear", one projection, or "mlm", as BERT predicts masked
    tokens: a layer with GELU and a norm, then a projection with a bias."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding itself."""

    _other_mixers: ClassVar[Mapping[str, type[Any]]] = {}
    """Kinds that only models described by this class may use, besides the registered ones."""

    def __post_init__(self) -> None:
        check(self, "model.")
        if (self.positions == "learned") != (self.max_positions is not None):
            raise ValueError(
                f"model.positions={self.positions!r} and model.max_positions={self.max_positions} contradict each"
                ' other: "learned" positions, and no others, need the longest context'
            )
        if not self.pattern:
            raise ValueError("model.pattern is empty: it needs at least one entry, such as 'attention+mlp'")
        for section, names in (("mixer", {m for m, _ in self.period}), ("ffn", {f for _, f in self.period if f})):
            for name in getattr(self, section):
                if name not in names:
                    raise ValueError(
                        f"model.{section}.{name} has options, but no layer of {list(self.pattern)} uses it"
                    )
            for name in names:
                self._layer(section, name)

    @property
    def kind(self) -> str:
        """One of KINDS: an encoder where any layer sees the tokens to come, which predicting the next one forbids."""
        is_causal = all(getattr(self.mixer_of(name)[1], "causal", True) for name, _ in self.period)
        return "decoder" if is_causal else "encoder"

    @property
    def period(self) -> tuple[tuple[str, str | None], ...]:
        """(mixer, ffn or None) of each entry of the pattern."""
        split = [entry.partition("+") for entry in self.pattern]
        return tuple((mixer, ffn or None) for mixer, _, ffn in split)

    @property
    def layers(self) -> tuple[tuple[str, str | None], ...]:
        """(mixer, ffn or None) of each of the n_layers layers."""
        return tuple(self.period[i % len(self.period)] for i in range(self.n_layers))

    def mixer_of(self, name: str) -> tuple[type[Any], Any]:
        """The class of a mixer name and its options."""
        return self._layer("mixer", name)

    def ffn_of(self, name: str) -> tuple[type[Any], Any]:
        """The class of an ffn name and its options."""
        return self._layer("ffn", name)

    def _layer(self, section: str, name: str) -> tuple[type[Any], Any]:
        options, path = dict(getattr(self, section).get(name, {})), f"model.{section}.{name}"
        named_in = f"{path}.kind" if "kind" in options else "model.pattern"
        others = self._other_mixers if section == "mixer" else None
        cls, config = resolve(section, options.pop("kind", name), options, named_in=named_in, path=path, others=others)
        if self.bias and hasattr(config, "bias") and "bias" not in options:
            config = dataclasses.replace(config, bias=True)
        return cls, config

    def to_dict(self) -> dict[str, Any]:
        """Returns JSON values (lists, no tuples), from which `from_dict` makes an equal config."""
        values = {f.name: _json_value(getattr(self, f.name)) for f in dataclasses.fields(self)}
        if not self.segments:  # what was written before there were any is of the same model
            del values["segments"]
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Reads what `to_dict` wrote, or the [model] table of a TOML file; with a `source` it is a Seq2SeqConfig.

        Raises:
            ValueError: for unknown and for missing keys.
        """
        if "source" in values and not issubclass(cls, Seq2SeqConfig):
            return Seq2SeqConfig.from_dict(values)
        return from_plain(cls, values, "model.")


@dataclass(frozen=True, kw_only=True)
class Seq2SeqConfig(ModelConfig):
    """A decoder, described as any model, whose pattern may name READERS too, and the encoder of its source.

    Raises:
        ValueError: as ModelConfig, and if no layer reads the source.
    """

    source: Mapping[str, Any]
    """The encoder: its `pattern`, the options `mixer` and `ffn` of what the pattern names, and `n_layers`, without
    which it has as many periods as the decoder. All else is as in the decoder."""

    # they need a state, so they cannot be in the registry, whose entries hold the contract of mixers
    _other_mixers = READERS

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.source:
            if key not in _SOURCE_KEYS:
                raise ValueError(f"unknown key model.source.{key}{nearest(key, _SOURCE_KEYS)}")
        if "pattern" not in self.source:
            raise ValueError("model.source lacks the pattern of the encoder, such as ['encoder+mlp']")
        if not isinstance(self.source["pattern"], list | tuple):
            raise ValueError(f"model.source.pattern={shown(self.source['pattern'])} must be a list")
        object.__setattr__(self, "source", dict(self.source) | {"pattern": tuple(self.source["pattern"])})
        if not any(issubclass(self.mixer_of(name)[0], Reader) for name, _ in self.period):
            known = " or ".join(READERS)
            raise ValueError(f"no layer of model.pattern={list(self.pattern)} reads the source: add {known}")
        if self.head != "linear":
            raise ValueError(f"model.head={self.head!r} predicts masked tokens, not the next ones: use 'linear'")
        if self.segments:
            raise ValueError(f"model.segments={self.segments}: a source and its target are told apart without: use 0")
        _ = self.encoder  # which checks itself

    @property
    def kind(self) -> str:
        """Always "seq2seq"."""
        return "seq2seq"

    @property
    def encoder(self) -> ModelConfig:
        """The encoder as a model of its own."""
        n_periods = -(-self.n_layers // len(self.pattern))
        shared = {name: getattr(self, name) for name in _SHARED}
        return ModelConfig(**{"n_layers": n_periods * len(self.source["pattern"]), **shared, **self.source})


def _json_value(value: Any) -> Any:
    """Makes dicts of mappings and lists of tuples, all the way down."""
    if isinstance(value, Mapping):
        return {key: _json_value(inner) for key, inner in value.items()}
    return [_json_value(inner) for inner in value] if isinstance(value, list | tuple) else value
