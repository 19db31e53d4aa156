"""What an operation is given is checked before anything runs: nothing that reaches a kernel can lead it astray."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import KERNELS, Unsupported, use_backend
from torch import Tensor

IMPLEMENTATIONS = [(name, backend) for name, op in ops.OPS.items() for backend in op.backends]
WITH_STARTS = [
    pytest.param(name, backend, marks=pytest.mark.slow if backend == "triton" else ())
    for name, backend in IMPLEMENTATIONS
    if "starts" in ops.OPS[name].cases.example()
]

ALONE = {
    ("attention", "v", 3),
    ("long_conv", "u", 0),
    ("rotary", "q", 2),
    ("rotary", "k", 2),
    ("turned_heads", "angle", 3),
    ("linear_cross_entropy", "weight", 0),
    ("grouped_mm", "x", 0),
    ("grouped_mm", "weight", 1),
}
"""Axes that no other argument has: operation, argument, axis."""


def example(name: str, *, B: int = 3, L: int = 11) -> tuple[dict[str, Tensor], dict[str, Any]]:
    cases = ops.OPS[name].cases
    return cast(cases.example(B=B, L=L, E=7, N=5), torch.float32), cases.example_options(L=L)


def wrong(t: Tensor) -> Iterator[tuple[str, int, Tensor]]:
    """What is wrong about it, the axis, and the tensor."""
    for axis in range(t.dim()):
        yield "longer", axis, torch.cat([t, t.narrow(axis, 0, 1)], axis)
        if t.shape[axis] > 2:
            yield "shorter", axis, t.narrow(axis, 1, t.shape[axis] - 1)
            yield "one", axis, t.narrow(axis, 0, 1)
    yield "more", -1, t[None]
    if t.dim():
        yield "missing", -1, t[..., 0]
    for dtype in (torch.float32, torch.int64, torch.bool, torch.complex64, torch.uint8):
        if dtype != t.dtype:
            yield f"{dtype}", -1, torch.zeros(t.shape, dtype=dtype)
    yield "on another device", -1, t.to("meta")


@pytest.mark.parametrize("name", ops.OPS)
def test_whatever_does_not_fit_is_refused_in_one_line_before_anything_runs(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, (tensors, options) = ops.OPS[name], example(name)
    ran = dict.fromkeys(op.backends, lambda *_, **__: "it ran")
    monkeypatch.setattr(op, "_implementations", ran)
    assert op(**tensors, **options) == "it ran"
    only_one = name == "rms_norm"  # has any axes before the last of x, and no other argument has them
    for argument, t in tensors.items():
        for what, axis, bad in wrong(t):
            call = functools.partial(op, **tensors | {argument: bad}, **options)
            one_row = (argument, what, axis) == ("starts", "one", 0)
            leading = only_one and argument == "x" and (what == "more" or 0 <= axis < 2)
            single = len(tensors) == 1 and not what.startswith("torch.")  # no other has its axes or device
            if one_row or leading or single or (name, argument, axis) in ALONE:
                assert call() == "it ran"
            else:
                with pytest.raises(ValueError, match=f"^{name}: [^\n]*$"):
                    call()


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("attention", {"window": 0}),
        ("causal_conv1d", {"activation": "relu"}),
        ("gated_rms_norm", {"n_groups": 0}),
        ("gated_rms_norm", {"n_groups": 5}),
        ("gated_rms_norm", {"n_groups": None}),
        ("ssd", {"chunk_len": 0}),
        ("ssd", {"chunk_len": 2.5}),
        ("attention", {"window": True}),
        ("ssm_kernel", {"length": -1}),
        ("attention", {"kv_len": 3}),
        ("ssd", {"A": None}),
    ],
)
def test_numbers_and_words_that_mean_nothing_are_refused(name: str, wrong: dict[str, Any]) -> None:
    tensors, options = example(name)
    with pytest.raises(ValueError, match=f"^{name}: .*{next(iter(wrong))}|n_groups|multiple"):
        ops.OPS[name](**tensors | options | wrong)


def test_a_right_call_is_remembered_and_an_equal_number_of_another_type_is_not_it() -> None:
    op, (tensors, options) = ops.OPS["attention"], example("attention")
    for _ in range(2):
        op(**tensors | options | {"window": 1})
    for window in (True, 1.0):
        with pytest.raises(ValueError, match="whole number"):
            op(**tensors | options | {"window": window})


@pytest.mark.parametrize(("name", "backend"), [pair for pair in IMPLEMENTATIONS if pair[1] in KERNELS])
def test_kernels_take_neither_double_precision_nor_what_lies_elsewhere(name: str, backend: str) -> None:
    tensors, options = example(name)
    with use_backend(backend), pytest.raises(Unsupported, match=r"float64|complex128"):
        ops.OPS[name](**cast(tensors, torch.float64), **options)
    if backend == "cpu":
        with use_backend(backend), pytest.raises(Unsupported, match="meta"):
            ops.OPS[name](**{k: t.to("meta") for k, t in tensors.items()}, **options)


def test_what_is_missing_or_too_much_is_a_type_error_as_in_any_call() -> None:
    x = torch.randn(3, 5)
    with pytest.raises(TypeError, match="weight"):
        ops.rms_norm(x)  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="without x"):
        ops.rms_norm()  # pyright: ignore[reportCallIssue]
    with pytest.raises(TypeError, match="positional"):
        ops.swiglu(x, x, x)  # pyright: ignore[reportCallIssue]


@pytest.mark.parametrize("name", ops.OPS)
def test_each_tensor_may_have_a_precision_of_its_own(name: str) -> None:
    tensors, options = example(name)
    for argument, t in list(tensors.items())[1:]:
        if t.is_floating_point():
            mixed = tensors | {argument: t.bfloat16()}
            with use_backend("reference"):
                expected = values_and_gradients(ops.OPS[name], mixed, **options)
            for backend in set(ops.OPS[name].backends) & {"torch", "cpu"}:
                with use_backend(backend):
                    found = values_and_gradients(ops.OPS[name], mixed, **options)
                assert_same(found, expected, 2e-2)
                assert {k: t.dtype for k, t in found.items()} == {k: t.dtype for k, t in expected.items()}
        elif t.is_complex() and argument not in ("A", "u"):
            with pytest.raises(ValueError, match=rf"^{name}: {argument} is torch.complex128"):
                ops.OPS[name](**tensors | {argument: t.to(torch.complex128)}, **options)


@pytest.mark.parametrize(("name", "backend"), WITH_STARTS)
def test_one_row_of_starts_is_for_all(name: str, backend: str) -> None:
    tensors, options = example(name)
    starts = torch.arange(11)[None] % 4 == 2
    results = []
    for marks in (starts, starts.expand(3, -1).contiguous()):
        with use_backend(backend):
            results.append(values_and_gradients(ops.OPS[name], tensors | {"starts": marks}, **options))
    assert_same(*results, tolerance=0.0)


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("name", ops.OPS)
def test_nothing_gives_nothing_and_leaves_the_state_alone(name: str, optional: bool) -> None:
    op, cases = ops.OPS[name], ops.OPS[name].cases
    # an axis of 13 or 37 is one of rows or tokens, and attention's 42 is 5 keys before them
    whole = cast(cases.example(B=13, L=37, E=6, N=5, optional=optional), torch.float32)
    outputs = op(**whole, **cases.example_options(L=37, optional=optional))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    for B, L in ((0, 37), (13, 0), (0, 0)):
        cut = {13: B, 37: L, 42: L + 5}
        tensors = {k: t[tuple(slice(cut.get(n, n)) for n in t.shape)] for k, t in whole.items()}
        if name == "grouped_mm" and L == 0:
            tensors["counts"] = torch.zeros(5, dtype=torch.int64)
        if all(t.numel() for t in tensors.values()):
            continue
        for backend in op.backends:
            with use_backend(backend):
                found = values_and_gradients(op, tensors, **cases.example_options(L=L, optional=optional))
            for i, t in enumerate(outputs):
                assert found[f"output {i}"].dtype == t.dtype
                assert found[f"output {i}"].shape == tuple(cut.get(n, n) for n in t.shape)
            if L == 0 and "initial_state" in cases.example():
                state = tensors.get("initial_state", torch.zeros(()))
                assert torch.equal(found["output 1"], state.expand_as(found["output 1"]))
            grads = {k: t for k, t in found.items() if k.startswith("gradient") and "initial_state" not in k}
            assert not any(t.any() for t in grads.values())
            assert all(t.shape == tensors[k.removeprefix("gradient of ")].shape for k, t in grads.items())
