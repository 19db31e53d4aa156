"""The decode step of Mamba-2 for the GPU: one kernel, a program for some rows of the state of one head.

Reading and writing the state is nearly all of the traffic, and happens once. The channels of B and C are shared by the
heads of a group, and every program convolves them again for itself: they are few, and come from the cache. The next
window is new memory, because others still read the old one when a program is done with its part.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import differentiable, operator
from ..triton_kernels import exp, launch, silu, softplus
from . import torch_impl
from .reference import n_groups

MAX_ROWS = 32
"""Row limit of a program: with fewer, B and C are convolved more often; with more, one sequence fills no GPU."""


def state_update(
    x: Tensor,
    dt: Tensor,
    window: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as reference.state_update. Differentiable, by plain PyTorch."""
    x, dt = (t if t.stride(1) == 1 else t.contiguous() for t in (x, dt))
    window, weight, h = window.contiguous(), weight.contiguous(), state.float().contiguous()
    inputs = (x, dt, window, h, weight, *(t.contiguous() for t in (bias, A, D, dt_bias)))
    if not in_place:
        return _update(*inputs)
    y, window = _update_in_place(*inputs)
    return y, window, h


def configuration(P: int, N: int) -> dict[str, int]:
    """Rows of a program, the power of two that holds the states of a row, and warps: 32 numbers a thread."""
    block_n = triton.next_power_of_2(N)
    block_p = max(1, min(MAX_ROWS, 4096 // block_n, triton.next_power_of_2(P)))
    return {"BLOCK_P": block_p, "BLOCK_N": block_n, "num_warps": max(1, min(16, block_p * block_n // 1024))}


def forward(
    x: Tensor,
    dt: Tensor,
    window: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    after: Tensor,
) -> tuple[Tensor, Tensor]:
    """y and the next window; the state that follows `state` is written to `after`, which may be the same."""
    (batch, H, P, N), G = state.shape, n_groups(x, state)
    y = torch.empty(batch, H, P, dtype=x.dtype, device=x.device)
    following = torch.empty(window.shape, dtype=x.dtype, device=x.device)
    config = configuration(P, N)
    launch(
        _update_kernel, (batch * H, triton.cdiv(P, config["BLOCK_P"])),
        x, dt, window, state, weight, bias, A, D, dt_bias, y, following, after,
        H, H // G, x.shape[1], x.stride(0), dt.stride(0),
        **config, K=weight.shape[1], P=P, N=N,
    )  # fmt: skip
    return y, following


def step(
    x: Tensor,
    dt: Tensor,
    window: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the next window and, in new memory, the next state."""
    after = torch.empty_like(state)
    return *forward(x, dt, window, state, weight, bias, A, D, dt_bias, after), after


def step_in_place(
    x: Tensor,
    dt: Tensor,
    window: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """y and the next window; the next state takes the place of `state`."""
    return forward(x, dt, window, state, weight, bias, A, D, dt_bias, state)


_update = operator("state_update_triton", step)
_update_in_place = operator("state_update_triton_in_place", step_in_place, mutates_args={"state"})


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, *grads: Tensor):
    # nobody trains by single steps for speed: what the kernel kept to itself is computed again, with its graph
    with torch.enable_grad():
        inputs = [t.detach().requires_grad_() for t in ctx.saved_tensors]
        outputs = torch_impl.state_update(*inputs)
    return torch.autograd.grad(outputs, inputs, grads)


differentiable(_update, _backward, _setup_context)


@triton.jit
def _convolve(X, WINDOW, NEXT, TAPS, BIAS, e, mask, keep, n_channels, K: tl.constexpr):
    """silu(conv(x)) of channels e; where `keep`, their inputs go to the next window."""
    x = tl.load(X + e, mask=mask, other=0.0)
    s = tl.load(BIAS + e, mask=mask, other=0.0).to(tl.float32)
    s += tl.load(TAPS + e * K + (K - 1), mask=mask, other=0.0).to(tl.float32) * x.to(tl.float32)
    for k in tl.static_range(K - 1):
        past = tl.load(WINDOW + k * n_channels + e, mask=mask, other=0.0)
        s += tl.load(TAPS + e * K + k, mask=mask, other=0.0).to(tl.float32) * past.to(tl.float32)
        if k > 0:
            tl.store(NEXT + (k - 1) * n_channels + e, past.to(NEXT.dtype.element_ty), mask=mask & keep)
    if K > 1:
        tl.store(NEXT + (K - 2) * n_channels + e, x, mask=mask & keep)
    return silu(s)


@triton.jit
def _update_kernel(
    X, DT, WINDOW, STATE, TAPS, BIAS, A, D, DT_BIAS, Y, NEXT, AFTER,
    H, heads_per_group, n_channels, stride_x, stride_dt,
    K: tl.constexpr, P: tl.constexpr, N: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
):  # grid (B * H, P / BLOCK_P)  # fmt: skip
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    p, n = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N)
    of_state = (p < P)[:, None] & (n < N)[None, :]
    row = tl.program_id(0).to(tl.int64) * P
    element = row * N + p[:, None] * N + n[None, :]
    h = tl.load(STATE + element, mask=of_state, other=0.0)  # on its way while the rest is computed
    X += batch * stride_x
    WINDOW += batch * (K - 1) * n_channels
    NEXT += batch * (K - 1) * n_channels
    x = _convolve(X, WINDOW, NEXT, TAPS, BIAS, head * P + p, p < P, True, n_channels, K)
    of_b, of_c = H * P + head // heads_per_group * N + n, (n_channels + H * P) // 2 + head // heads_per_group * N + n
    is_first = (head % heads_per_group == 0) & (tl.program_id(1) == 0)  # of those that convolve B and C of the group
    b = _convolve(X, WINDOW, NEXT, TAPS, BIAS, of_b, n < N, is_first, n_channels, K)
    c = _convolve(X, WINDOW, NEXT, TAPS, BIAS, of_c, n < N, is_first, n_channels, K)
    dt = tl.load(DT + batch * stride_dt + head).to(tl.float32) + tl.load(DT_BIAS + head).to(tl.float32)
    dt = softplus(dt)
    h = h * exp(dt * tl.load(A + head).to(tl.float32)) + (dt * x)[:, None] * b[None, :]
    tl.store(AFTER + element, h, mask=of_state)
    y = tl.sum(h * c[None, :], 1) + tl.load(D + head).to(tl.float32) * x
    tl.store(Y + row + p, y.to(Y.dtype.element_ty), mask=p < P)
