"""Inputs that S4's kernel with a low-rank term and its recurrence are checked and timed on."""

from __future__ import annotations

from torch import Tensor

from ..cases import Cases, complex_normal, decaying, normal


def _parameters(E: int, N: int) -> dict[str, Tensor]:
    # a pole near zero hardly decays, and its truncated kernel is a difference of nearly equal numbers
    return {"A": decaying(E, N) - 0.5} | {name: complex_normal(E, N) for name in "PBC"}


def _kernel_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    return _parameters(E, N)


def _scan_example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    tensors, state = _parameters(E, N), complex_normal(B, E, N)
    extra = {"D": normal(E), "initial_state": state, "starts": starts}
    return {"u": normal(B, L, E)} | tensors | (extra if optional else {})


dplr_kernel = Cases(example_tensors=_kernel_example, takes_length=True)
dplr_scan = Cases(example_tensors=_scan_example)
