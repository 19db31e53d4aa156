"""Truncated backpropagation through time: what the rows of a batch remember from one window of a text to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import archs
from ..archs import States
from .objective import Objective

__all__ = ["Carried", "check_carry"]


class Carried:
    """The states after the last window of each row, outside the autograd graph; empty before the first."""

    parts: list[States]
    """For each of the parts in which a batch is computed, the states of its rows: an update replaces them."""

    def __init__(self, model: Any, n_rows: int, n_parts: int = 1) -> None:
        """Makes them empty for a decoder that `check_carry` accepts; `n_rows` is a multiple of `n_parts`."""
        self.parts = [model.init_state(n_rows // n_parts, 1) for _ in range(n_parts)]

    def before(self, begins: np.ndarray) -> list[States]:
        """The parts before a step at which some rows, (n_rows,) bool, begin with nothing read."""
        for i, rows in enumerate(np.split(begins, len(self.parts))):
            if rows.any():
                tensor = next(iter(self.parts[i][0].tensors().values()))
                self.parts[i] = self.parts[i].forget(torch.from_numpy(rows).to(tensor.device))
        return self.parts

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all rows, whatever their parts, by layer and name."""
        return {
            f"{i}.{name}": tensor.contiguous()
            for i, layer in enumerate(States.cat(self.parts))
            for name, tensor in layer.tensors().items()
        }

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes over what `tensors` has returned, also in another number of parts.

        Raises:
            ValueError: if they are those of another model, or of other rows.
        """
        mine, theirs = ({name: (t.shape, t.dtype) for name, t in ts.items()} for ts in (self.tensors(), tensors))
        if mine != theirs:
            raise ValueError("the states that were carried are those of another model or of another number of rows")
        whole = States.cat(self.parts)
        layers = [
            dataclasses.replace(layer, **{name: tensors[f"{i}.{name}"].to(t) for name, t in layer.tensors().items()})
            for i, layer in enumerate(whole)
        ]
        rows = np.split(np.arange(whole.n_rows), len(self.parts))
        self.parts = [States(layers, whole.wide).select(part.tolist()) for part in rows]


def check_carry(objective: Objective[Any, Any], config: archs.ModelConfig) -> None:
    """Raises ValueError, with the remedy, if train.carry is asked of an objective or a model that has no use of it."""
    if not objective.train.carry:
        return
    if not objective.carries:
        raise ValueError(
            "train.carry is for rows that read on in a text, and those of this objective do not: turn it off"
        )
    blocks = archs.build(config, device="meta").backbone.blocks
    for (name, _), block in zip(config.layers, blocks, strict=True):
        state = block.mixer.init_state(1, 1, device="meta")
        grows = block.mixer.state_layout(1) != block.mixer.state_layout(2**20)
        if grows or state.tensors().keys() != vars(state).keys():
            raise ValueError(
                f"train.carry is for layers of constant state, and that of {name} depends on how much was read: "
                "turn it off, or train a model without such layers"
            )
    if config.max_positions is not None:
        raise ValueError(
            f"train.carry reads on without end, and this model ends at max_positions={config.max_positions}: turn it "
            "off, or train a model without learned positions"
        )
