"""Inputs that GELU by tanh is checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"x": 2 * normal(B, L, E)}


def _inputs(make: Maker, *, T: int, F: int) -> Inputs:
    x = make.act(T, F)
    return Inputs(tensors={"x": x}, written=x.nbytes)


gelu_tanh = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"T": B * L, "F": E},
    gpu=(size(T=16384, F=5632),),
    quick=(size(T=32, F=48),),
)
