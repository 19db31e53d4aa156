"""Inputs that rotary positions are checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors = {"q": normal(B, L, 4, 2 * N), "k": normal(B, L, 2, 2 * N)}
    return tensors | {"positions": torch.arange(E, E + L)}


def _inputs(make: Maker, *, B: int, L: int, H: int, P: int) -> Inputs:
    q = make.act(B, L, H, P)
    tensors = {"q": q, "k": make.act(B, L, H, P), "positions": torch.arange(L, device=make.device)}
    # a sine and a cosine of each angle, which all rows and heads share
    return Inputs(tensors=tensors, written=2 * q.nbytes, exps=(1.0 * L * P, 0.0))


rotary = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "H": max(1, E // 64), "P": min(64, E)},
    gpu=(size(B=8, L=2048, H=16, P=128),),
    quick=(size(B=2, L=16, H=2, P=16),),
)
