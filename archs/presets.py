"""The architectures by name: each is a layer pattern, a few options, a depth rule and a tuned learning rate.

`configure` turns a name and options into a ModelConfig, and sizes it where a number of parameters is asked for. Names
with a "-" are published models, sizes included: the table PUBLISHED.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, overload

import numpy as np
import torch

from ..options import check_table, nearest
from .config import KINDS, ModelConfig, Seq2SeqConfig
from .ffn import default_d_ff
from .inputs import check_count
from .model import LanguageModel, whole_config
from .registry import UnknownName, register
from .seq2seq import Seq2Seq, model_of

TOLERANCE = 0.02
"""Largest distance of a sized model from the number of parameters asked for, relative."""

UNTUNED = 2e-3
"""Learning rate of the architectures that nobody has tuned yet: the Transformer's."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """An architecture: everything about it that is not its size."""

    name: str
    label: str
    """Its name in tables and figures."""
    make: Callable[..., Mapping[str, Any]]
    """Its own options -> ModelConfig fields."""
    learning_rate: float
    """Peak learning rate of AdamW, found by `crossover compare --tune-lr` at the demo's size (results/README.md), or
    UNTUNED."""
    n_layers_at_1m: float
    """Depth of the architecture at one million parameters; it grows with their fourth root."""
    d_model_multiple: int
    """Widths are multiples of this, so that head sizes are legal."""
    kind: str = "decoder"
    """One of config.KINDS."""

    @property
    def summary(self) -> str:
        """One line for the documentation."""
        return (self.make.__doc__ or "").split("\n", 1)[0].rstrip(".")


PRESETS: dict[str, Preset] = {}


def register_preset(
    name: str,
    make: Callable[..., Mapping[str, Any]],
    *,
    label: str | None = None,
    learning_rate: float = UNTUNED,
    n_layers_at_1m: float = 4,
    d_model_multiple: int = 32,
    kind: str = "decoder",
) -> None:
    """Makes an architecture available to `build`, `crossover train` and `crossover compare`, from outside the package.

        register_preset("ema", lambda: {"pattern": ("ema+mlp",)}, label="EMA", learning_rate=4e-3)

    Args:
        name: its name in commands, and in the names of runs.
        make: its options -> ModelConfig fields, without sizes.
        label: its name in tables and figures; `name` when None.
        learning_rate: peak learning rate of AdamW; `crossover compare --tune-lr --archs NAME` finds it.
        n_layers_at_1m: depth at one million parameters; it grows with their fourth root.
        d_model_multiple: widths are multiples of this, so that head sizes are legal.
        kind: "decoder", "encoder" or "seq2seq".

    Raises:
        ValueError: if the name is taken or no identifier, `make` is no function, or a number cannot be.
    """
    if not callable(make):
        raise ValueError(f"{make!r} of the preset {name!r} is no function that gives fields of a ModelConfig")
    if name == "custom":
        raise ValueError("a preset cannot be named 'custom', which stands for models that give their own pattern")
    for what, value in (("learning_rate", learning_rate), ("n_layers_at_1m", n_layers_at_1m)):
        if not 0 < value < float("inf"):
            raise ValueError(f"{what}={value} of the preset {name!r} must be positive")
    if d_model_multiple < 1:
        raise ValueError(f"d_model_multiple={d_model_multiple} of the preset {name!r} must be at least 1")
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} of the preset {name!r} is none of {', '.join(KINDS)}")
    preset = Preset(
        name=name,
        label=label or name,
        make=make,
        learning_rate=learning_rate,
        n_layers_at_1m=n_layers_at_1m,
        d_model_multiple=d_model_multiple,
        kind=kind,
    )
    register(PRESETS, "preset", name, preset, make)


def _preset(**fields: Any) -> Callable[[Callable[..., Mapping[str, Any]]], Callable[..., Mapping[str, Any]]]:
    """Registers the decorated function as the preset of its name."""

    def register(make: Callable[..., Mapping[str, Any]]) -> Callable[..., Mapping[str, Any]]:
        PRESETS[make.__name__] = Preset(name=make.__name__, make=make, **fields)
        return make

    return register


@_preset(label="Transformer", learning_rate=4e-3, n_layers_at_1m=4, d_model_multiple=32)
def transformer() -> Mapping[str, Any]:
    """Transformer in the Llama layout: RMSNorm, rotary positions, SwiGLU."""
    return {"pattern": ("attention+mlp",)}


@_preset(label="GPT-2", learning_rate=8e-3, n_layers_at_1m=4, d_model_multiple=32)
def gpt2() -> Mapping[str, Any]:
    """GPT-2: a Transformer with learned positions, LayerNorm, GELU and biases."""
    return {
        "pattern": ("attention+mlp",),
        "norm": "layernorm",
        "bias": True,
        "positions": "learned",
        "max_positions": 1024,
        "mixer": {"attention": {"rope": False}},
        "ffn": {"mlp": {"activation": "gelu_tanh"}},
    }


@_preset(label="S4D", learning_rate=1.6e-2, n_layers_at_1m=4, d_model_multiple=8)
def s4d() -> Mapping[str, Any]:
    """S4D: a diagonal state space model, time-invariant, with SwiGLU."""
    return {"pattern": ("s4d+mlp",)}


@_preset(label="S4", learning_rate=1.6e-2, n_layers_at_1m=4, d_model_multiple=8)
def s4() -> Mapping[str, Any]:
    """S4: a state space model that remembers by HiPPO-LegS, with SwiGLU."""
    return {"pattern": ("s4+mlp",)}


@_preset(label="H3", learning_rate=1.6e-2, n_layers_at_1m=4, d_model_multiple=8)
def h3(attention_every: int | None = None) -> Mapping[str, Any]:
    """H3: keys and values gated through two state space models, with SwiGLU.

    With `attention_every` the second layer of each such group has attention; n_layers / 2 gives the two layers of the
    paper's hybrids (arXiv:2212.14052, section 5.1).
    """
    if attention_every is None:
        return {"pattern": ("h3+mlp",)}
    if attention_every < 2:
        raise ValueError(f"attention_every={attention_every} must be at least 2: the second layer of each group has it")
    return {"pattern": ("h3+mlp", "attention+mlp", *["h3+mlp"] * (attention_every - 2))}


@_preset(label="Mamba", learning_rate=8e-3, n_layers_at_1m=8, d_model_multiple=4)
def mamba() -> Mapping[str, Any]:
    """Mamba: a selective state space model, no other channel mixing."""
    return {"pattern": ("mamba",)}


@_preset(label="Mamba-2", learning_rate=8e-3, n_layers_at_1m=8, d_model_multiple=8)
def mamba2() -> Mapping[str, Any]:
    """Mamba-2: one decay per head, so that the scan is made of matrix products."""
    return {"pattern": ("mamba2",)}


@_preset(label="Mamba-3", learning_rate=8e-3, n_layers_at_1m=4, d_model_multiple=32)
def mamba3() -> Mapping[str, Any]:
    """Mamba-3: states that rotate, driven by a trapezoidal rule, with SwiGLU."""
    return {"pattern": ("mamba3+mlp",)}


@_preset(label="Gated DeltaNet", learning_rate=8e-3, n_layers_at_1m=4, d_model_multiple=32)
def gated_deltanet() -> Mapping[str, Any]:
    """Gated DeltaNet: a memory that forgets, and revises what it holds for a key."""
    return {"pattern": ("gated_deltanet+mlp",)}


@_preset(label="Jamba", learning_rate=1.6e-2, n_layers_at_1m=8, d_model_multiple=32)
def jamba(
    attention_every: int = 8, attention_offset: int = 4, moe_every: int = 2, moe_offset: int = 1, ssm: str = "mamba"
) -> Mapping[str, Any]:
    """Jamba: seven Mamba layers to one of attention without positions, experts in every second layer.

    Layer i has attention where i % attention_every == attention_offset, and experts instead of one MLP where
    i % moe_every == moe_offset (arXiv:2403.19887, figure 1). `ssm` names the mixer of the other layers: "mamba2" is
    the variant that its authors compared it with (arXiv:2408.12570).
    """
    for name, offset, every in (("attention", attention_offset, attention_every), ("moe", moe_offset, moe_every)):
        if not 0 <= offset < every:
            raise ValueError(f"{name}_offset={offset} must be at least 0 and below {name}_every={every}")
    period = attention_every * moe_every
    mixers = ["attention" if i % attention_every == attention_offset else ssm for i in range(period)]
    ffns = ["moe" if i % moe_every == moe_offset else "mlp" for i in range(period)]
    pattern = tuple(f"{mixer}+{ffn}" for mixer, ffn in zip(mixers, ffns, strict=True))
    if attention_every % moe_every == 0:
        pattern = pattern[:attention_every]  # the shorter spelling of the same
    options: dict[str, dict[str, Any]] = {"attention": {"rope": False}}
    if ssm == "mamba":
        options["mamba"] = {"inner_norm": True}
    return {"pattern": pattern, "mixer": options, "ffn": {"moe": {"n_experts": 4, "top_k": 2}}, "norm_eps": 1e-6}


@_preset(label="Samba", learning_rate=8e-3, n_layers_at_1m=4, d_model_multiple=32)
def samba() -> Mapping[str, Any]:
    """Samba: Mamba and attention in a sliding window by turns (arXiv:2406.07522)."""
    return {"pattern": ("mamba+mlp", "attention+mlp"), "mixer": {"attention": {"window": 2048}}}


@_preset(label="LSTM", learning_rate=8e-3, n_layers_at_1m=2, d_model_multiple=4)
def lstm() -> Mapping[str, Any]:
    """LSTM: stacked, residual, with a norm before each layer."""
    return {"pattern": ("lstm",)}


@_preset(label="BERT", learning_rate=UNTUNED, n_layers_at_1m=4, d_model_multiple=32, kind="encoder")
def bert() -> Mapping[str, Any]:
    """BERT: an encoder with post-norm, for one text at a time (no segment embeddings). Its learning rate is not tuned.

    arXiv:1810.04805. `LanguageModel.loss` is that of masked language modelling where `targets` are -100 at every token
    that was not masked; masking is the caller's.
    """
    return {
        "pattern": ("attention+mlp",),
        "norm": "layernorm",
        "norm_eps": 1e-12,
        "prenorm": False,
        "bias": True,
        "positions": "learned",
        "max_positions": 512,
        "head": "mlm",
        "mixer": {"attention": {"rope": False, "causal": False}},
        "ffn": {"mlp": {"activation": "gelu"}},
    }


@_preset(label="Encoder-decoder", learning_rate=1e-3, n_layers_at_1m=4, d_model_multiple=32, kind="seq2seq")
def encdec() -> Mapping[str, Any]:
    """Encoder-decoder: the Transformer of 2017, with post-norm. Its learning rate is not tuned by the common rule.

    arXiv:1706.03762, but with rotary positions for sinusoidal ones and GELU for ReLU. Two layers here are one of the
    paper's decoder: n_layers=12 gives its six, and six of the encoder.
    """
    mlp = {"activation": "gelu", "bias": True}
    return {
        "pattern": ("attention", "cross_attention+mlp"),
        "source": {"pattern": ("attention+mlp",), "mixer": {"attention": {"causal": False}}, "ffn": {"mlp": mlp}},
        "norm": "layernorm",
        "prenorm": False,
        "ffn": {"mlp": mlp},
    }


@_preset(label="RNN with attention", learning_rate=UNTUNED, n_layers_at_1m=4, d_model_multiple=2, kind="seq2seq")
def seq2seq() -> Mapping[str, Any]:
    """RNN with attention: LSTMs, one in both directions that reads, one that writes. Its learning rate is not tuned.

    After arXiv:1409.0473; archs/seq2seq.py says where it differs.
    """
    return {
        "pattern": ("lstm", "additive_attention"),
        "source": {"pattern": ("lstm",), "mixer": {"lstm": {"kind": "bidirectional", "of": "lstm"}}},
    }


_MAMBA = {"vocab_size": 50280}  # of 50277 tokens, padded to a multiple of 8
_MAMBA2 = {"vocab_size": 50288}  # of the same, padded to a multiple of 16

PUBLISHED: dict[str, tuple[str, Mapping[str, Any]]] = {
    "gpt2-124m": ("gpt2", {"d_model": 768, "n_layers": 12, "vocab_size": 50257}),
    "gpt2-355m": ("gpt2", {"d_model": 1024, "n_layers": 24, "vocab_size": 50257}),
    "gpt2-774m": ("gpt2", {"d_model": 1280, "n_layers": 36, "vocab_size": 50257}),
    "gpt2-1.5b": ("gpt2", {"d_model": 1600, "n_layers": 48, "vocab_size": 50257}),
    "llama-7b": (
        "transformer",
        {"d_model": 4096, "n_layers": 32, "n_heads": 32, "d_ff": 11008, "vocab_size": 32000, "tie_embeddings": False},
    ),
    "llama-3-8b": (
        "transformer",
        {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "rope_theta": 500_000.0, "d_ff": 14336}
        | {"vocab_size": 128256, "tie_embeddings": False},
    ),
    "mamba-130m": ("mamba", {"d_model": 768, "n_layers": 24} | _MAMBA),
    "mamba-370m": ("mamba", {"d_model": 1024, "n_layers": 48} | _MAMBA),
    "mamba-790m": ("mamba", {"d_model": 1536, "n_layers": 48} | _MAMBA),
    "mamba-1.4b": ("mamba", {"d_model": 2048, "n_layers": 48} | _MAMBA),
    "mamba-2.8b": ("mamba", {"d_model": 2560, "n_layers": 64} | _MAMBA),
    "mamba2-130m": ("mamba2", {"d_model": 768, "n_layers": 24} | _MAMBA2),
    "mamba2-370m": ("mamba2", {"d_model": 1024, "n_layers": 48} | _MAMBA2),
    "mamba2-780m": ("mamba2", {"d_model": 1536, "n_layers": 48} | _MAMBA2),
    "mamba2-1.3b": ("mamba2", {"d_model": 2048, "n_layers": 48} | _MAMBA2),
    "mamba2-2.7b": ("mamba2", {"d_model": 2560, "n_layers": 64} | _MAMBA2),
    "jamba-v0.1": (
        "jamba",
        {"d_model": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "d_ff": 14336, "n_experts": 16, "top_k": 2}
        | {"norm_eps": 1e-6, "vocab_size": 65536, "tie_embeddings": False},
    ),
}
"""Published models by name: the architecture, and the options of `configure` that give it its size."""


def available(kind: str = "decoder") -> tuple[str, ...]:
    """Names that `build` takes, of models of one kind: "decoder", "encoder" or "seq2seq".

    Published sizes are in PUBLISHED.
    """
    return tuple(name for name, preset in PRESETS.items() if preset.kind == kind)


def find(name: str) -> Preset:
    """The preset of a name, or of the architecture of a published model.

    Raises:
        UnknownName: if there is none, with the most similar name.
    """
    arch, _ = PUBLISHED.get(name, (name, {}))
    if arch not in PRESETS:
        raise UnknownName(f"unknown architecture {name!r}{nearest(name, [*PRESETS, *PUBLISHED])}")
    return PRESETS[arch]


def learning_rate(name: str) -> float:
    """Peak learning rate of AdamW tuned for an architecture, recorded in its preset."""
    return find(name).learning_rate


def configure(
    name: str,
    *,
    n_params: int | None = None,
    vocab_size: int | None = None,
    bidirectional: bool = False,
    **options: Any,
) -> ModelConfig:
    """Describes the model called `name`.

    Args:
        name: one of `available()`, of `available("encoder")`, of `available("seq2seq")` or of PUBLISHED.
        n_params: number of parameters to come within 2 % of, embeddings included, shared weights once. Depth follows
            the preset's rule, then width is solved, then the inner width of the ffns where there are any; of these
            d_model, n_layers and d_ff, what is given in `options` is kept.
        vocab_size: V; None means that of the published model, or 256, bytes.
        bidirectional: makes an encoder of a decoder: attention without its mask, and every other mixer twice, once in
            each direction (`Bidirectional`).
        options: options of the preset (attention_every, ...), fields of ModelConfig (d_model, tie_embeddings, ...) and
            options of its mixers and ffns by name (n_heads, d_state, top_k, ...), which go to every mixer or ffn of the
            pattern that has them.

    Raises:
        ValueError: for a name or an option that does not exist, or a size that cannot be reached.
    """
    preset = find(name)
    _, published = PUBLISHED.get(name, (name, {}))
    options = {"vocab_size": 256, **published} | options | ({} if vocab_size is None else {"vocab_size": vocab_size})

    def make(**options: Any) -> ModelConfig:
        config = _configure(preset, **options)
        return _encoder(config) if bidirectional else config

    if n_params is None:
        return make(**({"d_model": 256, "n_layers": _depth(preset, 4_000_000, 1)} | options))
    check_count("n_params", n_params, least=1)
    return _size(preset, make, n_params, options)


@overload
def build(  # pyright: ignore[reportOverlappingOverload]  # other names are those of language models
    model: Literal["encdec", "seq2seq"] | Seq2SeqConfig, **options: Any
) -> Seq2Seq: ...


@overload
def build(model: str | ModelConfig, **options: Any) -> LanguageModel: ...


def build(
    model: str | ModelConfig,
    *,
    n_params: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Any,
) -> LanguageModel | Seq2Seq:
    """Builds a model from a name and options as in `configure`, or from a ModelConfig.

    With device="meta" nothing is allocated: counts and state sizes are exact, weights have no values.
    """
    if isinstance(model, str):
        config = configure(model, n_params=n_params, **options)
    else:
        config = whole_config(model, options if n_params is None else {"n_params": n_params, **options})
    with torch.device(device or torch.get_default_device()):
        lm = model_of(config)
    return lm if dtype is None else lm.to(dtype)


def _configure(preset: Preset, **options: Any) -> ModelConfig:
    """Gives each option to the preset, the config or the layers that have it."""
    own = {key: options.pop(key) for key in _parameters(preset.make) if key in options}
    fields = dict(preset.make(**own))
    cls = Seq2SeqConfig if preset.kind == "seq2seq" else ModelConfig
    known = {f.name for f in dataclasses.fields(cls)}
    for section in ("mixer", "ffn"):
        if section in options:
            given = options.pop(section)
            check_table({"model": {section: given}}, {f"model.{section}": Mapping[str, Mapping[str, Any]]}, preset.name)
            fields[section] = _merge(fields.get(section, {}), given)
    fields |= {key: options.pop(key) for key in list(options) if key in known}
    skeleton = cls(**fields)
    taken = known | set(_parameters(preset.make)) | _spread(skeleton, fields, options)
    if isinstance(skeleton, Seq2SeqConfig):
        fields["source"] = dict(fields["source"])
        taken |= _spread(skeleton.encoder, fields["source"], options)
    for key in options:
        if key not in taken:
            raise ValueError(f"{preset.name} has no option {key!r}{nearest(key, taken)}")
    return cls(**fields)


def _spread(skeleton: ModelConfig, fields: dict[str, Any], options: Mapping[str, Any]) -> set[str]:
    """Adds options to the mixers and ffns in `fields` that have them; returns all that there are."""
    taken: set[str] = set()
    for section, names in (("mixer", {m for m, _ in skeleton.period}), ("ffn", {f for _, f in skeleton.period if f})):
        for name in names:
            cls, _ = skeleton.mixer_of(name) if section == "mixer" else skeleton.ffn_of(name)
            of_layer = {f.name for f in dataclasses.fields(cls.Config)}
            taken |= of_layer
            if chosen := {key: value for key, value in options.items() if key in of_layer}:
                fields[section] = _merge(fields.get(section, {}), {name: chosen})
    return taken


def _encoder(config: ModelConfig) -> ModelConfig:
    """Makes an encoder of a decoder: the same layers, which see the whole sequence."""
    if config.kind == "seq2seq":
        raise ValueError("a seq2seq model has an encoder, and its decoder must be causal: leave bidirectional out")
    mixers: dict[str, Mapping[str, Any]] = {}
    for name, _ in config.period:
        options = config.mixer.get(name, {})
        _, chosen = config.mixer_of(name)
        if "causal" in {f.name for f in dataclasses.fields(chosen)}:
            mixers[name] = {**options, "causal": False}
        else:
            of = options.get("kind", name)
            mixers[name] = {"kind": "bidirectional", "of": of, "options": dataclasses.asdict(chosen)}
    return dataclasses.replace(config, mixer=mixers)


def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _merge(old: Mapping[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    """Options by layer name, the new ones over the old."""
    return {name: {**old.get(name, {}), **new.get(name, {})} for name in {**old, **new}}


def _depth(preset: Preset, n_params: int, period: int) -> int:
    """Layers by the preset's rule, in whole periods of the pattern."""
    n_layers = preset.n_layers_at_1m * (n_params / 1e6) ** 0.25
    return max(1, round(n_layers / period)) * period


def count_params(config: ModelConfig) -> int:
    """Parameters of a model, counted on the meta device: nothing is allocated."""
    period = len(config.pattern)
    n_periods, rest = divmod(config.n_layers, period)
    if rest or n_periods <= 2:
        with torch.device("meta"):
            return model_of(config).n_params
    # all periods are alike, so two models say what any number of them holds
    of_one, of_two = (count_params(dataclasses.replace(config, n_layers=n * period)) for n in (1, 2))
    return of_one + (n_periods - 1) * (of_two - of_one)


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
    """The i >= 1 whose count is closest to the target, for a count that grows with i, and nearly as a quadratic does.

    Counting is slow. Three counts say how it grows, and so about where to look; what is counted there says how far off.
    """
    counts = {i: count(i) for i in (1, 8, 64)}
    growth = np.polynomial.Polynomial.fit([*counts], [*counts.values()], 2)
    while True:
        low = max((i for i, n in counts.items() if n < target), default=0)
        high = min((i for i, n in counts.items() if n >= target and i > low), default=16 * low)
        if high - low == 1:
            return min((i for i in (low, high) if i), key=lambda i: abs(counts[i] - target))
        nearest = min(counts, key=lambda i: abs(counts[i] - target))
        wanted = growth(nearest) + target - counts[nearest]
        guess = low + 1 + bisect.bisect_left(range(low + 1, high - 1), wanted, key=growth)
        counts[guess] = count(guess)


__all__ = [
    "PRESETS",
    "PUBLISHED",
    "TOLERANCE",
    "UNTUNED",
    "Preset",
    "available",
    "build",
    "configure",
    "count_params",
    "find",
    "learning_rate",
    "register_preset",
]
