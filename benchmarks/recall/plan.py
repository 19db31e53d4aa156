"""What `crossover bench recall` trains: the models, the settings of tasks that tell them apart, and the runs."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...options import nearest
from ...train.config import ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from .options import RecallConfig

__all__ = ["MODELS", "PRESETS", "SETTINGS", "Kind", "Model", "Preset", "Setting", "find_model", "kinds_of", "name_of"]


@dataclass(frozen=True, kw_only=True)
class Model:
    """Layers of the mixers of presets, without feed-forward blocks, which recall nothing."""

    base: str
    """Its name in MODELS."""
    label: str
    presets: tuple[str, ...]
    """Presets whose mixers its layers have, one after the other."""
    options: Mapping[str, Any]

    @property
    def pattern(self) -> list[str]:
        """Layers of the model, as ModelConfig takes them."""
        from ...archs.presets import find

        entries = (entry for name in self.presets for entry in find(name).make()["pattern"])
        return [entry.partition("+")[0] for entry in entries]


def _layers_of(name: str, label: str, *presets: str, **options: Any) -> Model:
    return Model(base=name, label=label, presets=presets or (name,), options=options)


MODELS: dict[str, Model] = {
    model.base: model
    for model in (
        _layers_of("transformer", "Attention"),
        _layers_of("transformer_nope", "Attention without positions", "transformer", rope=False),
        _layers_of("s4d", "S4D"),
        _layers_of("h3", "H3"),
        _layers_of("mamba", "Mamba"),
        _layers_of("mamba2", "Mamba-2"),
        _layers_of("gated_deltanet", "Gated DeltaNet"),
        _layers_of("hybrid", "Mamba, then Attention without positions", "mamba", "transformer", rope=False),
        _layers_of("lstm", "LSTM"),
    )
}
"""Models that are compared unless others are asked for."""


def find_model(name: str) -> Model:
    """The model NAME, or NAME@KEY=VALUE,...: with other options of its mixers, such as mamba@d_state=64.

    Raises:
        ValueError: if there is none, or its options cannot be read.
    """
    base, _, words = name.partition("@")
    if base not in MODELS:
        raise ValueError(f"--models {name} is unknown{nearest(base, MODELS)}")
    if not words:
        return MODELS[base]
    options = ModelSpec(set=tuple(words.split(","))).all_options()
    told = ", ".join(f"{key} {value}" for key, value in options.items())
    model = MODELS[base]
    return dataclasses.replace(model, label=f"{model.label}, {told}", options={**model.options, **options})


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of a task at which small models differ within a minute or so."""

    seq_len: int
    steps: int = 1000
    options: Mapping[str, Any]


def _setting(seq_len: int, steps: int = 1000, **options: Any) -> Setting:
    return Setting(seq_len=seq_len, steps=steps, options=options)


SETTINGS: dict[str, Setting] = {
    "mqar": _setting(32, pairs=4, vocab=32),
    "selective_copying": _setting(54, 800),
    "copying": _setting(32),
    "induction": _setting(64),
    "palindrome": _setting(32),
    "parity": _setting(32),
    "word_problem": _setting(16, things=3),
    "stack": _setting(64),
    "phonebook": _setting(64),
    "multikey": _setting(64),
    "variable_tracking": _setting(32, hops=1),
    "needle": _setting(128),
}
"""Settings by task; those that --import brings have 64 symbols and their own options."""

QUICK = ("mqar", "selective_copying", "induction", "parity")
"""Tasks of `--preset cpu`."""

FRONTIER = (
    *(f"mamba2@d_state={n}" for n in (4, 16, 64)),
    *(f"mamba@d_state={n}" for n in (4, 16, 64)),
    *(f"gated_deltanet@d_state={n}" for n in (4, 8, 16)),
    *(f"s4d@d_state={n}" for n in (16, 64, 256)),
    *(f"transformer@window={n}" for n in (8, 16, 32)),
    "transformer",
)
"""Models of `--preset frontier`: of each kind some that differ in the size of their state."""


@dataclass(frozen=True, kw_only=True)
class Preset:
    """What is trained where options do not say it."""

    tasks: tuple[str, ...]
    models: tuple[str, ...] = tuple(MODELS)
    settings: Mapping[str, Setting] = dataclasses.field(default_factory=dict)
    """In the place of SETTINGS."""

    def setting(self, task: str) -> Setting:
        """The sizes of a task."""
        return self.settings.get(task) or SETTINGS.get(task) or _setting(64)


PRESETS = {
    "cpu": Preset(tasks=QUICK),
    "all": Preset(tasks=tuple(SETTINGS)),
    "frontier": Preset(tasks=("mqar",), models=FRONTIER, settings={"mqar": _setting(64, 2000, pairs=8, vocab=64)}),
}
"""By name."""


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A run with what tells it apart from the others."""

    task: str
    model: str
    lr: float
    seed: int
    run: RunConfig


def kinds_of(config: RecallConfig, *, threads: int | None = None) -> list[Kind]:
    """All runs: the first seed of every rate, task and model before the second seed."""
    return [
        Kind(task=task, model=model, lr=lr, seed=seed, run=_run(config, task, model, lr, seed, threads))
        for seed in range(config.seeds)
        for task in config.chosen_tasks
        for lr in config.lrs
        for model in config.chosen_models
    ]


def name_of(task: str, model: str, lr: float, seed: int) -> str:
    """Name of a run."""
    return f"{task}-{re.sub('[^A-Za-z0-9_.]+', '-', model)}-r{lr:g}-s{seed}"


def _run(config: RecallConfig, task: str, model: str, lr: float, seed: int, threads: int | None) -> RunConfig:
    setting, spec = PRESETS[config.preset].setting(task), find_model(model)
    steps, name = config.steps or setting.steps, name_of(task, model, lr, seed)
    return RunConfig(
        name=name,
        seed=seed,
        out=config.out,
        model=ModelSpec(
            preset=spec.presets[0],
            d_model=config.d_model,
            n_layers=config.n_layers,
            options={"pattern": spec.pattern, **spec.options},
        ),
        objective=ObjectiveSpec(kind=task, options=dict(setting.options)),
        optim=OptimConfig(lr=lr, betas=(0.9, 0.98), weight_decay=0.01, warmup=0.1),
        train=TrainConfig(
            steps=steps,
            batch_size=config.batch_size,
            seq_len=setting.seq_len,
            eval_every=max(1, steps // 40),
            eval_tokens=(n_tokens := 256 * setting.seq_len),
            final_eval_tokens=n_tokens,
            stop_at=_DONE,
            checkpoint_every=max(1, steps // 4),
            keep_checkpoints=2,
            sample_tokens=0,
            position_len=0,
            precision=config.precision,
            device=config.device,
            threads=threads,
            tensorboard=Path(config.out) / "tb" / name,
        ),
    )


_DONE = 0.999
"""Accuracy at which a run ends before its steps do."""
