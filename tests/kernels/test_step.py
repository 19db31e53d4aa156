"""Single instructions of a compiled step against plain PyTorch in float64, at sizes that fit no vector.

What models make of them is in tests/archs/test_contract.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.kernels import ops
from crossover.kernels.dispatch import Unsupported
from crossover.kernels.step.program import MANY_ROWS, Program
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

pytestmark = pytest.mark.quick

few = settings(max_examples=12)
B, SEED = st.integers(1, 3), st.integers(0, 2**16)
WIDTH = st.integers(1, 37)
HUGE = 1e30


class Poisoned(Program):
    """A program whose activations are no numbers before they are computed."""

    def new(self, n: int) -> Tensor:
        return super().new(n).fill_(math.nan)

    def given(self, n: int, *, scale: float = 1.0) -> Tensor:
        """An input of n numbers, with others between its rows."""
        return (scale * torch.randn(self.n_rows, n + 5))[:, 2 : n + 2]


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.randn(*shape).to(dtype), requires_grad=False)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Off by no more than a share of the largest number."""
    assert actual.isfinite().all()
    assert expected.dtype in (torch.float64, torch.complex128)
    scale = expected.abs().max().clamp(min=1e-30)
    error = (actual.to(expected.dtype) - expected).abs().max() / scale
    assert error <= tolerance, float(error)


@few
@given(B=B, n=WIDTH, k=WIDTH, seed=SEED, bf16=st.booleans(), with_bias=st.booleans(), adds=st.booleans())
def test_products(B: int, n: int, k: int, seed: int, bf16: bool, with_bias: bool, adds: bool) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    x, W = step.given(k), weight(n, k, dtype=torch.bfloat16 if bf16 else torch.float32)
    bias, before = weight(n) if with_bias else None, torch.randn(B, n)
    expected = F.linear(x.double(), W.double(), None if bias is None else bias.double()) + (
        before.double() if adds else 0
    )
    y = step.product(x, W, bias, into=before if adds else None)
    step.run()
    assert_near(y, expected)


@few
@given(B=B, D=WIDTH, F_=st.integers(1, 19), n=st.integers(1, 6), seed=SEED, tied=st.booleans(), data=st.data())
def test_experts(B: int, D: int, F_: int, n: int, seed: int, tied: bool, data: st.DataObject) -> None:
    torch.manual_seed(seed)
    step, top_k = Poisoned(B), data.draw(st.integers(1, n))
    x, scores, up, down = step.given(D), 5 * torch.randn(B, n), weight(n, 2 * F_, D), weight(n, D, F_)
    if tied:  # of equal ones the first
        scores[:] = torch.randint(2, (B, n))
    probs, order = scores.double().softmax(-1).sort(dim=-1, descending=True, stable=True)
    expected = torch.zeros(B, D, dtype=torch.float64)
    for b in range(B):
        for p, e in zip(probs[b, :top_k], order[b, :top_k], strict=True):
            gate, value = (up[e].double() @ x[b].double()).chunk(2)
            expected[b] += p * (down[e].double() @ (F.silu(gate) * value))
    y = step.experts(x, scores, up, down, top_k)
    step.run()
    assert_near(y, expected, 5e-6)


POINTWISE: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "add": (Program.add, torch.add),
    "multiply": (Program.multiply, torch.mul),
    "swiglu": (Program.swiglu, lambda a, b: F.silu(a) * b),
    "gelu": (lambda step, a, b: step.gelu(a), lambda a, b: F.gelu(a)),
    "gelu by tanh": (lambda step, a, b: step.gelu(a, by_tanh=True), lambda a, b: F.gelu(a, approximate="tanh")),
    "sigmoid": (lambda step, a, b: step.sigmoid(a, times=2), lambda a, b: 2 * torch.sigmoid(a)),
    "glu": (lambda step, a, b: step.glu(a), lambda a, b: F.glu(a)),
}


@pytest.mark.parametrize("name", POINTWISE)
@settings(max_examples=6)
@given(B=B, n=st.integers(1, 20), seed=SEED, scale=st.sampled_from([1e-3, 1.0, 30.0]))
def test_functions_of_single_numbers(name: str, B: int, n: int, seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    function, expected = POINTWISE[name]
    step = Poisoned(B)
    a, b = step.given(2 * n, scale=scale), step.given(2 * n)
    y = function(step, a, b)
    step.run()
    assert_near(y, expected(a.double(), b.double()))


@few
@given(
    B=B,
    n=st.integers(1, 37),
    groups=st.integers(1, 3),
    seed=SEED,
    gated=st.booleans(),
    scale=st.sampled_from([1e-2, 1.0, HUGE]),
    kind=st.sampled_from(["own", "shared", "number"]),
)
def test_rms_norm(B: int, n: int, groups: int, seed: int, gated: bool, scale: float, kind: str) -> None:
    torch.manual_seed(seed)
    step, eps = Poisoned(B), 1e-5
    x, z = step.given(groups * n, scale=scale), step.given(groups * n) if gated else None
    w = {"own": weight(groups * n), "shared": weight(n), "number": 0.7}[kind]
    y = step.rms_norm(x, w, eps, gate=z, n_groups=groups)
    step.run()
    value = x.double() if z is None else x.double() * F.silu(z.double())
    parts = value.unflatten(1, (groups, n))
    normed = (parts / (parts.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(1)
    factor = w if isinstance(w, float) else w.double().repeat(1 if kind == "own" else groups)
    assert_near(y, normed * factor)


@few
@given(B=B, n=st.integers(2, 37), seed=SEED, scale=st.sampled_from([1e-2, 1.0, HUGE]), affine=st.booleans())
def test_layer_norm(B: int, n: int, seed: int, scale: float, affine: bool) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    x, w, bias = step.given(n, scale=scale), weight(n) if affine else None, weight(n) if affine else None
    y = step.layer_norm(x, w, bias, 1e-5)
    step.run()
    wide_w, wide_bias = (None if t is None else t.double() for t in (w, bias))
    assert_near(y, F.layer_norm(x.double(), (n,), wide_w, wide_bias), 1e-5)


@few
@given(B=B, E=WIDTH, K=st.integers(1, 5), seed=SEED, silu=st.booleans(), bf16=st.booleans())
def test_convolve(B: int, E: int, K: int, seed: int, silu: bool, bf16: bool) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    x, w, bias = step.given(E), weight(E, K), weight(E)
    window = torch.randn(B, K - 1, E).to(torch.bfloat16 if bf16 else torch.float32)
    past = torch.cat([window.double(), x.double()[:, None]], 1)
    expected = (past * w.double().T).sum(1) + bias.double()
    y = step.convolve(x, w, bias, window, "silu" if silu else None)
    step.run()
    assert_near(y, F.silu(expected) if silu else expected)
    assert torch.equal(window, past[:, 1:].to(window.dtype))


def one_token(op: Any, *arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
    """An operation's plain PyTorch in float64 at length one: y, (B, ...), and the state."""
    y, h = op._implementations["reference"](*arguments, **options)
    return y[:, 0], h


@few
@given(B=B, E=st.integers(1, 70), N=WIDTH, seed=SEED)
def test_selective_scan(B: int, E: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    u, dt, z, b, c = (step.given(n) for n in (E, E, E, N, N))
    A, D, bias, h = weight(E, N), weight(E), weight(E), torch.randn(B, E, N)
    wide = [t.double()[:, None] for t in (u, dt)], [t.double()[:, None] for t in (b, c)]
    rates = -A.double().exp()
    expected, after = one_token(
        ops.selective_scan, *wide[0], rates, *wide[1], D.double(), z.double()[:, None],
        delta_bias=bias.double(), delta_softplus=True, initial_state=h.double(),
    )  # fmt: skip
    y = step.selective_scan(u, dt, step.derived(lambda t: -t.exp(), A), b, c, D, z, bias, h)
    step.run()
    assert_near(y, expected, 5e-6)
    assert_near(h, after, 5e-6)


@few
@given(B=B, G=st.integers(1, 2), per=st.integers(1, 3), P=st.integers(1, 9), N=WIDTH, seed=SEED)
def test_heads_scan(B: int, G: int, per: int, P: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    step, H = Poisoned(B), G * per
    x, dt, b, c = step.given(H * P), step.given(H), step.given(G * N), step.given(G * N)
    A, D, bias, h = weight(H), weight(H), weight(H), torch.randn(B, H, P, N)
    expected, after = one_token(
        ops.ssd, x.double().view(B, 1, H, P), dt.double()[:, None], -A.double().exp(),
        *(t.double().view(B, 1, G, N) for t in (b, c)), D.double(),
        dt_bias=bias.double(), dt_softplus=True, initial_state=h.double(),
    )  # fmt: skip
    size, decay = step.decays(dt, bias, step.derived(lambda t: -t.exp(), A))
    y = step.heads_scan(x, size, decay, b, c, D, h)
    step.run()
    assert_near(y, expected.flatten(1), 5e-6)
    assert_near(h, after, 5e-6)


@few
@given(B=B, H=st.integers(1, 3), P=st.integers(1, 9), N=WIDTH, seed=SEED)
def test_delta_rule(B: int, H: int, P: int, N: int, seed: int) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    q, k, v = step.given(H * N), step.given(H * N, scale=N**-0.5), step.given(H * P)
    decay, beta, S = torch.rand(B, H), torch.rand(B, H), torch.randn(B, H, P, N)
    wide = [t.double().view(B, 1, H, -1) for t in (q, k, v)]
    expected, after = one_token(
        ops.gated_delta_rule, *wide, decay.double().log()[:, None], beta.double()[:, None], initial_state=S.double()
    )
    o = step.delta_rule(q, k, v, decay, beta, S)
    step.run()
    assert_near(o, expected.flatten(1), 5e-6)
    assert_near(S, after, 5e-6)


@few
@given(B=B, E=WIDTH, seed=SEED)
def test_lstm_cell(B: int, E: int, seed: int) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    gates, W, h = torch.randn(B, 4 * E), weight(4 * E, E), torch.randn(B, 2, E)
    expected, after = one_token(ops.lstm_scan, gates.double()[:, None], W.double(), h.double())
    y = step.lstm_cell(gates, W, h)
    step.run()
    assert_near(y, expected, 5e-6)
    assert_near(h, after, 5e-6)


@few
@given(B=B, E=st.integers(1, 70), N=st.integers(1, 19), seed=SEED, low_rank=st.booleans())
def test_complex_recurrences(B: int, E: int, N: int, seed: int, low_rank: bool) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    u, D, h = step.given(E), weight(E), torch.randn(B, E, N, dtype=torch.complex64)
    weights = [weight(E, N, 2) for _ in range(4)]

    def system(*weights: Tensor) -> Any:
        a, p, b, c = (torch.view_as_complex(t.data.contiguous()) for t in weights)
        a = torch.complex(-a.real.abs(), a.imag)
        return (a, p / N**0.5, b, c) if low_rank else (a, c)

    op = ops.dplr_scan if low_rank else ops.ssm_scan
    wide = system(*[t.double() for t in weights])
    expected, after = one_token(op, u.double()[:, None], *wide, D.double(), h.to(torch.complex128))
    y = (step.dplr_scan if low_rank else step.diagonal_scan)(u, system, weights, D, h)
    step.run()
    assert_near(y, expected, 1e-5)
    assert_near(h, after, 1e-5)


@few
@given(
    B=B, G=st.integers(1, 2), per=st.integers(1, 3), P=st.integers(1, 12), held=st.integers(0, 23), seed=SEED,
    scale=st.sampled_from([1.0, 40.0]), slides=st.booleans(), bf16=st.booleans(), hidden=st.integers(0, 23),
)  # fmt: skip
def test_attend(
    B: int, G: int, per: int, P: int, held: int, seed: int, scale: float, slides: bool, bf16: bool, hidden: int
) -> None:
    torch.manual_seed(seed)
    step, P, H = Poisoned(B), 2 * P, G * per
    room = held if slides else held + 1
    q, k, v = step.given(H * P, scale=scale), step.given(G * P), step.given(G * P)
    keys, values = (torch.randn(B, room + 1, G, P).to(torch.bfloat16 if bf16 else torch.float32) for _ in range(2))
    first = torch.tensor([min(held, hidden), *[0] * (B - 1)])
    keys[0, : first[0]] = values[0, : first[0]] = math.nan  # nobody sees them
    before, position = [t.clone() for t in (keys, values)], torch.full((B,), 1000 + held)
    wide = []
    for t, n in ((q, H), (k, G)):
        t = t.double().view(B, n, P)
        angle = (1000 + held) * 10_000.0 ** (-torch.arange(P // 2, dtype=torch.float64) / (P // 2))
        a, b = t.chunk(2, -1)
        wide.append(torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], -1))
    for t in (q, k):
        step.rotate(t, position, 10_000.0, P)
    length = step.count(held, most=room if slides else None)
    seen = first.clone()
    o = step.attend(
        q, k, v, keys, values, length, first_key=seen, room=room, slides=slides, scale=P**-0.5
    )  # fmt: skip
    step.run()
    for b in range(B):
        alone = [
            torch.cat([cache[b, first[b] : held].double(), new.view(1, G, P)]).repeat_interleave(per, 1)
            for cache, new in ((before[0], wide[1][b]), (before[1], v[b].double()))
        ]
        weights = (torch.einsum("hp,thp->ht", wide[0][b], alone[0]) * P**-0.5).softmax(-1)
        assert_near(o[b], torch.einsum("ht,thp->hp", weights, alone[1]).flatten(), 2e-5 * scale)
    full = held == room
    assert length.tolist() == [min(held + 1, room) if slides else held + 1] * B
    assert seen.tolist() == [max(0, int(n) - full) for n in first]
    if room:
        place = held - full
        assert_near(keys[:, place].double().flatten(1), wide[1].flatten(1), 1e-2 if bf16 else 1e-5)
        old = before[1][:, full:held]
        assert torch.equal(values[:, :place].nan_to_num(), old.nan_to_num())


@few
@given(B=B, S=st.integers(1, 9), d_key=WIDTH, d_value=WIDTH, seed=SEED, padded=st.booleans())
def test_compare(B: int, S: int, d_key: int, d_value: int, seed: int, padded: bool) -> None:
    torch.manual_seed(seed)
    step = Poisoned(B)
    q, keys, values, w = step.given(d_key), torch.randn(B, S, d_key), torch.randn(B, S, d_value), weight(1, d_key)
    length = torch.randint(1, S + 1, (B,)) if padded else None
    y = step.compare(q, keys, values, length, w, None)
    step.run()
    scores = (torch.tanh(q.double()[:, None] + keys.double()) @ w.double().T).squeeze(-1)
    if length is not None:
        scores = scores.masked_fill(torch.arange(S) >= length[:, None], -math.inf)
    assert_near(y, (scores.softmax(-1)[:, None] @ values.double()).squeeze(1), 5e-6)


def test_what_changes_in_a_weight_is_seen_and_what_moves_is_noticed() -> None:
    step = Poisoned(2)
    W, bias, x = weight(5, 3, dtype=torch.bfloat16), weight(5, dtype=torch.bfloat16), step.given(3)
    y = step.product(x, W, bias)
    for _ in range(2):
        step.run()
        assert_near(y, F.linear(x.double(), W.double(), bias.double()))
        W.add_(1)
        bias.mul_(3)
    assert step.is_current()
    W.data = W.data.clone()
    assert not step.is_current()


def test_what_a_program_cannot_do_is_refused() -> None:
    for n_rows in (0, MANY_ROWS + 1):
        with pytest.raises(Unsupported, match="rows"):
            Program(n_rows)
    step = Program(2)
    x = step.new(3)
    for wrong in (torch.ones(5, 3), nn.Parameter(torch.ones(5, 3).double()), nn.Parameter(torch.ones(3, 5).T)):
        with pytest.raises(Unsupported, match="a weight is"):
            step.product(x, wrong)
    for state in (torch.ones(2, 3).half(), torch.ones(3, 2).T, torch.ones(2, 3, requires_grad=True)):
        with pytest.raises(Unsupported, match="state"):
            step.state(state)
