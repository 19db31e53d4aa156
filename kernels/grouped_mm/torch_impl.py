"""Plain PyTorch: one matrix product per group, in an operator, as torch.compile cannot trace sizes that are data."""

from __future__ import annotations

import torch
from torch import Tensor

from ..autocast import product_dtype
from ..operators import differentiable
from . import reference
from .reference import sizes


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Same contract as reference.grouped_mm. Reads the counts on the host. Differentiable once."""
    dtype = product_dtype(x)
    return _grouped_mm(x.to(dtype), weight.to(dtype), counts)


@torch.library.custom_op("crossover::grouped_mm_torch", mutates_args=())
def _grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    rows = x.split(sizes(counts, len(x)))
    return torch.cat([r @ w.mT for r, w in zip(rows, weight.unbind(0), strict=True)])


@_grouped_mm.register_fake
def _(x, weight, counts):
    return x.new_empty(x.shape[0], weight.shape[1])


@torch.library.custom_op("crossover::grouped_mm_torch_weight_gradient", mutates_args=())
def _weight_gradient(grad_y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    n = counts.tolist()
    return torch.stack([g.mT @ r for g, r in zip(grad_y.split(n), x.split(n), strict=True)])


@_weight_gradient.register_fake
def _(grad_y, x, counts):
    return x.new_empty(counts.shape[0], grad_y.shape[1], x.shape[1])


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor):
    x, weight, counts = ctx.saved_tensors
    grad_x = _grouped_mm(grad_y, weight.mT, counts) if ctx.needs_input_grad[0] else None
    return grad_x, _weight_gradient(grad_y, x, counts) if ctx.needs_input_grad[1] else None, None


differentiable(_grouped_mm, _backward, _setup_context, lambda ctx: (reference.grouped_mm, ctx.saved_tensors))
