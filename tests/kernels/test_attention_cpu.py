"""The compiled CPU path of attention, and what only it can get wrong: blocks, shared keys, threads, memory, vectors."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.attention import cpu, cpu_kernels, reference
from crossover.kernels.compare import assert_same, cast, relative_error, values_and_gradients
from crossover.kernels.dispatch import record_backends, use_backend
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    n = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(n)


def inputs(B: int = 2, L: int = 150, H: int = 4, H_kv: int = 2, P: int = 21, V: int | None = None) -> dict[str, Any]:
    """Queries, keys and values in float64: numbers that float32 holds too."""
    shapes = {"q": (B, L, H, P), "k": (B, L, H_kv, P), "v": (B, L, H_kv, P if V is None else V)}
    return {name: torch.randn(shape).double() for name, shape in shapes.items()}


def compiled(**arguments: Any) -> Tensor:
    with use_backend("cpu"):
        return ops.attention(**arguments)


def single(tensors: dict[str, Tensor], function: Callable[..., Any] = compiled, **others: Any) -> dict[str, Tensor]:
    return values_and_gradients(function, cast(tensors, torch.float32), **others)


def assert_equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert {k for k in a if not torch.equal(a[k], b[k])} == set()


@settings(max_examples=25)
@given(
    B=st.integers(1, 2),
    L=st.integers(1, 200),
    H_kv=st.integers(1, 3),
    group=st.integers(1, 3),
    P=st.integers(1, 70),
    V=st.none() | st.integers(1, 70),
    scale=st.none() | st.floats(-1, 1, width=32),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_match_the_definition(
    B: int, L: int, H_kv: int, group: int, P: int, V: int | None, scale: float | None, seed: int
) -> None:
    torch.manual_seed(seed)
    check_against_the_definition(inputs(B, L, H_kv * group, H_kv, P, V), scale=scale)


def check_against_the_definition(tensors: dict[str, Tensor], **options: Any) -> None:
    expected = values_and_gradients(reference.attention, tensors, **options)
    actual, plain = (single(tensors, function, **options) for function in (compiled, reference.attention))
    errors = {k: (relative_error(actual[k], e), relative_error(plain[k], e)) for k, e in expected.items()}
    # 2e-6: the exponent of a weight is rounded as a power of two
    assert {k: e for k, e in errors.items() if not e[0] <= 5 * e[1] + 2e-6} == {}


def test_a_long_sequence_stays_accurate() -> None:
    tensors = inputs(B=1, L=1100, H=1, H_kv=1, P=40)
    # 3e-6: float32 has 6e-8, of which sums over 1100 keys lose some
    assert_same(single(tensors), values_and_gradients(reference.attention, tensors), 3e-6)


class PlainPyTorchRan(Exception):
    pass


@pytest.fixture
def no_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Tensor:
        raise PlainPyTorchRan

    monkeypatch.setattr(cpu.torch_impl, "attention", fail)


@pytest.mark.usefixtures("no_plain_pytorch")
def test_the_kernel_takes_causal_self_attention_and_nothing_else() -> None:
    tensors = cast(inputs(L=3), torch.float32)
    compiled(**tensors)
    compiled(**tensors, window=3)  # hides nothing
    others: list[dict[str, Any]] = [{"causal": False}, {"window": 2}, {"starts": torch.zeros(2, 3, dtype=torch.bool)}]
    others += [
        {"first_key": torch.zeros(2, dtype=torch.int64)},
        {"kv_len": torch.tensor(3)},
        {"q": tensors["q"][:, 1:]},
    ]
    for other in others:
        with pytest.raises(PlainPyTorchRan):
            compiled(**tensors | other)


@pytest.mark.usefixtures("no_plain_pytorch")
def test_small_inputs_run_plainly_unless_forced() -> None:
    large: dict[str, Any] = cast(inputs(B=4, L=110, H=4, P=40), torch.float32)
    ops.attention(**large)
    small = {k: t[:3] for k, t in large.items()}
    compiled(**small)
    with pytest.raises(PlainPyTorchRan):
        ops.attention(**small)


@pytest.mark.parametrize("cut", [1, 31, 32, 33, 63, 64, 65, 96, 128, 149])
def test_nothing_reads_what_comes_later(cut: int) -> None:
    tensors = cast(inputs(), torch.float32)
    changed = {k: torch.cat([t[:, :cut], 1e3 * torch.randn_like(t[:, cut:])], 1) for k, t in tensors.items()}
    o, other = compiled(**tensors), compiled(**changed)
    assert torch.equal(o[:, :cut], other[:, :cut])
    assert (o[:, cut] != other[:, cut]).any()
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    grads = torch.autograd.grad(compiled(**leaves)[:, :cut].sum(), list(leaves.values()))
    for name, grad in zip(leaves, grads, strict=True):
        assert not grad[:, cut:].any()
        assert grad[:, :cut].any() == (name == "v" or cut > 1)  # of one key the weight is always one


@pytest.mark.parametrize("size", [1e-30, 30.0, 1e4, 1e8])
def test_scores_of_any_size_lose_no_more_than_in_the_definition(size: float) -> None:
    tensors = inputs(L=150)
    tensors["q"] *= size
    check_against_the_definition(tensors)


def test_keys_beyond_every_score_get_no_weight() -> None:
    tensors: dict[str, Any] = cast(inputs(B=1, L=70, H=1, H_kv=1, P=1), torch.float32)
    tensors["q"], tensors["k"] = tensors["q"].abs(), tensors["k"].clone()
    tensors["k"][:, 0] = -float("inf")
    o = compiled(**tensors)
    assert torch.equal(o.isnan().flatten(), torch.arange(70) == 0)  # the first query has no other key
    torch.testing.assert_close(o[:, 1:], reference.attention(**tensors)[:, 1:])


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF], ids=["default", "payload", "negative"])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_nan_reaches_whoever_reads_it(name: str, bits: int) -> None:
    tensors = cast(inputs(B=1, L=150, H=2, H_kv=2), torch.float32)
    tensors[name][0, 70, 1, 5] = torch.tensor(bits, dtype=torch.int64).to(torch.int32).view(torch.float32)
    o = compiled(**tensors)
    assert not o[:, :, 0].isnan().any()
    # no weight times NaN is NaN, so earlier queries of its block may read a value too, as all do in the reference
    seen = {"q": slice(70, 71), "k": slice(70, None), "v": slice(70, None)}[name]
    unseen = [*range(64), *(range(71, 150) if name == "q" else ())]
    channels = slice(5, 6) if name == "v" else slice(None)
    assert o[:, seen, 1, channels].isnan().all()
    assert not o[:, unseen, 1].isnan().any()


def test_takes_slices_transposes_and_broadcasts() -> None:
    tensors = cast(inputs(H=2, H_kv=2, P=20), torch.float32)
    packed = torch.cat(list(tensors.values()), -1)  # one projection, as a mixer has it
    strided = dict(zip(tensors, packed.split(20, -1), strict=True))
    strided["q"] = tensors["q"].mT.contiguous().mT
    assert not any(t.is_contiguous() for t in strided.values())
    assert_equal_bits(single(strided), single(tensors))
    leaves = {k: t.requires_grad_() for k, t in tensors.items()}
    o = compiled(**leaves)
    broadcast = torch.autograd.grad(o.sum(), list(leaves.values()), retain_graph=True)  # a gradient with strides 0
    whole = torch.autograd.grad(o, list(leaves.values()), torch.ones_like(o))
    assert all(torch.equal(a, b) for a, b in zip(broadcast, whole, strict=True))


def test_reads_and_writes_only_its_own_memory(guard_bands: Any) -> None:
    tensors = cast(inputs(L=75), torch.float32)
    expected = single(tensors)
    with guard_bands.watched() as allocated:
        actual = single(tensors, lambda **t: compiled(**{k: guard_bands.surrounded(v) for k, v in t.items()}))
    assert_equal_bits(actual, expected)
    assert len(allocated) == 6


def test_repeats_bit_for_bit_on_any_number_of_threads() -> None:
    tensors = inputs(B=3, H=6)
    results = []
    for n_threads in (2, 2, 1, 3, 8):
        torch.set_num_threads(n_threads)
        results.append(single(tensors))
    for result in results[1:]:
        assert_equal_bits(result, results[0])


def test_keeps_nothing_of_size_length_squared() -> None:
    tensors = {k: t.requires_grad_() for k, t in cast(inputs(B=1, L=600, H=2, H_kv=1, P=3), torch.float32).items()}
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        compiled(**tensors)
    assert max(saved) == 600 * 2 * 3


def test_shared_keys_equal_keys_repeated() -> None:
    tensors = cast(inputs(H=6, H_kv=2), torch.float32)
    repeated = tensors | {k: tensors[k].repeat_interleave(3, dim=2) for k in "kv"}
    assert torch.equal(compiled(**tensors), compiled(**repeated))


def test_custom_operators_are_registered_soundly() -> None:
    t = cast(inputs(L=20, V=9), torch.float32)
    torch.library.opcheck(cpu._attention, (*(x.requires_grad_() for x in t.values()), 0.3))
    with torch.no_grad():
        o, *normalizers = cpu._attention(*t.values(), 0.3)
    plain = [x.detach() for x in t.values()]
    torch.library.opcheck(cpu._attention_backward, (torch.ones_like(o), *plain, 0.3, o, *normalizers))


def test_compiles_into_one_graph() -> None:
    def loss(q: Tensor) -> Tensor:
        return compiled(q=2 * q, k=tensors["k"], v=tensors["v"]).square().sum()

    tensors = cast(inputs(L=20), torch.float32)
    q = tensors["q"].requires_grad_()
    graph = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(graph(q), q), torch.autograd.grad(loss(q), q))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_converted(dtype: torch.dtype) -> None:
    tensors = cast(inputs(), dtype)
    o = compiled(**tensors)
    assert o.dtype == dtype
    assert torch.equal(o, compiled(**cast(tensors, torch.float32)).to(dtype))


def test_double_precision_runs_plainly_by_default() -> None:
    with record_backends() as used:
        ops.attention(**inputs(B=1, L=5))
    assert used == {"attention": ("torch",)}


def test_blocks_are_whole_pairs_rows_and_states() -> None:
    for whole in (cpu_kernels.PAIR, cpu_kernels.BLOCK_ROWS, cpu_kernels.STATES):
        assert cpu_kernels.BLOCK % whole == 0
    assert max(cpu_kernels.LANES, cpu_kernels.BLOCK_ROWS) % cpu_kernels.BLOCK_ROWS == 0
