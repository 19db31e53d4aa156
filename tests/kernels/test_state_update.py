"""One decode step of Mamba-2 where test_ops.py does not look: heads, rows and taps of any number, and memory reused."""

from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import use_backend
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

UPDATE = ops.OPS["state_update"]
EXAMPLE = ops.state_update.cases.example
EVERY = pytest.mark.parametrize("backend", UPDATE.backends)
BACKENDS = [name for name in UPDATE.backends if name != "reference"]


def run(backend: str, tensors: dict[str, torch.Tensor], **others: Any) -> dict[str, torch.Tensor]:
    with use_backend(backend):
        return values_and_gradients(UPDATE, tensors, **others)


def inputs(B: int, G: int, per_group: int, P: int, N: int, K: int) -> dict[str, torch.Tensor]:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    H = G * per_group
    channels = H * P + 2 * G * N
    return {
        "x": normal(B, channels),
        "dt": normal(B, H) - 2,
        "window": normal(B, K - 1, channels),
        "state": normal(B, H, P, N),
        "weight": normal(channels, K),
        "bias": normal(channels),
        "A": -8 * torch.rand(H, dtype=torch.float64) - 0.1,
        "D": normal(H),
        "dt_bias": normal(H),
    }


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=6, phases=(Phase.explicit, Phase.generate))
@given(
    B=st.integers(1, 2),
    G=st.integers(1, 2),
    per_group=st.integers(1, 3),
    P=st.integers(1, 40),  # more rows than one program takes
    N=st.integers(1, 20),
    K=st.integers(2, 5),
    seed=st.integers(0, 2**16),
)
def test_matches_the_definition_for_any_sizes(backend: str, seed: int, **sizes: int) -> None:
    torch.manual_seed(seed)
    tensors = inputs(**sizes)
    assert_same(run(backend, cast(tensors, torch.float32)), run("reference", tensors), 1e-5)


@EVERY
def test_is_the_convolution_and_then_the_scan_of_one_token(backend: str) -> None:
    B, G, per_group, P, N = 2, 2, 3, 5, 7
    H = G * per_group
    tensors = inputs(B, G, per_group, P, N, K=4)

    def in_two_operations(x, dt, window, state, weight, bias, A, D, dt_bias) -> tuple[torch.Tensor, ...]:
        x, window = ops.causal_conv1d(x[:, None], weight, bias, "silu", initial_state=window)
        x, b, c = x.split([H * P, G * N, G * N], dim=-1)
        x, b, c = x.unflatten(-1, (H, P)), b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
        y, state = ops.ssd(x, dt[:, None], A, b, c, D, None, dt_bias, True, initial_state=state)
        return y[:, 0], window, state

    with use_backend("reference"):
        expected = values_and_gradients(in_two_operations, tensors)
    dtype, tolerance = (torch.float32, 1e-5) if backend == "triton" else (torch.float64, 1e-12)
    assert_same(run(backend, cast(tensors, dtype)), expected, tolerance)


@EVERY
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_leaves_what_it_is_given_as_it_was(backend: str, dtype: torch.dtype) -> None:
    tensors = cast(EXAMPLE(), dtype) | {"state": EXAMPLE()["state"].float()}
    before = {k: t.clone() for k, t in tensors.items()}
    with use_backend(backend):
        y, window, state = UPDATE(**tensors)
    assert all(torch.equal(tensors[k], before[k]) for k in tensors)
    assert (y.dtype, window.dtype, state.dtype) == (dtype, dtype, torch.float32)
    # nothing else stays alive with the window
    assert window.untyped_storage().nbytes() == window.nbytes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_the_new_state_takes_the_place_of_the_old(backend: str, dtype: torch.dtype) -> None:
    tensors = cast(EXAMPLE(), dtype) | {"state": EXAMPLE()["state"].float()}
    with use_backend(backend):
        expected = UPDATE(**tensors)
        given_state = tensors["state"]
        actual = UPDATE(**tensors, in_place=True)
    assert actual[2].data_ptr() == given_state.data_ptr()
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


@EVERY
def test_half_precision_rounds_the_output_alone(backend: str) -> None:
    tensors = inputs(2, 1, 4, 8, 6, K=4)
    rounded = cast(tensors, torch.bfloat16) | {"state": tensors["state"].float()}
    with use_backend("reference"):
        y, window, state = UPDATE(**cast(rounded, torch.float64))
    with use_backend(backend):
        actual = UPDATE(**rounded)
    assert relative_error(actual[0], y) < 2**-8
    assert torch.equal(actual[1].double(), window)
    assert relative_error(actual[2], state) < 1e-6


@EVERY
def test_one_tap_needs_no_window(backend: str) -> None:
    tensors = inputs(2, 1, 2, 3, 4, K=1)
    with use_backend("reference"):
        y, _, state = UPDATE(**tensors)
    with use_backend(backend):
        actual = UPDATE(**cast(tensors, torch.float32))
    assert actual[1].shape == (2, 0, 14)
    assert relative_error(actual[0], y) < 1e-5
    assert relative_error(actual[2], state) < 1e-5


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, in the interpreter: the overflow is meant
@EVERY
def test_a_decay_that_leaves_nothing_leaves_the_drive(backend: str) -> None:
    tensors = cast(inputs(1, 1, 2, 3, 4, K=2), torch.float32) | {"A": torch.tensor([-1e30, -1.0])}
    tensors["dt"] = torch.tensor([[1e5, -1e5]])  # softplus: 1e5 and 0
    with use_backend(backend):
        y, _, state = UPDATE(**tensors)
        forgotten = UPDATE(**tensors | {"state": torch.zeros_like(tensors["state"])})[2]
    assert torch.isfinite(y).all()
    assert torch.equal(state[:, 0], forgotten[:, 0])
    assert torch.equal(state[:, 1], tensors["state"][:, 1])


@pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")
def test_the_kernel_compiles_whole_with_and_without_reusing_the_state() -> None:
    tensors = cast(EXAMPLE(B=1, E=3, N=2), torch.float32)
    compiled = torch.compile(UPDATE, fullgraph=True, backend="aot_eager")
    with use_backend("triton"):
        assert_same(values_and_gradients(compiled, tensors), values_and_gradients(UPDATE, tensors), 1e-6)
        expected = UPDATE(**tensors)
        actual = compiled(**tensors, in_place=True)
    torch.testing.assert_close(tensors["state"], expected[2])
    torch.testing.assert_close(actual, expected)


@EVERY
def test_channels_that_fit_no_heads_are_refused(backend: str) -> None:
    tensors = cast(inputs(1, 1, 3, 4, 5, K=4), torch.float32)
    for x in (tensors["x"][:, :-1], tensors["x"][:, :12], torch.randn(1, 12 + 2 * 2 * 5)):  # two groups of three heads
        C = x.shape[1]
        fitting = {"window": torch.randn(1, 3, C), "weight": torch.randn(C, 4), "bias": torch.randn(C)}
        with use_backend(backend), pytest.raises(ValueError, match=f"C={C}.*H=3, P=4"):
            UPDATE(**tensors | fitting | {"x": x})
