"""Attention's Triton kernels where many blocks meet, for which the examples that operations share are too small."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.kernels.attention import reference
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import Unsupported
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

triton_kernels = pytest.importorskip("crossover.kernels.attention.triton_kernels")
attention = triton_kernels.attention
definition: Callable[..., Tensor] = reference.attention
configuration = triton_kernels.configuration

TOLERANCE = 5e-5
"""Relative error in float32. Most are below 1e-6, but gradients that cancel (of a single key's score) are judged as if
they were of size 0.01."""


def small_blocks(kernel: str, width: int, dtype: torch.dtype, room: int = 0) -> dict[str, int]:
    m, n = (16, 32) if kernel == "dkdv" else (32, 16)
    return {"BLOCK_M": m, "BLOCK_N": n, "num_warps": 4, "num_stages": 2}


@pytest.fixture(autouse=True)
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks; the kernel for few queries, which small examples would always take, only where a test asks."""
    monkeypatch.setattr(triton_kernels, "configuration", small_blocks)
    monkeypatch.setattr(triton_kernels, "DECODE_ROWS", 0)
    if os.environ.get("TRITON_INTERPRET") == "1":  # its checks of integers cost as much as all the rest
        from triton.runtime import interpreter

        options = interpreter.InterpreterOptions(sanitize_overflow=False)
        monkeypatch.setattr(interpreter.interpreter_builder, "options", options)


@pytest.fixture
def packed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_kernels, "DECODE_ROWS", 64)


def inputs(B: int = 2, L: int = 50, past: int = 0, H: int = 2, H_kv: int = 1, P: int = 8) -> dict[str, Tensor]:
    k, v = torch.randn(2, B, past + L, H_kv, P, dtype=torch.float64)
    return {"q": torch.randn(B, L, H, P, dtype=torch.float64), "k": k, "v": v}


def assert_right(tensors: dict[str, Tensor], **others: Any) -> None:
    actual = values_and_gradients(attention, cast(tensors, torch.float32), **others)
    assert_same(actual, values_and_gradients(definition, tensors, **others), TOLERANCE)


# what fails is not made smaller, for which the interpreter is too slow
@settings(max_examples=16, phases=[Phase.explicit, Phase.generate])
@given(
    B=st.integers(1, 2),
    L=st.integers(1, 16) | st.integers(17, 70),
    past=st.just(0) | st.integers(1, 40),
    heads=st.sampled_from([(1, 1), (2, 1), (2, 2)]),
    P=st.sampled_from([8, 20, 32, 64]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    n_starts=st.none() | st.integers(0, 6),
    with_first_key=st.booleans(),
    spare=st.none() | st.integers(0, 40),
    scale=st.none() | st.just(0.3),
    rows=st.sampled_from([0, 64]),
    seed=st.integers(0, 2**16),
)
def test_values_and_gradients_are_right_with_any_mask(
    B: int,
    L: int,
    past: int,
    heads: tuple[int, int],
    P: int,
    causal: bool,
    window: int | None,
    n_starts: int | None,
    with_first_key: bool,
    spare: int | None,
    scale: float | None,
    rows: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = inputs(B, L, past, *heads, P)
    if n_starts is not None:
        tensors["starts"] = torch.rand(B, L) < n_starts / L
    if with_first_key:
        tensors["first_key"] = torch.randint(past + 1, (B,))
    ours = dict(tensors)
    if spare is not None:  # of a cache, what is not valid yet may hold anything
        tensors["kv_len"] = ours["kv_len"] = torch.tensor(past + L)
        for name in ("k", "v"):
            unused = torch.zeros(B, spare, *tensors[name].shape[2:])
            tensors[name], ours[name] = (torch.cat([tensors[name], x], 1) for x in (unused, unused + torch.nan))
    others = {"causal": causal, "window": window, "scale": scale}
    expected = values_and_gradients(definition, tensors, **others)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_kernels, "DECODE_ROWS", rows)
        assert_same(values_and_gradients(attention, cast(ours, torch.float32), **others), expected, TOLERANCE)


@pytest.mark.parametrize(("L", "past"), [(31, 1), (32, 0), (32, 16), (33, 0), (33, 15)])
def test_values_and_gradients_are_right_at_the_edges_of_blocks(L: int, past: int) -> None:
    tensors = inputs(1, L, past)
    assert_right(tensors)
    assert_right(tensors, causal=False, window=16)


def test_groups_of_heads_share_keys() -> None:
    assert_right(inputs(1, 34, H=6, H_kv=2), window=20)


@pytest.mark.parametrize(("P", "P_v"), [(80, 80), (256, 256), (3, 18), (33, 5)])
def test_heads_may_have_any_width(P: int, P_v: int) -> None:
    tensors = inputs(1, 20, H=1, P=P)
    tensors["v"] = torch.randn(1, 20, 1, P_v, dtype=torch.float64)
    assert_right(tensors)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1.5e-2), (torch.float16, 2e-3)], ids=str)
def test_half_precision_loses_no_more_than_its_own_rounding(dtype: torch.dtype, tolerance: float) -> None:
    tensors = cast(inputs(1, 50, P=32), dtype)
    expected = values_and_gradients(definition, cast(tensors, torch.float64), window=40)
    assert_same(values_and_gradients(attention, tensors, window=40), expected, tolerance)


@pytest.mark.parametrize("cut", [1, 33, 49])
def test_later_keys_change_no_bit_of_earlier_outputs(cut: int) -> None:
    t = cast(inputs(), torch.float32)
    changed = {name: x.clone() for name, x in t.items()}
    changed["k"][:, cut:], changed["v"][:, cut:] = 100 * torch.randn(2, 2, 50 - cut, 1, 8)
    assert torch.equal(attention(**t)[:, :cut], attention(**changed)[:, :cut])


@pytest.mark.parametrize("causal", [True, False])
def test_documents_packed_are_documents_apart(causal: bool) -> None:
    t = cast(inputs(1, 60), torch.float32)
    starts = torch.zeros(1, 60, dtype=torch.bool)
    starts[0, [0, 7, 32, 33]] = True
    packed = values_and_gradients(attention, t | {"starts": starts}, causal=causal)["output 0"]
    parts = [{name: x[:, i:j] for name, x in t.items()} for i, j in ((0, 7), (7, 32), (32, 33), (33, 60))]
    torch.testing.assert_close(packed, torch.cat([attention(**part, causal=causal) for part in parts], 1))


def test_values_and_gradients_repeat_bit_for_bit() -> None:
    tensors = cast(inputs(1, 50, past=20), torch.float32)
    first, second = (values_and_gradients(attention, tensors, window=30) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_inputs_may_be_views_of_any_strides() -> None:
    qkv = torch.randn(2, 33, 3, 1, 8)
    q, k, v = qkv.unbind(2)
    expected = attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(attention(q, k, v), expected)
    heads_first = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    assert torch.equal(attention(*heads_first), expected)
    widths_first = [t.mT.contiguous().mT for t in (q, k, v)]
    assert torch.equal(attention(*widths_first), expected)
    one_row = [t[:1].expand(2, -1, -1, -1) for t in (q, k, v)]
    assert torch.equal(attention(*one_row)[1], expected[0])


def test_gradients_of_a_plain_sum_are_right() -> None:
    t = {name: x.requires_grad_() for name, x in cast(inputs(L=40), torch.float32).items()}  # its gradient is expanded
    ours, expected = (torch.autograd.grad(f(**t).sum(), list(t.values())) for f in (attention, definition))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("L", [1, 33])
@pytest.mark.parametrize("rows", [0, 64])
def test_nothing_outside_the_tensors_is_read_or_written(L: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    margin, made = 4096, []

    def guarded(shape: torch.Size, dtype: torch.dtype) -> Tensor:
        storage = torch.full((shape.numel() + 2 * margin,), float("nan"), dtype=dtype)
        made.append((storage, shape.numel()))
        return storage[margin : margin + shape.numel()].view(shape)

    def empty(*size: Any, dtype: torch.dtype, device: torch.device) -> Tensor:
        return guarded(torch.Size(size[0] if isinstance(size[0], tuple) else size), dtype)

    t = cast(inputs(2, L, past=50 - L, P=20), torch.float32)
    guarded_inputs = [guarded(x.shape, x.dtype).copy_(x) for x in t.values()]
    monkeypatch.setattr(triton_kernels, "DECODE_ROWS", rows)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch, "empty_like", lambda x: guarded(x.shape, x.dtype))
    options = (None, None, None, True, 30, 0.2)
    o, lse = triton_kernels.forward(*guarded_inputs, *options)
    grads = triton_kernels.backward(o, *guarded_inputs, o, lse, *options)
    assert all(bool(torch.isfinite(x).all()) for x in (o, lse, *grads))
    assert len(made) >= 3 + 2 + 4
    for storage, n in made:
        assert bool(storage[:margin].isnan().all() and storage[margin + n :].isnan().all())


@pytest.mark.parametrize("window", [None, 1, 30])
@pytest.mark.usefixtures("packed")
def test_one_query_gets_the_last_row_of_the_whole(window: int | None) -> None:
    t = cast(inputs(2, 70, H=3), torch.float32)  # 210 rows are too many to pack
    whole = attention(**t, window=window)
    torch.testing.assert_close(attention(t["q"][:, -1:], t["k"], t["v"], window=window), whole[:, -1:])
    early = attention(t["q"][:, 39:40], t["k"], t["v"], window=window, kv_len=torch.tensor(40))
    torch.testing.assert_close(early, whole[:, 39:40])


def test_a_query_that_sees_no_key_gives_zeros_and_no_gradient() -> None:
    t = cast(inputs(1, 40), torch.float32)
    result = values_and_gradients(attention, t | {"first_key": torch.tensor([35])})
    assert all(bool(torch.isfinite(x).all()) for x in result.values())
    assert result["output 0"][:, :35].abs().max() == 0
    assert all(result[f"gradient of {name}"][:, :35].abs().max() == 0 for name in "qkv")
    assert result["gradient of v"][:, 35:].abs().min() > 0


def test_large_scores_do_not_overflow() -> None:
    t = inputs(1, 40)
    t["q"] *= 1e4
    o = attention(**cast(t, torch.float32))
    torch.testing.assert_close(o, definition(**t).float(), rtol=1e-3, atol=1e-3)


def test_keys_are_split_only_as_far_as_it_helps() -> None:
    splits = triton_kernels.splits
    assert splits(4, 4096, 64) == triton_kernels.MAX_SPLITS
    assert splits(4, 64, 64) == 1
    assert splits(triton_kernels.SLOTS, 4096, 64) == 1
    assert splits(triton_kernels.SLOTS // 2, 4096, 64) == 2


@pytest.mark.parametrize("kernel", ["forward", "decode", "dq", "dkdv"])
def test_blocks_suit_the_matrix_units(kernel: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for width in (16, 32, 64, 128, 256):
            chosen = configuration(kernel, width, dtype)
            assert all(chosen[name] in (16, 32, 64, 128) for name in ("BLOCK_M", "BLOCK_N"))
            assert chosen["num_warps"] in (4, 8)


def test_what_it_cannot_take_is_named() -> None:
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(Unsupported, match="257 channels is wider than 256"):
        attention(q, q, torch.randn(1, 3, 1, 257))
    with pytest.raises(Unsupported, match=r"torch\.float64"):
        attention(q.double(), q.double(), q.double())
    with pytest.raises(Unsupported, match=r"torch\.bfloat16"):
        attention(q, q.bfloat16(), q.bfloat16())
    with pytest.raises(Unsupported, match=r"scale=-1\.0"):
        attention(q, q, q, scale=-1.0)


def test_custom_operators_are_registered_soundly() -> None:
    q, k, v = (x.requires_grad_() for x in cast(inputs(1, 4), torch.float32).values())
    first, last = (torch.full((1, 4), x, dtype=torch.int32) for x in (0, 4))
    torch.library.opcheck(triton_kernels._attention, (q, k, v, first, last, None, True, 9, 0.3))
