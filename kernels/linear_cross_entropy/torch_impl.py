"""Plain PyTorch over chunks of tokens; a chunk's logits are recomputed in the backward instead of kept."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

LOGITS = 1 << 22  # elements of one chunk's logits: 16 MiB in float32


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.linear_cross_entropy."""
    n_tokens = max(1, LOGITS // weight.shape[0])
    loss = z = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for i in range(0, x.shape[0], n_tokens):
        rows = slice(i, i + n_tokens)
        if x.shape[0] <= n_tokens:
            sums = _sums(x, weight, targets, ignore_index, z_loss != 0)
        else:
            sums = checkpoint(_sums, x[rows], weight, targets[rows], ignore_index, z_loss != 0, use_reentrant=False)
        loss, z = loss + sums[0], z + sums[1]
    n = (targets != ignore_index).sum().clamp(min=1)
    return loss / n, z_loss * z / n


def _sums(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_z: bool) -> tuple[Tensor, Tensor]:
    """Sums of the cross-entropy and of the squared normalizer over one chunk."""
    logits = F.linear(x, weight)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if not with_z:
        return loss, torch.zeros_like(loss)
    counted = targets != ignore_index
    return loss, torch.where(counted, logits.logsumexp(-1).square(), 0.0).sum()
