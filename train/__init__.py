"""One trainer for every backbone: configuration, data, optimiser, checkpoints, records.

Importing this package does not import torch; `train` and `Trainer` do when they are first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .config import DataConfig, ModelSpec, OptimConfig, RunConfig, TrainConfig, parse

if TYPE_CHECKING:
    from .trainer import Outcome, Trainer, train

__all__ = [
    "DataConfig",
    "ModelSpec",
    "OptimConfig",
    "Outcome",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "parse",
    "train",
]


def __getattr__(name: str) -> Any:
    if name in ("Outcome", "Trainer", "train"):
        from . import trainer

        return getattr(trainer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
