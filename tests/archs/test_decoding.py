"""The compiled step gives what the modules give, and whatever it would bypass makes the modules run.

What every mixer's step computes is in test_contract.py.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import multiprocessing
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from crossover.archs import Decoder, LanguageModel, ModelConfig, States, available, build
from crossover.archs.decoding import COMPILED, MODULES
from crossover.archs.mixers.attention import Attention
from crossover.kernels import dispatch
from crossover.kernels.dispatch import record_backends, use_backend
from crossover.kernels.step import program
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize
from torch.utils.flop_counter import FlopCounterMode

V = 11
DRAWN = torch.tensor([[3, 1], [4, 1], [5, 9], [2, 6], [5, 3], [5, 8]])
"""Tokens of two rows, one after the other."""


def tiny(**options: Any) -> LanguageModel:
    """A model with most kinds of parts: attention, a scan, a gated ffn and experts."""
    torch.manual_seed(0)
    sizes = {"d_model": 12, "n_layers": 2, "vocab_size": V, "tie_embeddings": False}
    ffn = {"mlp": {"d_ff": 13}, "moe": {"n_experts": 3, "d_ff": 8}}
    return LanguageModel(
        ModelConfig(**{**sizes, "pattern": ("attention+mlp", "mamba+moe"), "ffn": ffn, **options})
    ).eval()


def read(lm: LanguageModel, max_len: int = 12) -> States:
    """The state after a prompt of two rows."""
    with torch.no_grad():
        return lm.prefill(torch.tensor([[1, 2, 3], [4, 5, 6]]), lm.init_state(2, max_len))[1]


def by_modules(lm: LanguageModel, tokens: Tensor, state: States) -> tuple[Tensor, States]:
    out = lm(tokens[:, None], state)
    return out.logits[:, 0], out.state


def assert_next(decoder: Decoder, lm: LanguageModel, tokens: Tensor, state: States, how: str) -> States:
    """The decoder's logits are the modules', it says how it got them, and so does `record_backends`."""
    expected, state = by_modules(lm, tokens, state)
    with record_backends() as used:
        logits = decoder(tokens)
    assert (decoder.how, used["decode"]) == (how, (how,)), decoder.why
    assert (decoder.why is None) == (how == COMPILED)
    assert logits.dtype == expected.dtype
    tolerance = 1e-5 if logits.dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits, expected, rtol=tolerance, atol=tolerance)
    return state


# What comes between


Interference = Callable[[LanguageModel], contextlib.AbstractContextManager[Any]]


def changes(change: Callable[[LanguageModel], object]) -> Interference:
    """What stays."""

    def apply(lm: LanguageModel) -> contextlib.AbstractContextManager[Any]:
        change(lm)
        return contextlib.nullcontext()

    return apply


def twice(*arguments: Any) -> Any:
    """A hook that doubles the output, also where it is a tuple."""
    out = arguments[-1]
    return (2 * out[0], *out[1:]) if isinstance(out, tuple) else 2 * out


def first_twice(module: nn.Module, arguments: Any) -> Any:
    return (2 * arguments[0], *arguments[1:]) if arguments and arguments[0].is_floating_point() else None


class Wrapped(nn.Module):
    """A projection with a low-rank part beside it, as LoRA has."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner
        self.down, self.up = nn.Linear(inner.in_features, 2), nn.Linear(2, inner.out_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + self.up(self.down(x))


class Louder(Attention):
    def forward(self, *arguments: Any, **options: Any) -> Any:
        return twice(super().forward(*arguments, **options))


class Turned(Attention):
    def _rotated(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        return super()._rotated(2 * q, k, positions)


class Double(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class Marked(Tensor):
    """A kind of tensor that may do anything when it is used."""


def replace_forward(lm: LanguageModel) -> None:
    mixer: Any = lm.backbone.blocks[0].mixer
    mixer.forward = lambda *a, **o: twice(Attention.forward(mixer, *a, **o))


def become(kind: type[Attention]) -> Interference:
    return changes(lambda lm: setattr(lm.backbone.blocks[0].mixer, "__class__", kind))


def wrap(lm: LanguageModel) -> None:
    mixer: Any = lm.backbone.blocks[1].mixer
    mixer.x_proj = Wrapped(mixer.x_proj)


def mark(lm: LanguageModel) -> None:
    parameters: Any = lm.head._parameters
    parameters["weight"] = parameters["weight"].detach().as_subclass(Marked)


def lay_out_otherwise(lm: LanguageModel) -> None:
    for p in lm.parameters():
        if p.dim() > 1:
            p.data = p.data.mT.contiguous().mT


def parametrized(lm: LanguageModel) -> None:
    parametrize.register_parametrization(lm.backbone.blocks[1].mixer, "A_log", Double())


@contextlib.contextmanager
def hooked_globally(lm: LanguageModel) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda m, a, out: twice(out) if m is lm.head else out)
    yield
    handle.remove()


@contextlib.contextmanager
def hooked_globally_before(lm: LanguageModel) -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda m, a: first_twice(m, a) if m is lm.head else None
    )
    yield
    handle.remove()


@contextlib.contextmanager
def switched_off(lm: LanguageModel) -> Iterator[None]:
    dispatch.switch_off("decode", "cpu", "it is wrong here")
    try:
        yield
    finally:
        del dispatch._switched_off["decode", "cpu"]


MIXER = "backbone.blocks.1.mixer"
INTERFERENCES: dict[str, tuple[Interference, str]] = {
    **{
        f"hook on {path or 'the model'}": (
            changes(lambda lm, path=path: lm.get_submodule(path).register_forward_hook(twice)),
            "hooks",
        )
        for path in ("backbone", "backbone.blocks.0", "backbone.blocks.0.mixer_norm", "transform", f"{MIXER}.dt_proj")
    },
    "hook before the head": (changes(lambda lm: lm.head.register_forward_pre_hook(first_twice)), "hooks"),
    "hook before the norm": (changes(lambda lm: lm.backbone.norm.register_forward_pre_hook(first_twice)), "hooks"),
    "global hook": (hooked_globally, "hooks"),
    "global pre-hook": (hooked_globally_before, "hooks"),
    "projection wrapped": (changes(wrap), "projection is a Wrapped"),
    "parametrization": (changes(parametrized), "ParametrizedMamba describes no step"),
    "weight norm": (changes(lambda lm: parametrizations.weight_norm(lm.head)), "ParametrizedLinear"),
    "old weight norm": (changes(lambda lm: nn.utils.weight_norm(lm.get_submodule(f"{MIXER}.in_proj"))), "hooks"),
    "subclass": (become(Louder), "Louder describes no step"),
    "subclass with another helper": (become(Turned), "Turned describes no step"),
    "replaced forward": (changes(replace_forward), "another forward pass"),
    "compiled module": (changes(lambda lm: lm.head.compile(backend="eager")), "another forward pass"),
    "kind of tensor": (changes(mark), "a weight is a Marked"),
    "layout": (changes(lay_out_otherwise), "not contiguous"),
    "float64": (changes(lambda lm: lm.double()), "float64"),
    "float16": (changes(lambda lm: lm.half()), "float16"),
    "gradients": (lambda lm: torch.enable_grad(), "gradients"),
    "autocast": (lambda lm: torch.autocast("cpu", torch.bfloat16), "autocast"),
    "a mode that counts": (lambda lm: FlopCounterMode(display=False), "hooks"),  # it has hooks, too
    "default device": (lambda lm: torch.device("cpu"), "mode"),
    "plain PyTorch asked for": (lambda lm: use_backend("torch"), "torch backend"),
    "the definition asked for": (lambda lm: use_backend("reference"), "reference backend"),
    "switched off": (switched_off, "it is wrong here"),
}  # fmt: skip


@pytest.mark.quick
@pytest.mark.parametrize("name", INTERFERENCES)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated:FutureWarning")
@torch.no_grad()
def test_whatever_would_be_bypassed_makes_the_modules_run(name: str) -> None:
    interference, reason = INTERFERENCES[name]
    lm = tiny()
    state = read(lm)
    decoder, late = Decoder(lm, state.clone()), Decoder(lm, state.clone())
    assert_next(late, lm, DRAWN[0], state.clone(), COMPILED)
    assert_next(late, lm, DRAWN[1], late.state.clone(), COMPILED)
    with interference(lm):
        assert_next(decoder, lm, DRAWN[0], state.clone(), MODULES)
        assert reason in (decoder.why or "")
        assert_next(late, lm, DRAWN[2], late.state.clone(), MODULES)  # it came between two tokens
        assert late.why == decoder.why


@torch.no_grad()
def test_sharded_weights_make_the_modules_run(tmp_path: Path) -> None:
    lm = tiny()
    state = read(lm)
    decoder = Decoder(lm, state.clone())
    expected = decoder(DRAWN[0])
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        fully_shard(lm)
        torch.testing.assert_close(Decoder(lm, state)(DRAWN[0]), expected)
        decoder(DRAWN[1])
        assert decoder.how == MODULES
    finally:
        dist.destroy_process_group()


@torch.no_grad()
def test_weights_of_a_functional_call_are_heeded() -> None:
    class Stepping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lm = lm
            self.decoder: Decoder = decoder

        def forward(self, tokens: Tensor) -> Tensor:
            return self.decoder(tokens)

    lm = tiny()
    state = read(lm)
    decoder = Decoder(lm, state.clone())
    decoder(DRAWN[0])
    with torch.no_grad():
        other = {f"lm.{name}": 2 * p for name, p in lm.named_parameters()}
    logits = torch.func.functional_call(Stepping(), other, (DRAWN[1],))
    assert decoder.how == MODULES
    lm.load_state_dict({name.removeprefix("lm."): p for name, p in other.items()})
    _, after = by_modules(tiny(), DRAWN[0], state)
    torch.testing.assert_close(logits, by_modules(lm, DRAWN[1], after)[0], rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_functions_of_torch_func_run_modules() -> None:
    lm = tiny()
    state = read(lm)
    how: list[str] = []

    def logits(tokens: Tensor) -> Tensor:
        decoder = Decoder(lm, state.clone())
        out = decoder(tokens)
        how.append(decoder.how)
        return out

    with pytest.warns(dispatch.KernelFallbackWarning):
        together = torch.func.vmap(logits)(DRAWN[:2])
    assert set(how) == {MODULES}
    for row, tokens in zip(together, DRAWN, strict=False):
        torch.testing.assert_close(row, logits(tokens), rtol=1e-5, atol=1e-5)
    assert how[-1] == COMPILED


# Weights that change


def moved(lm: LanguageModel) -> None:
    for p in lm.parameters():
        p.data = 1.1 * p.data


def stepped(lm: LanguageModel) -> None:
    for p in lm.parameters():
        p.grad = torch.ones_like(p)
    torch.optim.SGD(lm.parameters(), lr=0.1).step()


def loaded(lm: LanguageModel, assign: bool) -> None:
    lm.load_state_dict({name: 0.9 * t for name, t in lm.state_dict().items()}, assign=assign)


def turned(lm: LanguageModel) -> None:
    mixer: Any = lm.backbone.blocks[0].mixer
    mixer.q_proj.weight.data = mixer.q_proj.weight.data.T.contiguous()
    mixer.k_proj.weight = nn.Parameter(mixer.k_proj.weight.T.contiguous())


CHANGES: dict[str, Callable[[LanguageModel], object]] = {
    "moved": moved,
    "assigned": turned,
    "loaded": lambda lm: loaded(lm, assign=False),
    "loaded by assignment": lambda lm: loaded(lm, assign=True),
    "trained": stepped,
    "bfloat16": lambda lm: lm.bfloat16(),
    "there and back": lambda lm: lm.double().float(),
    "resized": lambda lm: lm.resize_embeddings(V + 3),
    "projection replaced": lambda lm: setattr(lm, "head", nn.Linear(12, V)),
    "other eps": lambda lm: setattr(lm.backbone, "norm", nn.LayerNorm(12, eps=0.5)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", CHANGES)
@torch.no_grad()
def test_weights_that_change_between_two_tokens_are_seen(name: str) -> None:
    lm = tiny()
    state = read(lm)
    decoder = Decoder(lm, state.clone())
    state = assert_next(decoder, lm, DRAWN[0], state, COMPILED)
    state = assert_next(decoder, lm, DRAWN[1], state, COMPILED)
    CHANGES[name](lm)
    if name == "trained":  # in place, so nothing is recorded anew
        assert decoder._step is not None
        assert decoder._step.is_current()
    for tokens in DRAWN[2:4]:
        state = assert_next(decoder, lm, tokens, state, COMPILED)
    if name == "resized":
        assert_next(decoder, lm, torch.tensor([V + 2, V]), state, COMPILED)


@pytest.mark.quick
@pytest.mark.parametrize("callback", ["on_token", "until"])
@torch.no_grad()
def test_generate_heeds_what_a_callback_does_to_the_model(callback: str) -> None:
    def drawn(*, changes: bool) -> Tensor:
        lm, calls = tiny(), []
        head: Any = lm.head

        def change(n: int, tokens: Tensor) -> bool:
            calls.append(n)
            if changes and len(calls) == 3:
                head.weight = nn.Parameter(-head.weight)
            return False

        return lm.generate(torch.tensor([[1, 2, 3]]), 9, temperature=0, **{callback: change})

    with use_backend("torch"):
        by_modules = drawn(changes=True)
    assert torch.equal(drawn(changes=True), by_modules)
    assert not torch.equal(drawn(changes=False), by_modules)


@torch.no_grad()
def test_without_a_watch_a_token_is_of_the_weights_that_were_there_before() -> None:
    lm, other = tiny(), tiny()
    state = read(lm)
    decoder = Decoder(lm, state.clone())
    for tokens in DRAWN[:2]:
        expected, state = by_modules(other, tokens, state)
        torch.testing.assert_close(decoder(tokens, watch=False), expected, rtol=1e-5, atol=1e-5)
    moved(lm)
    for p in lm.parameters():  # what they were moved to is taken by others, and what they had before is not
        torch.full_like(p, torch.nan)
    expected, state = by_modules(other, DRAWN[2], state)
    torch.testing.assert_close(decoder(DRAWN[2], watch=False), expected, rtol=1e-5, atol=1e-5)
    assert_next(decoder, lm, DRAWN[3], state, COMPILED)


@torch.no_grad()
def test_parameters_that_are_laid_out_otherwise_are_read_as_they_are() -> None:
    lm = tiny()
    mixer: Any = lm.backbone.blocks[1].mixer
    for name in ("A_log", "conv_weight"):
        parameter = getattr(mixer, name)
        parameter.data = parameter.data.T.contiguous().T
        assert not parameter.is_contiguous()
        parameter.uniform_(-1, 1)
    state = read(lm)
    assert_next(Decoder(lm, state.clone()), lm, DRAWN[0], state, COMPILED)


@torch.no_grad()
def test_copies_of_models_and_decoders_go_on_by_themselves() -> None:
    lm = tiny()
    state = read(lm)
    decoder = Decoder(lm, state.clone())
    state = assert_next(decoder, lm, DRAWN[0], state, COMPILED)
    other, another = copy.deepcopy(decoder), copy.deepcopy(lm)
    for p in lm.parameters():
        p.zero_()
    expected, _ = by_modules(another, DRAWN[1], state)
    torch.testing.assert_close(other(DRAWN[1]), expected, rtol=1e-5, atol=1e-5)
    assert decoder(DRAWN[1]).eq(0).all()  # of weights that are zeros: the copy has its own
    torch.testing.assert_close(Decoder(another, state)(DRAWN[1]), expected, rtol=1e-5, atol=1e-5)


# Tokens and states


def assert_same_error(decoder: Decoder, lm: LanguageModel, tokens: Tensor, state: States) -> None:
    with pytest.raises((ValueError, IndexError)) as expected:
        by_modules(lm, tokens, state.clone())
    for _ in range(2):
        with pytest.raises(expected.type) as found:
            decoder(tokens)
        assert str(found.value) == str(expected.value)


@pytest.mark.quick
@torch.no_grad()
def test_wrong_tokens_are_the_errors_of_the_modules_and_the_decoder_goes_on() -> None:
    lm = tiny(positions="learned", max_positions=7, segments=2, norm="layernorm")
    state = read(lm, 7)
    decoder = Decoder(lm, state.clone())
    state = assert_next(decoder, lm, DRAWN[0], state, COMPILED)
    wrong = [[V, 0], [0, -1], [3], [1, 2, 3], [0.0, 1.0], [True, False], [[1], [2]], []]
    for tokens in wrong:
        assert_same_error(decoder, lm, torch.tensor(tokens), state)
    assert_same_error(Decoder(lm, state.clone()), lm, torch.tensor([V, 0]), state)
    for tokens in DRAWN[1:4]:
        state = assert_next(decoder, lm, tokens, state, COMPILED)
    assert_same_error(decoder, lm, DRAWN[4], state)  # cache and positions are full
    assert decoder.why == "there is no room for a token"
    assert_next(Decoder(lm, read(lm, 7)), lm, DRAWN[0].int(), read(lm, 7), COMPILED)


@torch.no_grad()
def test_learned_positions_end_where_the_modules_say() -> None:
    lm = tiny(positions="learned", max_positions=5, pattern=("mamba",), ffn={})
    tokens, real = torch.tensor([[1, 2, 3], [0, 0, 6]]), torch.tensor([[True] * 3, [False, False, True]])
    _, state = lm.prefill(tokens, lm.init_state(2, 5), padding_mask=real)
    for rows in ([0, 1], [1]):
        held = state.select(rows).clone()
        decoder = Decoder(lm, held.clone())
        for drawn in DRAWN[:2, : len(rows)]:
            held = assert_next(decoder, lm, drawn, held, COMPILED)
        assert_same_error(decoder, lm, DRAWN[2, : len(rows)], held)
    _, one = lm.prefill(tokens[:1], lm.init_state(1, 5))
    _, other = lm.prefill(tokens[:1, :1], lm.init_state(1, 5))
    held = States.cat([one, other])
    decoder = Decoder(lm, held.clone())
    for drawn in DRAWN[:2]:
        held = assert_next(decoder, lm, drawn, held, COMPILED)
    assert_same_error(decoder, lm, DRAWN[2], held)
    decoder.select(torch.tensor([1]))  # the shorter one
    assert_next(decoder, lm, DRAWN[2, :1], held.select([1]), COMPILED)


@torch.no_grad()
def test_states_of_other_models_and_of_no_rows_are_the_business_of_the_modules() -> None:
    lm = tiny()
    for others in (tiny(d_model=20), tiny(n_layers=3), tiny(pattern=("mamba+mlp", "attention+moe"))):
        state = read(others)
        assert_same_error(Decoder(lm, state.clone()), lm, DRAWN[0], state)
    uneven = read(lm)
    uneven[1] = uneven[1].select(torch.tensor([0]))
    assert_same_error(Decoder(lm, uneven.clone()), lm, DRAWN[0], uneven)
    decoder = Decoder(lm, lm.init_state(0, 4))
    assert decoder(torch.zeros(0, dtype=torch.int64)).shape == (0, V)
    assert decoder.how == MODULES
    many = lm.init_state(program.MANY_ROWS + 1, 4)
    decoder = Decoder(lm, many)
    assert decoder(torch.zeros(program.MANY_ROWS + 1, dtype=torch.int64)).shape == (program.MANY_ROWS + 1, V)
    assert "rows" in (decoder.why or "")


@torch.no_grad()
def test_states_the_step_cannot_write_to_are_taken_by_modules() -> None:
    lm = tiny(pattern=("mamba",), ffn={})
    state = read(lm)
    gaps = States([layer.map(lambda t: torch.stack([t, t], -1)[..., 0]) for layer in state])
    assert_next(Decoder(lm, gaps), lm, DRAWN[0], state.clone(), MODULES)
    with torch.enable_grad():
        recorded = States([layer.map(lambda t: t.clone().requires_grad_()) for layer in state])
    assert_next(Decoder(lm, recorded), lm, DRAWN[0], state.clone(), MODULES)


def test_a_graph_notices_that_a_detached_state_was_written_to() -> None:
    lm = tiny(pattern=("mamba",), ffn={})
    state = lm(torch.tensor([[1, 2, 3], [4, 5, 6]]), lm.init_state(2, 9)).state
    saved = [layer.ssm for layer in state]  # pyright: ignore[reportAttributeAccessIssue]
    loss = sum((t.square() * torch.ones_like(t, requires_grad=True)).sum() for t in saved)
    product = torch.stack([(t * t).sum() for t in saved]).sum() + loss
    with torch.no_grad():
        decoder = Decoder(lm, state.detach())
        decoder(DRAWN[0])
    assert decoder.how == COMPILED
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@torch.no_grad()
def test_what_is_no_number_in_a_row_stays_in_its_row() -> None:
    for name in available():
        lm = build(name, d_model=16, n_layers=8 if name == "jamba" else 2, vocab_size=V, tie_embeddings=False)
        lm.embedding.weight[7] = torch.nan
        decoder, alone = (Decoder(lm, lm.init_state(2, 6)) for _ in range(2))
        for tokens in ([3, 4], [7, 5], [2, 6], [1, 9]):
            logits, expected = decoder(torch.tensor(tokens)), alone(torch.tensor([1, tokens[1]]))
            assert torch.equal(logits[1], expected[1]), name
            assert logits[0].isnan().any() or tokens[0] != 7
        assert decoder.how == COMPILED


@torch.no_grad()
def test_two_decoders_of_one_model_take_turns() -> None:
    lm = tiny()
    states = [read(lm), read(lm).select([1, 0])]
    decoders = [Decoder(lm, state.clone()) for state in states]
    for tokens in DRAWN:
        for i in range(2):
            states[i] = assert_next(decoders[i], lm, tokens, states[i], COMPILED)


@pytest.mark.quick
def test_modes_without_gradients_may_alternate() -> None:
    lm = tiny()
    with torch.inference_mode():
        state, free = read(lm), read(lm)
        decoder = Decoder(lm, state)
        expected = [decoder(tokens) for tokens in DRAWN]
    modes = [torch.no_grad, torch.inference_mode]
    for first, state in enumerate([free, read(lm)]):
        decoder = Decoder(lm, state)
        for i, tokens in enumerate(DRAWN):
            with modes[(first + i) % 2]():
                if i == 3:
                    lm.embedding.weight.data = lm.embedding.weight.data.clone()  # recorded anew
                if i == 4:
                    lm.backbone.blocks[1].mixer.A_log.data.add_(0)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
                logits = decoder(tokens)
            assert decoder.how == COMPILED
            assert torch.equal(logits, expected[i])


@torch.no_grad()
def test_a_default_dtype_changes_nothing() -> None:
    for name in ("h3", "s4", "s4d", "gated_deltanet", "mamba3"):
        lm = build(name, d_model=12, n_layers=2, vocab_size=V)
        state = lm.init_state(2, 9)
        expected = Decoder(lm, state.clone())(DRAWN[0])
        for dtype in (torch.float64, torch.bfloat16):
            before = torch.get_default_dtype()
            torch.set_default_dtype(dtype)
            try:
                assert torch.equal(Decoder(lm, state.clone())(DRAWN[0]), expected)
            finally:
                torch.set_default_dtype(before)


# Threads


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def decoded(lm: LanguageModel, n_rows: int = 2) -> Tensor:
    with torch.inference_mode():
        decoder = Decoder(lm, lm.init_state(n_rows, 8))
        logits = torch.stack([decoder(tokens[:n_rows] if n_rows < 2 else tokens) for tokens in DRAWN])
    assert decoder.how == COMPILED
    return logits


@pytest.mark.parametrize("name", available())
def test_two_threads_give_the_bits_of_one(name: str, two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build(name, d_model=40, n_layers=8 if name == "jamba" else 2, vocab_size=V)
    for n_rows in (1, 2):
        alone = decoded(lm, n_rows)
        with monkeypatch.context() as small:
            small.setattr(program, "LARGE", 0)
            assert torch.equal(decoded(lm, n_rows), alone)


def test_decoders_run_from_several_threads(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LARGE", 0)
    lms = [build(name, d_model=40, n_layers=2, vocab_size=V) for name in ("transformer", "mamba", "s4d", "lstm")]
    expected, found = [decoded(lm) for lm in lms], {}
    threads = [
        threading.Thread(target=lambda i=i: found.update({i: [decoded(lms[i % 4]) for _ in range(5)]}))
        for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == list(range(8))
    assert all(torch.equal(logits, expected[i % 4]) for i, each in found.items() for logits in each)


def test_an_interrupted_step_leaves_no_thread_waiting(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LARGE", 0)
    lm = tiny()
    expected, ended = decoded(lm), threading.Event()

    def interrupted(n_threads: int, work: Callable[[int], None]) -> None:
        threading.Thread(target=lambda: (work(1), ended.set()), daemon=True).start()
        raise KeyboardInterrupt  # before this thread has begun its part

    with monkeypatch.context() as once:
        once.setattr(program, "at_once", interrupted)
        with pytest.raises(KeyboardInterrupt):
            decoded(lm)
    assert ended.wait(20)
    assert torch.equal(decoded(lm), expected)  # others go on


def _goes_on(decoder: Decoder, expected: Tensor) -> None:
    with torch.inference_mode():
        assert torch.equal(torch.stack([decoder(tokens) for tokens in DRAWN[1:]]), expected[1:])


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_forked_process_goes_on(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "LARGE", 0)
    lm = tiny()
    expected = decoded(lm)
    with torch.inference_mode():
        decoder = Decoder(lm, lm.init_state(2, 8))
        decoder(DRAWN[0])
    child = multiprocessing.get_context("fork").Process(target=_goes_on, args=(decoder, expected), daemon=True)
    child.start()
    child.join(60)
    assert child.exitcode == 0
    _goes_on(decoder, expected)  # as does this one, whose memory is its own


def test_a_step_outlives_what_it_was_described_by() -> None:
    lm = tiny()
    expected = decoded(lm)
    gc.collect()
    with torch.no_grad():
        decoder = Decoder(lm, lm.init_state(2, 8))
        decoder.prepare()
        lm = None
        gc.collect()
        assert torch.equal(torch.stack([decoder(tokens) for tokens in DRAWN]), expected)
