"""The selective scan's Triton kernels, and what only they can get wrong: splits, layouts, memory beyond the ends."""

from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import Unsupported, triton_can_run
from crossover.kernels.selective_scan import reference
from torch import Tensor

if not triton_can_run():
    pytest.skip("Triton cannot run here", allow_module_level=True)

from crossover.kernels.selective_scan import triton_kernels as scan

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks in few tokens."""
    monkeypatch.setattr(scan, "CHUNK", 16)


def single(**sizes: Any) -> dict[str, Tensor]:
    return {k: t.to(DEVICE) for k, t in cast(ops.selective_scan.cases.example(**sizes), torch.float32).items()}


def both(tensors: dict[str, Tensor], function: Any = scan.selective_scan) -> dict[str, Tensor]:
    return {k: t.cpu() for k, t in values_and_gradients(function, tensors, delta_softplus=True).items()}


@pytest.mark.parametrize("n_splits", [1, 2, 3])
def test_a_split_sequence_equals_the_definition(n_splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ops.selective_scan.cases.example(B=2, L=41, E=5, N=3)
    length = {1: 48, 2: 32, 3: 16}[n_splits]
    monkeypatch.setattr(scan, "split_length", lambda *_: length)
    actual = both({k: t.to(DEVICE) for k, t in cast(tensors, torch.float32).items()})
    # 2e-6: float32 has 6e-8, of which sums over rows and tokens lose some
    assert_same(actual, values_and_gradients(reference.selective_scan, tensors, delta_softplus=True), 2e-6)


@pytest.mark.parametrize(("E", "N"), [(40, 16), (33, 8), (3, 1), (5, 20)])
@pytest.mark.parametrize("tokens", [2, 4])
def test_every_layout_equals_the_definition(E: int, N: int, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("forward_configuration", "backward_configuration"):
        choose = getattr(scan, name)
        monkeypatch.setattr(scan, name, lambda *sizes, choose=choose: choose(*sizes) | {"T": tokens})
    tensors = ops.selective_scan.cases.example(B=1, L=9, E=E, N=N)
    actual = both({k: t.to(DEVICE) for k, t in cast(tensors, torch.float32).items()})
    assert_same(actual, values_and_gradients(reference.selective_scan, tensors, delta_softplus=True), 2e-6)


def test_layouts_fill_a_warp_and_hold_every_state() -> None:
    for E in (1, 33, 2048):
        for N in (1, 5, 16, 64, 256):
            for config in (scan.forward_configuration(E, N), scan.backward_configuration(E, N)):
                assert config["NL"] * config["DL"] == 32
                assert config["W"] == config["num_warps"]
                assert config["M"] * config["NL"] >= N
                assert scan.CHUNK % config["T"] == 0


def test_few_channels_split_the_sequence_and_many_do_not() -> None:
    wide, narrow = scan.forward_configuration(2048, 16), scan.forward_configuration(64, 16)
    assert scan.split_length(64, 2048, 2048, wide) >= 2048
    length = scan.split_length(1, 2048, 64, narrow)
    assert length < 2048
    assert length % scan.CHUNK == 0


def test_nothing_outside_the_tensors_is_read_or_written() -> None:
    tensors = single(B=2, L=18, E=5, N=3)
    expected = both(tensors)
    banded = {}
    for name, t in tensors.items():
        if t.is_floating_point():
            storage = torch.full((t.numel() + 64,), float("nan"), device=t.device)
            inside = storage[32:-32].view(t.shape)
            banded[name] = inside.copy_(t)
        else:
            banded[name] = t
    actual = {k: t.cpu() for k, t in values_and_gradients(_in_place_of_clones(banded), tensors).items()}
    assert {k for k in expected if not torch.equal(actual[k], expected[k])} == set()


def _in_place_of_clones(banded: dict[str, Tensor]) -> Any:
    """A scan of the leaves' values as they lie in larger tensors of NaN."""

    def run(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        moved = {k: _At.apply(t, banded[k]) if t.is_floating_point() else t for k, t in leaves.items()}
        return scan.selective_scan(**moved, delta_softplus=True)

    return run


class _At(torch.autograd.Function):
    """The same values in another place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, place: Tensor) -> Tensor:
        return place.view_as(place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad, None


def test_later_tokens_change_nothing_before_them() -> None:
    tensors = single(B=1, L=30, E=4, N=4)
    before, _ = scan.selective_scan(**tensors, delta_softplus=True)
    for name in ("u", "delta", "B", "C", "z"):
        tensors[name][:, 17:] += 1.0
    after, _ = scan.selective_scan(**tensors, delta_softplus=True)
    assert torch.equal(before[:, :17], after[:, :17])
    assert not torch.equal(before[:, 17:], after[:, 17:])


def test_extreme_steps_stay_finite() -> None:
    tensors = single(B=1, L=20, E=4, N=4)
    for shift in (-30.0, 30.0):
        moved = tensors | {"delta": tensors["delta"] + shift}
        wide = {k: t.cpu() for k, t in cast(moved, torch.float64).items()}
        expected = values_and_gradients(reference.selective_scan, wide, delta_softplus=True)
        assert_same(both(moved), expected, 2e-5)  # sums of large steps cancel


def test_what_it_cannot_take_is_said() -> None:
    with pytest.raises(Unsupported, match="d_state=300"):
        both(single(B=1, L=4, E=2, N=300))
