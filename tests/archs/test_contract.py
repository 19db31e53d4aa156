"""The mixer contract over the registry, in float64, values and gradients. A new mixer is tested by being registered.

full == any split into chunks == token by token == packed documents apart == left-padded, and y[:t] ignores x[t:].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.archs import MIXERS, Mixer
from crossover.archs.layers import RMSNorm
from crossover.kernels.check import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

# Options that change how a mixer runs; every other mixer is tested with its defaults.
VARIANTS = {
    "attention": [
        {"n_heads": 4, "n_kv_heads": 2},
        {"n_heads": 2, "rope": False},
        {"n_heads": 2, "window": 3},
        {"n_heads": 1, "window": 1},
    ],
    "mamba": [{"d_state": 5, "d_conv": 3}, {"d_state": 4, "inner_norm": True, "expand": 1.5}],
    "s4d": [{"d_state": 6}],
    "lstm": [{"expand": 2}],
}
CASES = [(name, options) for name in MIXERS for options in VARIANTS.get(name, [{}])]
LENGTH = 24

over_the_registry = pytest.mark.parametrize(
    ("name", "options"), CASES, ids=["-".join([n, *(f"{k}={v}" for k, v in o.items())]) for n, o in CASES]
)
drawn = settings(max_examples=25, deadline=None, derandomize=True)
SEED, LENGTHS, WIDTHS = st.integers(0, 2**16), st.integers(1, LENGTH), st.sampled_from([8, 24])


def make(name: str, options: dict[str, Any], d_model: int, seed: int) -> Mixer:
    """A mixer with weights large enough for errors to show, in float64."""
    torch.manual_seed(seed)
    cls = MIXERS[name]
    mixer = cls(d_model, cls.Config(**options)).double()
    with torch.no_grad():
        for module in mixer.modules():
            if isinstance(module, RMSNorm):
                module.weight.uniform_(0.5, 1.5)
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
@given(L=LENGTHS, D=WIDTHS, seed=SEED, cuts=st.sets(st.integers(1, LENGTH - 1), max_size=4), packed=st.booleans())
def test_any_split_into_chunks_equals_the_full_pass(
    name: str, options: dict[str, Any], L: int, D: int, seed: int, cuts: set[int], packed: bool
) -> None:
    mixer = make(name, options, D, seed)
    x, bounds = torch.randn(2, L, D, dtype=torch.float64), sorted(c for c in cuts if c < L)
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


@over_the_registry
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


@over_the_registry
def test_training_makes_no_state_and_reaches_every_parameter(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    y, state = mixer(torch.randn(2, 9, 8, dtype=torch.float64))
    assert y.shape == (2, 9, 8)
    assert state is None
    y.square().sum().backward()
    untouched = [n for n, p in mixer.named_parameters() if p.grad is None or p.grad.abs().max() < 1e-12]
    # a token that sees only itself has softmax weights of one, whatever the queries and keys are
    assert untouched == (["q_proj.weight", "k_proj.weight"] if options.get("window") == 1 else [])


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


@over_the_registry
def test_declared_parameter_names_exist(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    own = {n for n, _ in mixer.named_parameters(recurse=False)}
    assert mixer.no_weight_decay | set(mixer.lr_scale) <= own


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
def test_state_keeps_no_more_alive_than_it_declares(name: str, options: dict[str, Any]) -> None:
    mixer = make(name, options, 8, 0)
    state = mixer.init_state(1, 500, dtype=torch.float64)
    declared = state.nbytes
    with torch.no_grad():
        _, state = mixer(torch.randn(1, 400, 8, dtype=torch.float64), state)
    assert sum(t.untyped_storage().nbytes() for t in state.tensors().values()) == state.nbytes == declared


@over_the_registry
def test_state_counts_the_same_in_bfloat16(name: str, options: dict[str, Any]) -> None:
    mixer = MIXERS[name](8, MIXERS[name].Config(**options)).to(torch.bfloat16)
    state = mixer.init_state(1, 9, dtype=torch.bfloat16)
    before = state.nbytes
    with torch.no_grad():
        y, state = mixer(torch.randn(1, 3, 8, dtype=torch.bfloat16), state)
    assert y.dtype == torch.bfloat16
    assert torch.isfinite(y).all()
    assert state.nbytes == before
