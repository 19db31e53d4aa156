"""Inputs that the decode step of Mamba-2 is checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size, uniform


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    channels = 4 * E + 2 * 2 * N
    return {
        "x": normal(B, channels),
        "dt": normal(B, 4) - 2,
        "window": normal(B, 3, channels),
        "state": normal(B, 4, E, N),
        "weight": normal(channels, 4),
        "bias": normal(channels),
        "A": -uniform(4) * 8 - 0.1,
        "D": normal(4),
        "dt_bias": normal(4),
    }


def _inputs(make: Maker, *, B: int, H: int, P: int, N: int, G: int = 1) -> Inputs:
    channels, state = H * P + 2 * G * N, make.param(B, H, P, N)
    tensors = {
        "x": make.act(B, channels),
        "dt": make.act(B, H) - 2,
        "window": make.act(B, 3, channels),
        "state": state,
        "weight": make.param(channels, 4),
        "bias": make.param(channels),
        "A": -make.rising(H) / H * 15,
        "D": make.param(H),
        "dt_bias": make.param(H),
    }
    return Inputs(
        tensors=tensors,
        written=state.nbytes + tensors["window"].nbytes,
        # the taps of the window; the state decays, takes the input and is read
        flops=(2.0 * tensors["weight"].numel() * B + 5.0 * state.numel(), 0.0),
        # silu of the channels; softplus and decay of the steps
        exps=(2.0 * B * channels + 3.0 * B * H, 0.0),
        has_backward=False,
    )


state_update = Cases(
    example_tensors=_example,
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "H": 4, "P": E // 8, "N": 16, "G": 2},
    gpu=(size({"fwd": (0.031, 0.037)}, B=64, H=32, P=64, N=128),),
    quick=(size(B=2, H=2, P=16, N=16),),
)
