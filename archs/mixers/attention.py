"""Causal self-attention in the Llama layout: rotary positions or none, grouped keys, an optional sliding window.

Sources: Vaswani et al. 2017 (arXiv:1706.03762), Su et al. 2021 (RoPE, arXiv:2104.09864), Ainslie et al. 2023 (grouped
keys, arXiv:2305.13245), Beltagy et al. 2020 (window, arXiv:2004.05150).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor

from ...kernels import ops
from ..layers import linear, linear_flops
from ..mixer import Mixer, State


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """Options of Attention."""

    n_heads: int | None = None
    """Query heads; None means d_model / head_dim."""
    n_kv_heads: int | None = None
    """Key and value heads; None means n_heads (multi-head), 1 means multi-query."""
    head_dim: int | None = None
    """Channels per head; None means d_model / n_heads, or where that is None too the largest power of two up to 64 that
    leaves at least three heads."""
    rope: bool = True
    """Whether queries and keys are rotated by their position; False is NoPE."""
    rope_theta: float = 10_000.0
    """Base of the rotation's wavelengths."""
    window: int | None = None
    """Number of latest tokens seen, the current one included; None means all."""


@dataclass
class KVCache(State):
    """Keys and values of the tokens so far, or under a window of the latest ones."""

    k: Tensor
    """Keys, rotated, (B, max_len, H_kv, P); under a window (B, min(max_len, window - 1), H_kv, P)."""
    v: Tensor
    """Values, shaped like k."""
    first_key: Tensor
    """Index of the first key of the current document, (B,) int64."""
    length: int = 0
    """Keys held."""
    n_seen: int = 0
    """Tokens seen: the position of the next one."""
    one_document: bool = True
    """Whether no start has been seen, so that every key is visible and attention needs no mask for first_key."""


class Attention(Mixer[AttentionConfig, KVCache]):
    """o = softmax(q k^T / sqrt(P)) v per head, projected back to D."""

    Config = AttentionConfig

    def __init__(self, d_model: int, config: AttentionConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        self.n_heads, self.head_dim = _heads(d_model, config)
        self.n_kv_heads = config.n_kv_heads or self.n_heads
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"n_heads={self.n_heads} is not divisible by n_kv_heads={self.n_kv_heads}")
        if config.rope and self.head_dim % 2:
            raise ValueError(
                f"head_dim={self.head_dim} is odd: rotary positions need pairs of channels (or rope=false)"
            )
        if config.window is not None and config.window < 1:
            raise ValueError(f"window={config.window} must be at least 1, the token itself")
        self.q_proj = linear(d_model, self.n_heads * self.head_dim)
        self.k_proj = linear(d_model, self.n_kv_heads * self.head_dim)
        self.v_proj = linear(d_model, self.n_kv_heads * self.head_dim)
        self.out_proj = linear(self.n_heads * self.head_dim, d_model, scale=residual_scale)

    def forward(
        self, x: Tensor, state: KVCache | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, KVCache | None]:
        """See Mixer.forward."""
        q, k, v = (
            rearrange(proj(x), "b l (h p) -> b l h p", p=self.head_dim)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.config.rope:
            # attention sees differences of positions only, so they may run on across documents
            cos, sin = _rotation(x, 0 if state is None else state.n_seen, self.head_dim, self.config.rope_theta)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        first_key = None
        if state is not None:
            first_key = None if state.one_document else state.first_key
            k, v, state = self._append(state, k, v, starts)
        o = ops.attention(q, k, v, window=self.config.window, starts=starts, first_key=first_key)
        return self.out_proj(rearrange(o, "b l h p -> b l (h p)")), state

    def _append(self, state: KVCache, k: Tensor, v: Tensor, starts: Tensor | None) -> tuple[Tensor, Tensor, KVCache]:
        """All keys and values that the new tokens may see, and the cache after them."""
        L, past, capacity = k.shape[1], state.length, state.k.shape[1]
        first_key, one_document = state.first_key, state.one_document and starts is None
        if starts is not None:
            first_key = torch.where(starts.any(1), past + _last_true(starts), first_key)
        n_seen = state.n_seen + L
        if past + L <= capacity and self.may_write_in_place(k, v, state.k, state.v):
            state.k[:, past : past + L], state.v[:, past : past + L] = k, v
            cache = KVCache(state.k, state.v, first_key, past + L, n_seen, one_document)
            return state.k[:, : past + L], state.v[:, : past + L], cache
        keys, values = (torch.cat([old[:, :past], new.to(old.dtype)], 1) for old, new in ((state.k, k), (state.v, v)))
        if past + L > capacity and self.config.window is None:
            raise ValueError(f"the cache was made for max_len={capacity} tokens and would hold {past + L}")
        dropped = max(0, past + L - capacity)  # tokens that have left the window for good
        kept = [
            torch.cat([t[:, dropped:], t.new_zeros(len(t), capacity - (past + L - dropped), *t.shape[2:])], 1)
            for t in (keys, values)
        ]
        first_key = (first_key - dropped).clamp(min=0)
        cache = KVCache(kept[0], kept[1], first_key, past + L - dropped, n_seen, one_document)
        return keys, values, cache

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> KVCache:
        """An empty cache of `max_len` tokens, or of window - 1 where that is less."""
        capacity = max_len if self.config.window is None else min(max_len, self.config.window - 1)
        shape = (batch_size, capacity, self.n_kv_heads, self.head_dim)
        return KVCache(
            k=torch.zeros(shape, device=device, dtype=dtype),
            v=torch.zeros(shape, device=device, dtype=dtype),
            first_key=torch.zeros(batch_size, device=device, dtype=torch.int64),
        )

    def flops_per_token(self, context_len: float) -> float:
        """Projections, and scores and weighted values over what the token sees: 4 H P each key."""
        seen = context_len + 1 if self.config.window is None else min(context_len + 1, self.config.window)
        return linear_flops(self) + 4 * self.n_heads * self.head_dim * seen


def _heads(d_model: int, config: AttentionConfig) -> tuple[int, int]:
    """(n_heads, head_dim)."""
    n_heads, head_dim = config.n_heads, config.head_dim
    if n_heads is None and head_dim is None:
        fitting = [p for p in (64, 32, 16, 8, 4, 2) if d_model % p == 0 and d_model // p >= 3]
        head_dim = fitting[0] if fitting else d_model
    if n_heads is not None and head_dim is not None:
        return n_heads, head_dim
    known = n_heads or head_dim
    assert known is not None
    if d_model % known:
        raise ValueError(f"d_model={d_model} is not divisible by {'n_heads' if n_heads else 'head_dim'}={known}")
    return (n_heads, d_model // n_heads) if n_heads else (d_model // known, known)


def _rotation(x: Tensor, offset: int, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles, (L, 1, P/2) each. Angles in float64: positions may be large."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=x.device, dtype=torch.float64) / head_dim)
    position = torch.arange(offset, offset + x.shape[1], device=x.device, dtype=torch.float64)
    angle = position[:, None, None] * frequency
    dtype = torch.promote_types(x.dtype, torch.float32)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x[i], x[i + P/2]) of each head, (B, L, H, P)."""
    a, b = x.to(cos.dtype).chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


def _last_true(marks: Tensor) -> Tensor:
    """Index of the last True of each row, (B,); the last index where there is none."""
    return marks.shape[1] - 1 - marks.flip(1).int().argmax(1)
