"""Meaning of `starts`, the marks at the first token of each document in a packed batch, for an operation."""

from __future__ import annotations

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
