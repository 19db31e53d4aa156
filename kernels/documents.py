"""Meaning of `starts`, the marks at the first token of each document in a packed batch, for an operation."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def document_ids(starts: Tensor) -> Tensor:
    """Numbers the documents of each row, (B, L) int64; 0 is what continues from before the first mark."""
    return starts.long().cumsum(1)


def tokens_since_start(starts: Tensor) -> Tensor:
    """Counts tokens since the latest mark, (B, L) int64: 0 at a mark, more than any length before the first one."""
    position = torch.arange(starts.shape[1], device=starts.device)
    latest = torch.where(starts, position, -(1 << 40)).cummax(1).values
    return position - latest


def never_if_none(starts: Tensor | None, like: Tensor) -> Tensor:
    """The marks as kernels take them, (B, L) bool, for a tensor (B, L, ...): where there are none, none is set."""
    return torch.zeros(like.shape[:2], dtype=torch.bool, device=like.device) if starts is None else starts


def isolated(
    starts: Tensor, state: Tensor, written: Sequence[Tensor], read: Tensor
) -> tuple[Tensor, list[Tensor], Tensor, Tensor, Tensor]:
    """Zeros in place of what is not finite, for products in which zeros hide a document from others: 0 NaN is NaN.

    Args:
        starts: (B, L).
        state: what comes before the first token, (B, ...).
        written: inputs that reach the state, (B, L, ...) each.
        read: what the state is read by, (B, L, ...).

    Returns:
        state, written and read without what is not finite, and where that leaves no number: in the states after the
        tokens and in the outputs, (B, L) bool each.
    """
    bad_state, bad_read = ~torch.isfinite(state).flatten(1).all(1), ~torch.isfinite(read).flatten(2).all(2)
    bad = torch.stack([~torch.isfinite(t).flatten(2).all(2) for t in written]).any(0)
    position, since = torch.arange(starts.shape[1], device=starts.device), tokens_since_start(starts)
    latest = torch.where(bad, position, -1).cummax(1).values
    spoilt = (latest >= (position - since).clamp(min=0)) | (bad_state[:, None] & (since > position))
    kept = [t.masked_fill(_like(bad, t), 0) for t in written]
    clean = state.masked_fill(_like(bad_state, state), 0), kept, read.masked_fill(_like(bad_read, read), 0)
    return *clean, spoilt, spoilt | bad_read


def _like(mask: Tensor, t: Tensor) -> Tensor:
    """The mask with as many axes as the tensor."""
    return mask.view(*mask.shape, *[1] * (t.dim() - mask.dim()))
