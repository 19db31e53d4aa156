"""Self-attention, causal or not: rotary positions or none, grouped keys, an optional sliding window.

Sources: Vaswani et al. 2017 (arXiv:1706.03762), Su et al. 2021 (RoPE, arXiv:2104.09864), Ainslie et al. 2023 (grouped
keys, arXiv:2305.13245), Beltagy et al. 2020 (window, arXiv:2004.05150).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ...kernels import ops
from ...options import Length, Positive, Size
from ..layers import linear, linear_flops
from ..mixer import Mixer, State, Zeros
from ..state import joined_numbers, per_row
from ..step import Step


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of Attention."""

    n_heads: Size | None = None
    """Query heads; None means d_model / head_dim."""
    n_kv_heads: Size | None = None
    """Key and value heads; None means n_heads (multi-head), 1 means multi-query."""
    head_dim: Size | None = None
    """Channels per head; None means d_model / n_heads, or where that is None too the largest power of two up to 64 that
    leaves at least three heads."""
    rope: bool = True
    """Whether queries and keys are rotated by their position; False is NoPE."""
    rope_theta: Positive = 10_000.0
    """Base of the rotation's wavelengths."""
    window: Length | None = None
    """Number of latest tokens seen, the current one included; None means all. Without `causal` as many to come."""
    causal: bool = True
    """Whether a token sees only itself and earlier ones; False is an encoder, which takes no state."""
    bias: bool = False
    """Whether the projections have biases."""


@dataclass
class KVCache(State):
    """Keys and values of the tokens so far, or under a window of the latest ones."""

    k: Tensor
    """Keys, rotated, (B, max_len, H_kv, P); under a window (B, min(max_len, window - 1), H_kv, P)."""
    v: Tensor
    """Values, shaped like k."""
    first_key: Tensor | None = None
    """Index of the first key of the current document, (B,) int64; None where no start has been seen, so that every key
    is visible and attention needs no mask."""
    length: int | Tensor = 0
    """Keys held. As a tensor, (), it makes every step the same work, whose result the host need not know."""
    n_seen: int | Tensor = 0
    """Tokens seen: the position of the next one. A tensor where `length` is one, and (B,) where rows were joined that
    have seen unlike numbers."""

    def forget(self, rows: Tensor) -> Self:
        """See State.forget: the next key is the first one of these rows."""
        first_key = torch.where(rows, self.length, 0 if self.first_key is None else self.first_key)
        return dataclasses.replace(self, first_key=first_key)

    @classmethod
    def cat(cls, states: Sequence[Any]) -> Self:
        """See State.cat: the last keys of all rows stand side by side, and `first_key` hides what is before a row's."""
        hidden = [0 if s.first_key is None or not len(s.k) else int(s.first_key.min()) for s in states]
        held = [int(s.length) - n for s, n in zip(states, hidden, strict=True)]
        length, room = max(held), max(s.k.shape[1] - int(s.length) for s in states)
        k, v = (
            torch.cat([
                F.pad(t[:, n : n + m], (0, 0, 0, 0, length - m, room))
                for t, n, m in zip(tensors, hidden, held, strict=True)
            ])
            for tensors in ([s.k for s in states], [s.v for s in states])
        )  # fmt: skip
        first_key = None
        if any(s.first_key is not None or m < length for s, m in zip(states, held, strict=True)):
            first_key = torch.cat([
                (k.new_zeros(len(s.k), dtype=torch.int64) if s.first_key is None else s.first_key) + length - m - n
                for s, n, m in zip(states, hidden, held, strict=True)
            ])  # fmt: skip
        return cls(k, v, first_key, length, joined_numbers([(s.n_seen, len(s.k)) for s in states], k.device))


class Attention(Mixer[AttentionConfig, KVCache]):
    """o = softmax(q k^T / sqrt(P)) v per head, projected back to D."""

    Config = AttentionConfig
    State = KVCache

    def __init__(self, d_model: int, config: AttentionConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        self.n_heads, self.head_dim = _heads(d_model, config)
        self.n_kv_heads = self.n_heads if config.n_kv_heads is None else config.n_kv_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if config.rope and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: rotary positions need pairs of channels (or rope=false)"
            )
        d_q, d_kv, bias = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim, config.bias
        self.q_proj = linear(d_model, d_q, bias=bias)
        self.k_proj = linear(d_model, d_kv, bias=bias)
        self.v_proj = linear(d_model, d_kv, bias=bias)
        self.out_proj = linear(d_q, d_model, bias=bias, scale=residual_scale)

    def forward(
        self, x: Tensor, state: KVCache | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """See Mixer.forward.

        Raises:
            ValueError: if the cache is full, or if a state is given to an encoder.
        """
        if state is not None:
            self._check_causal()
        q, k, v = (
            rearrange(proj(x), "b l (h p) -> b l h p", p=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.rope:
            # attention sees differences of positions only, so they may run on across documents
            positions = torch.arange(x.shape[1], device=x.device)
            if state is not None:
                positions = per_row(state.n_seen) + positions
            q, k = self._rotated(q, k, positions)
        first_key = kv_len = None
        if state is not None:
            first_key = state.first_key
            if isinstance(state.length, Tensor):
                kv_len = state.length + x.shape[1]
                k, v, state = self._append_at(state.length, state, k, v, starts)
            else:
                k, v, state = self._append(state.length, state, k, v, starts)
        o = ops.attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            self.config.causal,
            self.config.window,
            starts=starts,
            first_key=first_key,
            kv_len=kv_len,
        )
        return self.out_proj(rearrange(o, "b l h p -> b l (h p)")), state

    def _rotated(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys at positions, (L,), or (B, L) of each row."""
        if positions.dim() == 1:
            return ops.rotary(q, k, positions, self.config.rope_theta)
        shape, one_row = positions.shape, [t.flatten(0, 1)[None] for t in (q, k)]
        q, k = ops.rotary(one_row[0], one_row[1], positions.flatten(), self.config.rope_theta)
        return q[0].unflatten(0, shape), k[0].unflatten(0, shape)

    def _append(
        self, past: int, state: KVCache, k: Tensor, v: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, KVCache]:
        """All keys and values that the new tokens may see, and the cache after them; `past` is the length before."""
        L, capacity = k.shape[1], state.k.shape[1]
        if self.config.window is not None:  # joined rows may have brought room for more
            capacity = min(capacity, self.config.window - 1)
        first_key, n_seen = _first_key_after(past, state.first_key, starts), state.n_seen + L
        if past + L <= capacity and self.may_write_in_place(k, v, state.k, state.v):
            state.k[:, past : past + L], state.v[:, past : past + L] = k, v
            cache = KVCache(state.k, state.v, first_key, past + L, n_seen)
            return state.k[:, : past + L], state.v[:, : past + L], cache
        keys, values = (torch.cat([old[:, :past], new.to(old.dtype)], 1) for old, new in ((state.k, k), (state.v, v)))
        if past + L > capacity and self.config.window is None:
            raise ValueError(f"the cache was made for max_len={capacity} tokens and would hold {past + L}")
        dropped = max(0, past + L - capacity)  # tokens that have left the window for good
        kept = [
            torch.cat([t[:, dropped:], t.new_zeros(len(t), capacity - (past + L - dropped), *t.shape[2:])], 1)
            for t in (keys, values)
        ]
        if first_key is not None:
            first_key = (first_key - dropped).clamp(min=0)
        return keys, values, KVCache(kept[0], kept[1], first_key, past + L - dropped, n_seen)

    def _append_at(
        self, past: Tensor, state: KVCache, k: Tensor, v: Tensor, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, KVCache]:
        """`_append` at a length that is a tensor: shapes do not depend on it, and no error says that a cache is full.

        Of the keys and values that come back the first `past` + L are valid.
        """
        L, capacity, windowed = k.shape[1], state.k.shape[1], self.config.window is not None
        first_key, length = _first_key_after(past, state.first_key, starts), past + L
        write = Tensor.index_copy_ if self.may_write_in_place(k, v, state.k, state.v) else Tensor.index_copy
        index = past + torch.arange(L, device=k.device)
        keys, values = (
            write(F.pad(old, (0, 0, 0, 0, 0, L)) if windowed else old, 1, index, new.to(old.dtype))
            for old, new in ((state.k, k), (state.v, v))
        )
        if not windowed:
            return keys, values, KVCache(keys, values, first_key, length, state.n_seen + L)
        dropped = (length - capacity).clamp(min=0)  # tokens that have left the window for good
        index = dropped + torch.arange(capacity, device=k.device)
        kept = [t.index_select(1, index) for t in (keys, values)]
        if first_key is not None:
            first_key = (first_key - dropped).clamp(min=0)
        return keys, values, KVCache(kept[0], kept[1], first_key, length - dropped, state.n_seen + L)

    def describe_step(self, step: Step, x: Tensor, state: KVCache) -> Tensor:
        """See Mixer.describe_step."""
        q, k, v = (step.linear(proj, x) for proj in (self.q_proj, self.k_proj, self.v_proj))
        n_seen, slides = step.counted(state, "n_seen"), self.config.window is not None
        if self.config.rope:
            for t in (q, k):
                step.rotate(t, n_seen, self.config.rope_theta, self.head_dim)
        room = state.k.shape[1]
        if self.config.window is not None:  # joined rows may have brought room for more
            room = min(room, self.config.window - 1)
        length = step.counted(state, "length", most=room if slides else None)
        o = step.attend(
            q, k, v, state.k, state.v, length,
            first_key=state.first_key, room=room, slides=slides, scale=self.head_dim**-0.5,
        )  # fmt: skip
        return step.linear(self.out_proj, o)

    def _check_causal(self) -> None:
        if not self.config.causal:
            raise ValueError("attention with causal=false sees the tokens to come and has no state: use causal=true")

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """A cache of `max_len` tokens, or of window - 1 where that is less; ValueError for an encoder."""
        self._check_causal()
        capacity = max_len if self.config.window is None else min(max_len, self.config.window - 1)
        return dict.fromkeys(("k", "v"), Zeros((capacity, self.n_kv_heads, self.head_dim)))

    def flops_per_token(self, context_len: float) -> float:
        """Projections, and scores and weighted values over what the token sees: 4 H P each key."""
        seen = context_len + 1 if self.config.window is None else min(context_len + 1, self.config.window)
        return linear_flops(self) + 4 * self.n_heads * self.head_dim * seen

    def sequence_flops(self, seq_len: int) -> float:
        """The sum over the tokens; without `causal` they see as much to their right as to their left."""
        left = super().sequence_flops(seq_len)
        return left if self.config.causal else 2 * left - seq_len * self.flops_per_token(0)


def _heads(d_model: int, config: AttentionConfig) -> tuple[int, int]:
    """(n_heads, head_dim)."""
    n_heads, head_dim = config.n_heads, config.head_dim
    if n_heads is None and head_dim is None:
        fitting = [p for p in (64, 32, 16, 8, 4, 2) if d_model % p == 0 and d_model // p >= 3]
        head_dim = fitting[0] if fitting else d_model
    if n_heads is not None and head_dim is not None:
        return n_heads, head_dim
    name, known = ("n_heads", n_heads) if n_heads is not None else ("head_dim", head_dim)
    assert known is not None
    if d_model % known:
        raise ValueError(f"d_model={d_model} is not divisible by {name}={known}")
    return (known, d_model // known) if n_heads is not None else (d_model // known, known)


def _first_key_after(past: int | Tensor, first_key: Tensor | None, starts: Tensor | None) -> Tensor | None:
    """Index of the first key of the current document once the tokens of `starts` follow `past` keys."""
    if starts is None or not starts.shape[1]:
        return first_key
    return torch.where(starts.any(1), past + _last_true(starts), 0 if first_key is None else first_key)


def _last_true(marks: Tensor) -> Tensor:
    """Index of the last True of each row, (B,); the last index where there is none."""
    return marks.shape[1] - 1 - marks.flip(1).int().argmax(1)
