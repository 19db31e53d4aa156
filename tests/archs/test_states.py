"""A model's states are one value: rows join, part and move, and it goes through trees, files and precisions."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, Seq2Seq, States, available, build
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

V = 23
JOINED = [(name, {}) for name in available()] + [("transformer", {"window": 5}), ("samba", {"window": 2})]


def tiny(name: str, **options: Any) -> LanguageModel:
    sizes = {"d_model": 24, "vocab_size": V, "n_layers": 8 if name == "jamba" else 2, "tie_embeddings": False}
    return build(name, **sizes | options).double().eval()


def leaves(states: States) -> list[Tensor]:
    return [t for layer in states for t in layer.tensors().values()]


@pytest.mark.quick
@pytest.mark.parametrize(("name", "options"), JOINED, ids=str)
@settings(max_examples=2)
@given(seed=st.integers(0, 2**16))
@torch.no_grad()
def test_rows_that_join_and_leave_a_batch_at_any_time_go_on_as_if_alone(
    name: str, options: dict[str, Any], seed: int
) -> None:
    torch.manual_seed(seed)
    draw, lm = random.Random(seed), tiny(name, **options)
    waiting = [torch.randint(V, (draw.randint(2, 13),)) for _ in range(5)]
    running: list[tuple[Tensor, int, Tensor]] = []  # a text, tokens read of it, and its logits when alone
    states: list[States] = []
    while waiting or running:
        while waiting and (not running or draw.random() < 0.4):
            text = waiting.pop()
            n = draw.randint(1, len(text) - 1)
            states.append(lm(text[None, :n], lm.init_state(1, len(text))).state)
            running.append((text, n, lm(text[None]).logits[0]))
        n_tokens = min([draw.choice([1, 1, 3]), *(len(text) - n for text, n, _ in running)])
        out = lm(torch.stack([text[n : n + n_tokens] for text, n, _ in running]), States.cat(states))
        for (_, n, alone), logits in zip(running, out.logits, strict=True):
            torch.testing.assert_close(logits, alone[n : n + n_tokens])
        left = [row for row, (text, n, _) in enumerate(running) if n + n_tokens < len(text)]
        draw.shuffle(left)
        running = [(text, n + n_tokens, alone) for text, n, alone in (running[row] for row in left)]
        states = [out.state.select(left)] if left else []


@torch.no_grad()
def test_a_joined_batch_holds_no_more_than_its_longest_row_and_the_room_that_each_was_promised() -> None:
    lm = tiny("transformer", window=5)
    states = lm.init_state(1, 40)
    for _ in range(30):  # a server that never empties
        new = lm(torch.randint(V, (1, 3)), lm.init_state(1, 40)).state
        states = States.cat([lm(torch.randint(V, (1, 6)), states).state, new]).select([1])
        assert states.nbytes <= 2 * lm.init_state(1, 40).nbytes
    lm = tiny("transformer")
    old, new = (lm(torch.randint(V, (1, n)), lm.init_state(1, 20)).state for n in (19, 1))
    states = States.cat([old, new]).select([1])
    lm(torch.randint(V, (1, 19)), states)
    without_the_one_that_left = States.cat([states])  # and without what only it had read
    assert [t.numel() for t in leaves(without_the_one_that_left)[:2]] == [t.numel() for t in leaves(new)[:2]]


@torch.no_grad()
def test_joined_rows_of_learned_positions_are_refused_beyond_them_and_not_before() -> None:
    lm = tiny("gpt2", max_positions=8)
    tokens = torch.randint(V, (2, 8))
    old, new = (lm(tokens[i : i + 1, :n], lm.init_state(1, 8)).state for i, n in ((0, 7), (1, 2)))
    states = States.cat([old, new])
    with pytest.raises(ValueError, match="9 tokens are more than max_positions=8"):
        lm(tokens[:, :2], states.clone())
    left = states.select([1])
    torch.testing.assert_close(lm(tokens[1:, 2:], left).logits, lm(tokens[1:]).logits[:, 2:])


@torch.no_grad()
def test_sources_of_unlike_lengths_join() -> None:
    for name in available("seq2seq"):
        model: Seq2Seq = build(name, d_model=24, n_layers=2, vocab_size=V).double()  # pyright: ignore[reportAssignmentType]
        sources, target = [torch.randint(V, (1, n)) for n in (5, 3)], torch.randint(V, (2, 4))
        together = States.cat([model.encode(source, max_len=4) for source in sources])
        apart = [model(source, target[i : i + 1]).logits for i, source in enumerate(sources)]
        torch.testing.assert_close(model.decode(target, together).logits, torch.cat(apart))


@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_states_go_through_trees_and_files_and_are_lists(name: str) -> None:
    lm, tokens = tiny(name), torch.randint(V, (2, 6))
    states = lm(tokens[:, :4], lm.init_state(2, 6)).state
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    read_back = torch.load(file, weights_only=True)
    doubled = pytree.tree_map(lambda t: t + t, states)
    assert all(torch.equal(a, b + b) for a, b in zip(leaves(doubled), leaves(states), strict=True))
    expected = lm(tokens[:, 4:], states.clone()).logits
    flat, spec = pytree.tree_flatten(states)
    for same in (read_back, pytree.tree_unflatten(flat, spec).clone(), list(states.clone()), tuple(states.clone())):
        out = lm(tokens[:, 4:], same)
        assert torch.equal(out.logits, expected)
        assert isinstance(out.state, States)


@pytest.mark.parametrize("name", available())
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@torch.no_grad()
def test_a_state_may_have_a_precision_of_its_own_and_keeps_it(name: str, dtype: torch.dtype) -> None:
    lm, tokens = tiny(name).float(), torch.randint(V, (2, 7))
    states = lm.init_state(2, 7, dtype=dtype)
    moved = lm.init_state(2, 7).to(dtype)
    assert [t.dtype for t in leaves(moved)] == [t.dtype for t in leaves(states)]
    if dtype == torch.bfloat16:  # as what autocast would keep
        with torch.autocast("cpu", dtype):
            assert [t.dtype for t in leaves(lm.init_state(2, 7))] == [t.dtype for t in leaves(states)]
    _, after = lm.prefill(tokens[:, :5], states)
    out = lm(tokens[:, 5:6], after)
    out = lm(tokens[:, 6:], out.state)
    assert [t.dtype for t in leaves(out.state)] == [t.dtype for t in leaves(moved)]
    assert out.state.nbytes == lm.init_state(2, 7, dtype=dtype).nbytes
    expected = lm(tokens).logits[:, -1:]
    assert out.logits.dtype == torch.float32
    assert (out.logits - expected).norm() < (2e-2 if dtype == torch.bfloat16 else 1e-5) * expected.norm()
