"""One trainer for every backbone: configuration, data, optimiser, checkpoints, records.

Importing this package imports nothing: torch and tyro, the parser, come with the names that need them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .command_line import parse
    from .config import DataConfig, ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig
    from .objectives import register_objective
    from .run import train
    from .trainer import Outcome, Trainer

__all__ = [
    "DataConfig",
    "ModelSpec",
    "ObjectiveSpec",
    "OptimConfig",
    "Outcome",
    "RunConfig",
    "TrainConfig",
    "Trainer",
    "parse",
    "register_objective",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "train":
        from .run import train

        return train
    if name in ("Outcome", "Trainer"):
        from . import trainer

        return getattr(trainer, name)
    if name == "register_objective":
        from .objectives import register_objective

        return register_objective
    if name == "parse":
        from .command_line import parse

        return parse
    if name in __all__:
        from . import config

        return getattr(config, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
