"""Inputs that B and C of rotating heads are checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    H = 1 + E // 4
    shared = {"B": normal(B, L, N), "C": normal(B, L, N), "B_bias": normal(H, N), "C_bias": normal(H, N)}
    tensors = {**shared, "drive": normal(B, L, H)}
    if optional:
        # of some sizes all states turn, of others not
        tensors |= {"angle": 10 * normal(B, L, H, max(1, N // (2 + E % 2))), "before": normal(B, H, N)}
    return tensors


def _inputs(make: Maker, *, B: int, L: int, H: int, N: int) -> Inputs:
    shared = {"B": make.act(B, L, N), "C": make.act(B, L, N), "B_bias": make.param(H, N), "C_bias": make.param(H, N)}
    tensors = {**shared, "drive": make.param(B, L, H), "angle": make.param(B, L, H, N // 4)}
    n = 1.0 * B * L * H * N
    return Inputs(tensors=tensors, written=int(2 * 4 * n), flops=(5 * n, 12 * n), exps=(n / 2, n / 2))


turned_heads = Cases(
    example_tensors=_example,
    blocks=(
        {"L": 300, "E": 9, "N": 70, "optional": True},
        {"L": 256, "E": 8, "N": 64, "optional": False},
    ),
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "H": max(1, E // 64), "N": min(128, 4 * E)},
    gpu=(size(B=8, L=2048, H=24, N=128),),
    quick=(size(B=2, L=32, H=2, N=16),),
)
