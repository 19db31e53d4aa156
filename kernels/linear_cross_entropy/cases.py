"""Inputs that the loss fused with its projection is checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    targets = torch.randint(N + 1, (L,))
    targets[:: 3 if optional else L + 1] = -100 if optional else 0
    return {"x": normal(L, E), "weight": normal(N + 1, E), "targets": targets}


def _inputs(make: Maker, *, T: int, D: int, V: int) -> Inputs:
    tensors = {
        "x": make.act(T, D),
        "weight": make.act(V, D) * D**-0.5,
        "targets": torch.randint(V, (T,), device=make.device),
    }
    flops, exps = (2.0 * T * D * V, 4.0 * T * D * V), (1.0 * T * V, 1.0 * T * V)
    return Inputs(tensors=tensors, written=0, flops=flops, exps=exps)


linear_cross_entropy = Cases(
    example_tensors=_example,
    optional_options={"z_loss": 1e-2},
    blocks=({"L": 300, "E": 200, "N": 999, "optional": True},),  # more classes than a block
    inputs=_inputs,
    cpu=lambda B, L, E: {"T": 2 * L, "D": E // 2, "V": 16 * E},
    gpu=(
        # at least 90 % of 790 TFLOP/s
        size({"fwd+bwd": (12.8, 14.2)}, T=16384, D=2048, V=50304),
    ),
    quick=(size(T=32, D=32, V=64),),
    aot={"": {"T": 2048, "D": 2048, "V": 50257}},
    compiles=False,
)
