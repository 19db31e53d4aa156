"""Recurrences in chunks, at lengths that fill some chunks and leave a rest, against one step per token in float64."""

from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, values_and_gradients
from crossover.kernels.dispatch import use_backend
from torch import Tensor

SCANS = ("ssm_scan", "dplr_scan")


def run(name: str, backend: str, tensors: dict[str, Any]) -> dict[str, Tensor]:
    with use_backend(backend):
        return values_and_gradients(ops.OPS[name], tensors)


@pytest.mark.parametrize("often", [0.0, 0.02, 0.5])
@pytest.mark.parametrize("L", [63, 64, 65, 128, 193])
@pytest.mark.parametrize("name", SCANS)
def test_chunks_of_documents_are_the_recurrence_with_gradients(name: str, L: int, often: float) -> None:
    tensors = ops.OPS[name].cases.example(B=3, L=L, E=2, N=3) | {"starts": torch.rand(3, L) < often}
    assert_same(run(name, "torch", tensors), run(name, "reference", tensors), 1e-11)


@pytest.mark.parametrize("name", SCANS)
def test_nothing_of_a_document_reaches_the_next_not_even_what_is_not_finite(name: str) -> None:
    L, start = 150, 77
    tensors = ops.OPS[name].cases.example(L=L) | {"starts": (torch.arange(L) == start).expand(2, L)}
    tensors["u"][:, :start] = torch.inf
    with use_backend("torch"):
        y, h = ops.OPS[name](**tensors)
        apart = {k: t for k, t in tensors.items() if k not in ("starts", "initial_state")}
        expected_y, expected_h = ops.OPS[name](**apart | {"u": tensors["u"][:, start:]})
    torch.testing.assert_close(y[:, start:], expected_y)
    torch.testing.assert_close(h, expected_h)
