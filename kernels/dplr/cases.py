"""Inputs that S4's kernel with a low-rank term and its recurrence are checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, Inputs, Maker, complex_normal, decaying, normal, size


def _parameters(E: int, N: int) -> dict[str, Tensor]:
    # a pole near zero hardly decays, and its truncated kernel is a difference of nearly equal numbers
    return {"A": decaying(E, N) - 0.5} | {name: complex_normal(E, N) for name in "PBC"}


def _kernel_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return _parameters(E, N)


def _scan_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors, state = _parameters(E, N), complex_normal(B, E, N)
    extra = {"D": normal(E), "initial_state": state, "starts": starts}
    return {"u": normal(B, L, E)} | tensors | (extra if optional else {})


def _timed_parameters(make: Maker, E: int, N: int) -> dict[str, Tensor]:
    poles, others = make.poles(E, N), make.poles(E, N)
    return {"A": poles["A"] - 0.5, "P": others["A"], "B": others["C"], "C": poles["C"]}


def _kernel_inputs(make: Maker, *, E: int, N: int, L: int) -> Inputs:
    flops = 4.0 * E * N * L  # the real part of a sum over the poles
    tensors = _timed_parameters(make, E, N)
    return Inputs(tensors=tensors, options={"length": L}, written=4 * E * L, flops=(flops, 2 * flops))


def _scan_inputs(make: Maker, *, B: int, L: int, E: int, N: int) -> Inputs:
    u = make.act(B, L, E)
    # as of poles alone, and a complex inner product and its share of each state for the low-rank term
    flops = 27.0 * u.numel() * N
    return Inputs(tensors={"u": u, **_timed_parameters(make, E, N)}, written=u.nbytes, flops=(flops, 2 * flops))


dplr_kernel = Cases(
    example_tensors=_kernel_example,
    takes_length=True,
    inputs=_kernel_inputs,
    cpu=lambda B, L, E: {"E": E // 8, "N": 16, "L": L},
    gpu=(size(E=256, N=16, L=2048),),
    quick=(size(E=16, N=4, L=32),),
)
dplr_scan = Cases(
    example_tensors=_scan_example,
    inputs=_scan_inputs,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E // 8, "N": 16},
    gpu=(size(B=8, L=2048, E=256, N=16),),
    quick=(size(B=2, L=32, E=16, N=4),),
)
