"""The part of a training step that the trainer and the benchmarks share, so that what is timed is what trains."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..archs import LanguageModel
from .runtime import Precision

__all__ = ["Batch", "accumulate_gradients"]

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, targets and document starts, each (B, L); no starts where documents are not told apart."""


def accumulate_gradients(
    model: LanguageModel, parts: Sequence[Batch], *, precision: Precision, clip: float
) -> tuple[float, float, float]:
    """Leaves the gradient of the mean over equally large parts of a batch in the parameters, clipped.

    Args:
        model: its gradients are empty.
        parts: run one after the other, to hold the activations of one at a time.
        precision: arithmetic of the forward pass.
        clip: largest norm of the whole gradient; 0 leaves it as it is.

    Returns:
        Mean loss and mean auxiliary loss (nats per token), and the norm before clipping.
    """
    device = parts[0][0].device
    total_loss, total_aux = torch.zeros((), device=device), torch.zeros((), device=device)
    for tokens, targets, starts in parts:
        with precision.autocast(device):
            loss, aux = model.loss(tokens, targets, starts=starts)
        ((loss + aux) / len(parts)).backward()
        total_loss += loss.detach() / len(parts)
        total_aux += aux.detach() / len(parts)
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    return total_loss.item(), total_aux.item(), norm.item()
