"""The CPU path: numba kernels that read each input once, with bias and SiLU fused (cpu_kernels.py), float32 inside."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from ..documents import never_if_none
from ..operators import differentiable, operator
from ..parallel import floats, run
from . import reference, torch_impl
from .torch_impl import next_window

NARROWEST = 16
"""Channels that kernels need, as many as the longest vector has; fewer are filled up."""


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.causal_conv1d, in float32. Differentiable once."""
    if x.shape[1] == 1:  # a decode step: plain operations cost less than a call of the kernel
        return torch_impl.causal_conv1d(x, weight, bias, activation, initial_state, starts)
    (batch, _, E), K = x.shape, weight.shape[1]
    past = x.new_zeros(batch, K - 1, E) if initial_state is None else initial_state.to(x.dtype)
    taps = weight.flip(1).T.float().contiguous()  # (K, E), by lag
    inputs = (x.float(), past.float(), taps, None if bias is None else bias.float())
    if E < NARROWEST:
        inputs = tuple(None if t is None else F.pad(t, (0, NARROWEST - E)) for t in inputs)
    y = _conv(*inputs, activation == "silu", starts)[..., :E]
    return y.to(x.dtype), next_window(x, past, starts)


def forward(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, starts: Tensor | None) -> Tensor:
    """y, (B, L, E); taps (K, E) are by lag."""
    from . import cpu_kernels

    y = floats(x.shape)
    run(cpu_kernels.forward, _n_tasks(x), *_inputs(x, past, taps, bias, silu, starts), y)
    return y


_conv = operator("causal_conv1d_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor, x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, starts: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, past, taps and bias."""
    from . import cpu_kernels

    (batch, _, E), K = x.shape, len(taps)
    grad_x, grad_past = floats(x.shape), floats(batch, K - 1, E)
    parts_taps, parts_bias = floats(batch, K, E), floats(batch, E)
    outputs = (grad_x, grad_past, parts_taps, parts_bias)
    run(cpu_kernels.backward, _n_tasks(x), grad_y, *_inputs(x, past, taps, bias, silu, starts), *outputs)
    return grad_x, grad_past, parts_taps.sum(0), parts_bias.sum(0)


_conv_backward = operator("causal_conv1d_cpu_backward", backward, device_types="cpu")


def _setup_context(ctx, inputs, output) -> None:
    x, past, taps, bias, ctx.silu, starts = inputs
    ctx.save_for_backward(x, past, taps, bias, starts)


def _backward(ctx, grad_y: Tensor):
    x, past, taps, bias, starts = ctx.saved_tensors
    *grads, grad_bias = _conv_backward(grad_y, x, past, taps, bias, ctx.silu, starts)
    return *grads, None if bias is None else grad_bias, None, None


def _again(ctx):
    def definition(x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, starts: Tensor | None):
        return reference.causal_conv1d(x, taps.T.flip(1), bias, "silu" if silu else None, past, starts)

    x, past, taps, bias, starts = ctx.saved_tensors
    return definition, (x, past, taps, bias, ctx.silu, starts)


differentiable(_conv, _backward, _setup_context, _again)


def _n_tasks(x: Tensor) -> int:
    from . import cpu_kernels

    return x.shape[0] * -(-x.shape[2] // cpu_kernels.WIDTH)


def _inputs(
    x: Tensor, past: Tensor, taps: Tensor, bias: Tensor | None, silu: bool, starts: Tensor | None
) -> tuple[object, ...]:
    """Arguments of both kernels."""
    bias = x.new_zeros(x.shape[2]) if bias is None else bias
    return x, past, taps, bias, silu, never_if_none(starts, x)
