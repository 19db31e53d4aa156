"""Which implementation runs, and that nobody is deceived about it."""

import warnings

import pytest
import torch
from crossover.kernels.dispatch import KernelFallbackWarning, Op, Unsupported, record_backends, use_backend


def reference(x: torch.Tensor) -> str:
    return "reference"


def plain(x: torch.Tensor) -> str:
    return "torch"


def picky(x: torch.Tensor) -> str:
    if x.numel() > 1:
        raise Unsupported("more than one element")
    return "cpu"


def test_the_fastest_backend_of_the_device_runs() -> None:
    assert Op(reference, torch=plain)(torch.zeros(1)) == "torch"
    assert Op(reference, torch=plain, cpu=picky)(torch.zeros(1)) == "cpu"


def test_an_automatic_fallback_warns_with_the_reason() -> None:
    with pytest.warns(KernelFallbackWarning, match="cpu is passed over: more than one element"):
        assert Op(reference, torch=plain, cpu=picky)(torch.zeros(2)) == "torch"


def test_a_forced_backend_never_falls_back() -> None:
    op = Op(reference, torch=plain, cpu=picky)
    with use_backend("cpu"), pytest.raises(Unsupported, match="more than one"):
        op(torch.zeros(2))
    with use_backend("triton"), pytest.raises(Unsupported, match="has no triton implementation"):
        op(torch.zeros(1))


def test_forcing_ends_with_the_block_even_after_an_error() -> None:
    with pytest.raises(RuntimeError), use_backend("reference"):
        raise RuntimeError
    assert Op(reference, torch=plain)(torch.zeros(1)) == "torch"


def test_an_unknown_backend_is_an_error() -> None:
    with pytest.raises(ValueError, match="expected one of reference, torch, cpu, triton"), use_backend("cuda"):
        pass


def test_recording_names_every_backend_that_ran() -> None:
    op = Op(reference, torch=plain, cpu=picky)
    with record_backends() as used, warnings.catch_warnings():
        warnings.simplefilter("ignore", KernelFallbackWarning)
        op(torch.zeros(1))
        op(torch.zeros(2))
        with use_backend("reference"):
            op(torch.zeros(1))
    assert used == {"reference": ("cpu", "reference", "torch")}  # the operation is called after its reference


def test_every_operation_has_a_reference_and_plain_pytorch() -> None:
    from crossover.kernels import ops

    assert {name for name, op in ops.OPS.items() if set(op.backends) < {"reference", "torch"}} == set()
    assert all(name == op.__name__ for name, op in ops.OPS.items())
