"""S4's Triton kernels, and what only they can get wrong: tiles, layouts, pairs of reals, memory beyond the ends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import Unsupported, triton_can_run, use_backend
from crossover.kernels.long_conv import reference, torch_impl
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

if not triton_can_run():
    pytest.skip("Triton cannot run here", allow_module_level=True)

from crossover.kernels.long_conv import triton_kernels
from crossover.kernels.triton_kernels import record_launches

ALONG = ("u", "starts")
"""Arguments with an axis of tokens."""

SHIPPED = {name: getattr(triton_kernels, name) for name in ("BLOCK", "STEP", "most_columns")}
"""Tiles of long_conv on a GPU, in whose place tests have smaller ones."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, and several spans or blocks in few steps."""
    monkeypatch.setattr(triton_kernels, "ENOUGH_THREADS", 0)
    monkeypatch.setattr(triton_kernels, "SPAN", 64)
    for name, small in (("BLOCK", 32), ("STEP", 16), ("most_columns", lambda dtype: 16)):
        monkeypatch.setattr(triton_kernels, name, small)


def single(B: int = 2, L: int = 19, E: int = 5, N: int = 3) -> dict[str, Tensor]:
    """All inputs of ssm_scan in float32."""
    return cast(ops.ssm_scan.cases.example(B=B, L=L, E=E, N=N), torch.float32)


def scanned(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return values_and_gradients(triton_kernels.ssm_scan, tensors)


def check_scan(tensors: dict[str, Tensor]) -> None:
    # 2e-6: float32 has 6e-8, of which sums over rows and tokens lose some
    actual, expected = scanned(cast(tensors, torch.float32)), values_and_gradients(reference.ssm_scan, tensors)
    assert_same(actual, expected, 2e-6)


@pytest.mark.parametrize("L", [1, 2, 7, 8, 9, 24])
def test_any_length_around_a_tile_matches_the_definition(L: int) -> None:
    check_scan(ops.ssm_scan.cases.example(B=2, L=L, E=3, N=3))


@pytest.mark.parametrize(("E", "N"), [(140, 1), (33, 5), (3, 33)])
@pytest.mark.parametrize("threads", [0, 1 << 30], ids=["states in registers", "states over lanes"])
def test_every_layout_matches_the_definition(E: int, N: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "ENOUGH_THREADS", threads)
    check_scan(ops.ssm_scan.cases.example(B=1, L=9, E=E, N=N))


def test_layouts_fill_a_warp_and_hold_every_state() -> None:
    for batch, E, N in ((1, 1, 1), (1, 33, 5), (8, 2048, 32), (64, 256, 256)):
        config = triton_kernels.configuration(batch, E, N)
        assert config["NL"] * config["DL"] == 32
        assert config["W"] == config["num_warps"]
        assert config["M"] * config["NL"] >= N


@pytest.mark.parametrize("absent", ["D", "initial_state", "starts"])
def test_optional_inputs_may_be_absent(absent: str) -> None:
    tensors = ops.ssm_scan.cases.example(B=2, L=11, E=3, N=3)
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
    tensors = ops.ssm_scan.cases.example(B=1, L=300, E=2, N=2)
    tensors["A"] = torch.complex(torch.zeros(2, 2), torch.tensor([[0.0, 1e-3], [0.5, 3.0]])).to(torch.complex128)
    tensors["starts"][:] = False
    expected = values_and_gradients(reference.ssm_scan, tensors)
    actual, plain = (
        values_and_gradients(scan, cast(tensors, torch.float32))
        for scan in (triton_kernels.ssm_scan, reference.ssm_scan)
    )
    for key, e in expected.items():  # the powers of a rounded factor drift in the definition as well
        assert relative_error(actual[key], e) <= 2 * relative_error(plain[key], e) + 2e-6, key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_lose_no_more_than_their_rounding(dtype: torch.dtype) -> None:
    tensors = cast(ops.ssm_scan.cases.example(B=2, L=11, E=3, N=3), dtype)
    actual = scanned(tensors)
    assert (actual["output 0"].dtype, actual["output 1"].dtype) == (dtype, torch.complex64)
    wide = {k: t.to(torch.complex128) if t.is_complex() else t for k, t in cast(tensors, torch.float64).items()}
    assert_same(actual, values_and_gradients(reference.ssm_scan, wide), 1e-2 if dtype == torch.bfloat16 else 1e-3)


@pytest.mark.parametrize("length", [1, 31, 32, 33, 64, 65, 130])
def test_a_kernel_of_any_length_matches_the_definition(length: int) -> None:
    tensors = ops.ssm_kernel.cases.example(E=2, N=5)
    expected = values_and_gradients(reference.ssm_kernel, tensors, length=length)
    narrow = cast(tensors, torch.float32)
    actual = values_and_gradients(triton_kernels.ssm_kernel, narrow, length=length)
    plain = values_and_gradients(reference.ssm_kernel, narrow, length=length)
    for key, e in expected.items():  # the phase of a late step is a large number, rounded in the definition too
        assert relative_error(actual[key], e) <= 2 * relative_error(plain[key], e) + 2e-6, key


def test_many_poles_make_one_kernel() -> None:
    tensors = cast(ops.ssm_kernel.cases.example(E=3, N=70), torch.float32)
    with use_backend("triton"):
        actual = values_and_gradients(ops.ssm_kernel, tensors, length=20)
    wide = cast(tensors, torch.float64)
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
    for D in (None, torch.randn(2, requires_grad=True)):
        conv = (torch.randn(2, 2, 33, requires_grad=True), torch.randn(2, 33, requires_grad=True), D)
        torch.library.opcheck(triton_kernels._conv, conv, test_utils=checks)


def test_what_it_cannot_take_is_said() -> None:
    t, many = single(L=4), torch.zeros(5, 300, dtype=torch.complex64)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("complex128", lambda: triton_kernels.ssm_scan(t["u"], t["A"].to(torch.complex128), t["C"])),
        ("complex128", lambda: triton_kernels.ssm_kernel(t["A"].to(torch.complex128), t["C"], 4)),
        ("300 poles", lambda: triton_kernels.ssm_scan(t["u"], many, many)),
        ("300 poles", lambda: triton_kernels.ssm_kernel(many, many, 4)),
    ]
    for reason, call in calls:
        with pytest.raises(Unsupported, match=reason):
            call()


def convolution(B: int = 3, L: int = 77, E: int = 2, *, optional: bool = True) -> dict[str, Tensor]:
    """All inputs of long_conv in float32."""
    return cast(ops.long_conv.cases.example(B=B, L=L, E=E, optional=optional), torch.float32)


def convolved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return values_and_gradients(triton_kernels.long_conv, tensors)


def check_convolution(tensors: dict[str, Tensor]) -> None:
    # 2e-6: float32 has 6e-8, of which sums over rows and tokens lose some
    expected = values_and_gradients(reference.long_conv, cast(tensors, torch.float64))
    assert_same(convolved(tensors), expected, 2e-6)


# the interpreter is too slow to shrink with
@settings(max_examples=8, phases=(Phase.explicit, Phase.generate))
@given(st.integers(1, 5), st.integers(1, 110), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_a_convolution_of_any_sizes_matches_the_definition(B: int, L: int, E: int, optional: bool, seed: int) -> None:
    torch.manual_seed(seed)
    check_convolution(convolution(B, L, E, optional=optional))


@pytest.mark.parametrize("L", [1, 31, 32, 33, 64, 65])
def test_blocks_of_a_convolution_need_not_fit(L: int) -> None:
    check_convolution(convolution(1, L, 1))


@pytest.mark.parametrize(("B", "L"), [(37, 40), (1, 600)])
def test_rows_and_blocks_beyond_those_of_one_program_are_convolved_too(B: int, L: int) -> None:
    rows, blocks = triton_kernels.columns(B, L, 16)
    assert rows < B or blocks * triton_kernels.BLOCK < L
    check_convolution(convolution(B, L, 1))


def test_the_blocks_that_a_gpu_takes_match_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SHIPPED.items():
        monkeypatch.setattr(triton_kernels, name, size)
    check_convolution(convolution(3, 333, 2))


def test_columns_fill_the_matrix_units_with_rows_first() -> None:
    for batch, length in ((1, 1), (1, 2048), (3, 100), (8, 2048), (500, 2048)):
        for most in (16, 32, 64, 128):
            rows, blocks = triton_kernels.columns(batch, length, most)
            assert 16 <= rows * blocks <= most
            assert rows >= min(batch, most)


def test_transposed_and_repeated_inputs_are_convolved_as_they_are() -> None:
    tensors = convolution()
    strided = {
        "u": tensors["u"].permute(2, 0, 1).contiguous().permute(1, 2, 0),
        "kernel": tensors["kernel"].mT.contiguous().mT,
        "D": tensors["D"].repeat_interleave(3)[::3],
    }
    assert all(not t.is_contiguous() for t in strided.values())
    actual, expected = convolved(strided), convolved(tensors)
    assert {k for k in expected if not torch.equal(actual[k], expected[k])} == set()
    # autograd hands a sum's gradient down as one number that is repeated by zero strides
    summed = values_and_gradients(lambda **t: triton_kernels.long_conv(**t).sum(), tensors)
    wide = values_and_gradients(lambda **t: reference.long_conv(**t).sum(), cast(tensors, torch.float64))
    assert_same(summed, wide, 1e-5)


def test_a_convolution_is_contiguous_and_repeats_bit_for_bit() -> None:
    tensors = convolution()
    first, second = convolved(tensors), convolved(tensors)
    assert {k for k in first if not torch.equal(first[k], second[k])} == set()
    assert triton_kernels.long_conv(**tensors).is_contiguous()


def test_a_convolution_ignores_the_future_exactly() -> None:
    tensors = convolution()
    before = triton_kernels.long_conv(**tensors)
    for cut in (10, 32, 41):
        changed = tensors["u"].clone()
        changed[:, cut:] += 1.0
        after = triton_kernels.long_conv(**tensors | {"u": changed})
        assert torch.equal(before[:, :cut], after[:, :cut])
        assert not torch.equal(before[:, cut:], after[:, cut:])


def test_rows_and_channels_are_convolved_apart() -> None:
    tensors = convolution()
    expected = triton_kernels.long_conv(**tensors)
    tensors["u"][1, :, 1] = float("nan")
    actual = triton_kernels.long_conv(**tensors)
    assert actual[1, :, 1].isnan().all()
    actual[1, :, 1] = expected[1, :, 1]
    assert torch.equal(actual, expected)


def test_nothing_outside_the_inputs_of_a_convolution_is_read() -> None:
    tensors = convolution()
    x, kernel, D = tensors["u"].mT.contiguous(), tensors["kernel"], tensors["D"]

    def run(x: Tensor, kernel: Tensor, D: Tensor) -> tuple[Tensor, ...]:
        y = triton_kernels.conv_forward(x, kernel, D)
        return y, triton_kernels.input_gradient(x, kernel, D), triton_kernels.kernel_gradient(x, x)

    def surrounded(t: Tensor) -> Tensor:
        wide = torch.full((t.numel() + 8192,), float("nan"))
        return wide[4096:-4096].view(t.shape).copy_(t)

    actual, expected = run(*(surrounded(t) for t in (x, kernel, D))), run(x, kernel, D)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


@pytest.mark.parametrize(("dtype", "scale"), [(torch.bfloat16, 1.0), (torch.float16, 1e-7)], ids=str)
def test_a_half_precision_convolution_loses_no_more_than_the_rounding_of_its_output(
    dtype: torch.dtype, scale: float
) -> None:
    # an even input almost cancels under a kernel of alternating sign; in half precision the kernel would not cancel
    u = (1 + 0.01 * torch.randn(2, 70, 2)).to(dtype) / scale**0.5
    kernel = (scale * (1 + 0.1 * torch.rand(2, 70)) * (-1) ** torch.arange(70)).requires_grad_()
    y = triton_kernels.long_conv(u, kernel)
    grad = torch.randn_like(y)
    (grad_kernel,) = torch.autograd.grad(y, kernel, grad)
    wide = kernel.detach().double().requires_grad_()
    expected = reference.long_conv(u.double(), wide)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    off = (y.double() - expected).abs()
    # eps: the interpreter cuts off where a GPU rounds; 16 bits of the kernel are left
    floor = 2**-16 * (u.double().abs().max() * wide.abs().sum())
    assert (off <= torch.finfo(dtype).eps * expected.abs() + floor).all()
    assert y.dtype == dtype
    assert relative_error(grad_kernel, expected_grad) < 1e-6  # of products that are exact


def test_gradients_that_nobody_asks_for_are_not_computed() -> None:
    def launched(*wanted: str) -> list[bool | None]:
        tensors = {k: t.requires_grad_(k in wanted) for k, t in convolution(1, 9, 1).items()}
        y = triton_kernels.long_conv(**tensors)
        with record_launches() as launches:
            y.backward(torch.ones_like(y))
        return [launch.options.get("TRANSPOSED") for launch in launches]

    assert launched("u") == [True]
    assert launched("kernel") == launched("D") == [None]
    assert launched("u", "D") == [True, None]


def test_a_long_convolution_is_left_to_the_fft(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "products_win", lambda batch, length, dtype: length <= 50)
    with record_launches() as launches:
        triton_kernels.long_conv(**convolution(1, 50, 1))
        assert len(launches) == 1
        tensors = convolution(1, 51, 1)
        assert torch.equal(triton_kernels.long_conv(**tensors), torch_impl.long_conv(**tensors))
        assert len(launches) == 1


def test_products_win_up_to_a_length_that_half_precision_extends(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in SHIPPED.items():
        monkeypatch.setattr(triton_kernels, name, size)

    def longest(batch: int, dtype: torch.dtype) -> int:
        wins = [triton_kernels.products_win(batch, length, dtype) for length in range(64, 16384, 64)]
        assert wins == sorted(wins, reverse=True)
        return 64 * sum(wins)

    for batch in (1, 8, 200):
        assert 256 <= longest(batch, torch.float32) < longest(batch, torch.bfloat16) < 8192
    assert longest(1, torch.bfloat16) < longest(8, torch.bfloat16)  # more rows waste less on a block's own past


def test_a_convolution_of_unknown_sizes_compiles_into_one_graph() -> None:
    tensors = convolution(2, 40, 3)
    with use_backend("triton"):
        compiled = torch.compile(ops.long_conv, fullgraph=True, backend="aot_eager", dynamic=True)
        actual = values_and_gradients(lambda **t: compiled(**t), tensors)
    assert_same(actual, convolved(tensors), 1e-7)
