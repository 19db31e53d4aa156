"""The definition: all logits, then the loss, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(x="T D", weight="V D", targets="T int64")
def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Computes the mean of logsumexp(W x) - (W x)[target], and z_loss times the mean of logsumexp(W x) squared.

    The second term keeps the softmax normalizer near one (PaLM, arXiv:2204.02311, section 5).

    Args:
        x: hidden states, (T, D).
        weight: output projection, (V, D).
        targets: (T,) int64.
        ignore_index: target of the tokens that count in neither mean.
        z_loss: weight of the second term.

    Returns:
        The cross-entropy in nats and the z-loss, scalars in float32 (float64 for float64 inputs). With no token to
        count both are zero.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    logits = x.to(dtype) @ weight.to(dtype).T  # (T, V)
    counted = targets != ignore_index
    normalizer = logits.logsumexp(-1)
    chosen = logits.gather(1, torch.where(counted, targets, 0)[:, None])[:, 0]
    n = counted.sum().clamp(min=1)
    loss = torch.where(counted, normalizer - chosen, 0.0).sum() / n
    return loss, z_loss * torch.where(counted, normalizer.square(), 0.0).sum() / n
