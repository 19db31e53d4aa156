"""The short convolution where test_ops.py does not look: the memory of the window that it returns."""

from __future__ import annotations

import pytest
import torch
from crossover.kernels import ops
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
