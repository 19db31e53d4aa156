"""Every backend of every operation against its reference in float64: values, gradients, states."""

import inspect
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import use_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

IMPLEMENTATIONS = [(name, backend) for name, op in ops.OPS.items() for backend in op.backends if backend != "reference"]
STATEFUL = [name for name, op in ops.OPS.items() if {"initial_state", "starts"} <= op.cases.example().keys()]
SIZES = {
    "B": st.integers(1, 3),
    "L": st.integers(1, 70),
    "E": st.integers(1, 9),
    "N": st.integers(2, 7),
    "optional": st.booleans(),
    "seed": st.integers(0, 2**16),
}


def run(name: str, backend: str, tensors: dict[str, torch.Tensor], **others: Any) -> dict[str, torch.Tensor]:
    with use_backend(backend):
        return values_and_gradients(ops.OPS[name], tensors, **others)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_takes_the_arguments_of_the_definition(name: str, backend: str) -> None:
    def arguments(which: str) -> list[tuple[Any, ...]]:
        signature = inspect.signature(ops.OPS[name]._implementations[which])
        return [(p.name, p.kind, p.default) for p in signature.parameters.values()]

    assert arguments(backend) == arguments("reference")


@pytest.mark.parametrize(("name", "backend"), [pair for pair in IMPLEMENTATIONS if pair[1] != "triton"])
@settings(max_examples=12)
@given(**SIZES)
def test_matches_the_definition_in_float32(name: str, backend: str, **drawn: Any) -> None:
    check_float32(name, backend, **drawn)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, backend in IMPLEMENTATIONS if backend == "triton"])
@settings(max_examples=3)  # the interpreter is slow
@given(**SIZES)
def test_triton_matches_the_definition_in_float32(name: str, **drawn: Any) -> None:
    check_float32(name, "triton", **drawn)


def check_float32(
    name: str, backend: str, *, B: int, L: int, E: int, N: int, optional: bool, seed: int, factor: float = 2
) -> None:
    torch.manual_seed(seed)
    cases = ops.OPS[name].cases
    tensors, others = (
        cases.example(B=B, L=L, E=E, N=N, optional=optional),
        cases.example_options(optional=optional, L=L),
    )
    expected = run(name, "reference", tensors, **others)
    actual = run(name, backend, cast(tensors, torch.float32), **others)
    plain = run(name, "reference", cast(tensors, torch.float32), **others)
    # no worse than `factor` times what the definition itself loses in float32; the floor covers another order of sums
    for key, value in actual.items():
        allowed = factor * (relative_error(plain[key], expected[key]) + 5e-6)
        assert relative_error(value, expected[key]) <= allowed, key


@pytest.mark.parametrize("name", [n for n, b in IMPLEMENTATIONS if b == "torch"])
@settings(max_examples=12)
@given(**SIZES)
def test_plain_pytorch_is_exact_in_float64(
    name: str, B: int, L: int, E: int, N: int, optional: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    cases = ops.OPS[name].cases
    tensors, others = (
        cases.example(B=B, L=L, E=E, N=N, optional=optional),
        cases.example_options(optional=optional, L=L),
    )
    assert_same(run(name, "torch", tensors, **others), run(name, "reference", tensors, **others), 1e-11)


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_half_precision_inputs_lose_no_more_than_their_own_rounding(
    name: str, backend: str, dtype: torch.dtype
) -> None:
    tensors, others = cast(ops.OPS[name].cases.example(), dtype), ops.OPS[name].cases.example_options()
    with use_backend("reference"):
        expected = ops.OPS[name](**cast(tensors, torch.float64), **others)
    with use_backend(backend):
        actual = ops.OPS[name](**tensors, **others)
    expected, actual = (x if isinstance(x, tuple) else (x,) for x in (expected, actual))
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= (3e-2 if dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_takes_inputs_that_are_not_contiguous(name: str, backend: str) -> None:
    tensors, others = cast(ops.OPS[name].cases.example(), torch.float32), ops.OPS[name].cases.example_options()
    strided = {k: t if t.dim() < 2 else t.transpose(0, 1).contiguous().transpose(0, 1) for k, t in tensors.items()}
    assert any(not t.is_contiguous() for t in strided.values())
    assert_same(run(name, backend, strided, **others), run(name, backend, tensors, **others), 1e-6)


@pytest.mark.parametrize(("name", "backend"), IMPLEMENTATIONS)
def test_repeats_bit_for_bit(name: str, backend: str) -> None:
    tensors, others = cast(ops.OPS[name].cases.example(), torch.float32), ops.OPS[name].cases.example_options()
    first, second = run(name, backend, tensors, **others), run(name, backend, tensors, **others)
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.quick
@pytest.mark.parametrize("cut", [1, 16, 36])
@pytest.mark.parametrize("name", STATEFUL)
def test_state_hands_over_at_any_cut(name: str, cut: int) -> None:
    tensors, others = ops.OPS[name].cases.example(), ops.OPS[name].cases.example_options()
    y, state = ops.OPS[name](**tensors, **others)
    sequence = {k for k, t in tensors.items() if k != "initial_state" and t.dim() > 1 and t.shape[1] == 37}
    first = {k: t[:, :cut] if k in sequence else t for k, t in tensors.items()}
    y1, middle = ops.OPS[name](**first, **others)
    second = {k: t[:, cut:] if k in sequence else t for k, t in tensors.items()} | {"initial_state": middle}
    y2, last = ops.OPS[name](**second, **others)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y)
    torch.testing.assert_close(last, state)


@pytest.mark.quick
@pytest.mark.parametrize("backend", ["reference", "torch"])
@pytest.mark.parametrize("name", STATEFUL)
def test_a_start_forgets_everything_before_it(name: str, backend: str) -> None:
    tensors, others = ops.OPS[name].cases.example(), ops.OPS[name].cases.example_options()
    starts = torch.zeros_like(tensors["starts"])
    starts[:, 20] = True
    with use_backend(backend):
        whole, state = ops.OPS[name](**tensors | {"starts": starts}, **others)
        cut = {k: t[:, 20:] if t.dim() > 1 and t.shape[1] == 37 else t for k, t in tensors.items() if k != "starts"}
        apart, apart_state = ops.OPS[name](**{k: t for k, t in cut.items() if k != "initial_state"}, **others)
    torch.testing.assert_close(whole[:, 20:], apart)
    torch.testing.assert_close(state, apart_state)


FORGETTING = [
    (name, b) for name, op in ops.OPS.items() if "starts" in op.cases.example() for b in op.backends if b != "triton"
]


def after_starts(name: str, backend: str, tensors: dict[str, Tensor], begin: Sequence[int]) -> dict[str, Tensor]:
    """What comes from a start in each row on: outputs, the last state, and the gradients of these, by the inputs from
    there on, and by what has no tokens."""
    starts = torch.zeros_like(tensors["starts"])
    starts[range(len(begin)), list(begin)] = True
    leaves = {k: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for k, t in tensors.items()}
    with use_backend(backend):
        out = ops.OPS[name](**leaves | {"starts": starts}, **ops.OPS[name].cases.example_options())
    y, *states = out if isinstance(out, tuple) else (out,)
    real = [torch.view_as_real(t) if t.is_complex() else t for t in (*(y[b, i:] for b, i in enumerate(begin)), *states)]
    torch.manual_seed(1)
    wanted = [k for k, t in leaves.items() if t.requires_grad]
    loss = sum(((t * torch.randn(t.shape)).sum() for t in real), torch.zeros(()))
    grads = dict(zip(wanted, torch.autograd.grad(loss, [leaves[k] for k in wanted]), strict=True))
    found = {f"output {i}": t.detach() for i, t in enumerate(real)}
    for k, grad in grads.items():
        n = tokens_before(k, tensors)
        found[k] = grad if n is None else torch.cat([grad[b, n + i :] for b, i in enumerate(begin)])
    return found


def tokens_before(key: str, tensors: dict[str, Tensor]) -> int | None:
    """Tokens of an input before those of `starts`, as a cache has them; None for what has no tokens."""
    t, L = tensors[key], tensors["starts"].shape[1]
    return t.shape[1] - L if t.dim() > 1 and key != "initial_state" and t.shape[1] >= L else None


@pytest.mark.quick
@pytest.mark.parametrize("no_number", [torch.nan, torch.inf])
@pytest.mark.parametrize("begin", [(0, 0), (20, 9)], ids=["state", "document"])
@pytest.mark.parametrize(("name", "backend"), FORGETTING)
def test_what_is_forgotten_is_gone_even_where_it_is_no_number(
    name: str, backend: str, begin: tuple[int, int], no_number: float
) -> None:
    tensors = cast(ops.OPS[name].cases.example(), torch.float32)
    spoilt = {k: t.clone() for k, t in tensors.items()}
    for k, t in spoilt.items():
        n = tokens_before(k, tensors)
        if k == "initial_state":
            t.fill_(no_number)
        elif n is not None and t.is_floating_point():
            for b, i in enumerate(begin):
                t[b, : n + i] = no_number
    expected, actual = (after_starts(name, backend, x, begin) for x in (tensors, spoilt))
    # what sums over all tokens, forgotten ones too, is no number either
    kept = [k for k in expected if begin == (0, 0) or k.startswith("output") or tokens_before(k, tensors) is not None]
    for k in kept:
        torch.testing.assert_close(actual[k], expected[k], msg=lambda text, k=k: f"{k}: {text}")


def test_selective_scan_keeps_nothing_of_size_length_times_states() -> None:
    # one saved tensor of (B, L, E, N) would be N = 64 times an activation
    B, L, E, N = 1, 512, 32, 64
    tensors = cast(ops.selective_scan.cases.example(B=B, L=L, E=E, N=N, optional=False), torch.float32)
    tensors = {k: t.requires_grad_() for k, t in tensors.items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        ops.selective_scan(**tensors, delta_softplus=True)
    assert max(saved) < B * L * E * N / 8


@pytest.mark.quick
def test_loss_of_no_counted_token_is_zero_and_has_zero_gradient() -> None:
    x = torch.randn(5, 3, requires_grad=True)
    loss, z = ops.linear_cross_entropy(x, torch.randn(4, 3), torch.full((5,), -100), z_loss=0.1)
    (loss + z).backward()
    assert loss.item() == z.item() == 0
    assert torch.equal(x.grad, torch.zeros(5, 3))  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("name", ["selective_scan", "lstm_scan", "turned_heads"])
def test_custom_operators_are_registered_soundly(name: str) -> None:
    from crossover.kernels.lstm_scan import torch_impl as lstm
    from crossover.kernels.selective_scan import torch_impl as scan
    from crossover.kernels.turned_heads import cpu as turned

    tensors = cast(ops.OPS[name].cases.example(L=20), torch.float32)
    t = {k: v.requires_grad_() for k, v in tensors.items() if v.is_floating_point()}
    if name == "lstm_scan":
        torch.library.opcheck(lstm._scan, (t["gates"], t["weight"], t["initial_state"], None))
    elif name == "turned_heads":
        torch.library.opcheck(turned._turned, tuple(t.values()))
    else:
        torch.library.opcheck(scan._scan, (t["u"], t["delta"].exp(), t["A"], t["B"], t["C"], t["initial_state"], None))
