"""Inputs that RMSNorm and its gated form are checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"x": normal(B, L, E + 1), "weight": normal(E + 1)}  # of one channel only the sign would be left


def _inputs(make: Maker, *, T: int, D: int) -> Inputs:
    x = make.act(T, D)
    return Inputs(tensors={"x": x, "weight": make.param(D)}, options={"eps": 1e-5}, written=x.nbytes)


rms_norm = Cases(
    example_tensors=_example,
    options={"eps": 1e-5},
    inputs=_inputs,
    cpu=lambda B, L, E: {"T": B * L, "D": E},
    gpu=(
        # at least 85 % of 4.3 TB/s, here and below
        size({"fwd": (0.031, 0.037), "fwd+bwd": (0.078, 0.092)}, T=16384, D=2048),
    ),
    quick=(size(T=32, D=32),),
)


def _gated_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"x": normal(B, L, 2 * E), "z": normal(B, L, 2 * E), "weight": normal(2 * E)}


def _gated_inputs(make: Maker, *, T: int, D: int) -> Inputs:
    x = make.act(T, D)
    tensors = {"x": x, "z": make.act(T, D), "weight": make.param(D)}
    n = 2.0 * x.numel()  # the sigmoid of the gate
    return Inputs(tensors=tensors, options={"eps": 1e-5}, written=x.nbytes, exps=(n, n))


gated_rms_norm = Cases(
    example_tensors=_gated_example,
    options={"eps": 1e-5},
    optional_options={"n_groups": 2},
    inputs=_gated_inputs,
    cpu=lambda B, L, E: {"T": B * L, "D": E},
    gpu=(size({"fwd": (0.047, 0.055), "fwd+bwd": (0.125, 0.147)}, T=16384, D=2048),),
    quick=(size(T=32, D=32),),
)
