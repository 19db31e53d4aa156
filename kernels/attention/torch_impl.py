"""PyTorch's scaled_dot_product_attention; where a mask is needed, one block of queries at a time.

A mask over all queries would need B L S bytes. Blocks keep memory linear in the context, and under a window the keys of
a block are only those near it, so time is linear too.

On the CPU PyTorch's gradient is neither right for scores of thousands, since it rounds weights to the size of the
scores, nor can it be differentiated again: there the plain formula takes its place.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ..dispatch import transform
from ..operators import opaque
from .visible import visible_keys

QUERY_BLOCK = 512

LARGE = 300
"""Largest score, at most, of which float32 still tells weights apart by 2e-5."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    first_key: Tensor | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Same contract as reference.attention."""
    if not q.dtype == k.dtype == v.dtype:
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        wide_q, k, v = (t.to(wide) for t in (q, k, v))
        return attention(wide_q, k, v, causal, window, starts, first_key, kv_len, scale).to(q.dtype)
    L, S = q.shape[1], k.shape[1]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, H, L, P)
    bounded = window is not None and window < S
    is_plain = not bounded and starts is None and first_key is None and kv_len is None
    if is_plain and (L in (1, S) or not causal):
        return _attend(q, k, v, None, bool(causal and L > 1), scale).transpose(1, 2)
    if is_plain and _may_join(q, k, v) and torch.isfinite(o := _after_a_cache(q, k, v, scale)).all():
        return o.transpose(1, 2)
    blocks = _in_blocks if L == 1 else _in_blocks_traced  # a decode step is no loop
    return blocks(q, k, v, causal, window, starts, first_key, kv_len, scale)


def _may_join(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether PyTorch's kernel that says the sums of its weights, of the CPU and without gradients, takes these."""
    is_eager = q.device.type == "cpu" and not torch.compiler.is_compiling() and transform() is None
    is_recorded = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v))
    return is_eager and not is_recorded and q.shape[3] == v.shape[3] and bool(q.numel())


def _after_a_cache(q: Tensor, k: Tensor, v: Tensor, scale: float | None) -> Tensor:
    """The last L of S tokens attend causally, (B, H, L, P): to all that came before them, and to one another.

    Neither part needs a mask, with which PyTorch's kernel takes half as long again. The sums of their weights join
    them: a share of the whole is exp(s_1) / (exp(s_0) + exp(s_1)).
    """
    past = k.shape[2] - q.shape[2]
    (before, s_0), (among, s_1) = (
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, keys, values, is_causal=is_causal, scale=scale)
        for keys, values, is_causal in ((k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True))
    )
    share = torch.sigmoid(s_1 - s_0)[..., None]  # float32 where they are of half precision
    return torch.lerp(before.to(share.dtype), among.to(share.dtype), share).to(q.dtype)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    window: int | None,
    starts: Tensor | None,
    first_key: Tensor | None,
    kv_len: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Attention under a mask, for q (B, H, L, P) and k and v (B, H_kv, S, P): o, (B, L, H, P)."""
    L, S = q.shape[2], k.shape[2]
    end = torch.as_tensor(S, device=q.device) if kv_len is None else kv_len
    blocks = []
    for i in range(0, L, QUERY_BLOCK):
        j = min(i + QUERY_BLOCK, L)
        first, last = 0, S
        if kv_len is None:  # the place of the queries among the keys is known without reading the device
            first = max(0, S - L + i - window + 1) if window is not None else 0
            last = S - L + j if causal else min(S, S - L + j + (S if window is None else window))
        mask = visible_keys(
            end - L + torch.arange(i, j, device=q.device),
            torch.arange(first, last, device=q.device),
            n_queries=L,
            end=end,
            causal=causal,
            window=window,
            starts=starts,
            first_key=first_key,
        )
        blocks.append(_attend_seen(q[:, :, i:j], k[:, :, first:last], v[:, :, first:last], mask, scale))
    return torch.cat(blocks, dim=2).transpose(1, 2)


_in_blocks_traced = opaque(lambda q, k, v, *_: q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]))(_in_blocks)


def _attend_seen(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    """`_attend` under a mask, (B, Q, S) or (1, Q, S): what a query does not see does not reach it, though it be NaN.

    Masked weights are zero, and zero times NaN is NaN. So what is not finite is left out, and makes the outputs NaN
    that see it. On the CPU that is only done where an output is not finite: to look at a whole cache for each token
    would take as long as the token.
    """
    is_eager = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager and torch.isfinite(o := _attend(q, k, v, mask[:, None], False, scale)).all():
        return o
    good_q, good_k, good_v = (torch.isfinite(t).all(-1) for t in (q, k, v))  # (B, H, Q), (B, H_kv, S) twice
    bad = ~(good_k & good_v)
    seen = (mask.to(q.dtype) @ bad.mT.to(q.dtype)).mT > 0  # (B, H_kv, Q)
    spoilt = ~good_q | seen.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    q, k, v = (torch.where(good[..., None], t, 0.0) for good, t in ((good_q, q), (~bad, k), (~bad, v)))
    return torch.where(spoilt[..., None], torch.nan, _attend(q, k, v, mask[:, None], False, scale))


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    """PyTorch's attention, (B, H, L, P)."""
    is_eager = q.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_eager and torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)) and transform() is None:
        return _Attention.apply(q, k, v, mask, is_causal, scale)
    return _sdpa(q, k, v, mask, is_causal, scale)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None) -> Tensor:
    gqa = q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, scale=scale, enable_gqa=gqa)


class _Attention(torch.autograd.Function):
    """PyTorch's attention with its gradient, but for large scores and to be differentiated again.

    It keeps its inputs and nothing else: a graph of its own would be out of reach of those who recompute activations
    or move them away.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        """Takes the arguments of `_sdpa`."""
        ctx.save_for_backward(*inputs[:4])
        ctx.options = inputs[4:]
        return _sdpa(*inputs)  # pyright: ignore[reportCallIssue]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of q, k and v."""
        q, k, v, mask = ctx.saved_tensors
        again, wanted = torch.is_grad_enabled(), ctx.needs_input_grad[:3]
        exact = again or _largest_score(q, k, ctx.options[1]) > LARGE
        # aliases where they are differentiated again: they may depend on each other
        q, k, v = leaves = [
            t.view_as(t) if again else t.detach().requires_grad_(needed)
            for t, needed in zip((q, k, v), wanted, strict=True)
        ]
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH) if exact else contextlib.nullcontext():
            o = _sdpa(q, k, v, mask, *ctx.options)
        inputs = [t for t, needed in zip(leaves, wanted, strict=True) if needed]
        found = iter(torch.autograd.grad(o, inputs, grads, create_graph=again))
        return *(next(found) if needed else None for needed in wanted), None, None, None


def _largest_score(q: Tensor, k: Tensor, scale: float | None) -> float:
    """A bound: the length of the longest query times that of the longest key."""
    longest = (t.detach().float().norm(dim=-1).max() for t in (q, k))
    return float(next(longest) * next(longest)) * (q.shape[-1] ** -0.5 if scale is None else abs(scale))
