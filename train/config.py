"""RunConfig: everything that decides a run, as frozen plain data.

Run files and run.json are read by `RunConfig.from_dict`, the command line by command_line.py, whose parser finds its
metavars and aliases in the annotations here. Nothing imports torch, so that `--help` and a typing mistake answer at
once.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ..files import parse_toml
from ..options import Positive, Range, Share, check, count, from_plain
from .plugins import registered

if TYPE_CHECKING:
    from ..archs import ModelConfig

__all__ = [
    "Count",
    "DataConfig",
    "ModelSpec",
    "ObjectiveSpec",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "flatten",
    "plain",
]

CUSTOM = "custom"
"""Preset of a model that a [model] table describes from its pattern up."""

_NOTHING = ("None", "''")


def _value(read: Callable[[str], Any], metavar: str, *, optional: bool = False) -> PrimitiveConstructorSpec[Any]:
    """Says to tyro how one value is read; an optional one may be written "none"."""

    def instance(values: list[str]) -> Any:
        return None if optional and values[0].lower() == "none" else read(values[0])

    return PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=instance,
        is_instance=lambda _: True,
        str_from_instance=lambda value: [str(value)],
    )


def _beside(what: str) -> Callable[[str], str]:
    """Says in the help, after the default, which presets or objectives imported modules have added."""

    def hint(default: str) -> str:
        names = ", ".join(registered(what))
        return f"(default: {default}; imported: {names})" if names else f"(default: {default})"

    return hint


def _unset(meaning: str) -> Callable[[str], str]:
    """Says in the help what a default of None or "" stands for."""
    return lambda default: f"(default: {default if default not in _NOTHING else meaning})"


def _zero(meaning: str) -> Callable[[str], str]:
    """Says in the help what a default of 0 stands for."""
    return lambda default: f"(default: {meaning if float(default) == 0 else default})"


Count = Annotated[int, _value(count, "COUNT"), Range(1)]
"""A number of things, at least one, that accepts what `count` reads."""
CountOrNone = Annotated[int, _value(count, "COUNT"), Range(0)]
"""The same where 0 turns something off."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def _merged(options: Mapping[str, Any], entries: Sequence[str], section: str) -> dict[str, Any]:
    """Nested tables of options with "dotted.key=TOML value" entries over them, the later over the earlier."""
    merged: dict[str, Any] = copy.deepcopy(dict(options))
    for given in entries:
        _merge(merged, _read_entry(given, section), f"{section}.set {given!r}")
    return merged


def _read_entry(entry: str, section: str) -> dict[str, Any]:
    key, equals, value = entry.partition("=")
    _require(bool(equals) and bool(key.strip()), f"{section}.set {entry!r} is not of the form key=value")
    for text in (entry, f"{key}={json.dumps(value, ensure_ascii=False)}"):  # a bare word is a string
        with contextlib.suppress(ValueError):
            return parse_toml(text, key)
    raise ValueError(f"{section}.set {entry!r} is not of the form key=value")


def _merge(into: dict[str, Any], new: Mapping[str, Any], where: str) -> None:
    for key, value in new.items():
        old = into.get(key, value)
        _require(isinstance(old, dict) == isinstance(value, dict), f"{where} contradicts an earlier {key}")
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value, where)
        else:
            into[key] = value


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The model: a preset and its size, or a [model] table of a run file that spells out the pattern."""

    preset: Annotated[str, tyro.conf.arg(help_behavior_hint=_beside("preset"))] = "mamba"
    """Architecture: transformer, mamba, mamba2, s4, h3, jamba, lstm, ..., as `crossover.archs.available()` lists them;
    "custom" where a [model] table gives the pattern."""
    n_params: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        Range(1, 10**12),
        tyro.conf.arg(aliases=("--params",), help_behavior_hint=_unset("the preset's own size")),
    ] = None
    """Total parameters, solved for within 2 %: 500k, 1M, 5e6."""
    d_model: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        Range(1, 2**18),
        tyro.conf.arg(help_behavior_hint=_unset("the preset's, or solved for")),
    ] = None
    """Width."""
    n_layers: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        Range(1, 2**10),
        tyro.conf.arg(help_behavior_hint=_unset("the preset's, or solved for")),
    ] = None
    """Number of layers."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Any other option of the model or of its mixers and ffns, as key=TOML value: --model.set d_state=32."""
    options: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, Any]]] = field(default_factory=dict, hash=False)
    """The same as nested tables, from the [model] table of a run file."""

    def __post_init__(self) -> None:
        check(self, "model.")
        _require(bool(self.preset), "model.preset must not be empty")
        options = self.all_options()
        _require("vocab_size" not in options, "model.vocab_size comes from the tokenizer (--tokenizer): leave it out")
        for name in ("preset", "n_params", "d_model", "n_layers"):
            _require(name not in options, f"model.set {name}=...: use --model.{name.replace('_', '-')} instead")
        if self.preset == CUSTOM:
            _require("pattern" in options, 'model.preset "custom" needs a pattern such as ["mamba", "attention+mlp"]')
            _require(
                self.n_params is None,
                "model.n_params sizes a preset, and this model gives its own pattern: leave one of the two out",
            )

    def all_options(self) -> dict[str, Any]:
        """Returns `options` and, over them, `set` as nested tables."""
        return _merged(self.options, self.set, "model")

    def configure(self, vocab_size: int) -> ModelConfig:
        """Returns the complete model configuration for a tokenizer of `vocab_size` tokens.

        Raises:
            ValueError: if the preset or an option does not exist, or the sizes do not fit together.
        """
        from .. import archs

        sizes = {name: getattr(self, name) for name in ("n_params", "d_model", "n_layers")}
        options = {name: size for name, size in sizes.items() if size is not None} | self.all_options()
        if self.preset == CUSTOM:
            return archs.ModelConfig.from_dict({**options, "vocab_size": vocab_size})
        return archs.configure(self.preset, vocab_size=vocab_size, **options)


@dataclass(frozen=True, kw_only=True)
class ObjectiveSpec:
    """What a model learns from the data."""

    kind: Annotated[
        str, tyro.conf.arg(aliases=("--objective",), metavar="NAME", help_behavior_hint=_beside("objective"))
    ] = "next_token"
    """Name of the objective: next_token, pairs (a target from its source, both columns of the data), or a task of
    recall: mqar, selective_copying, copying, induction, palindrome, parity, word_problem, stack, phonebook, multikey,
    variable_tracking, needle."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Any option of the objective, as key=TOML value: --objective.set packing=reset (next_token: forget at the start of
    each document in a window), --objective.set target=summary (pairs: the column)."""
    options: tyro.conf.Suppress[tyro.conf.Fixed[Mapping[str, Any]]] = field(default_factory=dict, hash=False)
    """The same as tables, from the [objective] table of a run file."""

    def __post_init__(self) -> None:
        check(self, "objective.")
        _require(bool(self.kind), "objective.kind must not be empty")
        self.all_options()

    def all_options(self) -> dict[str, Any]:
        """Returns `options` and, over them, `set` as nested tables."""
        return _merged(self.options, self.set, "objective")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it becomes tokens."""

    source: Annotated[str, tyro.conf.arg(aliases=("--data",), metavar="stdlib|PATH|hf:NAME[:CONFIG]")] = "stdlib"
    """The running Python's own library sources, a file or folder (text, JSON lines, CSV, Parquet, also compressed), or
    a Hugging Face data set."""
    column: Annotated[str, tyro.conf.arg(aliases=("--column",))] = "text"
    """Column that holds the text in JSON lines, CSV, Parquet and Hugging Face data sets."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=("--tokenizer",), metavar="bytes|bpe:SIZE|FILE")] = "bytes"
    """Bytes as they are, a byte-level BPE trained on the training split, or a tokenizer.json."""
    val_fraction: Annotated[float, Range(above=0, below=1)] = 0.05
    """Share of the documents held out for validation."""
    held_out: Literal["validation", "tuning"] = "validation"
    """What a run is judged by. "tuning" is for what is chosen before results are made: as many documents again, taken
    from those to train on by the same rule; those of validation are then read by nothing."""
    cache: Annotated[
        Path | None,
        _value(Path, "PATH", optional=True),
        tyro.conf.arg(help_behavior_hint=_unset("$CROSSOVER_CACHE, else crossover in $XDG_CACHE_HOME or ~/.cache")),
    ] = None
    """Folder for prepared corpora."""

    def __post_init__(self) -> None:
        check(self, "data.")
        _require(bool(self.source), "data.source must not be empty")
        _require(bool(self.tokenizer), "data.tokenizer must not be empty")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate schedule."""

    lr: Annotated[
        float | None,
        _value(float, "FLOAT", optional=True),
        Range(above=0),
        tyro.conf.arg(help_behavior_hint=_unset("the rate tuned for the preset")),
    ] = None
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine down to the end, constant and then linear decay (wsd), or constant."""
    warmup: Share = 0.05
    """Share of the steps in which the rate rises linearly."""
    decay: Share = 0.2
    """Share of the steps in which wsd decays."""
    min_lr_ratio: Share = 0.1
    """Rate of the last step as a share of the peak (cosine, wsd)."""
    weight_decay: Annotated[float, Range(0)] = 0.1
    """Decoupled weight decay of the matrices; vectors and what a module exempts do not decay."""
    betas: Annotated[tuple[float, float], Range(0, below=1)] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: Positive = 1e-8
    """AdamW's epsilon."""
    clip: Annotated[float, Range(0)] = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        check(self, "optim.")
        _require(
            self.schedule != "wsd" or self.warmup + self.decay <= 1,
            f"optim.warmup and optim.decay overlap: {self.warmup} + {self.decay} is more than 1",
        )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, in what pieces, and what to measure on the way."""

    steps: Count = 1000
    """Number of optimiser updates."""
    seconds: Annotated[float, Range(0), tyro.conf.arg(help_behavior_hint=_zero("steps decide"))] = 0.0
    """Seconds to train instead of `steps`, to the end of the step that is under way then. Warm-up and decay are shares
    of this time, held-out text is read after each fifth of it and a checkpoint saved after each tenth, unless
    eval_every or checkpoint_every is 0. What counts is training alone, not evaluation, saving, start-up or waiting; a
    resumed run goes on counting."""
    stop_at: float | None = None
    """Score at which training ends before that: when a validation of eval_tokens and then one of final_eval_tokens are
    as good, 0.999 of a task for example."""
    batch_size: Count = 8
    """Sequences per update."""
    seq_len: Count = 256
    """Tokens per sequence."""
    grad_accumulation: Count = 1
    """Number of equal parts in which a batch is computed: the same update in less memory."""
    carry: bool = False
    """Truncated backpropagation through time, for models of constant state: each row of a batch is the window after its
    last one, and begins with the state that was left there, without its gradient. Where the text wraps round, and with
    packing=reset at each document, the state is emptied; validations begin with an empty one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products; auto: bf16 where it pays, which a CPU with instructions for it measures, and which
    a run keeps when it is resumed. Parameters, states and sums always stay float32."""
    eval_every: CountOrNone = 250
    """Steps between two validations; 0 validates only at the end."""
    eval_tokens: Count = 65_536
    """Held-out tokens read by one validation on the way, always the same ones."""
    final_eval_tokens: Count = 262_144
    """Held-out tokens read by the last validation, whose score is the result of the run."""
    position_len: CountOrNone = 1024
    """Window of the final loss-by-position evaluation, best beyond seq_len; 0 leaves it out."""
    lengths: tuple[Count, ...] = ()
    """Context lengths at which held-out documents are read at the end, trained or not: each document of at least so
    many tokens from its start, in windows of this length, of which 8 documents and 64 KiB are needed. Those of seq_len
    are also read with the context cut to 1/2, 1/4, ... of it, down to 64."""
    length_tokens: Annotated[Count, Range(2**16)] = 2**16
    """Held-out tokens read at each of these lengths."""
    sample_tokens: CountOrNone = 128
    """Tokens of sample text written at each validation; 0 for none."""
    log_every: Count = 10
    """Steps between two lines of metrics."""
    layer_stats_every: CountOrNone = 0
    """Steps between two looks into the layers, 0 for none: in such a step metrics and TensorBoard have for each layer
    layer_NN/activation_rms of its output, gradient_rms before clipping, and update_ratio, the root mean square of the
    change of its parameters over their own. It trains the same, and takes longer, which counts."""
    profile: bool = False
    """Record steps 3 to 5 from the start or the resume by PyTorch's profiler: OUT/NAME/trace-step-N.json.gz has every
    operation by name and opens at https://ui.perfetto.dev. These steps take longer, which counts."""
    checkpoint_every: CountOrNone = 250
    """Steps between two checkpoints; 0 saves only at the end."""
    tensorboard: Annotated[
        Path | None, _value(Path, "PATH", optional=True), tyro.conf.arg(help_behavior_hint=_unset("OUT/NAME/tb"))
    ] = None
    """Folder of the TensorBoard events, by which TensorBoard names the run."""
    keep_checkpoints: Annotated[Count, Range(2)] = 2
    """Number of the newest checkpoints to keep, at least 2, so that one is whole whatever happens to the other."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:1."""
    threads: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        Range(1),
        tyro.conf.arg(help_behavior_hint=_unset("all cores")),
    ] = None
    """CPU threads."""

    @property
    def n_tokens(self) -> int:
        """Tokens of all rows of all steps, where each has seq_len."""
        return self.steps * self.batch_size * self.seq_len

    def __post_init__(self) -> None:
        check(self, "train.")
        _require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size={self.batch_size} is not divisible by train.grad_accumulation={self.grad_accumulation}",
        )
        _require(
            re.fullmatch(r"auto|cpu|[a-z]+(:\d+)?", self.device) is not None,
            f"train.device must be auto, cpu, cuda or cuda:N, got {self.device!r}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; its results are written to OUT/NAME."""

    name: Annotated[str, tyro.conf.arg(help_behavior_hint=_unset("PRESET-sSEED"))] = ""
    """Name of the run directory; the name of the run file where there is one."""
    seed: Annotated[CountOrNone, Range(below=2**63)] = 0
    """Seed of the initial weights and of the order of the data."""
    out: Path = Path("runs")
    """Folder that holds run directories."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Continue from the newest checkpoint if there is one; only so; or refuse a directory that holds a run."""
    turns: Annotated[
        Path | None, _value(Path, "PATH", optional=True), tyro.conf.arg(help_behavior_hint=_unset("none are taken"))
    ] = None
    """Folder by which runs that train at the same time take turns, as `crossover compare --equal seconds` makes it for
    its own."""
    model: ModelSpec = ModelSpec()
    objective: ObjectiveSpec = ObjectiveSpec()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        check(self)
        _require(
            self.name not in (".", "..") and not re.search(r"[/\\\0]", self.name),
            f"name={self.name!r} is not the name of one folder; the folder above it is --out",
        )

    @property
    def directory(self) -> Path:
        """The run directory, OUT/NAME."""
        return self.out / (self.name or f"{self.model.preset}-s{self.seed}")

    @property
    def arch(self) -> str:
        """Name of the architecture; a model of its own pattern goes by the name of its run."""
        return self.directory.name if self.model.preset == CUSTOM else self.model.preset

    @property
    def label(self) -> str:
        """The architecture's name as text writes it."""
        from ..archs import presets

        return self.arch if self.model.preset == CUSTOM else presets.find(self.model.preset).label

    def peak_learning_rate(self) -> float:
        """optim.lr, or the rate tuned for the preset.

        Raises:
            ValueError: if neither exists.
        """
        from ..archs import presets

        if self.optim.lr is not None:
            return self.optim.lr
        if self.model.preset == CUSTOM:
            raise ValueError("optim.lr must be given: a model described by its pattern has no tuned learning rate")
        return presets.learning_rate(self.model.preset)

    def to_dict(self) -> dict[str, Any]:
        """Returns the configuration as nested tables of JSON values."""
        return plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Inverse of `to_dict`, also of earlier versions. In [model] and [objective], other keys are their options.

        Raises:
            ValueError: for a key that no configuration has, with the dotted path and the nearest name, or for a value
                of another type.
        """
        tables = _upgraded(values)
        for name, spec in (("model", ModelSpec), ("objective", ObjectiveSpec)):
            if isinstance(tables.get(name), Mapping):
                tables[name] = _with_options(spec, tables[name])
        return from_plain(cls, tables)


def _with_options(spec: type[Any], table: Mapping[str, Any]) -> dict[str, Any]:
    """A table whose keys that are no fields of the spec stand under its field `options`."""
    own = {item.name for item in dataclasses.fields(spec)}
    others = {key: value for key, value in table.items() if key not in own}
    values = {key: value for key, value in table.items() if key in own}
    if others:
        values["options"] = {**values.get("options", {}), **others}
    if spec is ModelSpec and "preset" not in values and "pattern" in values.get("options", {}):
        values["preset"] = CUSTOM
    return values


def plain(value: Any) -> Any:
    """A configuration as JSON values: dataclasses as tables, tuples as lists, paths as text."""
    if dataclasses.is_dataclass(value):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return str(value) if isinstance(value, Path) else value


def flatten(table: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Returns the leaves of nested tables by their dotted paths: {"optim": {"lr": 1}} gives {"optim.lr": 1}."""
    leaves = {}
    for key, value in table.items():
        leaves |= flatten(value, f"{path}{key}.") if isinstance(value, Mapping) else {f"{path}{key}": value}
    return leaves


def _upgraded(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in the words of today: until December 2026, [data] said what was learned."""
    data = values.get("data")
    if not isinstance(data, Mapping) or not {"rows", "packing"} & set(data):
        return dict(values)
    data = dict(data)
    rows, packing = data.pop("rows", "documents"), data.pop("packing", None)
    _require(rows in ("documents", "pairs"), f"data.rows={rows!r} is none of 'documents', 'pairs'")
    objective: dict[str, Any] = {"kind": "pairs" if rows == "pairs" else "next_token"}
    if rows != "pairs" and packing not in (None, "concat"):
        objective["options"] = {"packing": packing}
    return {**values, "data": data, "objective": objective | dict(values.get("objective", {}))}
