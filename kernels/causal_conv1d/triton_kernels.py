"""The short convolution for the GPU: a program has a span of tokens and a block of channels, T tokens at a time.

Neighbouring taps are read again from the cache that holds them. Backward computes what SiLU saw again, also of the
tokens after its own to which an input contributes, so that one kernel does it all; the gradients of weight and bias are
summed in a fixed order, first inside programs and then over them, so they repeat bit for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import differentiable, operator
from ..triton_kernels import launch, silu, silu_slope
from . import torch_impl
from .torch_impl import next_window

MAX_TAPS = 8
"""Backward holds a sum for each tap in registers; beyond 4 some of them spill."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.causal_conv1d. Differentiable once. Filters of more than MAX_TAPS taps are cuDNN's."""
    if x.shape[1] == 1 or weight.shape[1] > MAX_TAPS:  # a decode step has no neighbours to share
        return torch_impl.causal_conv1d(x, weight, bias, activation, initial_state, starts)
    past = None if initial_state is None else initial_state.to(x.dtype).contiguous()
    marks = None if starts is None else starts.contiguous().view(torch.int8)
    x = x if x.stride(-1) == 1 else x.contiguous()
    taps = weight.flip(1).T.contiguous()  # (K, E), by lag
    bias = None if bias is None else bias.contiguous()
    y = _conv(x, past, taps, bias, activation == "silu", marks)
    before = x.new_zeros(x.shape[0], weight.shape[1] - 1, x.shape[2]) if past is None else past
    return y, next_window(x, before, starts)


def configuration(E: int) -> dict[str, int]:
    """Tokens of a span and of a tile, and channels of a block, so that a thread has eight numbers."""
    block = min(128, max(16, triton.next_power_of_2(E)))
    return {"SPAN": 128, "T": 8, "BLOCK": block, "num_warps": max(1, block // 32)}


def forward(
    x: Tensor, past: Tensor | None, taps: Tensor, bias: Tensor | None, silu: bool, starts: Tensor | None
) -> Tensor:
    """y, (B, L, E); taps (K, E) are by lag, starts are int8."""
    batch, L, E = x.shape
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    config = configuration(E)
    grid = (triton.cdiv(L, config["SPAN"]), triton.cdiv(E, config["BLOCK"]), batch)
    strides = (x.stride(0), x.stride(1))
    launch(_forward_kernel, grid, x, past, taps, bias, starts, y, L, E, *strides, K=len(taps), SILU=silu, **config)
    return y


def backward(
    grad_y: Tensor,
    x: Tensor,
    past: Tensor | None,
    taps: Tensor,
    bias: Tensor | None,
    silu: bool,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, past (empty where there is none), taps and bias."""
    (batch, L, E), K = x.shape, len(taps)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    grad_past = torch.empty(batch if past is not None else 0, K - 1, E, dtype=x.dtype, device=x.device)
    config = configuration(E)
    n_spans = triton.cdiv(L + K - 1, config["SPAN"])
    parts = torch.empty(batch * n_spans, K + 1, E, dtype=torch.float32, device=x.device)
    grid = (n_spans, triton.cdiv(E, config["BLOCK"]), batch)
    launch(
        _backward_kernel, grid,
        grad_y.contiguous(), x, past, taps, bias, starts, grad_x, grad_past, parts, L, E, x.stride(0), x.stride(1),
        K=K, SUMS=triton.next_power_of_2(K), SILU=silu, **config,
    )  # fmt: skip
    sums = parts.sum(0).to(taps.dtype)
    return grad_x, grad_past, sums[:K].clone(), sums[K].clone()


_conv = operator("causal_conv1d_triton", forward)
_conv_backward = operator("causal_conv1d_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    x, past, taps, bias, ctx.silu, starts = inputs
    ctx.save_for_backward(x, past, taps, bias, starts)


def _backward(ctx, grad_y: Tensor):
    x, past, taps, bias, starts = ctx.saved_tensors
    grad_x, grad_past, grad_taps, grad_bias = _conv_backward(grad_y, x, past, taps, bias, ctx.silu, starts)
    given = (grad_past if past is not None else None, grad_taps, grad_bias if bias is not None else None)
    return grad_x, *given, None, None


differentiable(_conv, _backward, _setup_context)


@triton.jit
def _input(X, PAST, row, shift: tl.constexpr, t, e, L, E, stride_xt, K: tl.constexpr):
    """Inputs `shift` tokens after t, of which the K - 1 before the first come from PAST, [T, BLOCK].

    t (T,) begins at the scalar `row`; what is added to one pointer for all of them fits 32 bits.
    """
    i, at = (t - row).to(tl.int32), t + shift
    is_channel = (e < E)[None, :]
    mask = ((at >= 0) & (at < L))[:, None] & is_channel
    x = tl.load(X + (row + shift) * stride_xt + (i[:, None] * stride_xt + e[None, :]), mask=mask, other=0.0)
    x = x.to(tl.float32)
    if PAST is not None:
        mask = ((at < 0) & (at > -K))[:, None] & is_channel
        past = tl.load(PAST + (row + shift + K - 1) * E + (i[:, None] * E + e[None, :]), mask=mask, other=0.0)
        x += past.to(tl.float32)
    return x


@triton.jit
def _tap(TAPS, lag: tl.constexpr, e, E):
    """The weight of the input `lag` tokens ago, [1, BLOCK]."""
    return tl.load(TAPS + lag * E + e, mask=e < E, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _begins(STARTS, t, L):
    """Whether a document begins at tokens t, (T,)."""
    if STARTS is not None:
        return tl.load(STARTS + t, mask=(t >= 0) & (t < L), other=0) != 0
    return t < -(1 << 30)


@triton.jit
def _convolve(X, PAST, TAPS, BIAS, STARTS, row, shift: tl.constexpr, t, e, L, E, stride_xt, K: tl.constexpr):
    """bias + sum over lags of taps[lag] x[at - lag], where `at` is `shift` tokens after t, [T, BLOCK]."""
    s = _tap(TAPS, 0, e, E) * _input(X, PAST, row, shift, t, e, L, E, stride_xt, K)
    if BIAS is not None:
        s += tl.load(BIAS + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    cut = _begins(STARTS, t + shift, L)
    for lag in tl.static_range(1, K):
        x = _input(X, PAST, row, shift - lag, t, e, L, E, stride_xt, K)
        if STARTS is not None:
            x = tl.where(cut[:, None], 0.0, x)
            cut = cut | _begins(STARTS, t + shift - lag, L)
        s += _tap(TAPS, lag, e, E) * x
    return s


@triton.jit
def _forward_kernel(
    X, PAST, TAPS, BIAS, STARTS, Y, L, E, stride_xb, stride_xt,
    K: tl.constexpr, SILU: tl.constexpr, SPAN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid (L / SPAN, E / BLOCK, B)
    b = tl.program_id(2).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    X += b * stride_xb
    if PAST is not None:
        PAST += b * (K - 1) * E
    if STARTS is not None:
        STARTS += b * L
    for i in range(0, SPAN, T):
        row = tl.program_id(0).to(tl.int64) * SPAN + i
        t = row + tl.arange(0, T)
        y = _convolve(X, PAST, TAPS, BIAS, STARTS, row, 0, t, e, L, E, stride_xt, K)
        if SILU:
            y = silu(y)
        out = tl.arange(0, T)[:, None] * E + e[None, :]
        tl.store(Y + (b * L + row) * E + out, y.to(Y.dtype.element_ty), mask=(t < L)[:, None] & (e < E)[None, :])


@triton.jit
def _before_activation(
    DY, X, PAST, TAPS, BIAS, STARTS, row, shift: tl.constexpr, t, e, L, E, stride_xt,
    K: tl.constexpr, SILU: tl.constexpr,
):  # fmt: skip
    """Gradients of what SiLU saw `shift` tokens after t, zero where there is no token, [T, BLOCK]."""
    at, i = t + shift, (t - row).to(tl.int32)
    mask = ((at >= 0) & (at < L))[:, None] & (e < E)[None, :]
    g = tl.load(DY + (row + shift) * E + (i[:, None] * E + e[None, :]), mask=mask, other=0.0).to(tl.float32)
    if SILU:
        g *= silu_slope(_convolve(X, PAST, TAPS, BIAS, STARTS, row, shift, t, e, L, E, stride_xt, K))
    return g


@triton.jit
def _backward_kernel(
    DY, X, PAST, TAPS, BIAS, STARTS, DX, DPAST, PARTS, L, E, stride_xb, stride_xt,
    K: tl.constexpr, SUMS: tl.constexpr, SILU: tl.constexpr,
    SPAN: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # grid ((L + K - 1) / SPAN, E / BLOCK, B); the first K - 1 tokens are those of PAST
    b = tl.program_id(2).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_channel = (e < E)[None, :]
    X += b * stride_xb
    DY += b * L * E
    if PAST is not None:
        PAST += b * (K - 1) * E
    if STARTS is not None:
        STARTS += b * L
    bias = tl.zeros([T, BLOCK], tl.float32)
    k = tl.arange(0, SUMS)
    sums = tl.zeros([SUMS, T, BLOCK], tl.float32)  # the first axis in registers: choosing from it costs nothing
    for i in range(0, SPAN, T):
        row = tl.program_id(0).to(tl.int64) * SPAN + i - (K - 1)
        t = row + tl.arange(0, T)
        g = _before_activation(DY, X, PAST, TAPS, BIAS, STARTS, row, 0, t, e, L, E, stride_xt, K, SILU)
        bias += g
        grad_x = _tap(TAPS, 0, e, E) * g
        sums += tl.where((k == 0)[:, None, None], (g * _input(X, PAST, row, 0, t, e, L, E, stride_xt, K))[None], 0.0)
        behind = _begins(STARTS, t, L)  # whether a document begins after the input and up to the token
        ahead = _begins(STARTS, t + 1, L)  # the same for the input at t and the token after it
        for lag in tl.static_range(1, K):
            before = g * _input(X, PAST, row, -lag, t, e, L, E, stride_xt, K)
            later = _before_activation(DY, X, PAST, TAPS, BIAS, STARTS, row, lag, t, e, L, E, stride_xt, K, SILU)
            if STARTS is not None:
                before, later = tl.where(behind[:, None], 0.0, before), tl.where(ahead[:, None], 0.0, later)
                behind = behind | _begins(STARTS, t - lag, L)
                ahead = ahead | _begins(STARTS, t + lag + 1, L)
            sums += tl.where((k == lag)[:, None, None], before[None], 0.0)
            grad_x += _tap(TAPS, lag, e, E) * later
        out = tl.arange(0, T)[:, None] * E + e[None, :]
        mask = ((t >= 0) & (t < L))[:, None] & is_channel
        tl.store(DX + (b * L + row) * E + out, grad_x.to(DX.dtype.element_ty), mask=mask)
        if PAST is not None:
            past = DPAST + (b * (K - 1) + row + K - 1) * E
            tl.store(past + out, grad_x.to(DPAST.dtype.element_ty), mask=(t < 0)[:, None] & is_channel)
    PARTS += (b * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * E + e
    tl.store(PARTS[None, :] + k[:, None] * E, tl.sum(sums, 1), mask=(k < K)[:, None] & (e < E)[None, :])
    tl.store(PARTS + K * E, tl.sum(bias, 0), mask=e < E)
