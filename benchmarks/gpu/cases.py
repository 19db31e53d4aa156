"""The cases that `benchmarks.gpu` times: each operation at its GPU sizes, the most important operations first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from ...kernels.cases import Maker, Size
from ...kernels.ops import OPS
from ..operations.race_cases import Case

__all__ = ["PASSES", "Spec", "build", "in_order", "specs_of"]

PASSES = ("fwd", "fwd+bwd")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An operation at one size."""

    op: str
    size: Size

    @property
    def shape(self) -> str:
        """The size as text."""
        return self.size.shape


def in_order(names: Iterable[str]) -> list[str]:
    """Names of operations, as ops.OPS has them: the most important first."""
    return sorted(set(names), key=list(OPS).index)


def specs_of(name: str, *, quick: bool) -> list[Spec]:
    """Everything that is timed of an operation."""
    cases = OPS[name].cases
    return [Spec(op=name, size=size) for size in (cases.quick if quick else cases.gpu)]


def build(spec: Spec, device: torch.device, dtype: torch.dtype) -> Case:
    """The tensors of a spec; on "meta" its counts alone."""
    if device.type != "meta":
        torch.manual_seed(0)
    inputs = OPS[spec.op].cases.build(Maker(device=device, dtype=dtype), spec.size.sizes)
    return Case(op=spec.op, length=spec.size.sizes.get("L", 1), shape=spec.shape, inputs=inputs)
