"""Inputs that the gated delta rule is checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size, steps, uniform


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    q, k = (torch.nn.functional.normalize(normal(B, L, 3, N), dim=-1) for _ in range(2))  # longer keys can explode
    tensors = {"q": q, "k": k, "v": normal(B, L, 3, E)}
    tensors |= {"log_decay": -4 * steps(B, L, 3), "beta": uniform(B, L, 3)}
    return tensors | ({"initial_state": normal(B, 3, E, N), "starts": starts} if optional else {})


def _inputs(make: Maker, *, B: int, L: int, H: int, P: int, N: int) -> Inputs:
    q, k = (torch.nn.functional.normalize(make.act(B, L, H, N), dim=-1) for _ in range(2))
    v = make.act(B, L, H, P)
    log_decay = -torch.nn.functional.softplus(make.param(B, L, H) - 2)
    # the state decays, is read for k, changed, and read for q
    flops = 7.0 * B * L * H * P * N
    return Inputs(
        tensors={"q": q, "k": k, "v": v, "log_decay": log_decay, "beta": make.act(B, L, H).sigmoid()},
        written=v.nbytes,
        flops=(flops, 2 * flops),
        exps=(1.0 * B * L * H, 0.0),
    )


gated_delta_rule = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "H": max(1, E // 128), "P": min(128, E), "N": min(64, E)},
    gpu=(size(B=8, L=2048, H=8, P=128, N=128),),
    quick=(size(B=2, L=32, H=2, P=16, N=8),),
)
