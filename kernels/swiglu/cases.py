"""Inputs that the gate of a SwiGLU is checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"gate": normal(B, L, E), "up": normal(B, L, E)}


def _inputs(make: Maker, *, T: int, F: int) -> Inputs:
    gate = make.act(T, F)
    n = 2.0 * gate.numel()  # the sigmoid of the gate
    return Inputs(tensors={"gate": gate, "up": make.act(T, F)}, written=gate.nbytes, exps=(n, n))


swiglu = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"T": B * L, "F": E},
    gpu=(size(T=16384, F=5632),),
    quick=(size(T=32, F=48),),
)
