"""Inputs that grouped matrix products are checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    group = torch.randint(N, (L,))
    return {"x": normal(L, E), "weight": normal(N, E + 1, E), "counts": torch.bincount(group, minlength=N)}


def _inputs(make: Maker, *, T: int, D: int, F: int, G: int) -> Inputs:
    # experts are never chosen equally often: from half to one and a half of the mean
    shares = [0.5 + g / max(1, G - 1) for g in range(G)]
    ends = [round(T * sum(shares[: g + 1]) / sum(shares)) for g in range(G)]
    counts = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=make.device)
    tensors = {"x": make.act(T, D), "weight": make.act(G, F, D) * D**-0.5, "counts": counts}
    written = T * F * tensors["x"].element_size()
    return Inputs(tensors=tensors, written=written, flops=(2.0 * T * D * F, 4.0 * T * D * F))


grouped_mm = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"T": L, "D": E // 4, "F": E // 2, "G": 8},
    gpu=(size(T=32768, D=2048, F=4096, G=16),),
    quick=(size(T=64, D=32, F=32, G=4),),
    aot={"": {"T": 32768, "D": 1024, "F": 5632, "G": 16}},
    compiles=False,
)
