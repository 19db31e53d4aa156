"""What enters a model is checked once, in a model's words, and padding is a mask away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, State, available, build, configure
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

V = 13


def tiny(name: str, **options: Any) -> Any:
    n_layers = len(configure(name, **options).pattern)
    return build(name, **{"d_model": 24, "n_layers": n_layers, "vocab_size": V} | options).double().eval()


every_decoder = pytest.mark.parametrize("name", available())
TOKENS = torch.arange(12).view(3, 4)


def marks(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=torch.bool)


@pytest.mark.quick
@pytest.mark.parametrize("entry", ["lm", "backbone"])
@every_decoder
def test_states_and_marks_that_do_not_fit_the_batch_are_refused_by_every_decoder(name: str, entry: str) -> None:
    lm: LanguageModel = tiny(name)
    model, x = (lm, TOKENS) if entry == "lm" else (lm.backbone, lm.embedding(TOKENS))
    for wrong in (marks(3, 1), marks(2, 4), marks(3, 3), marks(1, 5), marks(4), marks(3, 4, 1), marks(0, 4)):
        for key in ("starts", "padding_mask"):
            with pytest.raises(ValueError, match=rf"^{key} must be \(3, 4\), or \(1, 4\) for all rows alike, not \("):
                model(x, **{key: wrong})
    with pytest.raises(ValueError, match=r"^starts must be bool, not int64: use starts\.bool\(\)$"):
        model(x, starts=marks(3, 4).long())
    for rows in (1, 2, 4):
        with pytest.raises(ValueError, match=rf"^state\[0\] is of {rows} rows and the input of 3$"):
            model(x, lm.init_state(rows, 9))
        with pytest.raises(ValueError, match=rf"^state\[0\] is of {rows} rows and the input of 3$"):
            model(x[:, :1], lm.init_state(rows, 9))
    state = lm.init_state(3, 9)
    for wrong in (state[:-1], [*state, state[0]], []):
        with pytest.raises(ValueError, match=rf"^state has {len(wrong)} entries for {len(state)} layers"):
            model(x, wrong)
    with pytest.raises(
        ValueError, match=r"^state must be a list of states, as init_state makes it, not \w+State|Cache"
    ):
        model(x, state[0])
    with pytest.raises(ValueError, match=r"^state\[0\] is a State where \w+ needs a \w+$"):
        model(x, [State()] * len(state))
    with pytest.raises(ValueError, match=r"^state\[0\]\.\w+ of \w+ must be \(B, .*\), not \(3, "):
        model(x, tiny(name, d_model=48).init_state(3, 9))
    with pytest.raises(ValueError, match=r"^state\[0\]\.\w+ is on meta and the input on cpu: move one of them$"):
        model(x, lm.init_state(3, 9, device="meta"))
    with pytest.raises(ValueError, match=r"^state\[0\]\.\w+ of \w+ must hold (real|complex) numbers, not int64"):
        model(x, [layer.map(lambda t: torch.zeros(t.shape, dtype=torch.int64)) for layer in lm.init_state(3, 9)])


@every_decoder
def test_one_row_of_marks_stands_for_all_rows(name: str) -> None:
    lm: LanguageModel = tiny(name)
    row = torch.tensor([[False, True, False, True]])
    for key, mask in (("starts", row), ("padding_mask", row.cummax(1).values)):
        out, expected = (lm(TOKENS, lm.init_state(3, 4), **{key: m}) for m in (mask, mask.repeat(3, 1)))
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(lm(TOKENS, **{key: mask}).logits, lm(TOKENS, **{key: mask.repeat(3, 1)}).logits)


PAIRS = {"source": TOKENS, "target": TOKENS[:, :3]}
WRONG: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda lm, _: lm(TOKENS[0]), r"tokens must be \(B, L\), not \(4,\): use tokens\[None\] for one row"),
    (lambda lm, _: lm(TOKENS[None]), r"tokens must be \(B, L\), not \(1, 3, 4\)"),
    (lambda lm, _: lm(TOKENS.double()), "tokens must be int64, not float64"),
    (lambda lm, _: lm(TOKENS > 3), "tokens must be int64, not bool"),
    (lambda lm, _: lm([[1, 2]]), r"tokens must be a tensor, \(B, L\) int64, not list"),
    (lambda lm, _: lm(TOKENS + 2), "tokens reach from 2 to 13, and the vocabulary of the model from 0 to 12"),
    (lambda lm, _: lm(TOKENS - 1), "tokens reach from -1 to 10, and the vocabulary of the model from 0 to 12"),
    (lambda lm, _: lm.generate([[99]], 1), "tokens reach from 99 to 99, and the vocabulary"),
    (lambda lm, _: lm.loss(TOKENS, TOKENS + 2), "targets reach from 2 to 13, and the vocabulary"),
    (lambda lm, _: lm.loss(TOKENS, TOKENS - 1), "targets reach from -1 to 10, and the vocabulary"),
    (
        lambda lm, _: lm.loss(TOKENS, TOKENS.T),
        r"targets must be \(3, 4\) as the tokens that predict them, not \(4, 3\)",
    ),
    (lambda lm, _: lm.loss(TOKENS, TOKENS[:1]), r"targets must be \(3, 4\) as the tokens .*, not \(1, 4\)"),
    (lambda lm, _: lm.loss(TOKENS, TOKENS.int()), "targets must be int64, not int32"),
    (lambda lm, _: lm.loss(TOKENS, TOKENS, padding_mask=marks(3, 3)), r"padding_mask must be \(3, 4\), or"),
    (lambda lm, _: lm.backbone(torch.zeros(3, 4, 23)), r"x must be \(B, L, 24\), not \(3, 4, 23\)"),
    (lambda lm, _: lm.backbone(torch.zeros(3, 24)), r"x must be \(B, L, 24\), not \(3, 24\)"),
    (lambda lm, _: lm.backbone(TOKENS[..., None].expand(3, 4, 24)), "x must be in a floating-point dtype, not int64"),
    (lambda lm, _: lm.init_state(-1, 4), "batch_size=-1 must be a whole number of at least 0"),
    (lambda lm, _: lm.init_state(1, 2.5), "max_len=2.5 must be a whole number of at least 0"),
    (lambda lm, _: lm.init_state(True, 2), "batch_size=True must be a whole number of at least 0"),
    (lambda lm, _: lm.generate(TOKENS, -2), "max_new_tokens=-2 must be a whole number of at least 0"),
    (lambda lm, _: lm.generate([[1.5]], 1), "a prompt must be whole numbers, not float32"),
    (lambda lm, _: lm.generate(TOKENS.float(), 1), "a prompt must be whole numbers, not float32"),
    (lambda _, s2s: s2s(TOKENS[0], TOKENS), r"source must be \(B, L\), not \(4,\): use source\[None\]"),
    (lambda _, s2s: s2s(TOKENS, TOKENS[0]), r"target must be \(B, L\), not \(4,\): use target\[None\]"),
    (lambda _, s2s: s2s(TOKENS + 2, TOKENS), "source reach from 2 to 13, and the vocabulary"),
    (lambda _, s2s: s2s(TOKENS, TOKENS[:1]), "target has 1 rows and source 3: give each source its target"),
    (lambda _, s2s: s2s(**PAIRS, targets=TOKENS), r"targets must be \(3, 3\) as the tokens"),
    (lambda _, s2s: s2s(**PAIRS, source_len=torch.tensor([2])), r"source_len must be \(3,\), one length for each row"),
    (lambda _, s2s: s2s(**PAIRS, source_len=torch.ones(3)), "source_len must be int64, not float32"),
    (lambda _, s2s: s2s.decode(TOKENS, s2s.encode(TOKENS[:1], max_len=4)), r"state\[0\] is of 1 rows"),
    (lambda _, s2s: s2s.generate(TOKENS, -1), "max_new_tokens=-1 must be a whole number"),
    (lambda _, s2s: s2s.init_state(1, -1), "max_len=-1 must be a whole number"),
]


@pytest.mark.quick
@pytest.mark.parametrize(("call", "message"), WRONG, ids=[message for _, message in WRONG])
def test_what_does_not_fit_is_refused_in_one_line(call: Callable[[Any, Any], Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}") as error:
        call(tiny("mamba"), tiny("encdec"))
    assert "\n" not in str(error.value)


@pytest.mark.quick
@pytest.mark.parametrize("name", [*available(), *available("encoder")])
@settings(max_examples=2)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=2, max_size=4), seed=st.integers(0, 99)
)
def test_rows_padded_at_either_end_are_rows_alone(name: str, lengths: list[tuple[int, int]], seed: int) -> None:
    torch.manual_seed(seed)
    lm: LanguageModel = tiny(name)
    total = max(before + n for before, n in lengths) + 1
    tokens, mask = torch.randint(V, (len(lengths), total)), marks(len(lengths), total)
    for row, (before, n) in zip(mask, lengths, strict=True):
        row[before : before + n] = True
    alone = [lm(tokens[i : i + 1, before : before + n]).logits[0] for i, (before, n) in enumerate(lengths)]
    torch.testing.assert_close(lm(tokens, padding_mask=mask).logits[mask], torch.cat(alone))
    targets = torch.randint(V, tokens.shape)
    loss, _ = lm.loss(tokens, targets, padding_mask=mask)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(torch.cat(alone), targets[mask]))
    if lm.config.kind == "encoder":
        return
    with torch.no_grad():  # a mask that comes with a state leaves the state of the last real token
        out = lm(tokens, lm.init_state(len(lengths), total + 2), padding_mask=mask)
        torch.testing.assert_close(out.logits[mask], torch.cat(alone))
        more = torch.randint(V, (len(lengths), 2))
        rows = [torch.cat([tokens[i, b : b + n], more[i]])[None] for i, (b, n) in enumerate(lengths)]
        expected = torch.cat([lm(row).logits[:, -2:] for row in rows])
        torch.testing.assert_close(lm(more, out.state).logits, expected)
        # a part that holds nothing but padding leaves nothing, and one without tokens leaves all
        out = lm(
            tokens, lm.init_state(len(lengths), total + 3), padding_mask=mask & (torch.arange(len(mask)) > 0)[:, None]
        )
        out = lm(tokens[:, :0], out.state, padding_mask=mask[:, :0])
        expected[:1] = lm(more[:1]).logits
        torch.testing.assert_close(lm(more, out.state).logits, expected)


@pytest.mark.quick
@pytest.mark.parametrize("name", available())
@torch.no_grad()
def test_a_document_does_not_see_that_the_one_before_is_no_number(name: str) -> None:
    lm: LanguageModel = tiny(name)
    x, starts = lm.embed(torch.randint(V, (2, 9))), marks(2, 9)
    expected, _, _ = lm.backbone(x[:, 4:])
    x[:, 1], starts[:, 4] = torch.nan, True
    torch.testing.assert_close(lm.backbone(x, starts=starts)[0][:, 4:], expected)
    _, state, _ = lm.backbone(x[:, :4], lm.init_state(2, 9))
    torch.testing.assert_close(lm.backbone(x[:, 4:], state, starts=starts[:, 4:])[0], expected)


@torch.no_grad()
def test_checks_and_masks_trace_in_one_graph() -> None:
    torch._dynamo.reset()
    lm, mask = tiny("transformer"), torch.tensor([[True, True, True, False]])
    compiled = torch.compile(lm, fullgraph=True, backend="eager", dynamic=False)
    out, expected = (f(TOKENS, lm.init_state(3, 5), starts=mask, padding_mask=mask) for f in (compiled, lm))
    torch.testing.assert_close(out.logits, expected.logits)
