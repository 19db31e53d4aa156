"""What an update does to each layer of a model: root mean squares of activations, gradients and changes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from ..archs import States
from ..archs.model import Block
from .learner import Update
from .objective import Batch

__all__ = ["MeasuredUpdate", "layers_of"]


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model as layer_00, layer_01, ..., or encoder_layer_00, ... where it has more than one stack."""
    blocks = [(name.split("."), module) for name, module in model.named_modules() if isinstance(module, Block)]
    stacks = {tuple(path[:-2]): [part for part in path[:-2] if part != "backbone"] for path, _ in blocks}
    names = {stack: "_".join([*parts, "layer"]) if len(stacks) > 1 else "layer" for stack, parts in stacks.items()}
    return {f"{names[tuple(path[:-2])]}_{int(path[-1]):02d}": module for path, module in blocks}


class MeasuredUpdate:
    """Makes the same update as another one, to the bit, and measures it. Made to be used once."""

    def __init__(self, model: nn.Module, update: Update) -> None:
        self._layers, self._update = layers_of(model), update
        self._activations: dict[str, list[_Squares]] = {name: [] for name in self._layers}
        self._gradients: dict[str, float] = {}
        self._before: dict[str, list[Tensor]] = {}

    def __call__(
        self, batches: Sequence[Batch], lr: float, states: list[States] | None = None
    ) -> tuple[dict[str, float], dict[str, float]]:
        """Makes one update on the parts of a batch, with `states` as in `accumulate_gradients`.

        Returns:
            What the other one returns, and for each layer, as far as they are finite: NAME/activation_rms, of what it
            gives; NAME/gradient_rms, of its parameters and before clipping; and NAME/update_ratio, the root mean square
            of the change of its parameters over that of themselves.

        Raises:
            NonFiniteError: as the other one.
        """
        with self._listening():
            values = self._update(batches, lr, states, look=self._look)
        found: dict[str, float] = {}
        for name, layer in self._layers.items():
            before, now = self._before[name], [parameter.detach() for parameter in layer.parameters()]
            found[f"{name}/activation_rms"] = _rms(self._activations[name])
            found[f"{name}/gradient_rms"] = self._gradients[name]
            change = _rms(_squares(a - b) for a, b in zip(now, before, strict=True))
            found[f"{name}/update_ratio"] = change / (_rms(map(_squares, before)) or math.nan)
        return values, {tag: value for tag, value in found.items() if math.isfinite(value)}

    @contextlib.contextmanager
    def _listening(self) -> Iterator[None]:
        """Hears what the layers give in each of the parts of a batch."""

        def listen(name: str) -> Any:
            return lambda layer, given, made: self._activations[name].append(_squares(made[0].detach()))

        hooks = [layer.register_forward_hook(listen(name)) for name, layer in self._layers.items()]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _look(self) -> None:
        """Remembers parameters before their update, and measures their gradients."""
        for name, layer in self._layers.items():
            self._before[name] = [parameter.detach().clone() for parameter in layer.parameters()]
            self._gradients[name] = _rms(_squares(p.grad) for p in layer.parameters() if p.grad is not None)


_Squares = tuple[float, int]
"""The sum of the squares of some numbers, and how many they are."""


def _squares(values: Tensor) -> _Squares:
    return values.float().square().sum().item(), values.numel()


def _rms(parts: Iterable[_Squares]) -> float:
    """Root mean square of all parts; not a number where there is none."""
    sums, counts = zip((0.0, 0), *parts, strict=True)
    return math.sqrt(sum(sums) / sum(counts)) if sum(counts) else math.nan
