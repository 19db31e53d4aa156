"""S4's Triton kernels, and what only they can get wrong: tiles, layouts, pairs of reals, memory beyond the ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.check import assert_same, example, relative_error, to, values_and_gradients
from crossover.kernels.dispatch import Unsupported, triton_can_run, use_backend
from crossover.kernels.long_conv import reference
from torch import Tensor

if not triton_can_run():
    pytest.skip("Triton cannot run here", allow_module_level=True)

from crossover.kernels.long_conv import triton_kernels

ALONG = ("u", "starts")
"""What has an axis of tokens."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, and several spans in few steps."""
    monkeypatch.setattr(triton_kernels, "ENOUGH_THREADS", 0)
    monkeypatch.setattr(triton_kernels, "SPAN", 64)


def single(B: int = 2, L: int = 19, E: int = 5, N: int = 3) -> dict[str, Tensor]:
    """All inputs of ssm_scan in float32."""
    return to(example("ssm_scan", B=B, L=L, E=E, N=N), torch.float32)


def scanned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return values_and_gradients(triton_kernels.ssm_scan, tensors)


def check_scan(tensors: dict[str, Tensor]) -> None:
    # 2e-6: float32 has 6e-8, of which sums over rows and tokens lose some
    actual, expected = scanned(to(tensors, torch.float32)), values_and_gradients(reference.ssm_scan, tensors)
    assert_same(actual, expected, 2e-6)


@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 24])
def test_any_length_around_a_tile_matches_the_definition(L: int) -> None:
    check_scan(example("ssm_scan", B=2, L=L, E=3, N=3))


@pytest.mark.parametrize(("E", "N"), [(140, 1), (33, 5), (3, 33)])
@pytest.mark.parametrize("threads", [0, 1 << 30], ids=["states in registers", "states over lanes"])
def test_every_layout_matches_the_definition(E: int, N: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "ENOUGH_THREADS", threads)
    check_scan(example("ssm_scan", B=1, L=9, E=E, N=N))


def test_layouts_fill_a_warp_and_hold_every_state() -> None:
    for batch, E, N in ((1, 1, 1), (1, 33, 5), (8, 2048, 32), (64, 256, 256)):
        config = triton_kernels.configuration(batch, E, N)
        assert config["NL"] * config["DL"] == 32
        assert config["W"] == config["num_warps"]
        assert config["M"] * config["NL"] >= N


@pytest.mark.parametrize("absent", ["D", "initial_state", "starts"])
def test_optional_inputs_may_be_absent(absent: str) -> None:
    tensors = example("ssm_scan", B=2, L=11, E=3, N=3)
    check_scan({k: t for k, t in tensors.items() if k != absent})


@pytest.mark.parametrize("cut", [1, 8, 13])
def test_state_and_its_gradient_carry_across_a_split(cut: int) -> None:
    def split(**tensors: Any) -> tuple[Tensor, Tensor]:
        left = {k: t[:, :cut] if k in ALONG else t for k, t in tensors.items()}
        right = {k: t[:, cut:] if k in ALONG else t for k, t in tensors.items()}
        y1, middle = triton_kernels.ssm_scan(**left)
        y2, last = triton_kernels.ssm_scan(**right | {"initial_state": middle})
        return torch.cat([y1, y2], 1), last

    tensors = single()
    assert_same(values_and_gradients(split, tensors), scanned(tensors), 1e-6)  # the same sums, cut elsewhere


def test_documents_in_a_row_equal_documents_apart() -> None:
    def apart(**tensors: Any) -> tuple[Tensor, Tensor]:
        ys, state = [], tensors["initial_state"]
        for part in (slice(0, 4), slice(4, 5), slice(5, 19)):
            fixed = {k: tensors[k] for k in ("A", "C", "D")}
            y, last = triton_kernels.ssm_scan(tensors["u"][:, part], **fixed, initial_state=state)
            ys, state = [*ys, y], None
        return torch.cat(ys, 1), last

    tensors = single(B=1) | {"starts": torch.zeros(1, 19, dtype=torch.bool)}
    tensors["starts"][0, [4, 5]] = True
    assert_same(scanned(tensors), values_and_gradients(apart, tensors), 1e-6)


def test_nothing_of_a_forgotten_state_comes_back_not_even_nan() -> None:
    tensors = single(B=1) | {"starts": torch.arange(19)[None] == 5}
    tensors["u"][:, :5] = float("nan")
    y, state = triton_kernels.ssm_scan(**tensors)
    assert torch.isfinite(y[:, 5:]).all()
    assert torch.isfinite(torch.view_as_real(state)).all()
    tensors = single(B=1) | {"starts": torch.arange(19)[None] == 0}
    tensors["initial_state"][:] = float("nan")
    result = scanned(tensors)
    assert all(torch.isfinite(torch.view_as_real(t) if t.is_complex() else t).all() for t in result.values())
    assert not result["gradient of initial_state"].any()


def test_output_ignores_the_future_exactly() -> None:
    tensors = single(B=1)
    before, _ = triton_kernels.ssm_scan(**tensors)
    changed = tensors["u"].clone()
    changed[:, 10:] += 1.0
    after, _ = triton_kernels.ssm_scan(**tensors | {"u": changed})
    assert torch.equal(before[:, :10], after[:, :10])
    assert not torch.equal(before[:, 10:], after[:, 10:])


def test_poles_on_the_unit_circle_keep_their_gradients_over_many_tokens() -> None:
    tensors = example("ssm_scan", B=1, L=300, E=2, N=2)
    tensors["A"] = torch.complex(torch.zeros(2, 2), torch.tensor([[0.0, 1e-3], [0.5, 3.0]])).to(torch.complex128)
    tensors["starts"][:] = False
    expected = values_and_gradients(reference.ssm_scan, tensors)
    actual, plain = (
        values_and_gradients(scan, to(tensors, torch.float32)) for scan in (triton_kernels.ssm_scan, reference.ssm_scan)
    )
    for key, e in expected.items():  # the powers of a rounded factor drift in the definition as well
        assert relative_error(actual[key], e) <= 2 * relative_error(plain[key], e) + 2e-6, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_lose_no_more_than_their_rounding(dtype: torch.dtype) -> None:
    tensors = to(example("ssm_scan", B=2, L=11, E=3, N=3), dtype)
    actual = scanned(tensors)
    assert (actual["output 0"].dtype, actual["output 1"].dtype) == (dtype, torch.complex64)
    wide = {k: t.to(torch.complex128) if t.is_complex() else t for k, t in to(tensors, torch.float64).items()}
    assert_same(actual, values_and_gradients(reference.ssm_scan, wide), 1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 130])
def test_a_kernel_of_any_length_matches_the_definition(length: int) -> None:
    tensors = example("ssm_kernel", E=2, N=5)
    expected = values_and_gradients(reference.ssm_kernel, tensors, length=length)
    narrow = to(tensors, torch.float32)
    actual = values_and_gradients(triton_kernels.ssm_kernel, narrow, length=length)
    plain = values_and_gradients(reference.ssm_kernel, narrow, length=length)
    for key, e in expected.items():  # the phase of a late step is a large number, rounded in the definition too
        assert relative_error(actual[key], e) <= 2 * relative_error(plain[key], e) + 2e-6, key


def test_many_poles_make_one_kernel() -> None:
    tensors = to(example("ssm_kernel", E=3, N=70), torch.float32)
    with use_backend("triton"):
        actual = values_and_gradients(ops.ssm_kernel, tensors, length=20)
    wide = to(tensors, torch.float64)
    assert_same(actual, values_and_gradients(reference.ssm_kernel, wide, length=20), 5e-6)


def test_the_scan_is_the_convolution_with_the_kernel() -> None:
    tensors = {k: t for k, t in single(L=40).items() if k in ("u", "A", "C")}
    with use_backend("triton"):
        y, _ = ops.ssm_scan(**tensors)
        kernel = ops.ssm_kernel(tensors["A"], tensors["C"], 40)
    torch.testing.assert_close(ops.long_conv(tensors["u"], kernel), y, atol=1e-5, rtol=1e-5)


def test_nothing_outside_the_inputs_is_read() -> None:
    tensors = single(L=11)

    def surrounded(t: Tensor) -> Tensor:
        if not (t.is_floating_point() or t.is_complex()):
            return t
        wide = torch.full((t.numel() + 64,), float("nan"), dtype=t.dtype)
        return wide[32:-32].view(t.shape).copy_(t)

    actual = values_and_gradients(
        lambda **t: triton_kernels.ssm_scan(**{k: surrounded(v) for k, v in t.items()}), tensors
    )
    expected = scanned(tensors)
    assert {k for k in expected if not torch.equal(actual[k], expected[k])} == set()


def test_conjugates_that_are_not_yet_written_out_are_taken() -> None:
    tensors = single(L=9)
    lazy = {k: t.conj() if t.is_complex() else t for k, t in tensors.items()}
    assert lazy["A"].is_conj()
    expected, _ = triton_kernels.ssm_scan(**{k: t.resolve_conj() for k, t in lazy.items()})
    assert torch.equal(triton_kernels.ssm_scan(**lazy)[0], expected)
    kernel = triton_kernels.ssm_kernel(lazy["A"], lazy["C"], 7)
    torch.testing.assert_close(kernel, triton_kernels.ssm_kernel(tensors["A"], tensors["C"], 7))  # 2 Re of conjugates


def test_custom_operators_are_registered_soundly() -> None:
    t = {k: v.requires_grad_(k != "starts") for k, v in single(L=9).items()}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    scan = (t["u"], t["A"], t["C"], t["D"], t["initial_state"], t["starts"])
    torch.library.opcheck(triton_kernels._scan, scan, test_utils=checks)
    torch.library.opcheck(triton_kernels._kernel, (t["A"], t["C"], 9), test_utils=checks)


def test_what_it_cannot_take_is_said() -> None:
    t, many = single(L=4), torch.zeros(5, 300, dtype=torch.complex64)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("complex128", lambda: triton_kernels.ssm_scan(t["u"], t["A"].to(torch.complex128), t["C"])),
        ("complex128", lambda: triton_kernels.ssm_kernel(t["A"].to(torch.complex128), t["C"], 4)),
        ("300 poles", lambda: triton_kernels.ssm_scan(t["u"], many, many)),
        ("300 poles", lambda: triton_kernels.ssm_kernel(many, many, 4)),
        ("float64", lambda: triton_kernels.ssm_scan(t["u"].double(), t["A"], t["C"])),
    ]
    for reason, call in calls:
        with pytest.raises(Unsupported, match=reason):
            call()
