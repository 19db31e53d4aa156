"""The choice of the implementation that runs, and that nobody is deceived about it."""

import warnings

import pytest
import torch
from crossover.kernels import dispatch
from crossover.kernels.dispatch import (
    KernelFallbackWarning,
    Op,
    Unsupported,
    record_backends,
    switch_off,
    switched_off,
    use_backend,
)

pytestmark = pytest.mark.quick


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


@pytest.fixture
def _nothing_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_switched_off", {})


@pytest.mark.usefixtures("_nothing_stays_off")
def test_what_is_switched_off_is_passed_over_without_a_warning_and_its_reason_is_known() -> None:
    op, x = Op(reference, torch=plain, cpu=lambda x: "cpu"), torch.zeros(1)
    switch_off("reference", "cpu", "wrong gradients")  # the operation is called after its reference
    with record_backends() as used:
        assert op(x) == "torch"  # a KernelFallbackWarning would be an error
    assert used == {"reference": ("torch",)}
    assert switched_off() == {("reference", "cpu"): "wrong gradients"}
    switch_off("reference", "torch", "wrong too")
    assert op(x) == op(x.double()) == "reference"


@pytest.mark.usefixtures("_nothing_stays_off")
def test_without_plain_pytorch_the_reference_is_what_is_fallen_back_to() -> None:
    op = Op(reference, torch=plain, cpu=picky)
    switch_off("reference", "torch", "wrong")
    assert op(torch.zeros(1)) == "cpu"
    with pytest.warns(KernelFallbackWarning, match="more than one element"):
        assert op(torch.zeros(2)) == "reference"


@pytest.mark.usefixtures("_nothing_stays_off")
def test_a_forced_backend_runs_though_it_is_switched_off() -> None:
    switch_off("reference", "torch", "wrong")
    with use_backend("torch"):
        assert Op(reference, torch=plain)(torch.zeros(1)) == "torch"


@pytest.mark.usefixtures("_nothing_stays_off")
@pytest.mark.parametrize("backend", ["reference", "cuda"])
def test_the_judge_cannot_be_switched_off_and_neither_can_what_does_not_exist(backend: str) -> None:
    with pytest.raises(ValueError, match="expected one of torch, cpu, triton"):
        switch_off("reference", backend, "wrong")


@pytest.mark.usefixtures("_nothing_stays_off")
def test_a_compiled_operation_heeds_what_is_switched_off() -> None:
    op = Op(lambda x: x, torch=lambda x: x + 1, cpu=lambda x: x + 2)
    compiled = torch.compile(lambda x: op(x), fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1)) == 2
    switch_off(op.__name__, "cpu", "wrong")
    assert compiled(torch.zeros(1)) == 1
