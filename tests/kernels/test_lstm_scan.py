"""The compiled backends of the LSTM's recurrence: sizes around their blocks, states, documents, memory, threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import Unsupported, record_backends, triton_can_run, use_backend
from crossover.kernels.lstm_scan import cpu, reference
from crossover.kernels.simd import LANES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

MODULES: dict[str, Any] = {"cpu": cpu}
if triton_can_run():
    from crossover.kernels.lstm_scan import triton_kernels

    MODULES["triton"] = triton_kernels

OPTIONAL = ("initial_state", "starts")
each_backend = pytest.mark.parametrize("scan", [m.lstm_scan for m in MODULES.values()], ids=MODULES.keys())
each_module = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES.keys())
needs_triton = pytest.mark.skipif("triton" not in MODULES, reason="Triton cannot run here")


def inputs(B: int, L: int, E: int) -> dict[str, Tensor]:
    """All inputs in float64, with a weight that neither forgets nor saturates."""
    tensors = ops.lstm_scan.cases.example(B=B, L=L, E=E)
    return tensors | {"weight": tensors["weight"] * E**-0.5}


def single(B: int = 2, L: int = 11, E: int = 5) -> dict[str, Tensor]:
    return cast(inputs(B, L, E), torch.float32)


def check(scan: Callable[..., Any], tensors: dict[str, Tensor]) -> None:
    # 1e-6: float32 has 6e-8, of which sums over cells and tokens lose some
    actual, expected = (
        values_and_gradients(scan, cast(tensors, torch.float32)),
        values_and_gradients(reference.lstm_scan, tensors),
    )
    assert_same(actual, expected, 1e-6)


def assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {k for k in a if not torch.equal(a[k], b[k])} == set()


@settings(max_examples=15)
@given(
    B=st.integers(1, 9),
    L=st.integers(1, 12),
    E=st.integers(1, 70),
    given_=st.sets(st.sampled_from(OPTIONAL)),
    seed=st.integers(0, 2**16),
)
def test_the_cpu_path_matches_the_definition_for_any_sizes(B: int, L: int, E: int, given_: set[str], seed: int) -> None:
    torch.manual_seed(seed)
    check(cpu.lstm_scan, {k: t for k, t in inputs(B, L, E).items() if k not in OPTIONAL or k in given_})


@needs_triton
@pytest.mark.parametrize(("B", "L", "E"), [(17, 3, 3), (2, 2, 33), (1, 3, 64)])
def test_several_programs_and_blocks_of_cells_match_the_definition(B: int, L: int, E: int) -> None:
    check(MODULES["triton"].lstm_scan, inputs(B, L, E))


@each_backend
@pytest.mark.parametrize("cut", [1, 2, 7])
def test_state_and_its_gradient_carry_across_a_split(scan: Callable[..., Any], cut: int) -> None:
    def split(gates: Tensor, weight: Tensor, initial_state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        y1, middle = scan(gates[:, :cut], weight, initial_state, starts[:, :cut])
        y2, last = scan(gates[:, cut:], weight, middle, starts[:, cut:])
        return torch.cat([y1, y2], 1), last

    tensors = single()
    assert_same(values_and_gradients(split, tensors), values_and_gradients(scan, tensors), 1e-6)


@each_backend
def test_documents_in_a_row_equal_documents_apart(scan: Callable[..., Any]) -> None:
    def apart(gates: Tensor, weight: Tensor, initial_state: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        y1, _ = scan(gates[:, :4], weight, initial_state)
        y2, _ = scan(gates[:, 4:5], weight)
        y3, last = scan(gates[:, 5:], weight)
        return torch.cat([y1, y2, y3], 1), last

    tensors = single(B=1) | {"starts": torch.zeros(1, 11, dtype=torch.bool)}
    tensors["starts"][0, [4, 5]] = True
    assert_same(values_and_gradients(scan, tensors), values_and_gradients(apart, tensors), 1e-6)


@each_backend
def test_nothing_of_a_forgotten_state_comes_back_not_even_nan(scan: Callable[..., Any]) -> None:
    tensors = single(B=1) | {"starts": torch.arange(11)[None] == 5}
    assert values_and_gradients(scan, tensors)["gradient of initial_state"].any()
    tensors["gates"][:, :5] = float("nan")
    y, state = scan(**tensors)
    assert torch.isfinite(y[:, 5:]).all()
    assert torch.isfinite(state).all()
    tensors = single(B=1) | {"starts": torch.arange(11)[None] == 0}
    tensors["initial_state"][:] = float("nan")
    result = values_and_gradients(scan, tensors)
    assert all(torch.isfinite(t).all() for t in result.values())
    assert not result["gradient of initial_state"].any()


@each_backend
def test_output_ignores_the_future_and_other_rows_exactly(scan: Callable[..., Any]) -> None:
    tensors = single(B=3)
    before, _ = scan(**tensors)
    changed = tensors["gates"].clone()
    changed[:, 6:] += 1.0
    changed[1] += 1.0
    after, _ = scan(**tensors | {"gates": changed})
    assert torch.equal(before[::2, :6], after[::2, :6])
    assert not torch.equal(before[::2, 6:], after[::2, 6:])


@each_backend
def test_large_gates_saturate_and_small_ones_keep_their_digits(scan: Callable[..., Any]) -> None:
    tensors = inputs(B=2, L=6, E=5)
    del tensors["starts"]
    # 1e-5: slopes at 1e-6 of the steepest come from differences to one
    for scale, tolerance in ((30.0, 1e-5), (1e-4, 2e-6)):
        scaled = tensors | {k: scale * tensors[k] for k in ("gates", "initial_state")}
        with np.errstate(over="ignore"):  # the interpreter's exponentials of large numbers
            y, state = scan(**cast(scaled, torch.float32))
        expected, expected_state = reference.lstm_scan(**scaled)
        assert relative_error(y / scale, expected / scale) < tolerance
        assert relative_error(state / scale, expected_state / scale) < tolerance


@each_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_gradients_lose_no_more_than_their_rounding(
    scan: Callable[..., Any], dtype: torch.dtype
) -> None:
    tensors = cast(inputs(B=2, L=6, E=5), dtype)
    actual = values_and_gradients(scan, tensors)
    assert (actual["output 0"].dtype, actual["output 1"].dtype) == (dtype, torch.float32)
    expected = values_and_gradients(reference.lstm_scan, cast(tensors, torch.float64))
    assert_same(actual, expected, 2e-2 if dtype == torch.bfloat16 else 2e-3)


@each_backend
def test_nothing_outside_the_inputs_is_read(scan: Callable[..., Any]) -> None:
    tensors = single(E=LANES + 1)
    expected = values_and_gradients(scan, tensors)

    def surrounded(t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        wide = torch.full([n + 6 for n in t.shape], float("nan"))
        return wide[tuple(slice(3, n + 3) for n in t.shape)].copy_(t)

    actual = values_and_gradients(lambda **t: scan(**{k: surrounded(v) for k, v in t.items()}), tensors)
    assert_same(actual, expected, 1e-7)


def test_the_cpu_path_writes_only_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    margin, mark, allocated, empty = 64, 12345.0, [], torch.empty

    def guarded(*size: Any, **others: Any) -> Tensor:
        if others != {"dtype": torch.float32} or not all(isinstance(n, int) for n in size):
            return empty(*size, **others)
        memory = torch.full((torch.Size(size).numel() + 2 * margin,), mark)
        allocated.append(memory)
        return memory[margin:-margin].fill_(float("nan")).view(size)

    tensors = single(B=5, E=LANES + 1)
    expected = values_and_gradients(cpu.lstm_scan, tensors)
    monkeypatch.setattr(torch, "empty", guarded)
    assert_equal_bits(values_and_gradients(cpu.lstm_scan, tensors), expected)
    assert len(allocated) >= 6
    assert all((m[:margin] == mark).all() and (m[-margin:] == mark).all() for m in allocated)


def test_the_cpu_path_gives_the_same_bits_on_any_number_of_threads() -> None:
    tensors, n_threads = single(B=13, E=20), torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3, 8):
            torch.set_num_threads(n)
            results.append(values_and_gradients(cpu.lstm_scan, tensors))
            del results[-1]["gradient of weight"]  # PyTorch's matrix product, whose bits can depend on the threads
    finally:
        torch.set_num_threads(n_threads)
    for result in results[1:]:
        assert_equal_bits(result, results[0])


@each_module
def test_activated_gates_are_kept_only_for_a_backward(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    keeps: list[bool] = []
    inner = module._scan
    monkeypatch.setattr(module, "_scan", lambda *args: keeps.append(args[-1]) or inner(*args))
    tensors = single(L=2)
    module.lstm_scan(**tensors)
    tensors["weight"].requires_grad_()
    module.lstm_scan(**tensors)
    with torch.no_grad():
        module.lstm_scan(**tensors)
    assert keeps == [False, True, False]
    t = (tensors["gates"], tensors["weight"].detach(), tensors["initial_state"], None)
    assert [x.numel() > 0 for keep in (False, True) for x in inner(*t, keep)[2:]] == [False, False, True, True]


@each_module
def test_custom_operators_are_registered_soundly(module: Any) -> None:
    tensors = single(L=4)
    t = {k: tensors[k].requires_grad_() for k in ("gates", "weight", "initial_state")}
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(module._scan, (*t.values(), tensors["starts"], True), test_utils=checks)
    plain = [x.detach() for x in t.values()]
    y, state, activated, cells = module._scan(*plain, tensors["starts"], True)
    backward = (y, state, *plain[1:], tensors["starts"], y, activated, cells)
    torch.library.opcheck(module._scan_backward, backward, test_utils=checks)


def test_compiles_into_one_graph() -> None:
    def loss(gates: Tensor) -> Tensor:
        y, state = ops.lstm_scan(2 * gates, weight)
        return y.square().sum() + state.sum()

    tensors = single(L=4)
    gates, weight = tensors["gates"].requires_grad_(), tensors["weight"]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(gates), gates), torch.autograd.grad(loss(gates), gates))


@each_backend
def test_one_token_is_a_plain_step(scan: Callable[..., Any]) -> None:
    check(scan, inputs(B=3, L=1, E=7))


@pytest.mark.parametrize("backend", MODULES)
def test_double_precision_is_refused(backend: str) -> None:
    with use_backend(backend), pytest.raises(Unsupported, match="float64"):
        ops.lstm_scan(**inputs(1, 2, 3))


def test_the_compiled_path_runs_by_default_on_the_cpu() -> None:
    with record_backends() as used:
        ops.lstm_scan(**single())
    assert used == {"lstm_scan": ("cpu",)}
