"""The vector functions against float64."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from crossover.kernels import simd
from crossover.kernels.simd import (
    BLOCK_ROWS,
    LANES,
    PAIR,
    TILE,
    Floats1,
    Floats2,
    cos_and_sin,
    exp,
    exp2,
    kernel,
    load,
    load_first,
    sigmoid,
    softplus,
    store,
    store_first,
    tanh,
)


@kernel
def apply_exp2(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, exp2(load(x, i)))


@kernel
def apply_exp(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, exp(load(x, i)))


@kernel
def apply_sigmoid(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, sigmoid(load(x, i)))


@kernel
def apply_softplus(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, softplus(load(x, i)))


@kernel
def apply_tanh(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, tanh(load(x, i)))


@kernel
def apply_cos_and_sin(x: Floats1, y: Floats2) -> None:
    for i in range(0, len(x), LANES):
        c, s = cos_and_sin(load(x, i))
        store(y, (0, i), c)
        store(y, (1, i), s)


@kernel
def apply_usual_nan(x: Floats1, y: Floats1) -> None:
    for i in range(0, len(x), LANES):
        store(y, i, simd.usual_nan(load(x, i)))


@kernel
def multiply(a: Floats2, b: Floats2, begin: int, c: Floats2, d: Floats2) -> None:
    simd.product(c, BLOCK_ROWS, PAIR, a, b, begin, a.shape[0])
    simd.add_product(d, BLOCK_ROWS, PAIR, a, b, begin, a.shape[0])


@kernel
def turn(x: Floats2, y: Floats2, largest: Floats1) -> None:
    simd.transpose(x, 0, LANES, y)
    store(largest, 0, simd.highest(simd.load_tile(x, (1, 0))))


@kernel
def copy_first(x: Floats1, y: Floats1, n: int) -> None:
    store_first(y, 0, load_first(x, 0, n), n)


def apply(function: Any, x: np.ndarray) -> np.ndarray:
    y = np.full_like(x, np.nan)
    function(x, y)
    return y


def grid(low: float, high: float) -> np.ndarray:
    return np.linspace(low, high, 2**16, dtype=np.float32)


@pytest.mark.parametrize(
    ("function", "exact", "low", "high", "units"),
    [
        (apply_exp2, np.exp2, -126, 127.99, 3),
        (apply_exp2, np.exp2, -1e-3, 1e-3, 1),
        (apply_exp, np.exp, -87, 88, 3),
        (apply_sigmoid, lambda x: 1 / (1 + np.exp(-x)), -87, 88, 4),
        (apply_softplus, lambda x: np.logaddexp(0, x), -87, 88, 5),
        (apply_softplus, lambda x: np.logaddexp(0, x), -1, 1, 5),
    ],
)
def test_functions_are_accurate_to_units_in_the_last_place(
    function: Any, exact: Any, low: float, high: float, units: int
) -> None:
    x = grid(low, high)
    y = exact(x.astype(np.float64))
    worst = float(np.max(np.abs(apply(function, x) - y) / np.spacing(y.astype(np.float32))))
    assert worst <= units


def test_tanh_of_a_vector_is_accurate_where_it_is_small_and_where_it_is_one() -> None:
    x = np.concatenate([np.linspace(-12, 12, 4000), np.geomspace(1e-30, 1, 96)]).astype(np.float32)
    y = np.full_like(x, np.nan)
    apply_tanh(x, y)
    assert np.max(np.abs(y / np.tanh(x.astype(np.float64)) - 1)) < 4 * 2**-23
    special = np.tile(np.array([0, np.nan, np.inf, -np.inf], np.float32), LANES)
    apply_tanh(special, result := np.empty_like(special))
    np.testing.assert_allclose(result, np.tanh(special), rtol=3e-7)


def test_angles_of_many_turns_keep_their_cosine_and_sine() -> None:
    special = np.tile(np.array([0, np.nan, np.inf, -np.inf], np.float32), LANES)
    for x, error in ((grid(-4, 4), 5e-7), (grid(-1e6, 1e6), 5e-7), (special, 0)):
        with np.errstate(invalid="ignore"):
            exact = np.stack([np.cos(x.astype(np.float64)), np.sin(x.astype(np.float64))])
        apply_cos_and_sin(x, y := np.empty_like(exact, np.float32))
        np.testing.assert_allclose(y, exact, rtol=0, atol=error)
    far = grid(-1e9, 1e9)
    apply_cos_and_sin(far, y := np.empty((2, len(far)), np.float32))
    assert np.abs(y).max() <= 1


def test_functions_reach_their_limits() -> None:
    nan, inf = np.nan, np.inf
    x = np.array([-inf, -1e30, -3e3, -200, -150, 200, 1e30, inf, nan] + [0] * (32 - 9), np.float32)
    for function, above in {
        apply_exp2: [inf, inf, inf],
        apply_exp: [inf, inf, inf],
        apply_sigmoid: [1, 1, 1],
        apply_softplus: [200, np.float32(1e30), inf],
    }.items():
        y = apply(function, x)
        assert y[:8].tolist() == [0, 0, 0, 0, 0, *above]
        assert np.isnan(y[8])


def test_exp2_is_sound_next_to_its_limits() -> None:
    low, high = apply(apply_exp2, grid(-127.5, -125.5)), apply(apply_exp2, grid(127, 128.5))
    tiny = np.finfo(np.float32).tiny
    assert np.all((low >= 0) & (low <= np.exp2(-125.49)))
    assert np.all(np.abs(low - np.exp2(grid(-127.5, -125.5))) <= tiny)
    assert np.all(high >= np.exp2(126.99))
    assert np.all(np.isinf(high) == (grid(127, 128.5) >= 128))


@pytest.mark.quick
@pytest.mark.parametrize("n", range(LANES + 1))
def test_partial_vectors_touch_nothing_else(n: int) -> None:
    x, y = np.arange(1, 33, dtype=np.float32), np.full(32, -1, np.float32)
    copy_first(x, y, n)
    assert y.tolist() == [*x[:n].tolist(), *[-1.0] * (32 - n)]


def test_any_nan_becomes_the_usual_one_and_nothing_else_changes() -> None:
    bits = np.array([0x7FFFFFFF, 0xFFC00001, 0xFF800000, 0x7F800000, 0x80000000, 0x3F800001] + [0] * 26, np.uint32)
    found = apply(apply_usual_nan, bits.view(np.float32)).view(np.uint32)
    assert (found == np.where(np.arange(32) < 2, 0x7FC00000, bits)).all()


@pytest.mark.parametrize("begin", [0, 2])
def test_a_block_of_a_product_is_that_block_and_no_more(begin: int) -> None:
    a, b = (np.random.randn(5, n).astype(np.float32) for n in (3 * BLOCK_ROWS, 3 * PAIR))
    c, d = (np.random.randn(3 * BLOCK_ROWS, 3 * PAIR).astype(np.float32) for _ in range(2))
    rows, columns = slice(BLOCK_ROWS, 2 * BLOCK_ROWS), slice(PAIR, 2 * PAIR)
    block = a[begin:, rows].T.astype(np.float64) @ b[begin:, columns]
    expected_c, expected_d = c.copy(), d.copy()
    expected_c[rows, columns] = block
    expected_d[rows, columns] += block
    multiply(np.asfortranarray(a), b, begin, c, d)
    np.testing.assert_allclose(c, expected_c, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(d, expected_d, rtol=2e-5, atol=2e-6)


def test_a_block_is_transposed_and_the_largest_of_each_vector_found() -> None:
    x, y = np.random.randn(LANES, TILE).astype(np.float32), np.zeros((TILE, LANES), np.float32)
    turn(x, y, largest := np.zeros(4, np.float32))
    expected = np.zeros_like(y)
    expected[LANES : 2 * LANES] = x[:, LANES : 2 * LANES].T
    assert np.array_equal(y, expected)
    assert np.array_equal(largest, x[1].reshape(4, LANES).max(1))


WIDEST_REGISTER = """
import numba
from crossover.kernels.simd import LANES, load, store
@numba.njit("void(float32[:])")
def double(x):
    store(x, 0, load(x, 0) + load(x, 0))
(assembly,) = double.inspect_asm().values()
print(LANES, *[width for name, width in (("zmm", 16), ("ymm", 8), ("xmm", 4)) if name in assembly][:1])
"""


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="registers have other names elsewhere")
@pytest.mark.parametrize("limit", [{}, {"NUMBA_CPU_NAME": "haswell", "NUMBA_CPU_FEATURES": "+avx2,+fma"}])
def test_a_vector_fills_one_register_of_the_processor_that_numba_compiles_for(limit: dict[str, str]) -> None:
    child = subprocess.run(
        [sys.executable, "-c", WIDEST_REGISTER], env=os.environ | limit, check=True, capture_output=True, text=True
    )
    lanes, register = map(int, child.stdout.split())
    assert lanes == register == (8 if limit else LANES)
