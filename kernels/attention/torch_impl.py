"""PyTorch's scaled_dot_product_attention; where a mask is needed, one block of queries at a time.

A mask over all queries would need B L S bytes. Blocks keep memory linear in the context, and under a window the keys of
a block are only those near it, so time is linear too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .visible import visible_keys

QUERY_BLOCK = 512


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
    gqa = q.shape[1] != k.shape[1]
    bounded = window is not None and window < S
    if not bounded and starts is None and first_key is None and kv_len is None and (L in (1, S) or not causal):
        o = F.scaled_dot_product_attention(q, k, v, is_causal=causal and L > 1, scale=scale, enable_gqa=gqa)
        return o.transpose(1, 2)

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
        o = F.scaled_dot_product_attention(
            q[:, :, i:j], k[:, :, first:last], v[:, :, first:last], mask[:, None], scale=scale, enable_gqa=gqa
        )
        blocks.append(o)
    return torch.cat(blocks, dim=2).transpose(1, 2)
