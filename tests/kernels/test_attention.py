"""Attention's masks against a loop over pairs, and its blocks against one another."""

import itertools

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.attention import reference, torch_impl
from crossover.kernels.compare import assert_same, values_and_gradients
from crossover.kernels.dispatch import use_backend
from hypothesis import given, settings
from hypothesis import strategies as st


def sees(
    query: int, key: int, past: int, causal: bool, window: int | None, starts: torch.Tensor | None, first_key: int
) -> bool:
    """Whether one query sees one key of one row, said in words: positions on the axis of all keys."""
    if (causal and key > query) or key < first_key:
        return False
    if window is not None and abs(query - key) >= window:
        return False
    marks = [] if starts is None else [past + i for i, mark in enumerate(starts.tolist()) if mark]
    return not any(min(query, key) < mark <= max(query, key) for mark in marks)


@pytest.mark.parametrize("backend", ops.attention.backends)
@settings(max_examples=40)
@given(
    L=st.integers(1, 9),
    past=st.integers(0, 6),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 8),
    with_starts=st.booleans(),
    with_first_key=st.booleans(),
    spare=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_a_query_reads_exactly_the_keys_it_sees(
    backend: str,
    L: int,
    past: int,
    causal: bool,
    window: int | None,
    with_starts: bool,
    with_first_key: bool,
    spare: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    B = 2
    S = past + L
    starts = torch.rand(B, L) < 0.3 if with_starts else None
    first_key = torch.randint(past + 1, (B,)) if with_first_key else None
    kv_len = torch.tensor(S) if spare else None
    # one-hot values: the output is the row of attention weights; invalid cache entries are poisoned
    q, k = torch.randn(B, L, 2, 4), torch.full((B, S + spare, 1, 4), 1e4)
    k[:, :S] = torch.randn(B, S, 1, 4)
    v = torch.eye(S + spare)[None, :, None].expand(B, -1, -1, -1)
    with use_backend(backend):
        weights = ops.attention(
            q, k, v, causal=causal, window=window, starts=starts, first_key=first_key, kv_len=kv_len
        )
    expected = torch.zeros(B, L, S, dtype=torch.bool)
    for b, i, j in itertools.product(range(B), range(L), range(S)):
        marks = None if starts is None else starts[b]
        first = 0 if first_key is None else int(first_key[b])
        expected[b, i, j] = sees(past + i, j, past, causal, window, marks, first)
    read = weights[..., :S] > 0
    assert torch.equal(read, expected[:, :, None].expand_as(read))
    torch.testing.assert_close(weights[..., :S].sum(-1), torch.ones(B, L, 2))


@settings(max_examples=25)
@given(
    L=st.integers(2, 40),
    past=st.integers(1, 70),
    group=st.integers(1, 3),
    spoilt=st.booleans(),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_tokens_after_a_cache_read_it_and_one_another(L: int, past: int, group: int, spoilt: bool, seed: int) -> None:
    torch.manual_seed(seed)
    q, k, v = (torch.randn(2, n, h, 6) for n, h in ((L, 2 * group), (past + L, 2), (past + L, 2)))
    q *= 5
    for dtype, error in ((torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        rounded_q, rounded_k, rounded_v = (t.to(dtype) for t in (q, k, v))
        expected = reference.attention(rounded_q.double(), rounded_k.double(), rounded_v.double())
        if spoilt:  # what the first does not see
            rounded_v[:, -1] = torch.nan
        with use_backend("torch"):
            o = ops.attention(rounded_q, rounded_k, rounded_v)
        assert o.dtype == dtype
        seen = slice(None, -1 if spoilt else None)
        torch.testing.assert_close(o[:, seen].double(), expected[:, seen], rtol=error, atol=error)
        assert o[:, -1].isnan().all() == spoilt


def test_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = ops.attention.cases.example()
    whole = values_and_gradients(ops.attention, tensors, window=7)
    monkeypatch.setattr(torch_impl, "QUERY_BLOCK", 5)
    assert_same(values_and_gradients(ops.attention, tensors, window=7), whole, 1e-12)


def test_scale_defaults_to_the_inverse_root_of_the_head_width() -> None:
    t = ops.attention.cases.example(optional=False)
    torch.testing.assert_close(ops.attention(**t), ops.attention(**t, scale=t["q"].shape[-1] ** -0.5))


@pytest.mark.parametrize("backend", ops.attention.backends)
def test_shapes_that_cannot_be_are_named(backend: str) -> None:
    q, k = torch.randn(1, 3, 4, 8), torch.randn(1, 3, 3, 8)
    with use_backend(backend):
        with pytest.raises(ValueError, match="H=4, H_kv=3, expected H a multiple of H_kv"):
            ops.attention(q, k, k)
        with pytest.raises(ValueError, match="L=3, S=2, expected S at least L"):
            ops.attention(q, k[:, :2, :2], k[:, :2, :2])
