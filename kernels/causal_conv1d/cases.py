"""Inputs that the short convolution is checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors = {"x": normal(B, L, E), "weight": normal(E, N)}
    if optional:
        tensors |= {"bias": normal(E), "initial_state": normal(B, N - 1, E), "starts": starts}
    return tensors


def _inputs(make: Maker, *, B: int, L: int, E: int, K: int) -> Inputs:
    x = make.act(B, L, E)
    tensors = {"x": x, "weight": make.act(E, K), "bias": make.act(E)}
    n = float(x.numel())
    return Inputs(
        tensors=tensors,
        options={"activation": "silu"},
        written=x.nbytes,
        flops=(2 * K * n, 4 * K * n),
        exps=(2 * n, 2 * n),  # the sigmoid and its slope
    )


causal_conv1d = Cases(
    example_tensors=_example,
    optional_options={"activation": "silu"},
    # the usual number of taps
    blocks=(
        {"L": 300, "E": 200, "N": 4, "optional": True},
        {"L": 256, "E": 64, "N": 4, "optional": False},
    ),
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E, "K": 4},
    gpu=(
        # at least 85 % of 4.3 TB/s
        size({"fwd": (0.031, 0.037), "fwd+bwd": (0.078, 0.092)}, B=8, L=2048, E=2048, K=4),
    ),
    quick=(size(B=1, L=32, E=32, K=4),),
)
