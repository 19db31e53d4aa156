"""The compiled CPU path of the selective scan, and what only it can get wrong: memory, threads, processes, vectors."""

import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import KernelFallbackWarning, Unsupported, record_backends, use_backend
from crossover.kernels.selective_scan import cpu, reference, torch_impl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

OPTIONAL = ("D", "z", "delta_bias", "initial_state", "starts")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


def single(**sizes: Any) -> dict[str, Any]:
    """All inputs in float32."""
    return cast(ops.selective_scan.cases.example(**sizes), torch.float32)


def both(tensors: dict[str, Tensor], function: Callable[..., Any] = cpu.selective_scan) -> dict[str, Tensor]:
    return values_and_gradients(function, tensors, delta_softplus=True)


def assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {k for k in a if not torch.equal(a[k], b[k])} == set()


@settings(max_examples=30)
@given(
    B=st.integers(1, 3),
    L=st.integers(1, 70),
    E=st.integers(1, 48),
    N=st.integers(1, 17),
    given_=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_match_the_definition(
    B: int, L: int, E: int, N: int, given_: set[str], softplus: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    tensors = ops.selective_scan.cases.example(B=B, L=L, E=E, N=N)
    tensors = {k: t for k, t in tensors.items() if k not in OPTIONAL or k in given_}
    if not softplus:
        tensors["delta"] = tensors["delta"].exp() * 0.1
    expected = values_and_gradients(reference.selective_scan, tensors, delta_softplus=softplus)
    actual = values_and_gradients(cpu.selective_scan, cast(tensors, torch.float32), delta_softplus=softplus)
    plain = values_and_gradients(torch_impl.selective_scan, cast(tensors, torch.float32), delta_softplus=softplus)
    # 1e-6: sums taken in another order, and a decay of which the exponent was rounded twice
    errors = {k: (relative_error(actual[k], e), relative_error(plain[k], e)) for k, e in expected.items()}
    assert {k: e for k, e in errors.items() if not e[0] <= 2 * e[1] + 1e-6} == {}


def test_a_long_sequence_of_a_wide_model_stays_accurate() -> None:
    tensors = ops.selective_scan.cases.example(B=1, L=260, E=150, N=16)
    # 2e-6: float32 has 6e-8, of which sums over 260 tokens lose some
    assert_same(both(cast(tensors, torch.float32)), both(tensors, reference.selective_scan), 2e-6)


@pytest.mark.parametrize(
    ("delta", "A"),
    [(-9.2, -1.0), (-30.0, -1.0), (-80.0, -1.0), (25.0, -0.01), (40.0, -1e4), (3.0, -60.0)],
    ids=["dt=1e-4", "dt=1e-13", "dt=1e-35", "no memory loss", "decay 0", "decay near the smallest number"],
)
def test_extreme_steps_and_decays(delta: float, A: float) -> None:
    tensors = ops.selective_scan.cases.example(L=40, optional=False)
    tensors |= {"delta": tensors["delta"] + delta, "A": torch.full_like(tensors["A"], A)}
    tensors["u"] = tensors["u"] / torch.nn.functional.softplus(tensors["delta"])  # keeps the result near 1
    tensors = cast(cast(tensors, torch.float32), torch.float64)  # inputs that float32 can hold
    expected, actual = both(tensors, reference.selective_scan), both(cast(tensors, torch.float32))
    plain = both(cast(tensors, torch.float32), torch_impl.selective_scan)
    for key, e in expected.items():
        scale = e.norm().clamp(min=1e-30)
        error, allowed = ((x[key].double() - e).norm() / scale for x in (actual, plain))
        assert error <= 2 * allowed + 2e-6, key


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], ids=["default", "payload", "negative"])
@pytest.mark.parametrize("name", ["u", "delta", "A", "B", "C", "D", "z", "delta_bias", "initial_state"])
def test_nan_reaches_the_output_of_its_channel_and_nothing_before_it(name: str, bits: int) -> None:
    tensors = single(L=40, E=21)
    del tensors["starts"]
    nan = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    poisoned = tensors[name].clone()
    poisoned[(1, 35, 2) if name in "u delta B C z" else (1, 2, 2) if name == "initial_state" else 2] = nan
    y, _ = cpu.selective_scan(**tensors | {name: poisoned}, delta_softplus=True)
    expected, _ = reference.selective_scan(**tensors | {name: poisoned}, delta_softplus=True)
    assert y.isnan().any()
    assert torch.equal(y.isnan(), expected.isnan())


def test_infinity_goes_through() -> None:
    tensors = single(L=5, optional=False)
    tensors["u"][0, 2, 1] = float("inf")
    y, state = cpu.selective_scan(**tensors, delta_softplus=True)
    expected, expected_state = reference.selective_scan(**tensors, delta_softplus=True)
    torch.testing.assert_close(y, expected, equal_nan=True)
    torch.testing.assert_close(state, expected_state, equal_nan=True)


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 64])
def test_state_and_its_gradient_carry_across_a_split(cut: int) -> None:
    def split(**tensors: Any) -> tuple[Tensor, Tensor]:
        along = {k for k, t in tensors.items() if k in ("u", "delta", "B", "C", "z", "starts")}
        left = {k: t[:, :cut] if k in along else t for k, t in tensors.items() if k != "delta_softplus"}
        right = {k: t[:, cut:] if k in along else t for k, t in tensors.items() if k != "delta_softplus"}
        y1, middle = cpu.selective_scan(**left, delta_softplus=True)
        y2, last = cpu.selective_scan(**right | {"initial_state": middle}, delta_softplus=True)
        return torch.cat([y1, y2], 1), last

    tensors = single(L=70, E=20)
    assert_same(both(tensors, split), both(tensors), 1e-6)  # the same sums, cut elsewhere


def test_documents_in_a_row_equal_documents_apart() -> None:
    tensors = single(B=1, L=70, E=20) | {"starts": torch.zeros(1, 70, dtype=torch.bool)}
    tensors["starts"][0, [10, 42]] = True

    def apart(**tensors: Any) -> tuple[Tensor, Tensor]:
        ys, state = [], tensors["initial_state"]
        for part in (slice(0, 10), slice(10, 42), slice(42, 70)):
            cut = {k: tensors[k][:, part] for k in ("u", "delta", "B", "C", "z")}
            cut |= {k: tensors[k] for k in ("A", "D", "delta_bias")}
            y, last = cpu.selective_scan(**cut, initial_state=state, delta_softplus=True)
            ys, state = [*ys, y], None
        return torch.cat(ys, 1), last

    assert_same(both(tensors), both(tensors, apart), 1e-6)  # the same sums, cut elsewhere


def test_nothing_of_a_forgotten_state_comes_back_not_even_nan() -> None:
    tensors = single(B=1, L=40)
    tensors["starts"] = torch.arange(40)[None] == 5
    tensors["u"][:, :5] = float("nan")
    y, state = cpu.selective_scan(**tensors, delta_softplus=True)
    assert torch.isfinite(y[:, 5:]).all()
    assert torch.isfinite(state).all()
    tensors = single(B=1, L=40)
    tensors["starts"] = torch.arange(40)[None] == 5
    assert both(tensors)["gradient of initial_state"].any()
    tensors["starts"] = torch.arange(40)[None] == 0
    assert not both(tensors)["gradient of initial_state"].any()


def test_takes_slices_transposes_and_broadcasts() -> None:
    tensors = single(B=2, L=37, E=20)
    strided = {k: t.mT.contiguous().mT if t.dim() > 1 else t[:, None].repeat(1, 2)[:, 0] for k, t in tensors.items()}
    strided["u"], strided["z"] = torch.cat([tensors["u"], tensors["z"]], -1).chunk(2, -1)
    strided["B"], strided["C"] = torch.cat([tensors["B"], tensors["C"]], -1).split(5, -1)
    assert sum(not t.is_contiguous() for t in strided.values()) == len(strided)
    assert_equal_bits(both(strided), both(tensors))
    broadcast = tensors | {"u": tensors["u"][:, :1, :1].expand(2, 37, 20)}
    assert_equal_bits(both(broadcast), both({k: t.contiguous() for k, t in broadcast.items()}))
    y, _ = cpu.selective_scan(**{k: t.requires_grad_(k == "u") for k, t in tensors.items()}, delta_softplus=True)
    (grad,) = torch.autograd.grad(y.sum(), tensors["u"], retain_graph=True)  # a gradient with strides 0
    assert torch.equal(grad, torch.autograd.grad(y, tensors["u"], torch.ones_like(y))[0])


def test_reads_and_writes_only_its_own_memory(guard_bands: Any) -> None:
    tensors = single(B=2, L=37, E=21)
    expected = both(tensors)

    def surrounded(delta_softplus: bool, **t: Tensor) -> Any:
        inputs = {k: guard_bands.surrounded(v) for k, v in t.items()}
        return cpu.selective_scan(**inputs, delta_softplus=delta_softplus)

    with guard_bands.watched() as allocated:
        actual = both(tensors, surrounded)
    assert_equal_bits(actual, expected)
    assert len(allocated) > 10


def test_repeats_bit_for_bit_on_any_number_of_threads() -> None:
    tensors = single(B=3, L=70, E=100)
    results = []
    for n_threads in (2, 2, 1, 3, 8):
        torch.set_num_threads(n_threads)
        results.append(both(tensors))
    for result in results[1:]:
        assert_equal_bits(result, results[0])


def test_runs_in_several_threads_at_once() -> None:
    tensors = single(B=2, L=70, E=100)
    expected = both(tensors)
    with ThreadPoolExecutor(4) as threads:
        for result in threads.map(both, [tensors] * 8):
            assert_equal_bits(result, expected)


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_runs_in_a_child_of_a_process_that_used_it(method: str) -> None:
    tensors = single()
    expected = both(tensors)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context(method)) as process:
        child = process.submit(values_and_gradients, cpu.selective_scan, tensors, delta_softplus=True)
        assert_equal_bits(child.result(timeout=120), expected)
    assert_equal_bits(both(tensors), expected)


def test_keeps_states_only_for_a_backward() -> None:
    t = single(B=1, L=64, E=20, optional=False)
    kept = cpu._scan(*t.values(), None, None, None, True, None, None, True)[2]
    n_states = t["u"].numel() * t["A"].shape[1]  # one for every token
    assert 0 < kept.numel() <= n_states / 4  # one for every chunk, rounded up to whole vectors and tiles
    assert cpu._scan(*t.values(), None, None, None, True, None, None, False)[2].numel() == 0


@pytest.mark.parametrize("optional", [False, True])
def test_custom_operators_are_registered_soundly(optional: bool) -> None:
    t = {k: v.requires_grad_(v.is_floating_point()) for k, v in single(L=20, optional=optional).items()}
    scan = (*(t[k] for k in ("u", "delta", "A", "B", "C")), t.get("D"), t.get("z"), t.get("delta_bias"))
    end = (t.get("initial_state"), t.get("starts"))
    torch.library.opcheck(cpu._scan, (*scan, True, *end, True))
    with torch.no_grad():
        y, state, checkpoints = cpu._scan(*scan, True, *end, True)
    plain = [x if x is None else x.detach() for x in scan]
    torch.library.opcheck(cpu._scan_backward, (y, state, *plain, True, t.get("starts"), checkpoints))


def test_compiles_into_one_graph() -> None:
    def loss(u: Tensor) -> Tensor:
        y, state = ops.selective_scan(2 * u, rest["delta"], rest["A"], rest["B"], rest["C"], delta_softplus=True)
        return y.square().sum() + state.sum()

    tensors = single(optional=False)
    u, rest = tensors.pop("u").requires_grad_(), tensors
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(u), u), torch.autograd.grad(loss(u), u))


def test_half_precision_is_converted_under_autocast() -> None:
    tensors = single()
    weight = torch.eye(6)
    with torch.autocast("cpu", torch.bfloat16):
        y, state = cpu.selective_scan(**tensors | {"u": tensors["u"] @ weight}, delta_softplus=True)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    expected, _ = cpu.selective_scan(**tensors | {"u": tensors["u"].bfloat16()}, delta_softplus=True)
    assert torch.equal(y, expected)


def test_double_precision_is_refused_and_runs_plainly_by_default() -> None:
    tensors = ops.selective_scan.cases.example()
    with use_backend("cpu"), pytest.raises(Unsupported, match="float64"):
        ops.selective_scan(**tensors)
    with record_backends() as used, warnings.catch_warnings():
        warnings.simplefilter("error", KernelFallbackWarning)
        ops.selective_scan(**tensors)
        ops.selective_scan(**single())
    assert used == {"selective_scan": ("cpu", "torch")}
