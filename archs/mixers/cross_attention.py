"""Mixers that read a second sequence, the source: attention to it, by products or by a small network.

Sources: Vaswani et al. 2017 (arXiv:1706.03762, section 3.2.3), Bahdanau et al. 2014 (arXiv:1409.0473, section 3.1).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...options import Size
from ..layers import linear, linear_flops
from ..mixer import C, Mixer, State, Zeros
from ..step import Step
from .attention import Attention, AttentionConfig

CHUNK_NUMBERS = 1 << 24
"""Numbers that additive attention holds at once: 64 MB in float32."""


@dataclass
class Memory(State):
    """Keys and values of the source, which a reader keeps. They do not grow with the target."""

    k: Tensor
    """Keys, (B, S, d_k)."""
    v: Tensor
    """Values, (B, S, d_v)."""
    source_len: Tensor | None = None
    """Tokens of each source, (B,) int64, at least 1: what follows them is padding; None where nothing is padded."""

    @classmethod
    def cat(cls, states: Sequence[Any]) -> Self:
        """See State.cat: shorter sources are padded."""
        sizes = [s.k.shape[1] for s in states]
        longest = max(sizes)
        k, v = (
            torch.cat([F.pad(t, (0, 0, 0, longest - t.shape[1])) for t in tensors])
            for tensors in ([s.k for s in states], [s.v for s in states])
        )
        if all(s.source_len is None and n == longest for s, n in zip(states, sizes, strict=True)):
            return cls(k, v)
        lengths = [
            torch.full((len(s.k),), n, device=k.device) if s.source_len is None else s.source_len
            for s, n in zip(states, sizes, strict=True)
        ]
        return cls(k, v, torch.cat(lengths))

    def visible(self) -> Tensor | None:
        """Marks the keys that are of the source and not padding, (B, S) bool; None where all are."""
        if self.source_len is None:
            return None
        return torch.arange(self.k.shape[1], device=self.k.device) < self.source_len[:, None]


class Reader(Mixer[C, Memory]):
    """A mixer whose state is the source: output t depends on input t and on all of the source, and on nothing else.

    So it needs its state in training too, and hands it on as it came.
    """

    State = Memory

    k_proj: nn.Linear
    v_proj: nn.Linear

    def read(self, source: Tensor, source_len: Tensor | None = None) -> Memory:
        """Makes the memory of a source, (B, S, D), of which the first `source_len` tokens of each row count, (B,)."""
        return Memory(self.k_proj(source), self.v_proj(source), source_len)

    def forward(
        self, x: Tensor, state: Memory | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, Memory | None]:
        """(B, T, D) -> (B, T, D), and the state that was given.

        Raises:
            ValueError: without a state, and for packed documents.
        """
        if state is None:
            raise ValueError("this layer reads a source and was given none: call the model as lm(source, target)")
        if starts is not None:
            raise ValueError("a row holds one source, so documents cannot be packed: leave starts out")
        return self.attend(x, state), state

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        raise NotImplementedError

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """The memory of sources of `max_len` tokens: zeros have the size of any other."""
        return {"k": Zeros((max_len, self.k_proj.out_features)), "v": Zeros((max_len, self.v_proj.out_features))}

    def flops_per_token(self, context_len: float) -> float:
        """FLOPs of one target token without what it spends on each source token (`flops_per_pair`)."""
        return linear_flops(self) - self.flops_per_source_token()

    def flops_per_source_token(self) -> float:
        """FLOPs of the key and the value of a source token, which are made once for all targets."""
        return linear_flops(self.k_proj) + linear_flops(self.v_proj)

    def flops_per_pair(self) -> float:
        """FLOPs of one target token reading one source token."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class CrossAttentionConfig:
    """Options of CrossAttention, which are those of self-attention."""

    n_heads: Size | None = None
    """Query heads; None means d_model / head_dim."""
    n_kv_heads: Size | None = None
    """Key and value heads; None means n_heads."""
    head_dim: Size | None = None
    """Channels per head; None means as in self-attention."""
    bias: bool = False
    """Whether the projections have biases."""


class CrossAttention(Reader[CrossAttentionConfig]):
    """o = softmax(q k^T / sqrt(P)) v per head, where k and v are of the source. It knows no positions."""

    Config = CrossAttentionConfig

    def __init__(self, d_model: int, config: CrossAttentionConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        options = AttentionConfig(rope=False, causal=False, **dataclasses.asdict(config))
        attention = Attention(d_model, options, residual_scale=residual_scale)  # only the reading differs
        self.n_heads, self.n_kv_heads, self.head_dim = attention.n_heads, attention.n_kv_heads, attention.head_dim
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        """See Reader.attend."""
        q = self.q_proj(x)
        q, k, v = (rearrange(t.to(q.dtype), "b l (h p) -> b h l p", p=self.head_dim) for t in (q, memory.k, memory.v))
        visible = memory.visible()
        mask = None if visible is None else visible[:, None, None]
        o = F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=self.n_heads != self.n_kv_heads)
        return self.out_proj(rearrange(o, "b h l p -> b l (h p)"))

    def describe_step(self, step: Step, x: Tensor, state: Memory) -> Tensor:
        """See Mixer.describe_step."""
        q, scale = step.linear(self.q_proj, x), self.head_dim**-0.5
        o = step.read(q, state.k, state.v, state.source_len, scale=scale, head_dim=self.head_dim)
        return step.linear(self.out_proj, o)

    def flops_per_pair(self) -> float:
        """FLOPs of a score and a weighted value."""
        return 4 * self.n_heads * self.head_dim


@dataclass(frozen=True, kw_only=True)
class AdditiveAttentionConfig:
    """Options of AdditiveAttention."""

    d_attention: Size | None = None
    """Width of the network that compares a query with a key; None means d_model."""


class AdditiveAttention(Reader[AdditiveAttentionConfig]):
    """y[t] = sum over s of a[t, s] V h[s], where a[t] = softmax over s of v^T tanh(W x[t] + U h[s]) (section 3.1).

    The paper's projections of what is read (C, C_z, C_r) are V, made once for each source token.
    """

    Config = AdditiveAttentionConfig

    def __init__(self, d_model: int, config: AdditiveAttentionConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        d_attention = d_model if config.d_attention is None else config.d_attention
        self.q_proj = linear(d_model, d_attention, bias=True)
        self.k_proj = linear(d_model, d_attention)
        self.v_proj = linear(d_model, d_model, scale=residual_scale)
        self.score = linear(d_attention, 1)

    def attend(self, x: Tensor, memory: Memory) -> Tensor:
        """See Reader.attend. At most CHUNK_NUMBERS sums W x[t] + U h[s] are held at once, in the backward pass too."""
        q, visible = self.q_proj(x), memory.visible()
        n_targets = max(1, CHUNK_NUMBERS // max(1, memory.k.numel()))
        if n_targets >= q.shape[1]:
            return self._attend(q, memory.k, memory.v, visible)
        chunks = (
            checkpoint(self._attend, part, memory.k, memory.v, visible, use_reentrant=False)
            for part in q.split(n_targets, dim=1)
        )
        return torch.cat(list(chunks), dim=1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
        scores = self.score(torch.tanh(q[:, :, None] + k[:, None])).squeeze(-1)  # (B, T, S)
        if visible is not None:
            scores = scores.masked_fill(~visible[:, None], float("-inf"))
        return scores.softmax(-1).to(v.dtype) @ v

    def describe_step(self, step: Step, x: Tensor, state: Memory) -> Tensor:
        """See Mixer.describe_step."""
        q = step.linear(self.q_proj, x)
        return step.compare(q, state.k, state.v, state.source_len, *step.parameters_of(self.score))

    def flops_per_token(self, context_len: float) -> float:
        """The query: what is applied to a pair of tokens is in `flops_per_pair`."""
        return linear_flops(self.q_proj)

    def flops_per_pair(self) -> float:
        """A sum and a product for each channel of the score, and the weighted value."""
        return 3 * self.score.in_features + 2 * self.d_model


READERS: dict[str, type[Reader]] = {"cross_attention": CrossAttention, "additive_attention": AdditiveAttention}
"""Names that the pattern of a decoder with a source may use besides those of archs/registry.py."""
