"""Runs a toy of a model once, so that what follows measures the model and not the loading of libraries."""

from __future__ import annotations

import dataclasses

import torch

from .. import archs
from .config import OptimConfig
from .optim import adamw

__all__ = ["warm_up"]


def warm_up(config: archs.ModelConfig, device: torch.device) -> None:
    """Trains and steps a model of the same layers and a few channels, and throws it away.

    The first call of an operation loads libraries and may compile kernels: tens of megabytes that would otherwise be
    counted as memory of whichever model came first. The random state is left as it was.
    """
    # 96 channels: heads stay legal wherever d_model only sets how many there are
    toy = dataclasses.replace(config, d_model=96, n_layers=len(config.pattern), vocab_size=8)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model = archs.build(toy if _is_legal(toy) else config, device=device)
        # kernels that leave few or short rows to PyTorch would otherwise be compiled in the first step
        n_tokens = min(128, (config.max_positions or 129) - 1)
        tokens = torch.zeros(8, n_tokens, dtype=torch.int64, device=device)
        optimizer = adamw(model, OptimConfig())
        loss, aux = model.loss(tokens, tokens)
        (loss + aux).backward()
        optimizer.step()
        with torch.no_grad():
            out = model(tokens, model.init_state(len(tokens), n_tokens + 1))
            model(tokens[:, :1], out.state)


def _is_legal(config: archs.ModelConfig) -> bool:
    try:
        archs.build(config, device="meta")
    except ValueError:
        return False
    return True
