"""S4's kernel from its poles and the recurrence for the GPU; long_conv stays with PyTorch's FFT, which is cuFFT there.

Backward keeps nothing but the inputs. Poles do not depend on time, so no token costs an exponential, and what poles and
residues get is a sum that runs forward beside the state, with s = dh/dA:

    h[t] = a h[t-1] + u[t],   s[t] = a (s[t-1] + h[t-1]),   dL/dC = 2 sum_t g[t] h[t],   dL/dA = 2 C sum_t g[t] s[t],

where a = exp(A) and g is the gradient of y. The input's gradient is the same recurrence from the last token to the
first. All sums are taken in a fixed order, so results repeat bit for bit.

Triton has no complex numbers: real and imaginary parts are read from and written to PyTorch's own pairs. PyTorch's
gradient of a complex number is the conjugate of the derivative above; that is taken outside of the kernels.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..triton_kernels import exp, launch
from . import torch_impl

MAX_STATES = 256
"""Most poles of a channel: they are divided among the lanes of a warp, up to eight each."""

POWERS = 32
"""Steps of ssm_kernel that a program takes at a time, a lane for each."""

SPAN = 64 * POWERS
"""Steps of a program of ssm_kernel: each POWERS of them multiply its factor once, and errors add up."""


ENOUGH_THREADS = 528 * 32
"""Threads to aim at: a warp for each scheduler of a large GPU."""


# The kernel from the poles


def ssm_kernel(A: Tensor, C: Tensor, length: int) -> Tensor:
    """Same contract as reference.ssm_kernel. Differentiable once.

    Raises:
        Unsupported: if A is complex128, or has more than MAX_STATES poles a channel.
    """
    _check(A)
    return _kernel(_plain(A), _plain(C), length)


def _check(A: Tensor) -> None:
    if A.dtype == torch.complex128:
        raise Unsupported("A is complex128, and the kernels compute in float32")
    if A.shape[1] > MAX_STATES:
        raise Unsupported(f"{A.shape[1]} poles are more than {MAX_STATES}")


def _plain(x: Tensor) -> Tensor:
    """The complex tensor as it lies in memory: pairs of float32, neither strided nor lazily conjugated."""
    return x.to(torch.complex64).resolve_conj().contiguous()


@torch.library.custom_op("crossover::ssm_kernel_triton", mutates_args=())
def _kernel(A: Tensor, C: Tensor, length: int) -> Tensor:
    return kernel_forward(A, C, length)


@_kernel.register_fake
def _(A, C, length):
    return A.new_empty(A.shape[0], length, dtype=torch.float32)


@torch.library.custom_op("crossover::ssm_kernel_triton_backward", mutates_args=())
def _kernel_backward(grad: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    return kernel_backward(grad, A, C)


@_kernel_backward.register_fake
def _(grad, A, C):
    return torch.empty_like(A), torch.empty_like(C)


def _kernel_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _kernel_gradients(ctx, grad: Tensor):
    return *_kernel_backward(grad, *ctx.saved_tensors), None


_kernel.register_autograd(_kernel_gradients, setup_context=_kernel_setup)


def kernel_forward(A: Tensor, C: Tensor, length: int) -> Tensor:
    """K, (E, L)."""
    E, N = A.shape
    K = torch.empty(E, length, dtype=torch.float32, device=A.device)
    block = triton.next_power_of_2(N)
    launch(
        _response_kernel,
        (E, triton.cdiv(length, SPAN)),
        *(torch.view_as_real(A), torch.view_as_real(C), K, length),
        N=N,
        BLOCK=block,
        POWERS=POWERS,
        SPAN=SPAN,
        num_warps=max(1, block // 32),
    )
    return K


def kernel_backward(grad: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of A and C from that of K."""
    (E, N), length = A.shape, grad.shape[1]
    n_spans = triton.cdiv(length, SPAN)
    sums, timed = (A.new_empty(n_spans, E, N) for _ in range(2))  # of g[t] exp(A t) and t g[t] exp(A t)
    block = triton.next_power_of_2(N)
    launch(
        _response_gradient_kernel,
        (E, n_spans),
        *(torch.view_as_real(A), grad.contiguous(), torch.view_as_real(sums), torch.view_as_real(timed), length),
        N=N,
        BLOCK=block,
        POWERS=POWERS,
        SPAN=SPAN,
        num_warps=max(1, block // 16),
    )
    return (2 * C * timed.sum(0)).conj().resolve_conj(), (2 * sums.sum(0)).conj().resolve_conj()


@triton.jit
def _load_complex(X, offsets, mask):
    return tl.load(X + 2 * offsets, mask=mask, other=0.0), tl.load(X + 2 * offsets + 1, mask=mask, other=0.0)


@triton.jit
def _store_complex(X, offsets, re, im, mask):
    tl.store(X + 2 * offsets, re, mask=mask)
    tl.store(X + 2 * offsets + 1, im, mask=mask)


@triton.jit
def _multiply(a_re, a_im, b_re, b_im):
    return a_re * b_re - a_im * b_im, a_re * b_im + a_im * b_re


@triton.jit
def _power(a_re, a_im, t):
    """exp(a t)."""
    size, angle = exp(a_re * t), a_im * t
    return size * tl.cos(angle), size * tl.sin(angle)


@triton.jit
def _response_kernel(
    A, C, K, L, N: tl.constexpr, BLOCK: tl.constexpr, POWERS: tl.constexpr, SPAN: tl.constexpr
):  # grid (E, L / SPAN)
    e, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
    n, j = tl.arange(0, BLOCK), tl.arange(0, POWERS)
    a_re, a_im = _load_complex(A, e * N + n, n < N)
    c_re, c_im = _load_complex(C, e * N + n, n < N)
    # exp(A t) = exp(A t0) exp(A j) with t = t0 + j
    power_re, power_im = _power(a_re[:, None], a_im[:, None], j[None, :].to(tl.float32))
    step_re, step_im = _power(a_re, a_im, POWERS * 1.0)
    factor_re, factor_im = _power(a_re, a_im, first.to(tl.float32))
    factor_re, factor_im = _multiply(2.0 * c_re, 2.0 * c_im, factor_re, factor_im)
    for t0 in range(first, tl.minimum(first + SPAN, L), POWERS):
        k = tl.sum(factor_re[:, None] * power_re - factor_im[:, None] * power_im, 0)
        tl.store(K + e * L + t0 + j, k, mask=t0 + j < L)
        factor_re, factor_im = _multiply(factor_re, factor_im, step_re, step_im)


@triton.jit
def _response_gradient_kernel(
    A, DK, SUMS, TIMED, L, N: tl.constexpr, BLOCK: tl.constexpr, POWERS: tl.constexpr, SPAN: tl.constexpr
):  # grid (E, L / SPAN)
    e, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * SPAN
    n, j = tl.arange(0, BLOCK), tl.arange(0, POWERS)
    a_re, a_im = _load_complex(A, e * N + n, n < N)
    step_re, step_im = _power(a_re, a_im, POWERS * 1.0)
    factor_re, factor_im = _power(a_re, a_im, first.to(tl.float32))
    # of each j, sums over t0 of g[t] exp(A t0) and t0 g[t] exp(A t0)
    sum_re, sum_im = tl.zeros([BLOCK, POWERS], tl.float32), tl.zeros([BLOCK, POWERS], tl.float32)
    timed_re, timed_im = tl.zeros([BLOCK, POWERS], tl.float32), tl.zeros([BLOCK, POWERS], tl.float32)
    for t0 in range(first, tl.minimum(first + SPAN, L), POWERS):
        g = tl.load(DK + e * L + t0 + j, mask=t0 + j < L, other=0.0)[None, :]
        sum_re += factor_re[:, None] * g
        sum_im += factor_im[:, None] * g
        timed_re += factor_re[:, None] * (g * t0)
        timed_im += factor_im[:, None] * (g * t0)
        factor_re, factor_im = _multiply(factor_re, factor_im, step_re, step_im)
    steps = j[None, :].to(tl.float32)
    power_re, power_im = _power(a_re[:, None], a_im[:, None], steps)
    timed_re, timed_im = _multiply(timed_re + steps * sum_re, timed_im + steps * sum_im, power_re, power_im)
    sum_re, sum_im = _multiply(sum_re, sum_im, power_re, power_im)
    out = (tl.program_id(1) * tl.num_programs(0) + e) * N + n
    _store_complex(SUMS, out, tl.sum(sum_re, 1), tl.sum(sum_im, 1), n < N)
    _store_complex(TIMED, out, tl.sum(timed_re, 1), tl.sum(timed_im, 1), n < N)


# The recurrence


def ssm_scan(
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.ssm_scan. Differentiable once.

    Raises:
        Unsupported: if u is float64, A is complex128, or has more than MAX_STATES poles a channel.
    """
    if u.dtype == torch.float64:
        raise Unsupported("u is float64, and the kernels compute in float32")
    _check(A)
    if u.shape[1] == 1:  # a decode step has nothing to scan
        return torch_impl.ssm_scan(u, A, C, D, initial_state, starts)
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    D = None if D is None else D.float().contiguous()
    return _scan(u.contiguous(), _plain(A), _plain(C), D, _plain(initial_state), starts)


@torch.library.custom_op("crossover::ssm_scan_triton", mutates_args=())
def _scan(
    u: Tensor, A: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    return scan_forward(u, A, C, D, initial_state, starts)


@_scan.register_fake
def _(u, A, C, D, initial_state, starts):
    return u.new_empty(u.shape), initial_state.new_empty(initial_state.shape)


@torch.library.custom_op("crossover::ssm_scan_triton_backward", mutates_args=())
def _scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return scan_backward(grad_y, grad_state, u, A, C, D, initial_state, starts)


@_scan_backward.register_fake
def _(grad_y, grad_state, u, A, C, D, initial_state, starts):
    grad_D = u.new_empty(u.shape[2], dtype=torch.float32)
    return u.new_empty(u.shape), *(t.new_empty(t.shape) for t in (A, C)), grad_D, torch.empty_like(initial_state)


def _scan_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(True)


def _scan_gradients(ctx, grad_y: Tensor, grad_state: Tensor):
    inputs = ctx.saved_tensors
    grad_u, grad_A, grad_C, grad_D, grad_initial = _scan_backward(grad_y, grad_state, *inputs)
    return grad_u, grad_A, grad_C, None if inputs[3] is None else grad_D, grad_initial, None


_scan.register_autograd(_scan_gradients, setup_context=_scan_setup)


def configuration(batch: int, E: int, N: int) -> dict[str, int]:
    """Layout of the kernels: up to eight states in a thread, fewer where there are not enough threads otherwise.

    Tensors of states are [M, W, NL, DL]: M states in registers, W warps over channels, NL lanes over states and DL over
    channels, 32 in all; Triton's default layout deals them out in just this order (selective_scan says how to keep it).
    """
    states = triton.next_power_of_2(N)
    lanes = max(1, states // 8)
    while lanes < min(states, 32) and batch * E * lanes < ENOUGH_THREADS:
        lanes *= 2
    channels = 32 // lanes
    warps = min(4, triton.next_power_of_2(triton.cdiv(E, channels)))
    return {"T": 8, "M": states // lanes, "W": warps, "NL": lanes, "DL": channels, "num_warps": warps}


def scan_forward(
    u: Tensor, A: Tensor, C: Tensor, D: Tensor | None, initial_state: Tensor, starts: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y, (B, L, E), and the final state, (B, E, N)."""
    return _walk(u, A, C, D, initial_state, starts, reverse=False)


def scan_backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    A: Tensor,
    C: Tensor,
    D: Tensor | None,
    initial_state: Tensor,
    starts: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, A, C, D (zero where it is absent) and the initial state."""
    (batch, L, E), N = u.shape, A.shape[1]
    grad_y, entering = grad_y.contiguous(), _plain(grad_state.conj())
    grad_u, leaving = _walk(grad_y, A, C, D, entering, starts, reverse=True)

    # every program writes its own part of the sums over rows: of g h, of g s, and the last s
    states, slopes, last = (A.new_empty(batch, E, N) for _ in range(3))
    skips = torch.empty(batch, E, dtype=torch.float32, device=u.device)
    config = configuration(batch, E, N)
    launch(
        _sums_kernel,
        (triton.cdiv(E, config["W"] * config["DL"]), batch),
        *(u, grad_y, torch.view_as_real(torch.exp(A)), torch.view_as_real(initial_state), _marks(starts)),
        *(torch.view_as_real(t) for t in (states, slopes, last)),
        *(skips, L, E),
        N=N,
        **config,
    )
    grad_A = 2 * C * slopes.sum(0) + (entering * last).sum(0)
    grad_C = 2 * states.sum(0)
    return grad_u, *(t.conj().resolve_conj() for t in (grad_A, grad_C)), skips.sum(0), leaving.conj().resolve_conj()


def _walk(
    x: Tensor, A: Tensor, C: Tensor, D: Tensor | None, state: Tensor, starts: Tensor | None, *, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The recurrence from a state over x, (B, L, E), in either direction."""
    (batch, L, E), N = x.shape, A.shape[1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    last = torch.empty_like(state)
    config = configuration(batch, E, N)
    launch(
        _scan_kernel,
        (triton.cdiv(E, config["W"] * config["DL"]), batch),
        *(x, *(torch.view_as_real(t) for t in (torch.exp(A), C)), D, torch.view_as_real(state), _marks(starts)),
        *(y, torch.view_as_real(last), L, E),
        N=N,
        REVERSE=reverse,
        **config,
    )
    return y, last


def _marks(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)


@triton.jit
def _places(E, N: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr):
    """Channels of this program, [W, DL], and of its states, [M, W, NL, DL], the offsets in (E, N) and which exist."""
    first = tl.program_id(0) * (W * DL)
    channel = first + (tl.arange(0, W) * DL)[:, None] + tl.arange(0, DL)[None, :]
    n = (tl.arange(0, M) * NL)[:, None] + tl.arange(0, NL)[None, :]
    offsets = channel[None, :, None, :] * N + n[:, None, :, None]
    return channel, offsets, (channel < E)[None, :, None, :] & (n < N)[:, None, :, None]


@triton.jit
def _load_states(X, offsets, mask):
    """Real and imaginary parts, summed over an axis of one, behind which the layout of the load does not reach."""
    re, im = _load_complex(X, offsets, mask)
    return tl.sum(re[None], 0), tl.sum(im[None], 0)


@triton.jit
def _load_tokens(X, offsets, channel, E):
    """Numbers of some tokens in float32, [T, W, DL]."""
    return tl.load(X + offsets, mask=(channel < E)[None], other=0.0).to(tl.float32)


@triton.jit
def _for_states(x, T: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr):
    """The same for every state, [T, M, W, NL, DL]: in the layout of the states, where M copies are one register."""
    return tl.broadcast_to(x[:, None, :, None, :], [T, M, W, NL, DL])


@triton.jit
def _pick(x, i: tl.constexpr, T: tl.constexpr):
    """x at token i: no instruction, since a register's token is known and integer zeros add up to nothing."""
    here = (tl.arange(0, T) == i)[:, None, None, None, None]
    return tl.sum(tl.where(here, x.to(tl.int32, bitcast=True), 0), 0).to(tl.float32, bitcast=True)


@triton.jit
def _put(y, value, i: tl.constexpr, T: tl.constexpr):
    """y, [T, W, NL, DL], with `value` at token i."""
    return tl.where((tl.arange(0, T) == i)[:, None, None, None], value[None], y)


@triton.jit
def _forget(STARTS, re, im):
    """The state, or zero where the token begins a document."""
    start = tl.load(STARTS) != 0
    return tl.where(start, 0.0, re), tl.where(start, 0.0, im)


@triton.jit
def _step(a_re, a_im, h_re, h_im, x):
    """a h + x in four fused multiply-adds."""
    return x - a_im * h_im + a_re * h_re, a_re * h_im + a_im * h_re


@triton.jit
def _scan_tokens(
    X, Y, STARTS, a_re, a_im, c_re, c_im, skip, h_re, h_im, channel, E, row, first, last,
    REVERSE: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Takes the state through the tokens first .. last - 1 of a row that begins at `row`; c is twice the residue."""
    offsets = (tl.arange(0, T) * E)[:, None, None] + channel[None]
    for step in range(first, last, T):
        t = first + last - T - step if REVERSE else step
        x = _load_tokens(X + (row + t) * E, offsets, channel, E)
        inputs = _for_states(x, T, M, W, NL, DL)
        y = tl.zeros([T, W, NL, DL], tl.float32)
        if REVERSE:
            for i in tl.static_range(T - 1, -1, -1):
                x_i = _pick(inputs, i, T)
                h_re, h_im = h_re + c_re * x_i, h_im + c_im * x_i
                y = _put(y, tl.sum(h_re, 0), i, T)
                h_re, h_im = _multiply(a_re, a_im, h_re, h_im)
                if STARTS is not None:
                    h_re, h_im = _forget(STARTS + row + t + i, h_re, h_im)
        else:
            for i in tl.static_range(T):
                if STARTS is not None:
                    h_re, h_im = _forget(STARTS + row + t + i, h_re, h_im)
                h_re, h_im = _step(a_re, a_im, h_re, h_im, _pick(inputs, i, T))
                y = _put(y, tl.sum(c_re * h_re - c_im * h_im, 0), i, T)
        total = tl.sum(y, 2) + skip[None] * x
        tl.store(Y + (row + t) * E + offsets, total.to(Y.dtype.element_ty), mask=(channel < E)[None])
    return h_re, h_im


@triton.jit
def _scan_kernel(
    X, A, C, D, FIRST, STARTS, Y, LAST, L, E, N: tl.constexpr, REVERSE: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # grid (E / (W DL), B); A is the decay of a step  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel, of_state, exists = _places(E, N, M, W, NL, DL)
    a_re, a_im = _load_states(A, of_state, exists)
    c_re, c_im = _load_states(C, of_state, exists)
    c_re, c_im = 2.0 * c_re, 2.0 * c_im
    h_re, h_im = _load_states(FIRST, b * E * N + of_state, exists)
    skip = tl.zeros([W, DL], tl.float32)
    if D is not None:
        skip = tl.load(D + channel, mask=channel < E, other=0.0)
    row = b * L
    n_whole = L // T * T  # beyond it, tokens one by one
    if REVERSE:
        h_re, h_im = _scan_tokens(
            X,
            Y,
            STARTS,
            a_re,
            a_im,
            c_re,
            c_im,
            skip,
            h_re,
            h_im,
            channel,
            E,
            row,
            n_whole,
            L,
            REVERSE,
            1,
            M,
            W,
            NL,
            DL,
        )
        h_re, h_im = _scan_tokens(
            X,
            Y,
            STARTS,
            a_re,
            a_im,
            c_re,
            c_im,
            skip,
            h_re,
            h_im,
            channel,
            E,
            row,
            0,
            n_whole,
            REVERSE,
            T,
            M,
            W,
            NL,
            DL,
        )
    else:
        h_re, h_im = _scan_tokens(
            X,
            Y,
            STARTS,
            a_re,
            a_im,
            c_re,
            c_im,
            skip,
            h_re,
            h_im,
            channel,
            E,
            row,
            0,
            n_whole,
            REVERSE,
            T,
            M,
            W,
            NL,
            DL,
        )
        h_re, h_im = _scan_tokens(
            X,
            Y,
            STARTS,
            a_re,
            a_im,
            c_re,
            c_im,
            skip,
            h_re,
            h_im,
            channel,
            E,
            row,
            n_whole,
            L,
            REVERSE,
            1,
            M,
            W,
            NL,
            DL,
        )
    _store_complex(LAST, b * E * N + of_state, h_re, h_im, exists)


@triton.jit
def _sum_tokens(
    X, G, STARTS, a_re, a_im, h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip, channel, E, row, first, last,
    T: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    """Takes the state h, s = dh/dA and the sums of g h, g s and g x through tokens, as _scan_tokens does."""
    offsets = (tl.arange(0, T) * E)[:, None, None] + channel[None]
    for t in range(first, last, T):
        x, g = (
            _load_tokens(X + (row + t) * E, offsets, channel, E),
            _load_tokens(G + (row + t) * E, offsets, channel, E),
        )
        skip += tl.sum(g * x, 0)
        inputs, grads = _for_states(x, T, M, W, NL, DL), _for_states(g, T, M, W, NL, DL)
        for i in tl.static_range(T):
            x_i, g_i = _pick(inputs, i, T), _pick(grads, i, T)
            if STARTS is not None:
                h_re, h_im = _forget(STARTS + row + t + i, h_re, h_im)
                s_re, s_im = _forget(STARTS + row + t + i, s_re, s_im)
            s_re, s_im = _multiply(a_re, a_im, s_re + h_re, s_im + h_im)
            h_re, h_im = _step(a_re, a_im, h_re, h_im, x_i)
            gh_re, gh_im = gh_re + g_i * h_re, gh_im + g_i * h_im
            gs_re, gs_im = gs_re + g_i * s_re, gs_im + g_i * s_im
    return h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip


@triton.jit
def _sums_kernel(
    X, G, A, FIRST, STARTS, GH, GS, SLOPE, SKIP, L, E, N: tl.constexpr,
    T: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # grid (E / (W DL), B); A is the decay of a step  # fmt: skip
    b = tl.program_id(1).to(tl.int64)
    channel, of_state, exists = _places(E, N, M, W, NL, DL)
    a_re, a_im = _load_states(A, of_state, exists)
    of_state += b * E * N
    h_re, h_im = _load_states(FIRST, of_state, exists)
    zero = tl.zeros([M, W, NL, DL], tl.float32)
    s_re, s_im, gh_re, gh_im, gs_re, gs_im = zero, zero, zero, zero, zero, zero
    skip = tl.zeros([W, DL], tl.float32)
    row = b * L
    n_whole = L // T * T  # beyond it, tokens one by one
    h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip = _sum_tokens(
        X, G, STARTS, a_re, a_im, h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip, channel, E, row, 0, n_whole,
        T, M, W, NL, DL,
    )  # fmt: skip
    h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip = _sum_tokens(
        X, G, STARTS, a_re, a_im, h_re, h_im, s_re, s_im, gh_re, gh_im, gs_re, gs_im, skip, channel, E, row, n_whole, L,
        1, M, W, NL, DL,
    )  # fmt: skip
    _store_complex(GH, of_state, gh_re, gh_im, exists)
    _store_complex(GS, of_state, gs_re, gs_im, exists)
    _store_complex(SLOPE, of_state, s_re, s_im, exists)
    tl.store(SKIP + b * E + channel, skip, mask=channel < E)
