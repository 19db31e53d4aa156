"""What `crossover bench recall` trains: the models, the settings of tasks that tell them apart, and the runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...train.config import ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig

if TYPE_CHECKING:
    from .options import RecallConfig

__all__ = ["MODELS", "SETTINGS", "Kind", "Setting", "kinds_of", "name_of"]


@dataclass(frozen=True, kw_only=True)
class _Model:
    label: str
    presets: tuple[str, ...]
    """Presets whose mixers its layers have, one after the other."""
    options: Mapping[str, Any]

    @property
    def pattern(self) -> list[str]:
        from ...archs.presets import find

        entries = (entry for name in self.presets for entry in find(name).make()["pattern"])
        return [entry.partition("+")[0] for entry in entries]


def _layers_of(label: str, *presets: str, **options: Any) -> _Model:
    return _Model(label=label, presets=presets, options=options)


MODELS: dict[str, _Model] = {
    "transformer": _layers_of("Attention", "transformer"),
    "transformer_nope": _layers_of("Attention without positions", "transformer", rope=False),
    "s4d": _layers_of("S4D", "s4d"),
    "h3": _layers_of("H3", "h3"),
    "mamba": _layers_of("Mamba", "mamba"),
    "mamba2": _layers_of("Mamba-2", "mamba2"),
    "gated_deltanet": _layers_of("Gated DeltaNet", "gated_deltanet"),
    "hybrid": _layers_of("Mamba, then Attention without positions", "mamba", "transformer", rope=False),
    "lstm": _layers_of("LSTM", "lstm"),
}
"""Models of the mixers of presets; none has feed-forward blocks, which recall nothing."""


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
        for model in config.models
    ]


def name_of(task: str, model: str, lr: float, seed: int) -> str:
    """Name of a run."""
    return f"{task}-{model}-r{lr:g}-s{seed}"


def _run(config: RecallConfig, task: str, model: str, lr: float, seed: int, threads: int | None) -> RunConfig:
    setting, spec = SETTINGS.get(task, _setting(64)), MODELS[model]
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
