"""RunConfig: everything that decides a run, from TOML run files and the command line, as frozen plain data.

Nothing here imports torch, so that `--help` and a typing mistake answer at once. A run file is turned into arguments
and the command line is appended to them: one parser checks both, and the option typed last wins.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import sys
import tomllib
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypeVar

import tyro
from tyro.constructors import PrimitiveConstructorSpec

if TYPE_CHECKING:
    from ..archs import ModelConfig

__all__ = [
    "Count",
    "DataConfig",
    "ModelSpec",
    "OptimConfig",
    "RunConfig",
    "TrainConfig",
    "count",
    "flatten",
    "parse",
    "plain",
]

CUSTOM = "custom"
"""Preset of a model that a [model] table describes from its pattern up."""

T = TypeVar("T")

_NOTHING = ("None", "''")
_SUFFIXES = {"k": 10**3, "m": 10**6, "g": 10**9, "b": 10**9}


def count(text: str) -> int:
    """Reads a whole number as people write it: "500k", "1M", "1.3B", "5e5", "1_000_000".

    Raises:
        ValueError: if the text is not a number or not a whole one.
    """
    number = text.strip()
    scale = _SUFFIXES.get(number[-1:].lower(), 1)
    try:
        value = Decimal(number[:-1] if scale > 1 else number) * scale
    except InvalidOperation:
        raise ValueError(f"{text!r} is not a whole number such as 500, 500k, 1M or 5e5") from None
    if not value.is_finite() or value != int(value):
        raise ValueError(f"{text!r} is not a whole number such as 500, 500k, 1M or 5e5")
    return int(value)


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


def _unset(meaning: str) -> Callable[[str], str]:
    """Says in the help what a default of None or "" stands for."""
    return lambda default: f"(default: {default if default not in _NOTHING else meaning})"


Count = Annotated[int, _value(count, "COUNT")]
"""An int option that accepts what `count` reads."""


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """The model: a preset and its size, or a [model] table of a run file that spells out the pattern."""

    preset: str = "mamba"
    """Architecture: transformer, mamba, mamba2, s4, h3, jamba, lstm, ..., as `crossover.archs.available()` lists them;
    "custom" where a [model] table gives the pattern."""
    n_params: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        tyro.conf.arg(aliases=("--params",), help_behavior_hint=_unset("the preset's own size")),
    ] = None
    """Total parameters, solved for within 2 %: 500k, 1M, 5e6."""
    d_model: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        tyro.conf.arg(help_behavior_hint=_unset("the preset's, or solved for")),
    ] = None
    """Width."""
    n_layers: Annotated[
        int | None,
        _value(count, "COUNT", optional=True),
        tyro.conf.arg(help_behavior_hint=_unset("the preset's, or solved for")),
    ] = None
    """Number of layers."""
    set: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(metavar="KEY=VALUE")] = ()
    """Any other option of the model or of its mixers and ffns, as key=TOML value: --model.set d_state=32."""

    def __post_init__(self) -> None:
        _require(bool(self.preset), "model.preset must not be empty")
        for name in ("n_params", "d_model", "n_layers"):
            value = getattr(self, name)
            _require(value is None or value > 0, f"model.{name} must be positive, got {value}")
        options = self.options()
        _require("vocab_size" not in options, "model.vocab_size comes from the tokenizer (--tokenizer): leave it out")
        for name in ("preset", "n_params", "d_model", "n_layers"):
            _require(name not in options, f"model.set {name}=...: use --model.{name.replace('_', '-')} instead")
        if self.preset == CUSTOM:
            _require("pattern" in options, 'model.preset "custom" needs a pattern such as ["mamba", "attention+mlp"]')
            _require(
                self.n_params is None,
                "model.n_params sizes a preset, and this model gives its own pattern: leave one of the two out",
            )

    def options(self) -> dict[str, Any]:
        """Returns `set` as nested tables; a later entry replaces an earlier one of the same key."""
        merged: dict[str, Any] = {}
        for entry in self.set:
            _merge(merged, _read_option(entry), entry)
        return merged

    def configure(self, vocab_size: int) -> ModelConfig:
        """Returns the complete model configuration for a tokenizer of `vocab_size` tokens.

        Raises:
            ValueError: if the preset or an option does not exist, or the sizes do not fit together.
        """
        from .. import archs

        sizes = {name: getattr(self, name) for name in ("n_params", "d_model", "n_layers")}
        options = {name: size for name, size in sizes.items() if size is not None} | self.options()
        if self.preset == CUSTOM:
            return archs.ModelConfig.from_dict({**options, "vocab_size": vocab_size})
        return archs.configure(self.preset, vocab_size=vocab_size, **options)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it becomes tokens."""

    source: Annotated[str, tyro.conf.arg(aliases=("--data",), metavar="stdlib|PATH|hf:NAME[:CONFIG]")] = "stdlib"
    """The running Python's own library sources, a file or folder (text, JSONL, Parquet), or a Hugging Face data set."""
    rows: Literal["documents", "pairs"] = "documents"
    """What a model learns from: texts, or the pairs {"source": "...", "target": "..."} in the lines of a JSONL file."""
    column: str = "text"
    """Column that holds the text in JSONL, Parquet and Hugging Face data sets."""
    tokenizer: Annotated[str, tyro.conf.arg(aliases=("--tokenizer",), metavar="bytes|bpe:SIZE|FILE")] = "bytes"
    """Bytes as they are, a byte-level BPE trained on the training split, or a tokenizer.json."""
    val_fraction: float = 0.05
    """Share of the documents held out for validation."""
    packing: Literal["concat", "reset"] = "concat"
    """Whether a model sees across the end of a document in its window, or forgets at each start."""
    cache: Annotated[
        Path | None,
        _value(Path, "PATH", optional=True),
        tyro.conf.arg(help_behavior_hint=_unset("$CROSSOVER_CACHE, else ~/.cache/crossover")),
    ] = None
    """Folder for prepared corpora."""

    def __post_init__(self) -> None:
        _require(bool(self.source), "data.source must not be empty")
        _require(bool(self.tokenizer), "data.tokenizer must not be empty")
        _require(0 < self.val_fraction < 1, f"data.val_fraction must lie between 0 and 1, got {self.val_fraction}")


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW and its learning rate schedule."""

    lr: Annotated[
        float | None,
        _value(float, "FLOAT", optional=True),
        tyro.conf.arg(help_behavior_hint=_unset("the rate tuned for the preset")),
    ] = None
    """Peak learning rate."""
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    """After the warm-up: half a cosine down to the end, constant and then linear decay (wsd), or constant."""
    warmup: float = 0.05
    """Share of the steps in which the rate rises linearly."""
    decay: float = 0.2
    """Share of the steps in which wsd decays."""
    min_lr_ratio: float = 0.1
    """Rate of the last step as a share of the peak (cosine, wsd)."""
    weight_decay: float = 0.1
    """Decoupled weight decay of the matrices; vectors and what a module exempts do not decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of AdamW's two moments."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""

    def __post_init__(self) -> None:
        _require(
            self.lr is None or (math.isfinite(self.lr) and self.lr > 0), f"optim.lr must be positive, got {self.lr}"
        )
        for name in ("warmup", "decay", "min_lr_ratio"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optim.{name} must lie in [0, 1], got {value}")
        _require(
            self.schedule != "wsd" or self.warmup + self.decay <= 1,
            f"optim.warmup and optim.decay overlap: {self.warmup} + {self.decay} is more than 1",
        )
        for name in ("weight_decay", "clip"):
            value = getattr(self, name)
            _require(math.isfinite(value) and value >= 0, f"optim.{name} must not be negative, got {value}")
        _require(math.isfinite(self.eps) and self.eps > 0, f"optim.eps must be positive, got {self.eps}")
        _require(all(0 <= beta < 1 for beta in self.betas), f"optim.betas must lie in [0, 1), got {self.betas}")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, in what pieces, and what to measure on the way."""

    steps: Count = 1000
    """Number of optimiser updates."""
    batch_size: Count = 8
    """Sequences per update."""
    seq_len: Count = 256
    """Tokens per sequence."""
    grad_accumulation: Count = 1
    """Number of equal parts in which a batch is computed: the same update in less memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of matrix products; auto: bf16 where the processor has it. Parameters always stay float32."""
    eval_every: Count = 250
    """Steps between two validations; 0 validates only at the end."""
    eval_tokens: Count = 65_536
    """Held-out tokens read by one validation on the way, always the same ones."""
    final_eval_tokens: Count = 262_144
    """Held-out tokens read by the last validation, whose bits per byte are the result of the run."""
    position_len: Count = 1024
    """Window of the final loss-by-position evaluation, best beyond seq_len; 0 leaves it out."""
    sample_tokens: Count = 128
    """Tokens of sample text written at each validation; 0 for none."""
    log_every: Count = 10
    """Steps between two lines of metrics."""
    checkpoint_every: Count = 250
    """Steps between two checkpoints; 0 saves only at the end."""
    keep_checkpoints: Count = 2
    """Number of the newest checkpoints to keep, at least 2, so that one is whole whatever happens to the other."""
    device: str = "auto"
    """auto (cuda where there is one, else cpu), cpu, cuda or cuda:1."""
    threads: Annotated[
        int | None, _value(count, "COUNT", optional=True), tyro.conf.arg(help_behavior_hint=_unset("all cores"))
    ] = None
    """CPU threads."""

    def __post_init__(self) -> None:
        for name in (
            "steps",
            "batch_size",
            "seq_len",
            "grad_accumulation",
            "eval_tokens",
            "final_eval_tokens",
            "log_every",
        ):
            value = getattr(self, name)
            _require(value > 0, f"train.{name} must be positive, got {value}")
        for name in ("eval_every", "position_len", "sample_tokens", "checkpoint_every"):
            value = getattr(self, name)
            _require(value >= 0, f"train.{name} must not be negative, got {value}")
        _require(
            self.batch_size % self.grad_accumulation == 0,
            f"train.batch_size={self.batch_size} is not divisible by train.grad_accumulation={self.grad_accumulation}",
        )
        _require(self.keep_checkpoints >= 2, f"train.keep_checkpoints must be at least 2, got {self.keep_checkpoints}")
        _require(self.threads is None or self.threads > 0, f"train.threads must be positive, got {self.threads}")
        _require(
            re.fullmatch(r"auto|cpu|[a-z]+(:\d+)?", self.device) is not None,
            f"train.device must be auto, cpu, cuda or cuda:N, got {self.device!r}",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run; its results are written to OUT/NAME."""

    name: Annotated[str, tyro.conf.arg(help_behavior_hint=_unset("PRESET-sSEED"))] = ""
    """Name of the run directory; the name of the run file where there is one."""
    seed: Count = 0
    """Seed of the initial weights and of the order of the data."""
    out: Path = Path("runs")
    """Folder that holds run directories."""
    resume: Literal["auto", "must", "never"] = "auto"
    """Continue from the newest checkpoint if there is one; only so; or refuse a directory that holds a run."""
    model: ModelSpec = ModelSpec()
    data: DataConfig = DataConfig()
    optim: OptimConfig = OptimConfig()
    train: TrainConfig = TrainConfig()

    def __post_init__(self) -> None:
        _require(
            self.name not in (".", "..") and not re.search(r"[/\\\0]", self.name),
            f"name={self.name!r} is not the name of one folder; the folder above it is --out",
        )
        _require(0 <= self.seed < 2**63, f"seed must lie in [0, 2^63), got {self.seed}")

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
        """Inverse of `to_dict`.

        Raises:
            ValueError: for a key that no configuration has, with the dotted path and the nearest name.
        """
        return _from_dict(cls, values, "")


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


def parse(argv: Sequence[str], prog: str) -> RunConfig:
    """Reads `[RUN.toml] [--option value ...]`; the options override the file.

    A mistake prints one message with the nearest valid option and raises SystemExit(2); `--help` raises SystemExit(0).
    """
    path = _run_file(argv)
    try:
        command = tyro.cli(
            _CommandLine,
            prog=prog if path is None else f"{prog} {path}",
            description="Trains one language model and writes its weights, metrics and result to OUT/NAME.",
            args=[*([] if path is None else _arguments(_read_toml(path))), *argv],
            config=(),
        )
    except ValueError as error:  # of the file, or of RunConfig itself; tyro shows those of its parts
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    run = command.run
    if path is not None and not run.name:
        run = dataclasses.replace(run, name=path.stem)
    return run


@dataclass(frozen=True)
class _CommandLine:
    run_file: Annotated[
        Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="[RUN.toml]", help_behavior_hint="(optional)")
    ] = None
    """Run file: the options below as TOML, in the tables [model], [data], [optim] and [train]."""
    run: Annotated[RunConfig, tyro.conf.arg(name="")] = RunConfig()


def _run_file(argv: Sequence[str]) -> Path | None:
    """Finds the run file before the parser runs, because its content is part of what is parsed."""
    for index, argument in enumerate(argv):
        is_value = index > 0 and argv[index - 1].startswith("-") and "=" not in argv[index - 1]
        if not argument.startswith("-") and not is_value and (index == 0 or argument.endswith(".toml")):
            return Path(argument)
    return None


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the run file {path}: {error.strerror or error}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid TOML: {error}") from None


def _arguments(table: Mapping[str, Any]) -> list[str]:
    """Turns the content of a run file into command-line arguments."""
    arguments = []
    for key, value in table.items():
        if key == "model" and isinstance(value, Mapping):
            arguments += _model_arguments(value)
        elif isinstance(value, Mapping):
            for inner, inner_value in value.items():
                arguments += _argument(f"{key}.{inner}", inner_value)
        else:
            arguments += _argument(key, value)
    return arguments


def _model_arguments(table: Mapping[str, Any]) -> list[str]:
    own = {field.name for field in dataclasses.fields(ModelSpec)}
    arguments = [] if "preset" in table or "pattern" not in table else [f"--model.preset={CUSTOM}"]
    for key, value in table.items():
        if key == "set":
            arguments += [f"--model.set={entry}" for entry in value]
        elif key in own:
            arguments += _argument(f"model.{key}", value)
        else:
            arguments += [f"--model.set={entry}" for entry in _flatten(key, value)]
    return arguments


def _argument(path: str, value: Any) -> list[str]:
    if isinstance(value, Mapping):
        raise ValueError(f"[{path}] is a table where a value is expected")
    option = "--" + path.replace("_", "-")
    if isinstance(value, list):
        return [option, *map(str, value)]
    return [f"{option}={value}"]  # one word, so that a negative number is not taken for an option


def _flatten(path: str, value: Any) -> Iterable[str]:
    """Yields "dotted.path=TOML value" for each leaf of a table."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{path}.{_toml_key(key)}", inner)
        return
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)  # of these values, JSON is TOML
    except (TypeError, ValueError):
        raise ValueError(f"model.{path}={value!r} is neither a number, a string, a truth value nor a list") from None
    yield f"{path}={text}"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key, ensure_ascii=False)


def _read_option(entry: str) -> dict[str, Any]:
    key, equals, value = entry.partition("=")
    _require(bool(equals) and bool(key.strip()), f"model.set {entry!r} is not of the form key=value")
    for text in (entry, f"{key}={json.dumps(value, ensure_ascii=False)}"):  # a bare word is a string
        try:
            return tomllib.loads(text)
        except tomllib.TOMLDecodeError:
            continue
    raise ValueError(f"model.set {entry!r} is not of the form key=value")


def _merge(into: dict[str, Any], new: Mapping[str, Any], entry: str) -> None:
    for key, value in new.items():
        old = into.get(key, value)
        _require(isinstance(old, dict) == isinstance(value, dict), f"model.set {entry!r} contradicts an earlier {key}")
        if isinstance(value, dict):
            _merge(into.setdefault(key, {}), value, entry)
        else:
            into[key] = value


def _from_dict(cls: type[T], values: Mapping[str, Any], path: str) -> T:
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            nearest = difflib.get_close_matches(key, hints, n=1, cutoff=0.0)[0]
            raise ValueError(f"unknown key {path}{key}: perhaps you meant {path}{nearest}")
    return cls(**{key: _convert(hints[key], value, f"{path}{key}.") for key, value in values.items()})


def _convert(hint: Any, value: Any, path: str) -> Any:
    """Gives a JSON value the type of its field, where JSON has lost it."""
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _from_dict(hint, value, path)
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if Path in kinds and value is not None:
        return Path(value)
    return tuple(value) if isinstance(value, list) else value
