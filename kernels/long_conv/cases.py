"""Inputs that the long convolution, its kernel from the poles and the recurrence are checked and timed on."""

from __future__ import annotations

import math

from torch import Tensor

from ..cases import Cases, Inputs, Maker, complex_normal, decaying, normal, size


def _kernel_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"A": decaying(E, N), "C": complex_normal(E, N)}


def _kernel_inputs(make: Maker, *, E: int, N: int, L: int) -> Inputs:
    flops = 4.0 * E * N * L  # the real part of a sum over the poles
    return Inputs(tensors=make.poles(E, N), options={"length": L}, written=4 * E * L, flops=(flops, 2 * flops))


ssm_kernel = Cases(
    example_tensors=_kernel_example,
    takes_length=True,
    inputs=_kernel_inputs,
    cpu=lambda B, L, E: {"L": L, "E": E, "N": 32},
    gpu=(size(E=2048, N=32, L=2048),),
    quick=(size(E=32, N=4, L=32),),
)


def _conv_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return {"u": normal(B, L, E), "kernel": normal(E, L)} | ({"D": normal(E)} if optional else {})


def _conv_inputs(make: Maker, *, B: int, L: int, E: int) -> Inputs:
    u = make.act(B, L, E)
    # transforms of 2 L real points: of all rows there and back, and of the kernel
    flops = (2.0 * B + 1) * E * 2.5 * 2 * L * math.log2(2 * L)
    tensors = {"u": u, "kernel": make.param(E, L) / L, "D": make.param(E)}
    return Inputs(tensors=tensors, written=u.nbytes, flops=(flops, flops))


long_conv = Cases(
    example_tensors=_conv_example,
    inputs=_conv_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E},
    gpu=(
        # two products in bf16 with three quarters of all pairs, at half of the peak, and both transpositions
        size({"fwd": (0.40, 0.60)}, B=8, L=2048, E=2048),
    ),
    quick=(size(B=1, L=32, E=32),),
    aot={"": {"B": 8, "L": 2048, "E": 2048}, "float32": {"B": 8, "L": 512, "E": 2048}},
)


def _scan_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors = {"u": normal(B, L, E), "A": decaying(E, N), "C": complex_normal(E, N)}
    state = complex_normal(B, E, N)
    return tensors | ({"D": normal(E), "initial_state": state, "starts": starts} if optional else {})


def _scan_inputs(make: Maker, *, B: int, L: int, E: int, N: int) -> Inputs:
    u = make.act(B, L, E)
    flops = 11.0 * u.numel() * N  # a complex product and a sum for each state, and the real part of what it gives
    tensors = {"u": u, **make.poles(E, N), "D": make.param(E)}
    return Inputs(tensors=tensors, written=u.nbytes, flops=(flops, 2 * flops))


ssm_scan = Cases(
    example_tensors=_scan_example,
    inputs=_scan_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E, "N": 32},
    gpu=(size(B=8, L=2048, E=2048, N=32),),
    quick=(size(B=1, L=32, E=32, N=4),),
)
