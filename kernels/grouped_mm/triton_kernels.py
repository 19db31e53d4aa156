"""Grouped matrix products for the GPU: one kernel for all groups, whose sizes the host never learns.

Groups are cut into tiles of rows, none of which has rows of two groups. The number of tiles depends on the sizes, so as
many programs start as there could be tiles; each finds its group by comparing its number with the groups' first tiles,
and what is left over ends there. The gradient of x is the same product with every matrix transposed. The gradient of
weight has one program for each block of a group's matrix, which sums over the rows in order: results repeat bit for
bit.

Products take the inputs' own precision and accumulate in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..autocast import product_dtype
from ..dispatch import Unsupported
from ..operators import differentiable, operator
from ..triton_kernels import launch

MAX_GROUPS = 1023
"""Largest number of groups: their bounds, one more than they are, must fit the registers of one program."""


def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Same contract as reference.grouped_mm. Differentiable once.

    Raises:
        Unsupported: if there are more than MAX_GROUPS groups.
    """
    if weight.shape[0] > MAX_GROUPS:
        raise Unsupported(f"{weight.shape[0]} groups are more than {MAX_GROUPS}")
    dtype = product_dtype(x)
    return _grouped_mm(x.to(dtype), weight.to(dtype), counts)


def configuration(rows: int, columns: int, depth: int, dtype: torch.dtype, by_vectors: bool) -> dict[str, int]:
    """Blocks of a product, (BLOCK_M, BLOCK_K) by (BLOCK_K, BLOCK_N), warps, and blocks in flight.

    Args:
        rows: rows of a typical result; decoding has few, and blocks that are mostly empty cost as much as full ones.
        columns: columns of the result.
        depth: length of the sums.
        dtype: dtype of the inputs; float32 is multiplied outside the tensor cores and takes smaller blocks.
        by_vectors: whether inputs can be loaded 16 bytes at a time; what is loaded singly passes through registers.
    """
    m, n, k, warps, stages = (128, 128, 64, 8, 3) if dtype != torch.float32 and by_vectors else (64, 64, 32, 8, 2)
    blocks = {"BLOCK_M": (rows, m), "BLOCK_N": (columns, n), "BLOCK_K": (depth, k)}
    chosen = {name: max(16, min(most, triton.next_power_of_2(size))) for name, (size, most) in blocks.items()}
    return chosen | {"num_warps": warps if chosen["BLOCK_M"] == m else 4, "num_stages": stages}


def product(x: Tensor, weight: Tensor, counts: Tensor, transposed: bool = False) -> Tensor:
    """y[t] = weight[g(t)] x[t], (T, F), of x, (T, D), and weight, (G, F, D), or (G, D, F) if it is transposed."""
    x, weight = x.contiguous(), weight.contiguous()
    (T, D), G, F = x.shape, weight.shape[0], weight.shape[2 if transposed else 1]
    y = torch.empty(T, F, dtype=x.dtype, device=x.device)
    config = configuration(triton.cdiv(T, G), F, D, x.dtype, _by_vectors(F, D, x))
    # every group but those without rows has at most one tile that is not full
    n_tiles = T // config["BLOCK_M"] + min(G, T)
    n_columns = triton.cdiv(F, config["BLOCK_N"])
    launch(
        _product_kernel, (n_columns * n_tiles,),
        x, weight, bounds(counts, T, config["BLOCK_M"]), y, G, n_columns,
        BLOCK_G=triton.next_power_of_2(G), F=F, D=D, TRANSPOSED=transposed, **config,
    )  # fmt: skip
    return y


def weight_gradient(grad_y: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """The sum of the outer products of grad_y[t], (T, F), and x[t], (T, D), over the rows of each group: (G, F, D)."""
    grad_y, x = grad_y.contiguous(), x.contiguous()
    (T, F), D, G = grad_y.shape, x.shape[1], len(counts)
    grad_weight = torch.empty(G, F, D, dtype=x.dtype, device=x.device)
    config = configuration(F, D, triton.cdiv(T, G), x.dtype, _by_vectors(F, D, x))
    launch(
        _weight_gradient_kernel, (triton.cdiv(D, config["BLOCK_N"]), triton.cdiv(F, config["BLOCK_M"]), G),
        grad_y, x, bounds(counts, T, config["BLOCK_M"]), grad_weight,
        F=F, D=D, **config,
    )  # fmt: skip
    return grad_weight


def _by_vectors(F: int, D: int, x: Tensor) -> bool:
    return all(width * x.element_size() % 16 == 0 for width in (F, D))


def bounds(counts: Tensor, T: int, block: int) -> Tensor:
    """The first row of each group, and its first tile of `block` rows, with the totals at the end: (2, G + 1) int32.

    Whatever the counts are, the bounds increase from 0 to at most T.
    """
    G = len(counts)
    found = torch.empty(2, G + 1, dtype=torch.int32, device=counts.device)
    block_g = triton.next_power_of_2(G + 1)
    launch(_bounds_kernel, (1,), counts.contiguous(), found, G, T, BLOCK_M=block, BLOCK_G=block_g, num_warps=4)
    return found


def forward(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """y, (T, F)."""
    return product(x, weight, counts)


def backward(
    grad_y: Tensor, x: Tensor, weight: Tensor, counts: Tensor, with_x: bool, with_weight: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; empty where not asked for."""
    return (
        product(grad_y, weight, counts, transposed=True) if with_x else x.new_empty(0),
        weight_gradient(grad_y, x, counts) if with_weight else weight.new_empty(0),
    )


_grouped_mm = operator("grouped_mm_triton", forward)
_grouped_mm_backward = operator("grouped_mm_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor):
    wanted = ctx.needs_input_grad[:2]
    grads = _grouped_mm_backward(grad_y, *ctx.saved_tensors, *wanted)
    return *(grad if is_wanted else None for grad, is_wanted in zip(grads, wanted, strict=True)), None


differentiable(_grouped_mm, _backward, _setup_context)


@triton.jit
def _bounds_kernel(COUNTS, BOUNDS, G, T, BLOCK_M: tl.constexpr, BLOCK_G: tl.constexpr):  # grid (1,)
    g = tl.arange(0, BLOCK_G)
    counts = tl.minimum(tl.maximum(tl.load(COUNTS + g, mask=g < G, other=0), 0), T)
    ends = tl.cumsum(counts, 0)
    firsts = tl.minimum(ends - counts, T)
    rows = (tl.minimum(ends, T) - firsts).to(tl.int32)
    tiles = (rows + BLOCK_M - 1) // BLOCK_M
    tl.store(BOUNDS + g, firsts.to(tl.int32), mask=g <= G)
    tl.store(BOUNDS + G + 1 + g, tl.cumsum(tiles, 0) - tiles, mask=g <= G)


@triton.jit
def _product_kernel(
    X, W, BOUNDS, Y, G, n_columns,
    BLOCK_G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    F: tl.constexpr, D: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # grid (tiles and F / BLOCK_N,): programs that run at once share rows of x and the matrix of a group  # fmt: skip
    tile, column = tl.program_id(0) // n_columns, tl.program_id(0) % n_columns
    FIRST_TILES = BOUNDS + G + 1
    g = tl.arange(0, BLOCK_G)
    group = tl.sum((tl.load(FIRST_TILES + 1 + g, mask=g < G, other=tile + 1) <= tile).to(tl.int32), 0)
    if group < G:
        t = tl.load(BOUNDS + group) + (tile - tl.load(FIRST_TILES + group)) * BLOCK_M + tl.arange(0, BLOCK_M)
        f, d = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
        is_row, is_column = t < tl.load(BOUNDS + group + 1), f < F
        row = t.to(tl.int64)[:, None]
        W += group.to(tl.int64) * (F * D)
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for first in range(0, D, BLOCK_K):
            k = first + d
            x = tl.load(X + row * D + k[None, :], mask=is_row[:, None] & (k < D)[None, :], other=0.0)
            at = k[:, None] * F + f[None, :] if TRANSPOSED else f[None, :] * D + k[:, None]
            w = tl.load(W + at, mask=(k < D)[:, None] & is_column[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision="ieee")
        tl.store(Y + row * F + f[None, :], acc.to(Y.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


@triton.jit
def _weight_gradient_kernel(
    DY, X, BOUNDS, DW,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, F: tl.constexpr, D: tl.constexpr,
):  # grid (D / BLOCK_N, F / BLOCK_M, G)  # fmt: skip
    group = tl.program_id(2)
    f = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    d = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(BOUNDS + group + 1)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first in range(tl.load(BOUNDS + group), end, BLOCK_K):
        t = first + tl.arange(0, BLOCK_K)
        row = t.to(tl.int64)[:, None]
        dy = tl.load(DY + row * F + f[None, :], mask=(t < end)[:, None] & (f < F)[None, :], other=0.0)
        x = tl.load(X + row * D + d[None, :], mask=(t < end)[:, None] & (d < D)[None, :], other=0.0)
        acc = tl.dot(tl.trans(dy), x, acc, input_precision="ieee")
    out = DW + group.to(tl.int64) * (F * D) + f[:, None] * D + d[None, :]
    tl.store(out, acc.to(DW.dtype.element_ty), mask=(f < F)[:, None] & (d < D)[None, :])
