"""Cross-entropy of rows of logits for the GPU: one kernel between the matrix products, which are PyTorch's.

A program owns a row: it reads it once for the log-sum-exp and, if gradients are asked for, once more, then from the
cache, to leave the gradient in its place. Statistics are in float32, logits in the precision of the products.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_kernels import LOG2_E, LOG_2, launch
from .chunks import Weights, chunked, means

LOGITS = 1 << 27
"""Logits of a chunk: 256 MiB in bfloat16, and tokens enough to fill the device with products."""

BLOCK = 4096
"""Largest number of logits that a program holds at once."""


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int = -100, z_loss: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.linear_cross_entropy. Differentiable once."""
    return means(_sums, x, weight, targets, ignore_index, z_loss)


def rows(logits: Tensor, targets: Tensor, ignore_index: int, weights: Weights | None) -> tuple[Tensor, Tensor]:
    """See chunks.Rows."""
    n, V = logits.shape
    loss, normalizer = (torch.empty(n, dtype=torch.float32, device=logits.device) for _ in range(2))
    by_loss, by_normalizer = weights or (None, None)
    block = min(BLOCK, triton.next_power_of_2(V))
    launch(
        _rows_kernel, (n,),
        logits, targets.contiguous(), by_loss, by_normalizer, loss, normalizer, ignore_index, V,
        logits.stride(0),
        BLOCK=block, num_warps=max(1, min(8, block // 512)),
    )  # fmt: skip
    return loss, normalizer


_sums = chunked("linear_cross_entropy_triton", rows, lambda n_classes: max(1, LOGITS // n_classes))


@triton.jit
def _load(LOGITS, v, V, stride):
    """Logits of the classes v as powers of two; nothing beyond V. The mask, known to be aligned, allows for vectors."""
    x = tl.load(LOGITS + v, mask=v < stride, other=0.0).to(tl.float32)
    return tl.where(v < V, x * LOG2_E, -float("inf"))


@triton.jit
def _rows_kernel(
    LOGITS, TARGETS, OF_LOSS, OF_SQUARE, LOSS, NORMALIZER, ignore_index, V, stride, BLOCK: tl.constexpr
):  # grid (n,)
    row = tl.program_id(0).to(tl.int64)
    LOGITS += row * stride
    target = tl.load(TARGETS + row)
    counted = target != ignore_index
    # before the first reduction, at which the warps wait for each other: later one may have overwritten it
    # a target that is no class has no logit: the loss is NaN
    chosen = tl.load(LOGITS + target, mask=(target >= 0) & (target < V), other=float("nan")).to(tl.float32)
    v = tl.arange(0, BLOCK)
    peak, total = -float("inf"), 0.0
    for first in range(0, V, BLOCK):
        x = _load(LOGITS, first + v, V, stride)
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp2(peak - higher) + tl.sum(tl.exp2(x - higher), 0)
        peak = higher
    log2_sum = peak + tl.log2(total)
    normalizer = log2_sum * LOG_2
    tl.store(LOSS + row, tl.where(counted, normalizer - chosen, 0.0))
    tl.store(NORMALIZER + row, tl.where(counted, normalizer, 0.0))
    if OF_LOSS is not None:
        of_loss = tl.where(counted, tl.load(OF_LOSS), 0.0)
        scale = tl.where(counted, of_loss + 2.0 * tl.load(OF_SQUARE) * normalizer, 0.0)
        for first in range(0, V, BLOCK):
            grad = scale * tl.exp2(_load(LOGITS, first + v, V, stride) - log2_sum)
            grad = tl.where(first + v == target, grad - of_loss, grad)
            tl.store(LOGITS + first + v, grad.to(LOGITS.dtype.element_ty), mask=first + v < stride)
