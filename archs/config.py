"""Describes a model as plain data: what a TOML file holds and a checkpoint stores."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from .registry import FFNS, MIXERS

Options = Mapping[str, Mapping[str, Any]]


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

    d_model: int
    """D, width of the residual stream."""
    n_layers: int
    """Number of layers."""
    vocab_size: int
    """V, number of tokens in the vocabulary."""
    pattern: tuple[str, ...]
    """One entry per layer of a period."""
    mixer: Options = field(default_factory=dict)
    """Options of the mixers named in `pattern`."""
    ffn: Options = field(default_factory=dict)
    """Options of the ffns named in `pattern`."""
    norm_eps: float = 1e-5
    """Added to the mean square in every norm of the residual stream."""
    tie_embeddings: bool = True
    """Whether the output projection is the embedding itself."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", tuple(self.pattern))
        for name in ("d_model", "n_layers", "vocab_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"model.{name}={getattr(self, name)} must be at least 1")
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
        registry: Mapping[str, type[Any]] = MIXERS if section == "mixer" else FFNS
        options = dict(getattr(self, section).get(name, {}))
        kind = options.pop("kind", name)
        if kind not in registry:
            raise ValueError(f"unknown {section} {kind!r} in model.pattern{nearest(kind, registry)}")
        cls = registry[kind]
        known = {f.name for f in dataclasses.fields(cls.Config)}
        for key in options:
            if key not in known:
                raise ValueError(f"unknown option model.{section}.{name}.{key}{nearest(key, known)}")
        return cls, cls.Config(**options)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists and numbers, from which `from_dict` makes an equal config."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        sections = {name: {k: dict(v) for k, v in values[name].items()} for name in ("mixer", "ffn")}
        return values | sections | {"pattern": list(self.pattern)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads what `to_dict` wrote, or the [model] table of a TOML file.

        Raises:
            ValueError: for unknown and for missing keys.
        """
        fields = {f.name: f for f in dataclasses.fields(cls)}
        for key in values:
            if key not in fields:
                raise ValueError(f"unknown key model.{key}{nearest(key, fields)}")
        required = {n for n, f in fields.items() if f.default is f.default_factory is dataclasses.MISSING}
        if missing := sorted(required - set(values)):
            raise ValueError(f"the model table lacks {', '.join(missing)}")
        return cls(**values)


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of an error message: the most similar known word, or all of them."""
    known = sorted(known)
    match = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {match[0]!r}?" if match else f"; known are {', '.join(known)}"
