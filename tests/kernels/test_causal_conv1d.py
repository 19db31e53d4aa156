"""The short convolution where test_ops.py does not look: the memory of its window, channels of several vectors."""

from __future__ import annotations

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import use_backend


@pytest.mark.parametrize("backend", ops.causal_conv1d.backends)
@pytest.mark.parametrize("marked", [False, True], ids=["continued", "starts"])
@pytest.mark.parametrize("K", [1, 4, 9])
@pytest.mark.parametrize("L", [1, 2, 3, 5])
def test_the_window_owns_its_memory_and_is_the_last_inputs(backend: str, marked: bool, K: int, L: int) -> None:
    E = 8
    x, past = torch.randn(2, L, 3 * E)[..., :E], torch.randn(2, K - 1, E)
    starts = torch.zeros(2, L, dtype=torch.bool) if marked else None
    with use_backend(backend):
        _, window = ops.causal_conv1d(x, torch.randn(E, K), initial_state=past, starts=starts)
    assert torch.equal(window, torch.cat([past, x], dim=1)[:, L:])
    assert window.untyped_storage().nbytes() == window.numel() * window.itemsize


@pytest.mark.parametrize(
    ("L", "E", "K"),
    [(3, 17, 4), (2, 300, 9), (21, 517, 3), (40, 37, 4), (9, 264, 2)],  # ends within a vector, or in spans of channels
)
def test_the_cpu_matches_the_definition_where_channels_fill_no_whole_vectors(L: int, E: int, K: int) -> None:
    tensors = ops.causal_conv1d.cases.example(B=2, L=L, E=E, N=K)
    with use_backend("reference"):
        expected = values_and_gradients(ops.causal_conv1d, tensors, activation="silu")
    with use_backend("cpu"):
        actual = values_and_gradients(ops.causal_conv1d, cast(tensors, torch.float32), activation="silu")
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("density", [0.0, 0.02, 0.3, 1.0])
@pytest.mark.parametrize(("L", "K"), [(7, 4), (13, 4), (61, 4), (150, 70)])  # more taps than tokens of a chunk
def test_the_cpu_matches_the_definition_wherever_documents_begin(L: int, K: int, density: float) -> None:
    E = 43
    tensors = ops.causal_conv1d.cases.example(B=3, L=L, E=E, N=K)
    tensors["x"] = torch.randn(3, L, 2 * E + 5, dtype=torch.float64)[..., 3 : E + 3]  # part of a projection
    tensors["starts"] = torch.rand(3, L) < density
    with use_backend("reference"):
        expected = values_and_gradients(ops.causal_conv1d, tensors, activation="silu")
    with use_backend("cpu"):
        actual = values_and_gradients(ops.causal_conv1d, cast(tensors, torch.float32), activation="silu")
    assert_same(actual, expected, 1e-6)


@pytest.mark.parametrize("K", [4, 9])
def test_what_is_no_number_stays_in_its_document_on_the_cpu(K: int) -> None:
    x, weight = torch.randn(1, 41, 19, requires_grad=True), torch.randn(19, K)
    starts = torch.zeros(1, 41, dtype=torch.bool)
    starts[:, [11, 23]] = True
    with use_backend("cpu"):
        y, _ = ops.causal_conv1d(torch.where(starts.cumsum(1)[..., None] == 1, torch.nan, x), weight, starts=starts)
    assert y.isnan().any(2).squeeze(0).tolist() == [11 <= t < 23 for t in range(41)]
    (grad_x,) = torch.autograd.grad(y[:, 23:].sum() + y[:, :11].sum(), x)
    assert not grad_x.isnan().any()
