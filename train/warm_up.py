"""Runs a toy of a model once, so that what follows measures the model and not the loading of libraries."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from .. import archs
from .carry import Carried
from .config import OptimConfig
from .learner import Learner, Update
from .objective import Objective
from .optim import adamw
from .runtime import Precision

__all__ = ["warm_up"]

_MAX_TOKENS = 1024
"""Enough that no kernel leaves so few or so short rows to PyTorch, and would be compiled in the first step instead."""


def warm_up(
    config: archs.ModelConfig, objective: Objective[Any, Any], device: torch.device, precision: Precision
) -> None:
    """Trains a model of the same layers on rows of the first step, in the arithmetic to come, and throws it away.

    On the CPU it has a few channels; on a GPU it is the model itself on one row, as a kernel is compiled for widths.
    The first call of an operation loads libraries and may compile kernels: tens of megabytes that would otherwise be
    counted as memory of whichever model came first. A decoder also reads and steps with a state. The random state is
    left as it was.
    """
    is_cuda = device.type == "cuda"
    # 96 channels: heads stay legal wherever d_model only sets how many there are
    toy = dataclasses.replace(config, d_model=96, n_layers=len(config.pattern))
    rows = objective.rows(0)
    while len(rows) > 1 and (is_cuda or objective.n_tokens(rows) > _MAX_TOKENS):
        rows = rows[: len(rows) // 2]
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        model = objective.prepare(archs.build(config if is_cuda or not _is_legal(toy) else toy, device=device))
        optimizer = adamw(model, OptimConfig())
        update = Update(Learner(model, objective), objective, optimizer, precision=precision, clip=1.0)
        carried = Carried(model, len(rows)) if objective.train.carry else None
        update([objective.collate(rows)], lr=0.0, states=None if carried is None else carried.parts)
        if config.kind == "decoder":
            lm: Any = model
            n_tokens = min(128, (config.max_positions or 129) - 1)
            tokens = torch.zeros(8, n_tokens, dtype=torch.int64, device=lm.embedding.weight.device)
            with torch.no_grad(), precision.autocast(device):
                out = lm(tokens, lm.init_state(len(tokens), n_tokens + 1))
                lm(tokens[:, :1], out.state)


def _is_legal(config: archs.ModelConfig) -> bool:
    try:
        archs.build(config, device="meta")
    except ValueError:
        return False
    return True
