"""Inputs that the SSD scan is checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, before_softplus, normal, size, steps, uniform


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors = {
        "x": normal(B, L, 4, E),
        "dt": before_softplus(steps(B, L, 4)) if optional else steps(B, L, 4),
        "A": -uniform(4) * 8 - 0.1,
        "B": normal(B, L, 2, N),
        "C": normal(B, L, 2, N),
    }
    extra = {"D": normal(4), "z": normal(B, L, 4, E), "dt_bias": normal(4), "initial_state": normal(B, 4, E, N)}
    return tensors | (extra | {"starts": starts} if optional else {})


def _inputs(make: Maker, *, B: int, L: int, H: int, P: int, G: int, N: int) -> Inputs:
    x, Q = make.act(B, L, H, P), min(64, L)
    tensors = {
        "x": x,
        "dt": make.act(B, L, H) - 2,
        "A": -make.rising(H) / H * 15,
        "B": make.act(B, L, G, N),
        "C": make.act(B, L, G, N),
        "D": make.param(H),
        "dt_bias": make.param(H),
    }
    # in chunks of Q tokens: products inside a chunk are Q wide, those with the state N by P
    flops = (B * L * H * (2.0 * Q * (N + P) + 4 * N * P), B * L * H * (2.0 * Q * (3 * N + 2 * P) + 10 * N * P))
    n = 3.0 * B * L * H  # softplus and decay of each step
    return Inputs(tensors=tensors, options={"dt_softplus": True}, written=x.nbytes, flops=flops, exps=(n, n))


ssd = Cases(
    example_tensors=_example,
    optional_options={"dt_softplus": True, "chunk_len": 32},
    # wider heads and more states than for others
    blocks=(
        {"L": 300, "E": 64, "N": 128, "optional": True},
        {"L": 256, "E": 64, "N": 64, "optional": False},
    ),
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "H": max(1, E // 64), "P": min(64, E), "G": 1, "N": min(64, E)},
    gpu=(
        size({"fwd": (0.060, 0.080), "fwd+bwd": (0.25, 0.30)}, B=8, L=2048, H=32, P=64, G=1, N=128),
        size(B=8, L=4096, H=32, P=64, G=1, N=128),
        size(B=1, L=2048, H=32, P=64, G=1, N=128),
    ),
    quick=(size(B=1, L=32, H=2, P=16, G=1, N=16),),
    aot={"one sequence": {"B": 1, "L": 8192, "H": 24, "P": 64, "G": 1, "N": 128}},
)
