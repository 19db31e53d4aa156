"""The mixer contract over the registry, in float64, values and gradients. A new mixer is tested by being registered.

full == any split into chunks == token by token == packed documents apart == left-padded, and y[:t] ignores x[t:].
Compiled tokens, which are in float32, are as near as rounding.
Mixers of encoders keep what does not need a state: packing and padding. Whole models hold what their mixers hold.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from crossover.archs import (
    MIXERS,
    Decoder,
    LanguageModel,
    Mixer,
    ModelConfig,
    State,
    States,
    available,
    build,
    configure,
)
from crossover.archs.decoding import COMPILED, MODULES
from crossover.archs.layers import RMSNorm
from crossover.archs.presets import PRESETS
from crossover.kernels.compare import assert_same
from crossover.train.objectives import OBJECTIVES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._pytree import tree_leaves

# Options that change how a mixer runs; every other mixer is tested with its defaults.
VARIANTS = {
    "attention": [
        {"n_heads": 4, "n_kv_heads": 2, "bias": True},
        {"n_heads": 2, "rope": False},
        {"n_heads": 2, "window": 3},
        {"n_heads": 1, "window": 1},
    ],
    "mamba": [{"d_state": 5, "d_conv": 3}, {"d_state": 4, "inner_norm": True, "expand": 1.5}],
    "mamba2": [{"d_state": 5, "d_conv": 3, "n_groups": 2, "expand": 1.5}],
    "mamba3": [{"d_state": 6, "expand": 1.5}, {"d_state": 7, "rope_fraction": 1.0}],
    "s4": [{"d_state": 6}],
    "s4d": [{"d_state": 6}, {"d_state": 4, "init": "real"}],
    "h3": [{"d_conv": 5, "d_state": 6}, {"head_dim": 4, "d_conv": 3, "d_state": 4}],
    "gated_deltanet": [{"n_heads": 3, "d_state": 5, "expand": 0.6, "d_conv": 3, "negative_eigenvalues": True}],
    "lstm": [{"expand": 2}],
}


def example(file: str, name: str) -> type[Mixer]:
    """The mixer of a file in examples/, which registers it for this call alone."""
    path = Path(__file__).parents[2] / "examples" / file
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    with patch.dict(MIXERS), patch.dict(PRESETS), patch.dict(OBJECTIVES):
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    del sys.modules[path.stem]
    return getattr(module, name)


KINDS = {name: cls for name, cls in MIXERS.items() if name != "bidirectional"} | {
    "examples/new_mixer.py": example("new_mixer.py", "EMA"),
    "examples/plugin": example("plugin/token_shift.py", "TokenShift"),
}
ALL = KINDS | {"bidirectional": MIXERS["bidirectional"]}
CASES = [(name, options) for name in KINDS for options in VARIANTS.get(name, [{}])]
ENCODERS: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"causal": False, "n_heads": 4, "n_kv_heads": 2}),
    ("attention", {"causal": False, "n_heads": 2, "rope": False, "bias": True}),
    ("attention", {"causal": False, "n_heads": 2, "window": 3}),
    ("bidirectional", {"of": "mamba", "options": {"d_state": 5, "d_conv": 3}}),
    ("bidirectional", {"of": "s4d", "options": {"d_state": 6}}),
]
LENGTH = 24


def over(cases: list[tuple[str, dict[str, Any]]]) -> pytest.MarkDecorator:
    ids = ["-".join([name, *(f"{k}={v}" for k, v in options.items())]) for name, options in cases]
    return pytest.mark.parametrize(("name", "options"), cases, ids=ids)


over_the_registry = over(CASES)
over_encoders = over(ENCODERS)
over_both = over(CASES + ENCODERS)
drawn = settings(max_examples=25)
SEED, LENGTHS, WIDTHS = st.integers(0, 2**16), st.integers(1, LENGTH), st.sampled_from([8, 24])


def make(name: str, options: dict[str, Any], d_model: int, seed: int) -> Mixer:
    """A mixer with weights large enough for errors to show, in float64."""
    torch.manual_seed(seed)
    cls = ALL[name]
    mixer = cls(d_model, cls.Config(**options)).double()
    with torch.no_grad():
        for module in mixer.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
            if isinstance(module, torch.nn.Linear) and module.bias is not None:
                module.bias.normal_()
    return mixer


def values_and_gradients(mixer: Mixer, x: Tensor, run: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """y = run(x), and the gradients of x and of every parameter under a fixed random weighting of y."""
    x = x.detach().clone().requires_grad_()
    y = run(x)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weight).sum(), [x, *parameters], materialize_grads=True)
    return {"y": y.detach()} | dict(zip(("x", *names), grads, strict=True))


def in_chunks(mixer: Mixer, x: Tensor, bounds: list[int], starts: Tensor | None = None) -> Tensor:
    """Runs x[:, i:j] for consecutive bounds, handing the state on."""
    state, ys = mixer.init_state(len(x), x.shape[1], dtype=x.dtype), []
    for i, j in zip([0, *bounds], [*bounds, x.shape[1]], strict=True):
        y, state = mixer(x[:, i:j], state, starts=None if starts is None else starts[:, i:j])
        ys.append(y)
    return torch.cat(ys, dim=1)


def full(mixer: Mixer, starts: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    return lambda x: mixer(x, starts=starts)[0]


@over_the_registry
@drawn
@given(L=LENGTHS, D=WIDTHS, seed=SEED, cuts=st.lists(st.integers(0, LENGTH), max_size=4), packed=st.booleans())
def test_any_split_into_chunks_some_of_them_empty_equals_the_full_pass(
    name: str, options: dict[str, Any], L: int, D: int, seed: int, cuts: list[int], packed: bool
) -> None:
    mixer = make(name, options, D, seed)
    x, bounds = torch.randn(2, L, D, dtype=torch.float64), sorted(min(c, L) for c in cuts)
    starts = torch.rand(2, L) < 0.2 if packed else None
    expected = values_and_gradients(mixer, x, full(mixer, starts))
    actual = values_and_gradients(mixer, x, lambda x: in_chunks(mixer, x, bounds, starts))
    assert_same(actual, expected, 1e-9)
    with torch.no_grad():  # where a state is updated in place
        torch.testing.assert_close(in_chunks(mixer, x, bounds, starts), expected["y"])


@over_the_registry
@drawn
@given(L=LENGTHS, D=WIDTHS, seed=SEED)
def test_token_by_token_equals_the_full_pass(name: str, options: dict[str, Any], L: int, D: int, seed: int) -> None:
    mixer = make(name, options, D, seed)
    x = torch.randn(2, L, D, dtype=torch.float64)

    def steps(x: Tensor) -> Tensor:
        state, ys = mixer.init_state(2, L, dtype=x.dtype), []
        for t in range(L):
            y, state = mixer.step(x[:, t], state)
            ys.append(y)
        return torch.stack(ys, dim=1)

    expected = values_and_gradients(mixer, x, full(mixer))
    assert_same(values_and_gradients(mixer, x, steps), expected, 1e-9)
    with torch.no_grad():
        torch.testing.assert_close(steps(x), expected["y"])


@over_both
@drawn
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=4), D=WIDTHS, seed=SEED)
def test_packed_documents_equal_documents_apart(
    name: str, options: dict[str, Any], lengths: list[int], D: int, seed: int
) -> None:
    mixer = make(name, options, D, seed)
    x = torch.randn(1, sum(lengths), D, dtype=torch.float64)
    starts = torch.zeros(1, sum(lengths), dtype=torch.bool)
    for n in range(len(lengths)):
        starts[0, sum(lengths[:n])] = True
    apart = values_and_gradients(
        mixer, x, lambda x: torch.cat([mixer(part)[0] for part in x.split(lengths, dim=1)], dim=1)
    )
    assert_same(values_and_gradients(mixer, x, full(mixer, starts)), apart, 1e-9)


@over_the_registry
@drawn
@given(L=LENGTHS, D=WIDTHS, seed=SEED, padding=st.integers(1, 9), split=st.integers(1, 30))
def test_left_padding_changes_nothing(
    name: str, options: dict[str, Any], L: int, D: int, seed: int, padding: int, split: int
) -> None:
    mixer = make(name, options, D, seed)
    x = torch.randn(2, L, D, dtype=torch.float64)
    # the second row is padded with noise; the first has `padding` tokens more of its own
    longer = torch.cat([torch.randn(2, padding, D, dtype=torch.float64), x], dim=1)
    starts = torch.zeros(2, padding + L, dtype=torch.bool)
    starts[0, 0] = starts[1, padding] = True
    bounds = [split] if split < padding + L else []

    def real_tokens(x: Tensor) -> Tensor:
        y = in_chunks(mixer, torch.cat([longer[:, :padding], x], dim=1), bounds, starts)
        return torch.cat([y[0], y[1, padding:]])

    def apart(x: Tensor) -> Tensor:
        return torch.cat([mixer(torch.cat([longer[:1, :padding], x[:1]], dim=1))[0][0], mixer(x[1:])[0][0]])

    assert_same(values_and_gradients(mixer, x, real_tokens), values_and_gradients(mixer, x, apart), 1e-9)


@over_the_registry
@drawn
@given(L=st.integers(2, LENGTH), D=WIDTHS, seed=SEED, data=st.data())
def test_output_ignores_the_future(
    name: str, options: dict[str, Any], L: int, D: int, seed: int, data: st.DataObject
) -> None:
    mixer, t = make(name, options, D, seed), data.draw(st.integers(1, L - 1))
    x = torch.randn(1, L, D, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0][:, :t].sum(), x)
    # convolution by FFT rounds: the future leaks in at the level of the rounding, not of the signal
    assert gradient[:, t:].abs().max() <= 1e-12 * gradient[:, :t].abs().max()


@over_encoders
@drawn
@given(L=LENGTHS, D=WIDTHS, seed=SEED, padding=st.integers(1, 9))
def test_left_padding_of_an_encoder_changes_nothing(
    name: str, options: dict[str, Any], L: int, D: int, seed: int, padding: int
) -> None:
    mixer = make(name, options, D, seed)
    x = torch.randn(2, L, D, dtype=torch.float64)
    noise = torch.randn(2, padding, D, dtype=torch.float64)
    starts = torch.zeros(2, padding + L, dtype=torch.bool)
    starts[:, padding] = True
    padded = values_and_gradients(
        mixer, x, lambda x: mixer(torch.cat([noise, x], dim=1), starts=starts)[0][:, padding:]
    )
    assert_same(padded, values_and_gradients(mixer, x, full(mixer)), 1e-9)


@over_encoders
def test_an_encoder_sees_the_future_and_the_past(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    x = torch.randn(1, 7, 8, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixer(x)[0][:, 3].square().sum(), x)
    reach = options.get("window", 4)
    seen = [i for i in range(7) if gradient[:, i].abs().max() > 1e-9]
    assert seen == [i for i in range(7) if abs(i - 3) < reach]


@over_encoders
def test_an_encoder_refuses_a_state(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    with pytest.raises(ValueError, match="has no state"):
        mixer.init_state(1, 9)
    with pytest.raises(ValueError, match="has no state"):
        mixer(torch.randn(1, 3, 8, dtype=torch.float64), State())


@pytest.mark.quick
@over_both
def test_training_makes_no_state_and_reaches_every_parameter(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    y, state = mixer(torch.randn(2, 9, 8, dtype=torch.float64))
    assert y.shape == (2, 9, 8)
    assert state is None
    y.square().sum().backward()
    untouched = {n for n, p in mixer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12}
    # what is added to all keys alike adds the same to all scores of a query, and softmax ignores it
    without_rope = (
        {n for n, _ in mixer.named_parameters() if n.endswith("k_proj.bias")}
        if not options.get("rope", True)
        else set()
    )
    # a token that sees only itself has softmax weights of one, whatever the queries and keys are
    alone = {"q_proj.weight", "k_proj.weight"} if options.get("window") == 1 else set()
    assert untouched == without_rope | alone


@pytest.mark.quick
@over_the_registry
def test_gradients_flow_through_a_given_state(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    x = torch.randn(1, 6, 8, dtype=torch.float64, requires_grad=True)
    _, state = mixer(x, mixer.init_state(1, 9, dtype=x.dtype))
    before = {k: t.detach().clone() for k, t in state.tensors().items()}
    y, _ = mixer(torch.randn(1, 3, 8, dtype=torch.float64), state)
    (gradient,) = torch.autograd.grad(y.sum(), x, materialize_grads=True)
    assert bool(gradient.any()) == (options.get("window") != 1)
    assert all(torch.equal(before[k], t.detach()) for k, t in state.tensors().items())  # while gradients are recorded


@over_both
def test_declared_parameter_names_exist(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    own = {n for n, _ in mixer.named_parameters(recurse=False)}
    assert mixer.no_weight_decay | set(mixer.lr_scale) <= own


@pytest.mark.quick
@over_the_registry
def test_state_is_a_value(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    with torch.no_grad():
        _, state = mixer(torch.randn(3, 5, 8, dtype=torch.float64), mixer.init_state(3, 9, dtype=torch.float64))
        x, rows = torch.randn(3, 2, 8, dtype=torch.float64), [2, 0, 2]
        apart = [mixer(x[i : i + 1], state.select(torch.tensor([row])))[0] for i, row in enumerate(rows)]
        chosen, _ = mixer(x, state.clone().select(torch.tensor(rows)))
    torch.testing.assert_close(chosen, torch.cat(apart))
    assert state.nbytes == mixer.init_state(3, 9, device="meta", dtype=torch.float64).nbytes


@over_the_registry
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_an_empty_state_is_zeros_in_the_precision_of_the_activations_or_float32_at_least(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    state, on_meta = (
        make(name, options, 8, 0).init_state(3, 9, device=device, dtype=dtype) for device in ("cpu", "meta")
    )
    for key, value in state.tensors().items():
        assert value.dtype in (dtype, wide, wide.to_complex())
        assert len(value) == 3
        assert not value.any()
        assert (on_meta.tensors()[key].shape, on_meta.tensors()[key].dtype) == (value.shape, value.dtype)
    if name != "attention":
        assert {wide, wide.to_complex()} & {value.dtype for value in state.tensors().values()}


@over_the_registry
def test_state_keeps_no_more_alive_than_it_declares(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    state = mixer.init_state(1, 500, dtype=torch.float64)
    declared = state.nbytes
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 400, 8, dtype=torch.float64), state)
    assert sum(t.untyped_storage().nbytes() for t in state.tensors().values()) == state.nbytes == declared


@over_the_registry
def test_state_counts_the_same_in_bfloat16(name: str, options: dict[str, Any]) -> None:
    mixer = KINDS[name](8, KINDS[name].Config(**options)).to(torch.bfloat16)
    state = mixer.init_state(1, 9, dtype=torch.bfloat16)
    before = state.nbytes
    with torch.no_grad():
        y, state = mixer(torch.randn(1, 3, 8, dtype=torch.bfloat16), state)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    assert state.nbytes == before


def rows(lengths: list[int], padding: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Tokens and starts: a row of documents packed after noise, and a row of noise before one document."""
    tokens = torch.randint(vocab_size, (2, padding + sum(lengths)))
    starts = torch.zeros(tokens.shape, dtype=torch.bool)
    for n in range(len(lengths)):
        starts[0, padding + sum(lengths[:n])] = True
    starts[1, padding] = True
    return tokens, starts


def apart(lm: LanguageModel, tokens: Tensor, lengths: list[int], padding: int) -> Tensor:
    """Logits of the documents of `rows`, each run by itself, (2, sum(lengths), V)."""
    packed, alone = tokens[:, padding:]
    logits = torch.cat([lm(document[None]).logits[0] for document in packed.split(lengths)])
    return torch.stack([logits, lm(alone[None]).logits[0]])


def logits_and_gradients(lm: LanguageModel, logits: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(logits.shape, generator=torch.Generator().manual_seed(3), dtype=logits.dtype)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    grads = torch.autograd.grad((logits * weight).sum(), parameters, materialize_grads=True)
    return {"logits": logits.detach()} | dict(zip(names, grads, strict=True))


DOCUMENTS = {"lengths": st.lists(st.integers(1, 7), min_size=1, max_size=3), "padding": st.integers(0, 5), "seed": SEED}


@pytest.mark.quick
@pytest.mark.parametrize("name", available())
@settings(max_examples=6)
@given(
    cuts=st.sets(st.integers(1, LENGTH), max_size=3),
    extra=st.integers(0, 4),
    chunk_len=st.integers(1, LENGTH),
    **DOCUMENTS,
)
def test_a_decoder_reads_packed_padded_chunks_as_documents_apart(
    name: str, cuts: set[int], extra: int, chunk_len: int, lengths: list[int], padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    lm = build(name, d_model=24, n_layers=len(configure(name).pattern), vocab_size=11).double()
    tokens, starts = rows(lengths, padding, 11)
    total = tokens.shape[1]

    def in_chunks() -> Tensor:
        bounds = sorted(
            {0, *(c for c in cuts if c < total), *range(max(0, total - 2), total)}
        )  # the last ones by steps
        state, logits = lm.init_state(2, total), []
        for i, j in zip(bounds, [*bounds[1:], total], strict=True):
            out = lm(tokens[:, i:j], state, starts=starts[:, i:j])
            state = out.state
            logits.append(out.logits)
        return torch.cat(logits, dim=1)[:, padding:]

    expected = logits_and_gradients(lm, apart(lm, tokens, lengths, padding))
    assert_same(logits_and_gradients(lm, in_chunks()), expected, 1e-6)  # the router of experts is in float32
    with torch.no_grad():
        torch.testing.assert_close(in_chunks(), expected["logits"], rtol=1e-5, atol=1e-6)

        # padded after the first row and before the second, beside what `rows` has put before the documents
        spare = torch.zeros(2, extra, dtype=torch.int64)
        padded = torch.stack([torch.cat([tokens[0], spare[0]]), torch.cat([spare[1], tokens[1]])])
        real = torch.ones(2, total + extra, dtype=torch.bool)
        real[0, total:] = real[1, :extra] = False
        marks = torch.stack([torch.cat([starts[0], spare[0] > 0]), torch.cat([spare[1] > 0, starts[1]])])
        once = lm(padded, lm.init_state(2, total + extra), starts=marks, padding_mask=real)
        logits, state = lm.prefill(
            padded, lm.init_state(2, total + extra), starts=marks, padding_mask=real, chunk_len=chunk_len
        )
    torch.testing.assert_close(logits, expected["logits"][:, -1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(tree_leaves(state), tree_leaves(once.state), rtol=1e-5, atol=1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(("B", "L"), [(2, 0), (0, 3), (0, 0)])
@pytest.mark.parametrize("name", [*available("encoder"), *available()])
def test_nothing_in_is_nothing_out_and_no_loss(name: str, B: int, L: int) -> None:
    lm = build(name, d_model=24, n_layers=len(configure(name).pattern), vocab_size=11)
    tokens, starts = torch.zeros(B, L, dtype=torch.int64), torch.zeros(B, L, dtype=torch.bool)
    for marks in (None, starts):
        loss, aux_loss = lm.loss(tokens, tokens, starts=marks)
        assert (loss.item(), aux_loss.item()) == (0, 0)
        grads = torch.autograd.grad(loss + aux_loss, list(lm.parameters()))
        assert not any(gradient.any() for gradient in grads)
        if lm.config.kind == "encoder":
            continue
        with torch.no_grad():
            state = lm(torch.zeros(B, 4, dtype=torch.int64), lm.init_state(B, 9)).state
            before = state.clone()
            logits, after, _ = lm(tokens, state, starts=marks)
        assert logits.shape == (B, L, 11)
        for layer, old in zip(after, before, strict=True):
            assert all(torch.equal(t, old.tensors()[key]) for key, t in layer.tensors().items() if key in old.tensors())


@pytest.mark.parametrize("name", [*available("encoder"), *available()])
def test_the_loss_of_no_target_is_zero(name: str) -> None:
    lm = build(name, d_model=24, n_layers=len(configure(name).pattern), vocab_size=11)
    tokens = torch.randint(11, (2, 3))
    loss, _ = lm.loss(tokens, torch.full_like(tokens, -100))
    assert loss.item() == 0
    assert not any(g.any() for g in torch.autograd.grad(loss, list(lm.parameters())))


@pytest.mark.quick
@pytest.mark.parametrize("name", [*available("encoder"), *available()])
@settings(max_examples=3)
@given(**DOCUMENTS)
def test_an_encoder_reads_packed_padded_documents_as_documents_apart(
    name: str, lengths: list[int], padding: int, seed: int
) -> None:
    torch.manual_seed(seed)
    n_layers = len(configure(name).pattern)
    lm = build(name, d_model=24, n_layers=n_layers, vocab_size=11, bidirectional=True).double()
    tokens, starts = rows(lengths, padding, 11)
    expected = logits_and_gradients(lm, apart(lm, tokens, lengths, padding))
    together = logits_and_gradients(lm, lm(tokens, starts=starts).logits[:, padding:])
    assert_same(together, expected, 1e-6)


# Options at which a compiled step has other sizes than its vectors, or nothing to remember.
SIZES: list[tuple[str, dict[str, Any]]] = [
    ("attention", {"n_heads": 2, "n_kv_heads": 1, "head_dim": 18, "window": 9}),
    ("mamba", {"d_state": 19, "d_conv": 1}),
    ("mamba2", {"d_state": 17, "d_conv": 1, "head_dim": 1}),
    ("mamba3", {"d_state": 3, "rope_fraction": 0.1, "head_dim": 2}),
    ("s4d", {"d_state": 38}),
    ("h3", {"d_conv": 1}),
    ("gated_deltanet", {}),
    ("lstm", {"expand": 0.7}),
]
FFNS: list[tuple[str, dict[str, Any]]] = [
    ("", {}),
    ("+mlp", {"d_ff": 13, "bias": True}),
    ("+mlp", {"d_ff": 13, "activation": "gelu"}),
    ("+mlp", {"d_ff": 13, "activation": "gelu_tanh"}),
    ("+moe", {"d_ff": 13, "n_experts": 5, "top_k": 3}),
]
AROUND: list[dict[str, Any]] = [
    {"tie_embeddings": False},
    {"prenorm": False},
    {"norm": "layernorm", "positions": "learned", "max_positions": 20},
    {"segments": 2},
]
ROWS = [[0], [4, 1], [0, 0, 0], [6, 2, 3, 5, 3]]
"""Tokens that each row of a batch has read before."""


def compiled_case(name: str, options: dict[str, Any], ffn: int, around: int, D: int) -> LanguageModel:
    kind, ffn_options = FFNS[ffn]
    with patch.dict(MIXERS, {"tested": KINDS[name]}):
        lm = LanguageModel(
            ModelConfig(
                d_model=D,
                n_layers=2,
                vocab_size=11,
                pattern=(f"tested{kind}",),
                mixer={"tested": options},
                ffn={kind[1:]: ffn_options} if kind else {},
                **AROUND[around],
            )
        )
    with torch.no_grad():
        for p in lm.parameters():
            if p.dim() == 1:  # norms, biases, rates
                p.add_(torch.rand_like(p) / 2)
    return lm


def continued(lm: LanguageModel, tokens: list[Tensor], n: int, how: str) -> Tensor:
    """Logits after each of the last n tokens of every row: padded rows, then one joined to them, in several ways."""

    def given(part: list[Tensor]) -> States:
        longest = max(len(row) for row in part) - n
        state = lm.init_state(len(part), longest + n)
        if not longest:
            return state
        padded = torch.stack([torch.nn.functional.pad(row[:-n], (longest - len(row) + n, 0)) for row in part])
        real = torch.tensor([[t >= longest - len(row) + n for t in range(longest)] for row in part])
        return lm.prefill(padded, state, padding_mask=None if real.all() else real)[1]

    state = given(tokens) if len(tokens) < 3 else States.cat([given(tokens[:-1]), given(tokens[-1:])])
    last, found = torch.stack([row[-n:] for row in tokens], 1), []
    for begin in range(0, n, 4):  # three tokens one by one, and one by the modules
        if how == MODULES:
            for t in range(begin, begin + 3):
                logits, state, _ = lm(last[t][:, None], state)
                found.append(logits[:, 0])
        else:
            decoder = Decoder(lm, state)
            for t in range(begin, begin + 3):
                found.append(decoder(last[t]))
                assert decoder.how == how, decoder.why
                if t == begin + 1:  # rows change places, there and back
                    for _ in range(2):
                        decoder.select(torch.arange(len(tokens)).flip(0))
            state = decoder.state
        logits, state, _ = lm(last[begin + 3][:, None], state)
        found.append(logits[:, 0])
    return torch.stack(found, 1).double()


@pytest.mark.quick
@over(CASES + SIZES)
@settings(max_examples=4)
@given(
    rows=st.sampled_from(ROWS),
    ffn=st.integers(0, len(FFNS) - 1),
    around=st.integers(0, len(AROUND) - 1),
    D=st.sampled_from([8, 40]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=SEED,
)
@torch.no_grad()
def test_compiled_tokens_equal_the_full_pass(
    name: str,
    options: dict[str, Any],
    rows: list[int],
    ffn: int,
    around: int,
    D: int,
    dtype: torch.dtype,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    lm = compiled_case(name, options, ffn, around, D).to(dtype)
    how = COMPILED if "describe_step" in vars(KINDS[name]) else MODULES
    tokens = [torch.randint(11, (n_read + 8,)) for n_read in rows]
    found = [continued(lm, tokens, 8, way) for way in (how, MODULES)]
    lm.double()
    expected = torch.stack([lm(row[None]).logits[0, -8:] for row in tokens])
    size = expected.abs().max()
    if dtype == torch.float32:
        assert (found[0] - expected).abs().max() <= 5e-6 * size
    else:  # at least as near as the modules; a token that other experts take is far from both
        errors = [(logits - expected).square().mean().sqrt() for logits in found]
        assert errors[0] <= 1.2 * errors[1] + 0.02 * size
