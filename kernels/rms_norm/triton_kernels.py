"""RMSNorm and its gated form for the GPU: a program has whole rows in registers, so each number is read once.

Statistics are in float32. Backward computes the normalized input again from the saved 1 / rms; the gradient of the
weight is summed in a fixed order, first inside programs and then over them, so it repeats bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..operators import differentiable, operator
from ..parallel import rows
from ..triton_kernels import launch, silu, silu_slope

MAX_WIDTH = 16384
"""Widest group: a row must fit the registers of one program."""

PROGRAMS = 528
"""Largest number of programs that share the rows in backward: four for each multiprocessor of a large GPU."""


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as reference.rms_norm. Differentiable once.

    Raises:
        Unsupported: if a row is wider than MAX_WIDTH.
    """
    return gated_rms_norm(x, None, weight, eps)


def gated_rms_norm(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """Same contract as reference.gated_rms_norm; without z nothing is gated. Differentiable once.

    Raises:
        Unsupported: if a group is wider than MAX_WIDTH.
    """
    if weight.shape[0] // n_groups > MAX_WIDTH:
        raise Unsupported(f"a group of {weight.shape[0] // n_groups} channels is wider than {MAX_WIDTH}")
    y, _ = _norm(rows(x), None if z is None else rows(z), weight.contiguous(), eps, n_groups)
    return y.view(x.shape)


def configuration(width: int) -> dict[str, int]:
    """Rows of a program, the power of two that holds a row, and warps: some 4096 numbers at once, 16 a thread."""
    block = triton.next_power_of_2(width)
    n_rows = max(1, min(16, 4096 // block))
    return {"ROWS": n_rows, "BLOCK": block, "num_warps": max(1, min(16, n_rows * block // 512))}


def forward(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """y, (T, D), and 1 / rms, (T, G), of rows x and gates z."""
    T, D = x.shape
    y = torch.empty(T, D, dtype=x.dtype, device=x.device)
    rstd = torch.empty(T, n_groups, dtype=torch.float32, device=x.device)
    config = configuration(D // n_groups)
    grid = (triton.cdiv(T, config["ROWS"]), n_groups)
    strides = (x.stride(0), 0 if z is None else z.stride(0))
    launch(_forward_kernel, grid, x, z, weight, y, rstd, T, D // n_groups, *strides, eps, **config)
    return y, rstd


def backward(
    grad_y: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (empty without a gate) and weight."""
    (T, D), n_groups = x.shape, rstd.shape[1]
    grad_y = rows(grad_y)
    grad_x = torch.empty(T, D, dtype=x.dtype, device=x.device)
    grad_z = torch.empty((T, D) if z is not None else (0,), dtype=x.dtype, device=x.device)
    config = configuration(D // n_groups)
    n_programs = min(PROGRAMS, triton.cdiv(T, config["ROWS"]))
    parts = torch.empty(n_programs, D, dtype=torch.float32, device=x.device)
    strides = (grad_y.stride(0), x.stride(0), 0 if z is None else z.stride(0))
    launch(
        _backward_kernel, (n_programs, n_groups),
        grad_y, x, z, weight, rstd, grad_x, grad_z if z is not None else None, parts, T, D // n_groups,
        *strides,
        **config,
    )  # fmt: skip
    return grad_x, grad_z, parts.sum(0).to(weight.dtype)


_norm = operator("rms_norm_triton", forward)
_norm_backward = operator("rms_norm_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    x, z, weight, _, _ = inputs
    ctx.save_for_backward(x, z, weight, output[1])


def _backward(ctx, grad_y: Tensor, _: Tensor):
    x, z, weight, rstd = ctx.saved_tensors
    grad_x, grad_z, grad_weight = _norm_backward(grad_y, x, z, weight, rstd)
    return grad_x, None if z is None else grad_z, grad_weight, None, None


differentiable(_norm, _backward, _setup_context)


@triton.jit
def _forward_kernel(
    X, Z, W, Y, RSTD, T, D, stride_x, stride_z, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # grid (T / ROWS, G); D is the width of a group
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    d = tl.arange(0, BLOCK)
    mask = (t < T)[:, None] & (d < D)[None, :]
    row, column = t.to(tl.int64)[:, None], group * D + d[None, :]
    x = tl.load(X + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
    if Z is not None:
        x *= silu(tl.load(Z + row * stride_z + column, mask=mask, other=0.0).to(tl.float32))
    rstd = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    rstd = tl.where(rstd == 0, float("nan"), rstd)  # the squares are beyond float range
    w = tl.load(W + group * D + d, mask=d < D, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * w[None, :]
    tl.store(Y + row * (n_groups * D) + column, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(RSTD + t.to(tl.int64) * n_groups + group, rstd, mask=t < T)


@triton.jit
def _backward_kernel(
    DY, X, Z, W, RSTD, DX, DZ, DW, T, D, stride_dy, stride_x, stride_z, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # grid (programs, G); program i takes every programs-th tile of rows
    group, n_groups = tl.program_id(1), tl.num_programs(1)
    d = tl.arange(0, BLOCK)
    w = tl.load(W + group * D + d, mask=d < D, other=0.0).to(tl.float32)[None, :]
    grad_w = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(tl.program_id(0) * ROWS, T, tl.num_programs(0) * ROWS):
        t = first + tl.arange(0, ROWS)
        mask = (t < T)[:, None] & (d < D)[None, :]
        row, column = t.to(tl.int64)[:, None], group * D + d[None, :]
        g = tl.load(DY + row * stride_dy + column, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(X + row * stride_x + column, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(RSTD + t.to(tl.int64) * n_groups + group, mask=t < T, other=0.0)[:, None]
        u = x
        if Z is not None:
            z = tl.load(Z + row * stride_z + column, mask=mask, other=0.0).to(tl.float32)
            u = x * silu(z)
        normed = u * rstd
        grad_w += g * normed
        g *= w
        grad_u = rstd * (g - normed * (tl.sum(g * normed, 1) / D)[:, None])
        out = row * (n_groups * D) + column
        if Z is not None:
            tl.store(DZ + out, (grad_u * x * silu_slope(z)).to(DZ.dtype.element_ty), mask=mask)
            grad_u *= silu(z)
        tl.store(DX + out, grad_u.to(DX.dtype.element_ty), mask=mask)
    out = DW + tl.program_id(0) * (n_groups * D) + group * D + d
    tl.store(out, tl.sum(grad_w, 0), mask=d < D)
