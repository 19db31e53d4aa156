"""Generation equals rerunning the whole sequence, in every batch and chunk, and a graph can hold its step."""

from __future__ import annotations

import dataclasses
import inspect
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, Seq2Seq, available, build
from crossover.archs.generation import NO_TOKEN, DecodeGraph, Sampling, default_chunk_len, step_in_place
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

V = 23
every_decoder = pytest.mark.parametrize("name", available())
drawn = settings(max_examples=40)

# plain PyTorch's grouped products read on the host how many tokens each expert has
HOST_BOUND = {"jamba"}
STEADY = [(name, {}) for name in available() if name not in HOST_BOUND] + [
    ("samba", {"window": 4}),
    ("samba", {"window": 1}),
    ("transformer", {"n_heads": 4, "n_kv_heads": 2}),
]
every_steady_step = pytest.mark.parametrize(("name", "options"), STEADY, ids=str)


def tiny(name: str, **options: object) -> LanguageModel:
    """A model in float64. With tied embeddings it would repeat itself, and hide mistakes."""
    sizes = {"d_model": 24, "vocab_size": V, "n_layers": 8 if name == "jamba" else 2, "tie_embeddings": False}
    return build(name, **(sizes | options)).double().eval()


def rerun(lm: LanguageModel, prompt: Tensor, n: int) -> Tensor:
    """Greedy continuation of (B, L) by full passes."""
    for _ in range(n):
        prompt = torch.cat([prompt, lm(prompt).logits[:, -1:].argmax(-1)], dim=1)
    return prompt


def prompts_of(*lengths: int) -> list[Tensor]:
    return [torch.randint(V, (length,)) for length in lengths]


@every_decoder
@torch.no_grad()
def test_greedy_tokens_are_those_of_full_passes_alone_and_in_a_batch_of_different_lengths(name: str) -> None:
    lm = tiny(name)
    rows = prompts_of(3, 7, 1, 7)
    expected = [rerun(lm, row[None], 6)[0] for row in rows]
    for row, alone in zip(rows, expected, strict=True):
        assert torch.equal(lm.generate(row[None], 6, temperature=0)[0], alone)
    for row, together in zip(expected, lm.generate(rows, 6, temperature=0), strict=True):
        assert torch.equal(row, together)


def test_a_chunk_has_fewer_tokens_of_more_rows_but_never_few() -> None:
    assert [default_chunk_len(n) for n in (0, 1, 4, 5, 32, 1000)] == [2048, 2048, 2048, 1638, 256, 256]


def test_no_more_than_a_chunk_is_read_at_once_and_no_gradient_is_kept() -> None:
    lm, lengths = tiny("mamba"), list[int]()
    lm.backbone.register_forward_pre_hook(lambda _, args: lengths.append(args[0].shape[1]))
    logits, state = lm.prefill(torch.randint(V, (2, 11)), lm.init_state(2, 11), chunk_len=4)
    assert lengths == [4, 4, 3]
    assert not any(t.requires_grad for t in (logits, *state[0].tensors().values()))


@torch.no_grad()
def test_a_prefill_refuses_what_it_cannot_read() -> None:
    lm, tokens = tiny("transformer"), torch.randint(V, (2, 5))
    with pytest.raises(ValueError, match="chunk_len=0 must be a whole number of at least 1"):
        lm.prefill(tokens, lm.init_state(2, 5), chunk_len=0)
    with pytest.raises(ValueError, match="no tokens to read"):
        lm.prefill(tokens[:, :0], lm.init_state(2, 5))
    with pytest.raises(ValueError, match="made for max_len=4 tokens and would hold 5"):
        lm.prefill(tokens, lm.init_state(2, 4), chunk_len=2)
    with pytest.raises(ValueError, match=r"padding_mask must be \(2, 5\)"):
        lm.prefill(tokens, lm.init_state(2, 5), padding_mask=torch.ones(2, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["samba", "mamba2", "gpt2"])
@torch.no_grad()
def test_chunks_may_cut_the_padding_of_a_batch_anywhere(name: str) -> None:
    lm, rows = tiny(name, **({"window": 3} if name == "samba" else {})), prompts_of(2, 9, 5)
    expected = lm.generate(rows, 4, temperature=0)
    for chunk in (1, 2, 4, 7):
        for a, b in zip(lm.generate(rows, 4, temperature=0, prefill_chunk=chunk), expected, strict=True):
            assert torch.equal(a, b)


def test_lists_of_numbers_are_prompts_and_what_comes_back_has_the_form_of_what_went_in() -> None:
    lm = tiny("mamba")
    first, second = lm.generate([[1, 2, 3], [4]], 5, temperature=0)
    assert (first.shape, second.shape) == ((8,), (6,))
    assert first[:3].tolist() == [1, 2, 3]
    assert lm.generate(torch.tensor([[1, 2, 3]]), 5, temperature=0).tolist() == [first.tolist()]
    assert lm.generate([[1, 2, 3]], 0)[0].tolist() == [1, 2, 3]


def naive_probabilities(logits: list[float], seen: set[int], rules: Sampling) -> dict[int, float]:
    """Temperature above 0, one row, in Python's floats: token -> probability, of the tokens that can be drawn."""
    penalty = rules.repetition_penalty
    logits = [(x / penalty if x > 0 else x * penalty) if i in seen else x for i, x in enumerate(logits)]
    ranked = sorted(range(len(logits)), key=lambda i: -logits[i])[: rules.top_k]
    weight = {i: math.exp((logits[i] - logits[ranked[0]]) / rules.temperature) for i in ranked}
    total, kept, mass = sum(weight.values()), [], 0.0
    for i in ranked:
        if rules.top_p is not None and mass >= rules.top_p:
            break
        kept.append(i)
        mass += weight[i] / total
    return {i: weight[i] / sum(weight[j] for j in kept) for i in kept}


@drawn
@given(
    seed=st.integers(0, 2**16),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.none() | st.integers(1, V + 3),
    top_p=st.none() | st.floats(0.01, 1.0),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.6]),
)
def test_the_probabilities_are_those_of_the_definition(
    seed: int, temperature: float, top_k: int | None, top_p: float | None, repetition_penalty: float
) -> None:
    torch.manual_seed(seed)
    rules = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, repetition_penalty=repetition_penalty)
    logits, seen = 3 * torch.randn(3, V, dtype=torch.float64), torch.rand(3, V) < 0.4
    actual = rules.probabilities(logits, seen)
    for row, marks, probs in zip(logits, seen, actual, strict=True):
        expected = naive_probabilities(row.tolist(), set(marks.nonzero().flatten().tolist()), rules)
        assert set(probs.nonzero().flatten().tolist()) == set(expected)
        torch.testing.assert_close(probs[list(expected)], torch.tensor(list(expected.values()), dtype=probs.dtype))


def test_equal_logits_do_not_widen_top_k() -> None:
    assert (Sampling(top_k=3).probabilities(torch.zeros(2, V)) > 0).sum(-1).tolist() == [3, 3]


def test_draws_follow_the_probabilities() -> None:
    logits = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    tokens = Sampling(top_k=3, generator=torch.Generator().manual_seed(0)).draw(logits.expand(20_000, -1))
    expected = torch.tensor([3.0, 2.0, 1.0, -math.inf]).softmax(0)
    shares = tokens.bincount(minlength=4) / len(tokens)
    assert shares[3] == 0
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)  # four standard deviations


@torch.no_grad()
def test_the_penalty_is_on_what_prompt_and_continuation_hold_and_not_on_padding() -> None:
    lm, rules = tiny("mamba"), Sampling(repetition_penalty=5.0)
    rows = [[4], [0, 9, 9, 3, 17]]
    for row, found in zip(rows, lm.generate(rows, 8, temperature=0, repetition_penalty=5.0), strict=True):
        tokens = list(row)
        for _ in range(8):
            logits = lm(torch.tensor([tokens])).logits[0, -1].tolist()
            probs = naive_probabilities(logits, set(tokens), rules)
            tokens.append(max(probs, key=probs.__getitem__))
        assert found.tolist() == tokens
        assert tokens != lm.generate([row], 8, temperature=0)[0].tolist()


@pytest.mark.parametrize("name", ["transformer", "gpt2", "jamba"])
@torch.no_grad()
def test_a_row_ends_with_its_stop_token_and_the_others_go_on_as_if_alone(name: str) -> None:
    lm, rows = tiny(name), prompts_of(3, 6, 2, 6, 4)
    free = [row.tolist() for row in lm.generate(rows, 12, temperature=0)]
    stops = [free[0][4], free[1][11]]  # reached after at most two and six tokens
    ends = []
    for row, tokens in zip(rows, free, strict=True):
        n = len(row)
        ends.append(next((i + 1 for i in range(n, n + 12) if tokens[i] in stops), n + 12))
    assert len({end - len(row) for end, row in zip(ends, rows, strict=True)}) > 1  # they end at different times
    found = lm.generate(rows, 12, temperature=0, stop_tokens=stops, repetition_penalty=1.0)
    assert [row.tolist() for row in found] == [tokens[:end] for tokens, end in zip(free, ends, strict=True)]


@torch.no_grad()
def test_rows_of_a_tensor_are_filled_up_with_the_first_stop_token() -> None:
    lm = tiny("mamba")
    prompt = torch.randint(V, (2, 4))
    free = lm.generate(prompt, 9, temperature=0)
    stop = free[0, 5].item()
    found = lm.generate(prompt, 9, temperature=0, stop_tokens=[stop])
    for row, whole in zip(found.tolist(), free.tolist(), strict=True):
        end = next((i for i in range(4, 13) if whole[i] == stop), 12) + 1
        assert row == whole[:end] + [stop] * (len(row) - end)
    assert lm.generate(prompt[:1], 9, temperature=0, stop_tokens=[stop]).shape == (1, 6)


@pytest.mark.parametrize("name", ["transformer", "mamba"])
@torch.no_grad()
def test_until_ends_a_row_by_all_that_was_drawn_for_it_and_the_others_go_on_as_if_alone(name: str) -> None:
    lm, rows = tiny(name), prompts_of(3, 6, 2)
    free = [row[len(prompt) :].tolist() for row, prompt in zip(lm.generate(rows, 9, temperature=0), rows, strict=True)]
    wanted = [free[0][:4], free[1][:7], [-5]]  # the third is never found
    calls: list[tuple[int, int]] = []

    def until(row: int, new: Tensor) -> bool:
        calls.append((row, len(new)))
        return new.tolist() == wanted[row]

    found = lm.generate(rows, 9, temperature=0, until=until)
    new = [row[len(prompt) :].tolist() for row, prompt in zip(found, rows, strict=True)]
    assert new == [free[0][:4], free[1][:7], free[2]]
    assert sorted(calls) == [(row, n) for row, last in enumerate([4, 7, 9]) for n in range(1, last + 1)]


def test_until_is_not_asked_of_rows_that_a_stop_token_has_ended_and_a_tensor_is_filled_with_no_token() -> None:
    lm, prompt = tiny("lstm"), torch.randint(V, (2, 4))
    free = lm.generate(prompt, 5, temperature=0)
    asked: list[int] = []
    lm.generate(prompt[:1], 5, temperature=0, stop_tokens=[free[0, 4].item()], until=lambda row, _: asked.append(row))
    assert asked == []
    found = lm.generate(prompt, 5, temperature=0, until=lambda row, new: row == 1 and len(new) == 2)
    assert found[0].tolist() == free[0].tolist()
    assert found[1].tolist() == free[1, :6].tolist() + [NO_TOKEN] * 3


def test_every_option_can_be_given_and_is_shown_by_help() -> None:
    names = [field.name for field in dataclasses.fields(Sampling)]
    for generate in (LanguageModel.generate, Seq2Seq.generate):
        parameters = inspect.signature(generate).parameters
        assert [p for p in parameters if p in names] == names
        assert [name for name, p in parameters.items() if p.kind == p.POSITIONAL_OR_KEYWORD][2:] == [
            "max_new_tokens", "temperature", "top_k", "top_p", "generator",
        ]  # fmt: skip
        assert all(f"\n    {name}: " in (generate.__doc__ or "") for name in names)


def test_an_unknown_option_names_the_nearest() -> None:
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match=r"generate\(\) has no option 'tempratur'; did you mean 'temperature'\?"):
        tiny("lstm").generate(prompt, 1, tempratur=0)
    with pytest.raises(TypeError, match=r"has no option 'start_tokens'; did you mean 'start_token'\?"):
        build("seq2seq", d_model=8, n_layers=2).generate(prompt, 1, start_tokens=0)


def test_the_callback_sees_every_step_in_order_and_rows_that_have_ended_as_no_token() -> None:
    lm, rows = tiny("lstm"), prompts_of(2, 5, 3)
    free = lm.generate(rows, 7, temperature=0)
    stop = free[1][6].item()
    calls: list[tuple[int, list[int]]] = []
    found = lm.generate(
        rows, 7, temperature=0, stop_tokens=[stop], on_token=lambda n, tokens: calls.append((n, tokens.tolist()))
    )
    assert [n for n, _ in calls] == list(range(len(calls)))
    for i, row in enumerate(rows):
        column = [tokens[i] for _, tokens in calls]
        new = found[i][len(row) :].tolist()
        assert column == new + [NO_TOKEN] * (len(calls) - len(new))
    assert any(NO_TOKEN in tokens for _, tokens in calls)


def test_the_seed_decides_and_temperature_zero_leaves_the_generator_alone() -> None:
    lm, prompt = tiny("mamba"), torch.randint(V, (2, 3))

    def tokens(seed: int, **options: float) -> list[list[int]]:
        return lm.generate(prompt, 12, generator=torch.Generator().manual_seed(seed), **options).tolist()

    assert tokens(5) == tokens(5) != tokens(6)
    generator = torch.Generator().manual_seed(5)
    before = generator.get_state()
    assert lm.generate(prompt, 5, temperature=0, generator=generator).tolist() == lm.generate(prompt, 5, 0).tolist()
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0"),
        ({"temperature": math.nan}, "temperature=nan must be a finite number"),
        ({"temperature": math.inf}, "temperature=inf must be a finite number"),
        ({"temperature": "0.5"}, "temperature='0.5' must be a number"),
        ({"temperature": True}, "temperature=True must be a number"),
        ({"temperature": None}, "temperature=None must be a number"),
        ({"top_k": 0}, "top_k=0 must be at least 1"),
        ({"top_k": 2.0}, "top_k=2.0 must be a whole number"),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 must be more than 0"),
        ({"top_p": 1.5}, "top_p=1.5 must be at most 1"),
        ({"top_p": math.nan}, "top_p=nan must be a finite number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0 must be more than 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty=inf must be a finite number"),
        ({"prefill_chunk": 0}, "prefill_chunk=0 must be at least 1"),
        ({"stop_tokens": ["x"]}, r"stop_tokens\[0\]='x' must be a whole number"),
        ({"generator": 3}, "generator=3 must be of type Generator"),
        ({"until": 3}, "until=3 must be of type Callable"),
        ({"vocab_size": 0}, "vocab_size=0 must be at least 1"),
        ({"vocab_size": V + 1}, f"vocab_size={V + 1} is more than the {V} tokens of the model"),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        tiny("lstm").generate(torch.zeros(1, 2, dtype=torch.int64), 1, **options)


@drawn
@given(temperature=st.sampled_from([1e-39, 5e-324, 1e-30, 1e-8]), scale=st.sampled_from([1e-3, 1.0, 1e4, 1e38]))
def test_the_smallest_temperatures_take_the_most_likely_token(temperature: float, scale: float) -> None:
    logits = scale * (torch.stack([torch.randperm(V) for _ in range(4)]) / V)
    for rules in (Sampling(temperature), Sampling(temperature, top_k=3), Sampling(temperature, top_p=0.5)):
        assert torch.equal(rules.draw(logits), logits.argmax(-1))
        assert torch.equal(rules.draw(-logits), logits.argmin(-1))


@drawn
@given(
    seed=st.integers(0, 2**16),
    vocab_size=st.integers(1, V),
    temperature=st.sampled_from([0, 1e-39, 1.0, 1e30]),
    top_k=st.none() | st.integers(1, V + 3),
    top_p=st.none() | st.floats(0.01, 1.0),
    penalty=st.sampled_from([1.0, 0.01, 100.0]),
)
def test_tokens_beyond_the_tokenizer_are_never_drawn(
    seed: int, vocab_size: int, temperature: float, top_k: int | None, top_p: float | None, penalty: float
) -> None:
    torch.manual_seed(seed)
    rules = Sampling(temperature, top_k, top_p, vocab_size=vocab_size, repetition_penalty=penalty)
    logits = torch.randn(64, V) + 9 * (torch.arange(V) >= vocab_size)  # the likeliest, were they not beyond it
    assert (rules.draw(logits, torch.rand(64, V) < 0.5) < vocab_size).all()


@pytest.mark.parametrize("name", ["mamba", "transformer"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_no_numbers_end_generation_and_what_was_drawn_before_was_given(name: str, bad: float) -> None:
    lm, prompt, drawn_tokens = tiny(name), torch.randint(V, (2, 4)), []
    lm.generate(prompt, 3, on_token=lambda n, _: drawn_tokens.append(n))
    with torch.no_grad():
        lm.output_weight[2 if math.isnan(bad) else slice(None)] = bad
    with pytest.raises(FloatingPointError, match=r"^the model's logits are not finite: [^\n]*$"):
        lm.generate(prompt, 3, on_token=lambda n, _: drawn_tokens.append(n))
    assert drawn_tokens == [0, 1, 2]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (torch.zeros(1, 0, dtype=torch.int64), "the prompt is empty"),
        ([[1], []], "the prompt is empty"),
        ([], "the list of prompts is empty"),
        (torch.zeros(3, dtype=torch.int64), r"must be \(B, L\), not \(3,\)"),
        ([[[1]]], r"must be \(L,\), not \(1, 1\)"),
    ],
)
def test_prompts_that_are_none_are_refused(prompt: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("lstm").generate(prompt, 1)  # pyright: ignore[reportArgumentType,reportCallIssue]


@every_decoder
@torch.no_grad()
def test_a_graphs_steps_give_the_logits_of_a_full_pass(name: str) -> None:
    lm, tokens = tiny(name), torch.randint(V, (3, 12))
    logits, state = lm.prefill(tokens[:, :5], lm.init_state(3, 12))
    decode = DecodeGraph(lm, state)
    full = lm(tokens).logits
    torch.testing.assert_close(logits, full[:, 4])
    for t in range(5, 12):
        torch.testing.assert_close(decode(tokens[:, t]), full[:, t])


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@torch.no_grad()
def test_a_graphs_steps_continue_rows_that_begin_apart(window: int | None) -> None:
    lm, tokens = tiny("transformer", window=window), torch.randint(V, (2, 12))
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[1, 4] = True
    _, state = lm.prefill(tokens[:, :6], lm.init_state(2, 12), starts=starts)
    decode = DecodeGraph(lm, state)
    full = lm(tokens[:1]).logits[0], lm(tokens[1:, 4:]).logits[0]
    for t in range(6, 12):
        torch.testing.assert_close(decode(tokens[:, t]), torch.stack([full[0][t], full[1][t - 4]]))


class OnlyMeta(TorchDispatchMode):
    """Fails where an operation touches memory of the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        touched, _ = tree_flatten((args, kwargs, out))
        assert {t.device.type for t in touched if isinstance(t, Tensor)} <= {"meta"}, func
        return out


@every_steady_step
def test_a_step_reads_nothing_back_and_takes_nothing_from_the_host(
    name: str, options: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # a device without values: whatever asked for one would raise
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())  # which does not know it
    lm = build(name, d_model=24, n_layers=2, vocab_size=V, device="meta", **options)
    decode = DecodeGraph(lm, lm.init_state(2, 9))
    with OnlyMeta():
        assert decode(torch.zeros(2, dtype=torch.int64, device="meta")).shape == (2, V)


@torch.inference_mode()
def test_a_step_compiles_once_for_all_steps() -> None:
    lm, tokens = tiny("samba", window=3), torch.randint(V, (2, 10))
    _, state = lm.prefill(tokens[:, :4], lm.init_state(2, 10))
    held = DecodeGraph(lm, state)._state
    addresses = [t.data_ptr() for layer in held for t in layer.tensors().values()]
    compiled = torch.compile(step_in_place, fullgraph=True, backend="eager", dynamic=False)
    full = lm(tokens).logits
    for t in range(4, 9):
        with torch.compiler.set_stance("default" if t == 4 else "fail_on_recompile"):
            torch.testing.assert_close(compiled(lm, tokens[:, t].clone(), held), full[:, t])
    assert [t.data_ptr() for layer in held for t in layer.tensors().values()] == addresses
