"""The architectures by name: each is a layer pattern, a few options, a depth rule and a tuned learning rate.

`configure` turns a name and options into a ModelConfig, and sizes it where a number of parameters is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .config import ModelConfig, nearest
from .ffn import default_d_ff
from .model import LanguageModel

TOLERANCE = 0.02
"""How far a sized model may be from the number of parameters asked for, relative."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An architecture: everything about it that is not its size."""

    name: str
    label: str
    """Its name in tables and figures."""
    summary: str
    """One line for --help and the documentation."""
    make: Callable[..., Mapping[str, Any]]
    """Its own options -> ModelConfig fields."""
    learning_rate: float
    """Peak learning rate of AdamW, tuned by `crossover bench lr` at the demo's size (results/cpu-demo/lr.csv)."""
    n_layers_at_1m: float
    """Depth of the architecture at one million parameters; it grows with their fourth root."""
    d_model_multiple: int
    """Widths are multiples of this, so that head sizes are legal."""
    kind: str = "decoder"
    """What it is for: "decoder" reads left to right and predicts the next token."""


PRESETS: dict[str, Preset] = {}


def _preset(**fields: Any) -> Callable[[Callable[..., Mapping[str, Any]]], Callable[..., Mapping[str, Any]]]:
    """Registers the decorated function as the preset of its name."""

    def register(make: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
        summary = (make.__doc__ or "").split("\n", 1)[0].rstrip(".")
        PRESETS[make.__name__] = Preset(name=make.__name__, summary=summary, make=make, **fields)
        return make

    return register


@_preset(label="Transformer", learning_rate=2e-3, n_layers_at_1m=4, d_model_multiple=32)
def transformer() -> Mapping[str, Any]:
    """Transformer in the Llama layout: RMSNorm, rotary positions, SwiGLU."""
    return {"pattern": ("attention+mlp",)}


@_preset(label="S4D", learning_rate=1.6e-2, n_layers_at_1m=4, d_model_multiple=8)
def s4d() -> Mapping[str, Any]:
    """S4D: a diagonal state space model, time-invariant, with SwiGLU."""
    return {"pattern": ("s4d+mlp",)}


@_preset(label="Mamba", learning_rate=4e-3, n_layers_at_1m=8, d_model_multiple=4)
def mamba() -> Mapping[str, Any]:
    """Mamba: a selective state space model, no other channel mixing."""
    return {"pattern": ("mamba",)}


@_preset(label="Jamba", learning_rate=8e-3, n_layers_at_1m=8, d_model_multiple=32)
def jamba(
    attention_every: int = 8, attention_offset: int = 4, moe_every: int = 2, moe_offset: int = 1
) -> Mapping[str, Any]:
    """Jamba: seven Mamba layers to one of attention without positions, experts in every second layer.

    Layer i has attention where i % attention_every == attention_offset, and experts instead of one MLP where
    i % moe_every == moe_offset (arXiv:2403.19887, figure 1).
    """
    for name, offset, every in (("attention", attention_offset, attention_every), ("moe", moe_offset, moe_every)):
        if not 0 <= offset < every:
            raise ValueError(f"{name}_offset={offset} must be at least 0 and below {name}_every={every}")
    period = attention_every * moe_every
    mixers = ["attention" if i % attention_every == attention_offset else "mamba" for i in range(period)]
    ffns = ["moe" if i % moe_every == moe_offset else "mlp" for i in range(period)]
    pattern = tuple(f"{mixer}+{ffn}" for mixer, ffn in zip(mixers, ffns, strict=True))
    if attention_every % moe_every == 0:
        pattern = pattern[:attention_every]  # the shorter spelling of the same
    options = {"attention": {"rope": False}, "mamba": {"inner_norm": True}}
    return {"pattern": pattern, "mixer": options, "ffn": {"moe": {"n_experts": 4, "top_k": 2}}}


@_preset(label="LSTM", learning_rate=8e-3, n_layers_at_1m=2, d_model_multiple=4)
def lstm() -> Mapping[str, Any]:
    """LSTM: stacked, residual, with a norm before each layer."""
    return {"pattern": ("lstm",)}


def available(kind: str = "decoder") -> tuple[str, ...]:
    """Names that `build` takes, of models of one kind."""
    return tuple(name for name, preset in PRESETS.items() if preset.kind == kind)


def find(name: str) -> Preset:
    """The preset of a name.

    Raises:
        ValueError: if there is none, with the most similar name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown architecture {name!r}{nearest(name, PRESETS)}")
    return PRESETS[name]


def learning_rate(name: str) -> float:
    """Peak learning rate of AdamW tuned for an architecture, recorded in its preset."""
    return find(name).learning_rate


def configure(name: str, *, n_params: int | None = None, vocab_size: int = 256, **options: Any) -> ModelConfig:
    """Describes the model called `name`.

    Args:
        name: one of `available()`.
        n_params: number of parameters to come within 2 % of, embeddings included, shared weights once. Depth follows
            the preset's rule, then width is solved, then the inner width of the ffns where there are any; of these
            d_model, n_layers and d_ff, what is given in `options` is kept.
        vocab_size: V.
        options: options of the preset (attention_every, ...), fields of ModelConfig (d_model, tie_embeddings, ...) and
            options of its mixers and ffns by name (n_heads, d_state, top_k, ...), which go to every mixer or ffn of the
            pattern that has them.

    Raises:
        ValueError: for a name or an option that does not exist, or a size that cannot be reached.
    """
    preset = find(name)
    make = functools.partial(_configure, preset, vocab_size=vocab_size)
    if n_params is None:
        return make(**({"d_model": 256, "n_layers": _depth(preset, 4_000_000, 1)} | options))
    return _size(preset, make, n_params, options)


def build(
    model: str | ModelConfig,
    *,
    n_params: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LanguageModel:
    """Builds a language model from a name and options as in `configure`, or from a ModelConfig.

    With device="meta" nothing is allocated: counts and state sizes are exact, weights have no values.
    """
    config = configure(model, n_params=n_params, **options) if isinstance(model, str) else model
    with torch.device(device or torch.get_default_device()):
        lm = LanguageModel(config)
    return lm if dtype is None else lm.to(dtype)


def _configure(preset: Preset, **options: Any) -> ModelConfig:
    """Sorts options by who takes them."""
    own = {key: options.pop(key) for key in _parameters(preset.make) if key in options}
    fields = dict(preset.make(**own))
    known = {f.name for f in dataclasses.fields(ModelConfig)}
    for section in ("mixer", "ffn"):
        if section in options:
            given = options.pop(section)
            fields[section] = _merge(fields.get(section, {}), given)
    fields |= {key: options.pop(key) for key in list(options) if key in known}
    skeleton = ModelConfig(**fields)
    taken = known | set(_parameters(preset.make))
    for section, names in (("mixer", {m for m, _ in skeleton.period}), ("ffn", {f for _, f in skeleton.period if f})):
        for name in names:
            cls, _ = skeleton.mixer_of(name) if section == "mixer" else skeleton.ffn_of(name)
            of_layer = {f.name for f in dataclasses.fields(cls.Config)}
            taken |= of_layer
            if chosen := {key: value for key, value in options.items() if key in of_layer}:
                fields[section] = _merge(fields.get(section, {}), {name: chosen})
    for key in options:
        if key not in taken:
            raise ValueError(f"{preset.name} has no option {key!r}{nearest(key, taken)}")
    return ModelConfig(**fields)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return function.__code__.co_varnames[: function.__code__.co_argcount]


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Options by layer name, the new ones over the old."""
    return {name: {**old.get(name, {}), **new.get(name, {})} for name in {**old, **new}}


def _depth(preset: Preset, n_params: int, period: int) -> int:
    """Layers by the preset's rule, in whole periods of the pattern."""
    wanted = preset.n_layers_at_1m * (n_params / 1e6) ** 0.25
    return max(1, round(wanted / period)) * period


def count_params(config: ModelConfig) -> int:
    """Parameters of a model, counted on the meta device: nothing is allocated."""
    period = len(config.pattern)
    n_periods, rest = divmod(config.n_layers, period)
    if rest or n_periods <= 2:
        with torch.device("meta"):
            return LanguageModel(config).n_params
    # all periods are alike, so two models say what any number of them holds
    one, two = (count_params(dataclasses.replace(config, n_layers=n * period)) for n in (1, 2))
    return one + (n_periods - 1) * (two - one)


def _size(preset: Preset, make: Callable[..., ModelConfig], n_params: int, options: dict[str, Any]) -> ModelConfig:
    """Solves for the free ones of n_layers, d_model and d_ff."""
    best: tuple[float, ModelConfig] | None = None
    for config in _candidates(preset, make, n_params, options):
        error = abs(count_params(config) / n_params - 1)
        if best is None or error < best[0]:
            best = (error, config)
        if error <= TOLERANCE:
            return config
    assert best is not None
    raise ValueError(
        f"{preset.name} cannot be sized to {n_params:,} parameters within {TOLERANCE:.0%}: the nearest is"
        f" {count_params(best[1]):,}; change the number, or free d_model, n_layers or d_ff"
    )


def _candidates(
    preset: Preset, make: Callable[..., ModelConfig], n_params: int, options: dict[str, Any]
) -> Iterator[ModelConfig]:
    """Models near the size, the one nearest to the depth rule first."""
    probe = make(**({"d_model": preset.d_model_multiple, "n_layers": 1} | options))
    period = len(probe.period)
    has_ffn = any(ffn for _, ffn in probe.period)
    rule = _depth(preset, n_params, period)
    depths = sorted(range(period, 2 * rule + period, period), key=lambda n: abs(n - rule))
    for n_layers in [options["n_layers"]] if "n_layers" in options else depths:
        at_depth = functools.partial(make, **(options | {"n_layers": n_layers}))
        if "d_model" in options:
            d_model = options["d_model"]
        else:
            sized = functools.partial(_width, at_depth, preset.d_model_multiple)
            d_model = preset.d_model_multiple * _closest(lambda i, s=sized: count_params(s(i)), n_params)
        config = at_depth(**{"d_model": d_model})
        yield config
        if has_ffn and "d_ff" not in options:
            near = functools.partial(at_depth, d_model=d_model)
            d_ff = 8 * _closest(lambda i, f=near: count_params(f(d_ff=8 * i)), n_params)
            if default_d_ff(d_model) / 2 <= d_ff <= default_d_ff(d_model) * 2:
                yield near(d_ff=d_ff)


def _width(make: Callable[..., ModelConfig], multiple: int, i: int) -> ModelConfig:
    return make(d_model=multiple * i)


def _closest(count: Callable[[int], int], target: int) -> int:
    """The i >= 1 whose count is closest to the target, for a count that grows with i."""
    high = 1
    while count(high) < target:
        high *= 2
    low = max(1, high // 2)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if count(middle) < target else (low, middle)
    return min((low, high), key=lambda i: abs(count(i) - target))


__all__ = [
    "PRESETS",
    "TOLERANCE",
    "Preset",
    "available",
    "build",
    "configure",
    "count_params",
    "find",
    "learning_rate",
]
