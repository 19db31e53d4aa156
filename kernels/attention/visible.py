"""The mask: which keys a query may see. It is the whole of the semantics, so every mask is made here."""

from __future__ import annotations

import torch
from torch import Tensor

from ..documents import document_ids


def visible_keys(
    queries: Tensor,
    keys: Tensor,
    *,
    n_queries: int,
    end: Tensor,
    causal: bool,
    window: int | None,
    starts: Tensor | None,
    first_key: Tensor | None,
) -> Tensor:
    """Says which of `keys` each of `queries` sees, (B, Q, S) bool, with B = 1 where the rows do not differ.

    Args:
        queries: positions of some queries, (Q,), on the axis of the keys: the last query stands at end - 1.
        keys: positions of some keys, (S,).
        n_queries: number of all queries, L.
        end: number of valid keys, a scalar int tensor.
        causal: whether later keys are hidden.
        window: number of latest keys seen, itself included; None means all.
        starts: (B, L) bool, where documents begin among the queries.
        first_key: (B,) first visible key for queries before any start.
    """
    q, k = queries[:, None], keys
    visible = k < end
    if causal:
        visible = visible & (k <= q)
    if window is not None:
        visible = visible & (k > q - window) & (k < q + window)
    visible = visible.expand(1, len(queries), len(keys))
    if first_key is not None:
        visible = visible & (k >= first_key[:, None, None])
    if starts is not None:
        documents = document_ids(starts)
        of_queries, of_keys = (_at(documents, position - (end - n_queries)) for position in (queries, keys))
        visible = visible & (of_queries[:, :, None] == of_keys[:, None, :])
    return visible


def _at(documents: Tensor, index: Tensor) -> Tensor:
    """The document at each index, (B, len(index)); what was cached before (a negative index) belongs to document 0."""
    return torch.where(index < 0, 0, documents[:, index.clamp(0, documents.shape[1] - 1)])
