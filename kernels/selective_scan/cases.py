"""Inputs that the selective scan is checked and timed on."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..cases import Cases, Inputs, Maker, before_softplus, normal, size, steps, uniform

LOOP_LEN = 16
"""Tokens of the loop that torch.compile unrolls: with half as many it trains much slower, with more it compiles for
minutes."""


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors = {
        "u": normal(B, L, E),
        "delta": before_softplus(steps(B, L, E)) if optional else steps(B, L, E),
        "A": -uniform(E, N) * 8 - 0.1,
        "B": normal(B, L, N),
        "C": normal(B, L, N),
    }
    extra = {"D": normal(E), "z": normal(B, L, E), "delta_bias": normal(E), "initial_state": normal(B, E, N)}
    return tensors | (extra | {"starts": starts} if optional else {})


def _inputs(make: Maker, *, B: int, L: int, E: int, N: int) -> Inputs:
    u = make.act(B, L, E)
    tensors = {
        "u": u,
        "delta": make.act(B, L, E) - 2,
        "A": -make.rising(N).repeat(E, 1),
        "B": make.act(B, L, N),
        "C": make.act(B, L, N),
        "D": make.param(E),
        "z": make.act(B, L, E),
        "delta_bias": make.param(E),
    }
    return Inputs(
        tensors=tensors,
        options={"delta_softplus": True},
        written=u.nbytes,
        # softplus and the gate take four more for each number forward, and their slopes five backward
        exps=(B * L * E * (N + 4.0), B * L * E * (N + 5.0)),
    )


def loop(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    z: Tensor,
    delta_bias: Tensor,
    delta_softplus: bool = True,
) -> tuple[Tensor, Tensor]:
    """The scan as a loop over chunks, each compiled into one function of LOOP_LEN unrolled steps."""
    # a compiled function is of certain strides and of what needs a gradient: the same for every chunk and length
    h = u.new_zeros(u.shape[0], *A.shape).requires_grad_(torch.is_grad_enabled())
    ys = []
    for parts in zip(*(t.split(LOOP_LEN, dim=1) for t in (u, delta, B, C, z)), strict=True):
        y, h = compiled_chunk()(h, A, D, delta_bias, *(part.contiguous() for part in parts))
        ys.append(y)
    return torch.cat(ys, dim=1), h


def chunk(
    h: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """LOOP_LEN steps from the state h: their outputs and the state after them."""
    dt = F.softplus(delta + delta_bias)
    ys = []
    for t in range(LOOP_LEN):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(ys, dim=1) + D * u) * F.silu(z), h


@functools.cache
def compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    """The function `chunk` under torch.compile."""
    return torch.compile(chunk, dynamic=False)  # here, since its import takes seconds


selective_scan = Cases(
    example_tensors=_example,
    optional_options={"delta_softplus": True},
    inputs=_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E, "N": 16},
    at_every_length=True,
    gpu=(
        size({"fwd": (0.20, 0.24), "fwd+bwd": (1.05, 1.19)}, B=8, L=2048, E=2048, N=16),
        size(B=8, L=4096, E=2048, N=16),
        size(B=1, L=2048, E=2048, N=16),
    ),
    quick=(size(B=1, L=32, E=32, N=16),),
    compiles=False,
    loop=loop,
    loop_len=LOOP_LEN,
)
