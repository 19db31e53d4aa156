"""The part of a training step that the trainer and the benchmarks share, so that what is timed is what trains."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..archs import LanguageModel
from ..archs.seq2seq import Seq2Seq
from .runtime import Precision

__all__ = ["Batch", "PairBatch", "accumulate_gradients", "batch_loss"]

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Tokens, targets and document starts, each (B, L); no starts where documents are not told apart."""


class PairBatch(NamedTuple):
    """Pairs of a source and a target, padded at their ends."""

    source: Tensor
    """(B, S) int64."""
    target: Tensor
    """What the decoder reads, (B, T) int64."""
    targets: Tensor
    """What it predicts, (B, T) int64; -100 where a target is padded."""
    source_len: Tensor
    """Tokens of each source, (B,) int64."""

    @property
    def n_targets(self) -> int:
        """Tokens to be predicted."""
        return int((self.targets != -100).sum())


def batch_loss(model: LanguageModel | Seq2Seq, batch: Batch | PairBatch) -> tuple[Tensor, Tensor]:
    """Mean loss in nats per predicted token, and the auxiliary loss, of the kind of model that the batch is for."""
    if isinstance(batch, PairBatch):
        assert isinstance(model, Seq2Seq)
        return model.loss(batch.source, batch.target, batch.targets, source_len=batch.source_len)
    assert isinstance(model, LanguageModel)
    tokens, targets, starts = batch
    return model.loss(tokens, targets, starts=starts)


def accumulate_gradients(
    model: LanguageModel | Seq2Seq, parts: Sequence[Batch] | Sequence[PairBatch], *, precision: Precision, clip: float
) -> tuple[float, float, float]:
    """Leaves the gradient of the mean over the predicted tokens of a batch in the parameters, clipped.

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
    sizes = [part.n_targets if isinstance(part, PairBatch) else part[1].numel() for part in parts]
    for part, size in zip(parts, sizes, strict=True):
        divisor = sum(sizes) / size  # the number of parts, where they are equally large
        with precision.autocast(device):
            loss, aux = batch_loss(model, part)
        ((loss + aux) / divisor).backward()
        total_loss += loss.detach() / divisor
        total_aux += aux.detach() / divisor
    norm = nn.utils.clip_grad_norm_(model.parameters(), clip or math.inf)
    return total_loss.item(), total_aux.item(), norm.item()
