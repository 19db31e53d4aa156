"""Common part of the fast backends: a loop over chunks of tokens, and its gradients.

With the logits of a token at hand so is the gradient of its loss in them. Forward therefore leaves that gradient in the
place of a chunk's logits and multiplies it out at once; backward only scales (as in Liger, arXiv:2410.10989). How much
the z-loss weighs beside the loss is known in backward alone: with a z-loss forward keeps nothing, and backward computes
the logits again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..autocast import product_dtype
from ..operators import differentiable

ALIGNMENT = 16
"""Rows of logits are padded to a multiple of it, so that for any number of classes they load by vectors."""

Weights = tuple[Tensor, Tensor]
"""Factors of the sums of the cross-entropy and of the squared normalizer, scalars."""

Rows = Callable[[Tensor, Tensor, int, Weights | None], tuple[Tensor, Tensor]]
"""Maps (logits (n, V), targets (n,), ignore_index, weights) to the cross-entropy and the normalizer of each row, (n,),
both zero where nothing counts. May overwrite the logits, whose rows go on to a multiple of ALIGNMENT with numbers that
mean nothing; given weights, leaves there the gradient of the weighted sums."""

Sums = Callable[[Tensor, Tensor, Tensor, int, bool], tuple[Tensor, Tensor]]
"""Maps (x, weight, targets, ignore_index, with_z) to the sums of the cross-entropy and of the squared normalizer over
the tokens that count; the second is differentiable only `with_z`."""


def chunked(name: str, rows: Rows, chunk_len: Callable[[int], int]) -> Sums:
    """The sums chunk by chunk, differentiable once, as custom operators.

    Args:
        name: name of the operators.
        rows: function for a chunk's logits.
        chunk_len: tokens of a chunk, from the number of classes.
    """

    @torch.library.custom_op(f"crossover::{name}", mutates_args=())
    def sums(
        x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_x: bool, with_weight: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Sums of the cross-entropy and of the squared normalizer; gradients of the former, as far as asked for."""
        of_loss = torch.ones((), dtype=_wide(x), device=x.device)
        inputs = (x, weight, targets, ignore_index, (of_loss, torch.zeros_like(of_loss)), with_x, with_weight)
        return over_chunks(rows, chunk_len(weight.shape[0]), *inputs)

    @sums.register_fake
    def _(x, weight, targets, ignore_index, with_x, with_weight):
        scalars = (x.new_empty((), dtype=_wide(x)) for _ in range(2))
        return *scalars, *_empty_gradients(x, weight, with_x, with_weight)

    @torch.library.custom_op(f"crossover::{name}_backward", mutates_args=())
    def gradients(
        grad_loss: Tensor,
        grad_square: Tensor,
        x: Tensor,
        weight: Tensor,
        targets: Tensor,
        ignore_index: int,
        with_x: bool,
        with_weight: bool,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of both sums, as far as asked for."""
        inputs = (x, weight, targets, ignore_index, (grad_loss, grad_square), with_x, with_weight)
        return over_chunks(rows, chunk_len(weight.shape[0]), *inputs)[2:]

    @gradients.register_fake
    def _(grad_loss, grad_square, x, weight, targets, ignore_index, with_x, with_weight):
        return _empty_gradients(x, weight, with_x, with_weight)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, weight, targets, ctx.ignore_index, with_x, with_weight = inputs
        ctx.is_done, ctx.dtype = with_x or with_weight, weight.dtype
        ctx.save_for_backward(*(output[2:] if ctx.is_done else (x, weight, targets)))

    def backward(ctx: Any, grad_loss: Tensor, grad_square: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[:2]
        if ctx.is_done:
            grads = tuple(grad * grad_loss for grad in ctx.saved_tensors)
        else:
            grads = gradients(grad_loss, grad_square, *ctx.saved_tensors, ctx.ignore_index, *wanted)
        grad_x, grad_weight = (grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True))
        return grad_x, None if grad_weight is None else grad_weight.to(ctx.dtype), None, None, None, None

    differentiable(sums, backward, setup_context)

    def sums_of(x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, with_z: bool) -> tuple[Tensor, Tensor]:
        x = x.to(product_dtype(x))
        at_once = torch.is_grad_enabled() and not with_z
        wanted = (at_once and x.requires_grad, at_once and weight.requires_grad)
        return sums(x, weight, targets, ignore_index, *wanted)[:2]

    return sums_of


def means(
    sums: Sums, x: Tensor, weight: Tensor, targets: Tensor, ignore_index: int, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Makes of the sums what reference.linear_cross_entropy returns."""
    loss, square = sums(x, weight, targets, ignore_index, z_loss != 0)
    n = (targets != ignore_index).sum().clamp(min=1)
    return loss / n, z_loss * square / n


def over_chunks(
    rows: Rows,
    chunk_len: int,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    ignore_index: int,
    weights: Weights,
    with_x: bool,
    with_weight: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums of the cross-entropy and of the squared normalizer, and the gradients of x and weight under `weights`.

    Matrices are multiplied in x's precision; the gradient of weight, (V, D), is summed in float32. What is not asked
    for is empty.
    """
    (T, _), V = x.shape, weight.shape[0]
    weight = weight.to(x.dtype)
    loss, square = (torch.zeros((), dtype=_wide(x), device=x.device) for _ in range(2))
    grad_x, grad_weight = _empty_gradients(x, weight, with_x, with_weight)
    grad_weight.zero_()
    width = -(-V // ALIGNMENT) * ALIGNMENT
    buffer = torch.empty(min(chunk_len, T), width, dtype=x.dtype, device=x.device)[:, :V]
    for i in range(0, T, chunk_len):
        chunk = slice(i, min(i + chunk_len, T))
        logits = torch.mm(x[chunk], weight.T, out=buffer[: chunk.stop - i])
        losses, normalizers = rows(logits, targets[chunk], ignore_index, weights if with_x or with_weight else None)
        loss += losses.sum()
        square += normalizers.square().sum()
        if with_x:
            torch.mm(logits, weight, out=grad_x[chunk])
        if with_weight and x.dtype == grad_weight.dtype:
            grad_weight.addmm_(logits.T, x[chunk])
        elif with_weight:
            grad_weight += logits.T @ x[chunk]
    return loss, square, grad_x, grad_weight


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _empty_gradients(x: Tensor, weight: Tensor, with_x: bool, with_weight: bool) -> tuple[Tensor, Tensor]:
    grad_x = torch.empty(x.shape if with_x else (0,), dtype=x.dtype, device=x.device)
    return grad_x, torch.empty(weight.shape if with_weight else (0,), dtype=_wide(x), device=x.device)
