"""The definition: for each query the scores of the keys that it sees and their softmax, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes
from .visible import visible_keys


@takes(
    q="B L H P",
    k="B S H_kv P",
    v="B S H_kv V",
    window="W",
    starts="B L bool",
    first_key="B int",
    kv_len="int",
    gives=("B L H V",),
    where={
        "H a multiple of H_kv": lambda size: size["H"] % size["H_kv"] == 0,
        "S at least L": lambda size: size["S"] >= size["L"],
    },
)
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
    """Computes softmax(scale q k^T + mask) v; the queries are the last L of the valid keys.

    Grouped keys (Ainslie et al. 2023, arXiv:2305.13245): query head h reads key head h // (H / H_kv).

    Args:
        q: queries, (B, L, H, P).
        k: keys, (B, S, H_kv, P) with S >= L and H a multiple of H_kv.
        v: values, (B, S, H_kv, P).
        causal: whether a query sees only keys up to its own position.
        window: number of latest keys that a query sees, itself included; None means all.
        starts: (B, L) bool, True where a document begins among the queries: older keys are hidden from it on.
        first_key: (B,) int, first key that the queries before any start may see; None means 0.
        kv_len: number of valid keys, a scalar int tensor, where k and v are a cache of fixed size; None means S.
        scale: factor on the scores; None means P ** -0.5.

    Returns:
        o, (B, L, H, P), in q's dtype.
    """
    L, H, P = q.shape[1:]
    dtype = torch.promote_types(q.dtype, torch.float32)
    k, v = (t.to(dtype).repeat_interleave(H // t.shape[2], dim=2) for t in (k, v))
    end = torch.as_tensor(k.shape[1], device=q.device) if kv_len is None else kv_len
    queries = end - L + torch.arange(L, device=q.device)
    keys = torch.arange(k.shape[1], device=q.device)
    visible = visible_keys(
        queries, keys, n_queries=L, end=end, causal=causal, window=window, starts=starts, first_key=first_key
    )
    os = []
    for t in range(L):
        seen = visible[:, t, :, None, None]  # what is hidden is not multiplied by zero: it may be no number
        scores = torch.einsum("bhp,bshp->bhs", q[:, t].to(dtype), torch.where(seen, k, 0.0))
        scores = scores * (P**-0.5 if scale is None else scale)
        weights = scores.masked_fill(~visible[:, t, None], -torch.inf).softmax(-1)
        os.append(torch.einsum("bhs,bshp->bhp", weights, torch.where(seen, v, 0.0)))
    return torch.stack(os, dim=1).to(q.dtype)
