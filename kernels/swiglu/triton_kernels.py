"""The gate of a SwiGLU for the GPU: each way one kernel that reads and writes every number once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import differentiable, operator
from ..parallel import rows
from ..triton_kernels import launch, silu, silu_slope

OPTIONS = {"BLOCK": 1024, "num_warps": 4}
"""Sixteen bytes a thread in half precision."""


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract as reference.swiglu. Differentiable once."""
    return _product(rows(gate), rows(up)).view(gate.shape)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y, (T, F)."""
    T, F = gate.shape
    y = torch.empty(T, F, dtype=gate.dtype, device=gate.device)
    grid = (T, triton.cdiv(F, OPTIONS["BLOCK"]))
    launch(_forward_kernel, grid, gate, up, y, F, gate.stride(0), up.stride(0), **OPTIONS)
    return y


def backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (T, F)."""
    T, F = gate.shape
    grad_y = rows(grad_y)
    grad_gate = torch.empty(T, F, dtype=gate.dtype, device=gate.device)
    grad_up = torch.empty(T, F, dtype=up.dtype, device=up.device)
    grid = (T, triton.cdiv(F, OPTIONS["BLOCK"]))
    strides = (grad_y.stride(0), gate.stride(0), up.stride(0))
    launch(_backward_kernel, grid, grad_y, gate, up, grad_gate, grad_up, F, *strides, **OPTIONS)
    return grad_gate, grad_up


_product = operator("swiglu_triton", forward)
_product_backward = operator("swiglu_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor):
    return _product_backward(grad_y, *ctx.saved_tensors)


differentiable(_product, _backward, _setup_context)


@triton.jit
def _forward_kernel(G, U, Y, F, stride_g, stride_u, BLOCK: tl.constexpr):  # grid (T, F / BLOCK)
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    g = tl.load(G + t * stride_g + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U + t * stride_u + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(Y + t * F + f, (silu(g) * u).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward_kernel(DY, G, U, DG, DU, F, stride_dy, stride_g, stride_u, BLOCK: tl.constexpr):  # grid (T, F / BLOCK)
    t = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = f < F
    dy = tl.load(DY + t * stride_dy + f, mask=mask, other=0.0).to(tl.float32)
    g = tl.load(G + t * stride_g + f, mask=mask, other=0.0).to(tl.float32)
    u = tl.load(U + t * stride_u + f, mask=mask, other=0.0).to(tl.float32)
    tl.store(DU + t * F + f, (dy * silu(g)).to(DU.dtype.element_ty), mask=mask)
    tl.store(DG + t * F + f, (dy * u * silu_slope(g)).to(DG.dtype.element_ty), mask=mask)
