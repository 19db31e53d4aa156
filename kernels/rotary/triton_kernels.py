"""Rotary positions for the GPU: one kernel that reads and writes every number once; the adjoint turns back."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from ..triton_kernels import launch
from . import torch_impl


def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Same contract as reference.rotary."""
    cos, sin = torch_impl.table(q, positions, theta)
    return _rotated(_dense(q), cos, sin), _rotated(_dense(k), cos, sin)


def _dense(x: Tensor) -> Tensor:
    """The tensor with its heads side by side, copied only where they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()


def configuration(H: int, half: int) -> dict[str, int]:
    """Sizes of a program's block, powers of two with some 1024 pairs: tokens, heads and half a head."""
    width = triton.next_power_of_2(half)
    heads = max(1, min(triton.next_power_of_2(H), 1024 // width))
    return {"TOKENS": max(1, 1024 // (heads * width)), "HEADS": heads, "HALF": width, "num_warps": 4}


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H, P) rotated by a table, (L, P/2) each."""
    batch, L, H, P = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = configuration(H, P // 2)
    grid = (triton.cdiv(L, config["TOKENS"]), triton.cdiv(H, config["HEADS"]), batch)
    launch(_kernel, grid, x, cos, sin, y, L, H, P // 2, x.stride(0), x.stride(1), **config)
    return y


_rotated = operator("rotary_triton", forward)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad_y: Tensor):
    cos, sin = ctx.saved_tensors
    return _rotated(_dense(grad_y), cos, -sin), None, None


_rotated.register_autograd(_backward, setup_context=_setup_context)


@triton.jit
def _kernel(
    X, COS, SIN, Y, L, H, half, stride_b, stride_t, TOKENS: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr
):  # grid (L / TOKENS, H / HEADS, B)
    t = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)[:, None, None]
    h = (tl.program_id(1) * HEADS + tl.arange(0, HEADS))[None, :, None]
    b = tl.program_id(2).to(tl.int64)
    i = tl.arange(0, HALF)[None, None, :]
    mask = (t < L) & (h < H) & (i < half)
    cos = tl.load(COS + t * half + i, mask=(t < L) & (i < half), other=0.0)
    sin = tl.load(SIN + t * half + i, mask=(t < L) & (i < half), other=0.0)
    pair = h * (2 * half) + i
    source, target = X + b * stride_b + t * stride_t + pair, Y + (b * L + t) * H * (2 * half) + pair
    u = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(source + half, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, (u * cos - v * sin).to(Y.dtype.element_ty), mask=mask)
    tl.store(target + half, (v * cos + u * sin).to(Y.dtype.element_ty), mask=mask)
