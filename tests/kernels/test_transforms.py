"""Derivatives that kernels do not have: forward mode, torch.func, gradients of gradients."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import cast, relative_error
from crossover.kernels.dispatch import KernelFallbackWarning, use_backend
from torch import Tensor
from torch.autograd import forward_ad

pytestmark = [
    pytest.mark.quick,
    pytest.mark.filterwarnings("ignore::crossover.kernels.dispatch.KernelFallbackWarning"),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
ROUNDING = {torch.float64: 1e-9, torch.float32: 2e-4}
ONCE = {"lstm_scan"}
"""Operations whose kernels keep no input that a second derivative could start from."""


def case(name: str, dtype: torch.dtype) -> tuple[list[str], list[Tensor], Callable[..., tuple[Tensor, ...]]]:
    """Names and values of what is differentiable, and the operation as a function of it, with real outputs."""
    op, rest = ops.OPS[name], cast(ops.OPS[name].cases.example(L=11), dtype)
    names = [k for k, t in rest.items() if t.is_floating_point() or t.is_complex()]
    options = op.cases.example_options(L=11)

    def function(*inputs: Tensor) -> tuple[Tensor, ...]:
        out = op(**rest | dict(zip(names, inputs, strict=True)), **options)
        return tuple(real(t) for t in (out if isinstance(out, tuple) else (out,)))

    return names, [rest[k] for k in names], function


def real(t: Tensor) -> Tensor:
    return torch.view_as_real(t.resolve_conj()) if t.is_complex() else t


def normal(like: Sequence[Tensor]) -> list[Tensor]:
    return [torch.randn(t.shape, dtype=t.dtype) for t in like]


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(real(x) * real(y)).sum() for x, y in zip(a, b, strict=True)]).sum()


@DTYPES
@pytest.mark.parametrize("name", ops.OPS)
def test_forward_mode_agrees_with_reverse_mode(name: str, dtype: torch.dtype) -> None:
    _, inputs, function = case(name, dtype)
    tangents = normal(inputs)
    outputs, moved, *_ = torch.func.jvp(function, tuple(inputs), tuple(tangents))
    weights = normal(outputs)
    leaves = [t.requires_grad_() for t in inputs]
    grads = torch.autograd.grad(dot(function(*leaves), weights), leaves)
    sizes = dot([t.abs() for t in grads], [t.abs() for t in tangents])
    assert abs(dot(moved, weights) - dot(grads, tangents)) <= ROUNDING[dtype] * sizes
    with forward_ad.dual_level():
        duals = function(*(forward_ad.make_dual(t.detach(), v) for t, v in zip(inputs, tangents, strict=True)))
        torch.testing.assert_close([forward_ad.unpack_dual(t).tangent for t in duals], list(moved), check_dtype=False)


@DTYPES
@pytest.mark.parametrize("name", ops.OPS)
def test_gradients_can_be_differentiated_again(name: str, dtype: torch.dtype) -> None:
    _, inputs, function = case(name, dtype)
    weights, twice = normal(function(*inputs)), normal(inputs)

    def second(backend: str) -> list[Tensor]:
        leaves = [t.clone().requires_grad_() for t in inputs]
        made = leaves[:1]
        for t in leaves[1:]:  # of the one before too, as dt, B and C of a model are made of its x
            made.append(t * (1 + 0.1 * real(made[-1]).mean()))
        with use_backend(backend):
            outputs = function(*made)
        loss = dot([t.square() for t in outputs], weights)
        grads = torch.autograd.grad(loss, leaves, create_graph=True)
        return list(torch.autograd.grad(dot(grads, twice), leaves, allow_unused=True, materialize_grads=True))

    expected = second("reference")
    for backend in ops.OPS[name].backends[1:]:
        if backend == "triton" or (backend == "cpu" and dtype == torch.float64):
            continue
        if name in ONCE:
            with pytest.raises(NotImplementedError, match=r'run this under `with use_backend\("reference"\)'):
                second(backend)
        else:
            for actual, e in zip(second(backend), expected, strict=True):
                assert relative_error(actual, e) <= ROUNDING[dtype], backend


@pytest.mark.parametrize("name", [n for n, op in ops.OPS.items() if "initial_state" in op.cases.example()])
def test_gradients_of_every_row_apart(name: str) -> None:
    op, tensors = ops.OPS[name], cast(ops.OPS[name].cases.example(L=11), torch.float32)
    first, options = next(iter(tensors)), op.cases.example_options(L=11)
    by_row = [k for k, t in tensors.items() if (t.dim() > 1 and t.shape[1] == 11) or k == "initial_state"]

    def loss(*rows: Tensor) -> Tensor:
        y, _ = op(**tensors | {k: t[None] for k, t in zip(by_row, rows, strict=True)}, **options)
        return y.square().sum()

    apart = torch.func.vmap(torch.func.grad(loss))(*(tensors[k] for k in by_row))
    x = tensors[first].requires_grad_()
    y, _ = op(**tensors, **options)
    (together,) = torch.autograd.grad(y.square().sum(), x)
    assert relative_error(apart, together) < 1e-5


def test_the_definition_takes_over_with_a_warning_and_no_forced_kernel_is_silent() -> None:
    _, inputs, function = case("selective_scan", torch.float32)
    arguments: Any = (function, tuple(inputs), tuple(normal(inputs)))
    with pytest.warns(KernelFallbackWarning, match="selective_scan: the definition runs"):
        torch.func.jvp(*arguments)
    for backend in ("torch", "cpu"):
        with use_backend(backend), pytest.raises(NotImplementedError, match=r'use_backend\("reference"\)'):
            torch.func.jvp(*arguments)
