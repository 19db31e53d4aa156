"""Records one token's way through a model as a list of instructions, and runs the whole list in one call.

Between two operations on one token Python takes longer than the operation: a small model decodes ten times slower than
its matrices can be read. So a model describes its step once, layer by layer, with the methods below, which read like
its forward pass; nothing is computed then. `Program.run` computes it, each time for the next token.

Weights and states are not copied: instructions hold their addresses. What training writes into a weight is seen by the
next run, and so is a weight that has moved, which is found by `is_current` and must be recorded anew.
"""

from __future__ import annotations

import functools
import math
import operator
import struct
import threading
from collections.abc import Callable, Collection, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from ..dispatch import Unsupported
from ..parallel import at_once

__all__ = ["MANY_ROWS", "Program"]

MANY_ROWS = 16
"""Rows of a batch up to which a program is faster than matrix products of the whole batch."""

LARGE = 1 << 24
"""Bytes of weights from which a program runs on several threads, which wait for each other after every instruction."""

_NUMBERS = (torch.float32, torch.bfloat16)

_OPEN = 1 << 62
"""More than a counter of threads ever reaches by itself."""

_lock = threading.Lock()
"""Held while threads wait for each other: they must all have begun."""

T = TypeVar("T", bound=Tensor | Sequence[Tensor])


class Program:
    """One token of `n_rows` sequences as a list of instructions.

    Activations are tensors (n_rows, n), float32, that hold nothing until `run`: they may be split and sliced along n.
    Every method that computes returns a new one. What a program cannot do is `Unsupported`, with the reason.
    """

    def __init__(self, n_rows: int) -> None:
        if not 1 <= n_rows <= MANY_ROWS:
            raise Unsupported(f"a batch of {n_rows} rows is faster by matrix products")
        self.n_rows = n_rows
        self.n_left = math.inf
        """Tokens for which there is still room in all states."""
        self.tokens = torch.zeros(n_rows, dtype=torch.int64)
        """What is run next, (n_rows,) int64."""
        self.n_bytes = 0
        """Bytes of the weights and states that one run reads."""
        self._words: list[list[int]] = []
        self._kept: list[Tensor] = []
        self._weights: dict[int, Tensor] = {}
        self._places: list[object] | None = None
        self._derived: list[_Derived] = []
        self._sources: list[Tensor] = []
        self._versions: list[object] = []
        self._counts: dict[tuple[tuple[int, ...], int], Tensor] = {}
        self._turns: dict[tuple[int, float, int], tuple[Tensor, Tensor]] = {}
        self._table: Tensor | None = None
        self._run: Callable[[int, int, int], None]

    # Recording: memory

    def new(self, n: int) -> Tensor:
        """An activation of n numbers."""
        return _zeros(self.n_rows, n)

    def weight(self, t: Tensor) -> Tensor:
        """A weight as float32: itself, or a copy that is made anew when it has changed."""
        return self._known(t) if t.dtype == torch.float32 and t.is_contiguous() else self.derived(_as_floats, t)

    def derived(self, function: Callable[..., T], *weights: Tensor) -> T:
        """What a function makes of some weights, before the first run and again when they have changed."""
        derived = _Derived(function, [self._plain(w) for w in weights])
        self._derived.append(derived)
        self._sources += derived.weights
        return derived.value  # pyright: ignore[reportReturnType]

    def count(self, number: int | Tensor, *, most: int | None = None) -> Tensor:
        """A number that grows by one with every run, up to `most`: (n_rows,) int64."""
        values = number.tolist() if isinstance(number, Tensor) else [number] * self.n_rows
        key = tuple(values), 2**62 if most is None else most
        if key not in self._counts:  # layers that have seen as much as each other share it
            self._counts[key] = torch.tensor(values, dtype=torch.int64)
        return self._counts[key]

    def state(self, t: Tensor) -> Tensor:
        """A tensor of a state, which is updated in place; complex numbers as pairs of floats."""
        if type(t) is not Tensor:
            raise Unsupported(f"a tensor of the state is a {type(t).__name__}")
        if t.requires_grad:
            raise Unsupported("autograd records the state")
        if not t.is_contiguous():
            raise Unsupported("a tensor of the state is not contiguous")
        if not t.is_inference():  # so that a graph which holds a detached state's memory notices
            torch.autograd.graph.increment_version(t)
        t = torch.view_as_real(t) if t.is_complex() else t
        if t.dtype not in (*_NUMBERS, torch.int64):
            raise Unsupported(f"a state is in {_short(t.dtype)}")
        return t

    def _plain(self, t: Tensor) -> Tensor:
        if type(t) is not nn.Parameter:
            raise Unsupported(f"a weight is a {type(t).__name__}")
        if t.device.type != "cpu":
            raise Unsupported(f"a weight is on {t.device}")
        if t.dtype not in _NUMBERS:
            raise Unsupported(f"a weight is in {_short(t.dtype)}")
        if t.layout is not torch.strided:
            raise Unsupported("a weight is sparse")
        self._weights[id(t)] = t
        return t

    def _known(self, t: Tensor) -> Tensor:
        if not self._plain(t).is_contiguous():
            raise Unsupported("a weight is not contiguous")
        return t

    def _emit(self, name: str, *words: Tensor | int | float | None) -> None:
        from .instruction import WORDS
        from .instructions import address_of

        row = [address_of(name)]
        for word in words:
            if isinstance(word, Tensor):
                self._kept.append(word)
                row.append(word.data_ptr())
            else:
                row.append(struct.unpack("q", struct.pack("d", word))[0] if isinstance(word, float) else int(word or 0))
        assert len(row) <= WORDS, f"{name} has {len(row)} words"
        self._words.append(row + [0] * (WORDS - len(row)))

    def _emit_for(self, name: str, t: Tensor, *words: Tensor | int | float | None) -> None:
        """Emits an instruction that comes in two kinds, for float32 and bfloat16 in its first tensor."""
        self._emit(_kind(name, t), t, *words)

    # Recording: products

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, *, into: Tensor | None = None) -> Tensor:
        """weight x + bias, or `into` plus it, in place: weight (n, k), bias (n,)."""
        n, k = weight.shape
        y = self.new(n) if into is None else into
        self.n_bytes += weight.nbytes
        offsets = None if bias is None else self.weight(bias)
        words = (x, x.stride(0), y, y.stride(0), offsets, n, k, self.n_rows, into is not None)
        self._emit_for("linear", self._known(weight), *words)
        return y

    def experts(self, x: Tensor, scores: Tensor, up: Tensor, down: Tensor, top_k: int) -> Tensor:
        """The sum over the top_k largest of p = softmax(scores) of p down (silu(g) u), where g, u = up x.

        x (n_rows, D) · scores (n_rows, n_experts), used up · up (n_experts, 2 F, D) · down (n_experts, D, F).
        """
        n_experts, width, D = up.shape
        F, y = width // 2, self.new(D)
        choice, shares = torch.zeros(self.n_rows, top_k, dtype=torch.int64), self.new(top_k)
        gate_up, inner, outer = self.new(top_k * width), self.new(top_k * F), self.new(top_k * D)
        self._emit("route", scores, choice, shares, n_experts, self.n_rows, top_k)
        self._emit_for(
            "chosen", self._known(up), choice, x, x.stride(0), gate_up, width, D, self.n_rows, top_k, True
        )  # fmt: skip
        rows = gate_up.view(-1, width)
        self._pointwise("SWIGLU", rows[:, :F], rows[:, F:], inner.view(-1, F))
        self._emit_for("chosen", self._known(down), choice, inner, F, outer, D, F, self.n_rows, top_k, False)
        self._emit("mix", outer, shares, y, y.stride(0), D, self.n_rows, top_k)
        self.n_bytes += (up.nbytes + down.nbytes) // n_experts * top_k * self.n_rows
        return y

    def lookup(self, table: Tensor, index: Tensor, *, less: Tensor | None = None, into: Tensor | None = None) -> Tensor:
        """table[index - less], or `into` plus it, in place: table (m, n), index and less (n_rows,) int64."""
        y = self.new(table.shape[1]) if into is None else into
        words = (index, less, y, y.stride(0), table.shape[1], self.n_rows, into is not None)
        self._emit_for("lookup", self._known(table), *words)
        return y

    # Recording: single numbers

    def _pointwise(self, function: str, a: Tensor, b: Tensor, y: Tensor | None = None) -> Tensor:
        from . import pointwise

        y = self.new(a.shape[1]) if y is None else y
        words = (getattr(pointwise, function), a, a.stride(0), b, b.stride(0), y, y.stride(0), *reversed(a.shape))
        self._emit("pointwise", *words)
        return y

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b."""
        return self._pointwise("ADD", a, b)

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """a b."""
        return self._pointwise("MULTIPLY", a, b)

    def swiglu(self, gate: Tensor, x: Tensor) -> Tensor:
        """silu(gate) x."""
        return self._pointwise("SWIGLU", gate, x)

    def glu(self, x: Tensor) -> Tensor:
        """a sigmoid(b) of the halves a and b of x."""
        a, b = x.chunk(2, dim=-1)
        return self._pointwise("GLU", a, b)

    def gelu(self, x: Tensor, *, by_tanh: bool = False) -> Tensor:
        """GELU, or its approximation by tanh."""
        return self._pointwise("GELU_TANH" if by_tanh else "GELU", x, x)

    def sigmoid(self, x: Tensor, *, times: float = 1.0) -> Tensor:
        """times sigmoid(x)."""
        factor = torch.full((1, x.shape[1]), float(times), dtype=torch.float32)
        return self._pointwise("SIGMOID", x, factor.expand_as(x))

    def rms_norm(
        self, x: Tensor, weight: Tensor | float, eps: float, *, gate: Tensor | None = None, n_groups: int | None = None
    ) -> Tensor:
        """weight x / rms(x) in equal groups of channels, of x silu(gate) where there is a gate.

        The weight is of all channels, of one group for all alike, or a number.
        """
        width = x.shape[1]
        if isinstance(weight, Tensor):
            scale = self.weight(weight)
            n = width // n_groups if n_groups else len(scale)
        else:
            n = width // n_groups if n_groups else width
            scale = torch.full((n,), weight, dtype=torch.float32)
        y = self.new(width)
        gates = (None, 0) if gate is None else (gate, gate.stride(0))
        words = (scale, len(scale) == width, y, y.stride(0), n, width // n, self.n_rows, float(eps))
        self._emit("rms_norm", x, x.stride(0), *gates, *words)
        return y

    def layer_norm(self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        """weight (x - mean) / sqrt(variance + eps) + bias."""
        scale, offsets = (None if t is None else self.weight(t) for t in (weight, bias))
        y = self.new(x.shape[1])
        words = (scale, offsets, y, y.stride(0), x.shape[1], self.n_rows, float(eps))
        self._emit("layer_norm", x, x.stride(0), *words)
        return y

    def convolve(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, window: Tensor, activation: str | None = None
    ) -> Tensor:
        """ops.causal_conv1d of one token: weight (E, K), bias (E,), window (n_rows, K-1, E), in place."""
        y, window = self.new(x.shape[1]), self.state(window)
        taps, offsets = self.derived(_taps, weight), None if bias is None else self.weight(bias)
        n_past = window.shape[1]
        words = (x, x.stride(0), taps, offsets, y, x.shape[1], n_past, self.n_rows, activation == "silu")
        self._emit_for("convolve", window, *words)
        self.n_bytes += window.nbytes + taps.nbytes
        return y

    def decays(self, dt: Tensor, bias: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
        """step = softplus(dt + bias) and exp(A step): bias and A (n,), A as `derived` gives it."""
        step, decay = self.new(dt.shape[1]), self.new(dt.shape[1])
        words = (self.weight(bias), A, step, decay, dt.shape[1], self.n_rows)
        self._emit("decays", dt, dt.stride(0), *words)
        return step, decay

    # Recording: recurrences

    def selective_scan(
        self,
        u: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor,
        dt_bias: Tensor,
        state: Tensor,
    ) -> Tensor:
        """ops.selective_scan of one token, with softplus: A (E, N) as `derived` gives it, state (n_rows, E, N)."""
        h, (E, N), y, scratch = self._recurrent(state), A.shape, self.new(u.shape[1]), self.new(2 * u.shape[1])
        given = (h, u, u.stride(0), dt, dt.stride(0), self.weight(dt_bias), A, B, B.stride(0), C, C.stride(0))
        self._emit("selective_scan", *given, self.weight(D), z, z.stride(0), scratch, y, E, N, self.n_rows)
        self.n_bytes += A.nbytes
        return y

    def heads_scan(
        self, x: Tensor, step: Tensor, decay: Tensor, B: Tensor, C: Tensor, D: Tensor, state: Tensor
    ) -> Tensor:
        """h = decay h + step x B^T and y = h C + D x per head: ops.ssd of one token.

        x (n_rows, H P) · step, decay (n_rows, H) · B, C (n_rows, G N) · D (H,) · state (n_rows, H, P, N).
        """
        h, (_, H, P, N), y = self._recurrent(state), state.shape, self.new(x.shape[1])
        given = (h, x, x.stride(0), step, decay, B, B.stride(0), C, C.stride(0), self.weight(D))
        self._emit("heads_scan", *given, y, H, P, N, B.shape[1] // N, self.n_rows)
        return y

    def delta_rule(self, q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> Tensor:
        """ops.gated_delta_rule of one token: q, k (n_rows, H N), v (n_rows, H P), state (n_rows, H, P, N)."""
        S, (_, H, P, N), o = self._recurrent(state), state.shape, self.new(v.shape[1])
        given = (S, q, q.stride(0), k, k.stride(0), v, v.stride(0), decay, beta)
        self._emit("delta_rule", *given, o, H, P, N, self.n_rows)
        return o

    def trapezoid_scan(
        self,
        x: Tensor,
        gates: tuple[Tensor, Tensor, Tensor, Tensor],
        dt_bias: Tensor,
        B: tuple[Tensor, Tensor],
        C: tuple[Tensor, Tensor],
        D: Tensor,
        state: tuple[Tensor, Tensor, Tensor, Tensor],
        *,
        A_min: float,
        least: float,
    ) -> Tensor:
        """The recurrence of Mamba-3 for one token (arXiv:2603.15569).

        Args:
            x: (n_rows, H P).
            gates: dt, A and mix, (n_rows, H), and theta, (n_rows, n_angles), all parts of one projection.
            dt_bias: (H,).
            B: (n_rows, N), and its bias, (H, N).
            C: alike.
            D: (H,).
            state: h, (n_rows, H, P, N), the last x, (n_rows, H, P), the last B, (n_rows, H, N), and the angles,
                (n_rows, H, n_angles), all in place.
            A_min: smallest -A.
            least: smallest -A dt.
        """
        h, last_B, angle = (self._recurrent(state[i]) for i in (0, 2, 3))
        (_, H, P, N), last_x = h.shape, self.state(state[1]).flatten(1)
        factors, turned_B, turned_C = _zeros(3, self.n_rows, H), self.new(H * N), self.new(H * N)
        given = (*gates, gates[0].stride(0), self.weight(dt_bias), B[0], B[0].stride(0), C[0], C[0].stride(0))
        made = (self.weight(B[1]), self.weight(C[1]), angle, factors, turned_B, turned_C, H, angle.shape[2], N)
        self._emit("trapezoid_inputs", *given, *made, self.n_rows, float(A_min), float(least))
        old_x = last_x
        if last_x.dtype != torch.float32:
            old_x = self.new(H * P)
            self._emit_for("lookup", last_x, torch.arange(self.n_rows), None, old_x, H * P, H * P, self.n_rows, False)
        y = self.new(H * P)
        words = (h, x, x.stride(0), old_x, factors, turned_B, last_B, turned_C, self.weight(D), y, H, P, N, self.n_rows)
        self._emit("trapezoid_scan", *words)
        if last_x is not old_x:
            self._emit_for("save", last_x, old_x, H * P, H * P, self.n_rows)
        return y

    def lstm_cell(self, gates: Tensor, weight: Tensor, state: Tensor) -> Tensor:
        """ops.lstm_scan of one token: gates (n_rows, 4 E), weight (4 E, E), state (n_rows, 2, E)."""
        held, E = self._recurrent(state), state.shape[2]
        gates = self.product(held[:, 0], weight, into=gates)
        y = self.new(E)
        self._emit("lstm_cell", gates, held, y, E, self.n_rows)
        return y

    def diagonal_scan(
        self,
        u: Tensor,
        system: Callable[..., tuple[Tensor, Tensor]],
        weights: Sequence[Tensor],
        D: Tensor,
        state: Tensor,
    ) -> Tensor:
        """ops.ssm_scan of one token: system(*weights) gives A and C as it takes them; state (n_rows, E, N) complex.

        There may be more rows than in the batch, as many of u and y as of the state.
        """

        def arranged(*weights: Tensor) -> tuple[Tensor, ...]:
            A, C = system(*weights)
            return *_factor(torch.exp(A)), _real_part(2 * C)

        h, y = self._recurrent(state), _zeros(*u.shape)
        real, imag, C = self.derived(arranged, *weights)
        E, n = real.shape
        ones = torch.tensor([1.0, 0.0], dtype=torch.float32).repeat(n // 2)
        self._emit("diagonal_scan", h, u, u.stride(0), real, imag, C, ones, self.weight(D), y, E, n, len(u))
        self.n_bytes += 3 * real.nbytes
        return y

    def outer(self, k: Tensor, v: Tensor, head_dim: int) -> Tensor:
        """k[h, i] v[h, j] for the pairs of channels of each head, (n_rows P P, H): k and v (n_rows, H P)."""
        y = _zeros(self.n_rows * head_dim**2, k.shape[1] // head_dim)
        self._emit("outer", k, k.stride(0), v, v.stride(0), y, y.shape[1], head_dim, self.n_rows)
        return y

    def inner(self, q: Tensor, pairs: Tensor, head_dim: int) -> Tensor:
        """sum over i of q[h, i] pairs[i, j, h], (n_rows, H P), for q (n_rows, H P) and pairs as `outer` makes them."""
        y = self.new(q.shape[1])
        self._emit("inner", q, q.stride(0), pairs, y, pairs.shape[1], head_dim, self.n_rows)
        return y

    def dplr_scan(
        self,
        u: Tensor,
        system: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]],
        weights: Sequence[Tensor],
        D: Tensor,
        state: Tensor,
    ) -> Tensor:
        """ops.dplr_scan of one token: system(*weights) gives A, P, B and C as it takes them."""

        def arranged(*weights: Tensor) -> tuple[Tensor, ...]:
            A, P, B, C = system(*weights)
            M = 1 / (1 - A / 2)
            w = P.conj() * M / (1 + (P.conj() * M * P).sum(-1, keepdim=True).real)
            return *_factor(M), _real_part(w), _numbers(M * P), _numbers(B), _real_part(2 * C)

        h, y = self._recurrent(state), self.new(u.shape[1])
        real, imag, w, Q, B, C = self.derived(arranged, *weights)
        E, n = real.shape
        words = (real, imag, w, Q, B, C, self.weight(D), y, E, n, self.n_rows)
        self._emit("dplr_scan", h, u, u.stride(0), *words)
        self.n_bytes += 6 * real.nbytes
        return y

    def _recurrent(self, state: Tensor) -> Tensor:
        h = self.state(state)
        if h.dtype != torch.float32:
            raise Unsupported(f"the state of a recurrence is in {_short(state.dtype)}")
        self.n_bytes += h.nbytes
        return h

    # Recording: attention

    def rotate(self, x: Tensor, position: Tensor, theta: float, head_dim: int) -> None:
        """ops.rotary of one token, in place: x (n_rows, H P), position (n_rows,) as `count` gives it."""
        half, key = head_dim // 2, (id(position), theta, head_dim)
        if key not in self._turns:  # layers share them
            frequency = theta ** -(torch.arange(half, dtype=torch.float64) / half)
            self._turns[key] = self.new(half), self.new(half)
            self._emit("angles", position, frequency, *self._turns[key], half, self.n_rows)
        self._emit("rotate", x, x.stride(0), *self._turns[key], x.shape[1] // head_dim, half, self.n_rows)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        *,
        first_key: Tensor | None,
        room: int,
        slides: bool,
        scale: float,
    ) -> Tensor:
        """ops.attention of one token that sees the keys held and itself, and then joins them.

        Args:
            q: queries, (n_rows, H P).
            k: its key, (n_rows, G P).
            v: its value, alike.
            keys: those held, (n_rows, capacity, G, P), in place.
            values: alike.
            length: how many are held, as `count` gives it.
            first_key: the first that is seen, (n_rows,) int64; None means all are.
            room: most that may be held.
            slides: whether the oldest then leaves; otherwise there is no room for more tokens.
            scale: factor on the scores.
        """
        keys, values = self.state(keys), self.state(values)
        capacity, o = keys.shape[1], self.new(q.shape[1])
        held = int(length.max())
        first = None if first_key is None else self.state(first_key)
        self._attend(q, (k, k.stride(0), v, v.stride(0)), keys, values, length, first, o, room, scale)
        if not slides:
            self.n_left = min(self.n_left, room - held)
        elif first is not None:
            self._emit("slide", first, length, room, self.n_rows)
        if capacity:
            self.n_bytes += (keys.nbytes + values.nbytes) * held // capacity
        return o

    def read(
        self,
        q: Tensor,
        keys: Tensor,
        values: Tensor,
        length: Tensor | None,
        *,
        scale: float,
        head_dim: int,
    ) -> Tensor:
        """Attention to keys and values, (n_rows, S, G P), of which each row has the first `length`, (n_rows,) int64."""
        keys, values = (self.state(t).unflatten(-1, (-1, head_dim)) for t in (keys, values))
        o = self.new(q.shape[1])
        self._attend(q, (None, 0, None, 0), keys, values, self._lengths(keys, length), None, o, 0, scale)
        self.n_bytes += keys.nbytes + values.nbytes
        return o

    def compare(
        self, q: Tensor, keys: Tensor, values: Tensor, length: Tensor | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        """sum over t of a[t] v[t], a = softmax of weight tanh(q + k[t]) + bias: weight (1, d_key), as `read`."""
        keys, values = self.state(keys), self.state(values)
        _, S, d_key = keys.shape
        d_value, scratch = values.shape[2], _zeros(self.n_rows, S)
        y, offset = self.new(d_value), None if bias is None else self.weight(bias)
        given = (q, q.stride(0), keys, values, self._lengths(keys, length), self.weight(weight), offset, scratch, y)
        self._emit(_kind("compare", keys, values), *given, S, d_key, d_value, self.n_rows)
        self.n_bytes += keys.nbytes + values.nbytes
        return y

    def _attend(
        self,
        q: Tensor,
        new: tuple[Tensor | None, int, Tensor | None, int],
        keys: Tensor,
        values: Tensor,
        length: Tensor,
        first_key: Tensor | None,
        o: Tensor,
        room: int,
        scale: float,
    ) -> None:
        _, capacity, G, P = keys.shape
        H = q.shape[1] // P
        scratch = _zeros(self.n_rows, H, capacity + 1)
        given = (q, q.stride(0), *new, keys, values, length, first_key, scratch, o)
        self._emit(_kind("attend", keys, values), *given, H, G, P, capacity, room, self.n_rows, float(scale))

    def _lengths(self, keys: Tensor, length: Tensor | None) -> Tensor:
        return torch.full((self.n_rows,), keys.shape[1]) if length is None else self.state(length)

    # Running

    def is_current(self) -> bool:
        """Whether all weights are still where they were when they were recorded, and laid out as they were."""
        return _places(self._weights.values()) == self._places

    def finish(self) -> None:
        """Ends the recording: from here on weights that move are noticed, and `run` may be called."""
        from .instruction import WORDS, run
        from .instructions import address_of

        for (_, most), numbers in self._counts.items():
            self._words.append([address_of("advance"), numbers.data_ptr(), self.n_rows, most, *[0] * (WORDS - 4)])
        self._table = torch.tensor(self._words, dtype=torch.int64)
        self._run = functools.partial(run, self._table.data_ptr(), len(self._words), WORDS)
        self._places = _places(self._weights.values())
        self._kept += [w.detach() for w in self._weights.values()]  # a weight that moves leaves its memory to the end

    def run(self) -> None:
        """Computes the step for `tokens`, and advances all states by one token."""
        if self._table is None:
            self.finish()
        if (versions := _versions(self._sources)) != self._versions:
            self._versions = versions
            for derived in self._derived:
                derived.refresh()
        self.n_left -= 1
        n_threads = torch.get_num_threads() if self.n_bytes >= LARGE else 1
        # where another thread runs a program on several threads, this one must not wait for it in their middle
        if n_threads == 1 or not _lock.acquire(blocking=False):
            self._run(0, 1, 0)
            return
        counter = torch.zeros(1, dtype=torch.int64)
        try:
            at_once(n_threads, lambda rank: self._run(rank, n_threads, counter.data_ptr()))
        except BaseException:  # such as Ctrl-C before all have begun: the others must not wait for ever
            counter.fill_(_OPEN)
            raise
        finally:
            _lock.release()


class _Derived:
    """Tensors that a function makes of weights, kept at one address and made anew when a weight has changed."""

    def __init__(self, function: Callable[..., Tensor | Sequence[Tensor]], weights: Sequence[Tensor]) -> None:
        self._function, self.weights = function, weights
        self._seen = _versions(weights)
        self.value = self._made()

    @torch.no_grad()
    def _made(self) -> Tensor | tuple[Tensor, ...]:
        value = self._function(*self.weights)
        # of its own memory: where nothing had to be done it would be the weight itself
        if isinstance(value, Tensor):
            return value.clone(memory_format=torch.contiguous_format)
        return tuple([t.contiguous() for t in value])

    def refresh(self) -> None:
        """Makes them anew if a weight has changed."""
        if (seen := _versions(self.weights)) == self._seen:
            return
        self._seen = seen
        for old, new in zip(_listed(self.value), _listed(self._made()), strict=True):
            old.copy_(new)


def _listed(value: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def _places(weights: Collection[Tensor]) -> list[object]:
    """Where tensors are and how they are laid out: it is asked for every token, so all of it is loops of C."""
    return [*map(Tensor.data_ptr, weights), *map(Tensor.stride, weights), *map(Tensor.numel, weights)]


def _versions(weights: Sequence[Tensor]) -> list[object]:
    """What differs as soon as one of them has been written to."""
    try:
        return [*map(_version, weights)]
    except RuntimeError:  # changes of inference tensors are not counted: they may have changed at any time
        return [object() if w.is_inference() else w._version for w in weights]


_version = operator.attrgetter("_version")


def _zeros(*shape: int) -> Tensor:
    """Memory for float32 numbers, whatever PyTorch's default is."""
    return torch.zeros(*shape, dtype=torch.float32)


def _kind(name: str, *tensors: Tensor) -> str:
    """The name of an instruction for the numbers of some tensors, all alike."""
    dtype, *others = {t.dtype for t in tensors}
    if others or dtype not in _NUMBERS:
        raise Unsupported("tensors of one state are in different dtypes, or whole numbers")
    return name if dtype == torch.float32 else f"{name}_bfloat16"


def _as_floats(weight: Tensor) -> Tensor:
    return weight.float().contiguous()


def _taps(weight: Tensor) -> Tensor:
    """(E, K) -> (K, E)."""
    return weight.float().T.contiguous()


def _numbers(z: Tensor) -> Tensor:
    """Complex numbers, (E, N), as real and imaginary parts in turn, (E, 2 N)."""
    return torch.view_as_real(z.to(torch.complex64).resolve_conj().contiguous()).flatten(1)


def _real_part(z: Tensor) -> Tensor:
    """What numbers h in turn are multiplied with and summed to give Re sum(z h)."""
    return _numbers(z.conj())


def _factor(z: Tensor) -> tuple[Tensor, Tensor]:
    """z as the recurrences multiply by it: its real parts, each twice, and its imaginary parts b as (-b, b)."""
    real, imag = z.real.float(), z.imag.float()
    return torch.stack([real, real], -1).flatten(1), torch.stack([-imag, imag], -1).flatten(1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
