"""Plain PyTorch: few logits are left to autograd, more are never whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..autocast import product_dtype
from .chunks import Weights, chunked, means

KEPT = 1 << 19
"""Logits that autograd may keep in all, 2 MiB in float32: up to there chunks cost more than they save on a CPU."""

LOGITS = 1 << 22
"""Logits of a chunk: 16 MiB in float32."""

TOKENS = 128
"""Fewest tokens of a chunk: with fewer, adding up the gradient of the weight costs as much as its products."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.linear_cross_entropy. Differentiable once where there are more than KEPT logits."""
    sums = _kept_sums if x.shape[0] * weight.shape[0] <= KEPT else _chunked_sums
    return means(sums, x, weight, targets, ignore_index, z_loss)


def _kept_sums(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_z: bool) -> tuple[Tensor, Tensor]:
    """See chunks.Sums."""
    dtype = product_dtype(x)
    logits = F.linear(x.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    if not with_z:
        return loss, torch.zeros_like(loss)
    return loss, torch.where(targets != ignore_index, logits.logsumexp(-1).square(), 0.0).sum()


def rows(logits: Tensor, targets: Tensor, ignore_index: int, weights: Weights | None) -> tuple[Tensor, Tensor]:
    """See chunks.Rows."""
    counted = (targets != ignore_index)[:, None]
    targets = torch.where(counted, targets[:, None], 0)
    p = logits.to(torch.promote_types(logits.dtype, torch.float32))  # the logits themselves, if that is their dtype
    chosen = p.gather(1, targets)
    peak = p.amax(1, keepdim=True)
    total = p.sub_(peak).exp_().sum(1, keepdim=True)
    normalizer = peak + total.log()
    if weights is not None:
        of_loss, of_square = weights
        p.mul_(torch.where(counted, (of_loss + 2 * of_square * normalizer) / total, 0))
        p.scatter_add_(1, targets, torch.where(counted, -of_loss, 0))
        if p is not logits:
            logits.copy_(p)
    loss, normalizer = (torch.where(counted, t, 0)[:, 0] for t in (normalizer - chosen, normalizer))
    return loss, normalizer


_chunked_sums = chunked("linear_cross_entropy", rows, lambda n_classes: max(TOKENS, LOGITS // n_classes))
