"""S4's kernel from its poles, the convolution with it and the recurrence for the GPU.

Backward keeps nothing but the inputs. Poles do not depend on time, so no token costs an exponential, and what poles and
residues get is a sum that runs forward beside the state, with s = dh/dA:

    h[t] = a h[t-1] + u[t],   s[t] = a (s[t-1] + h[t-1]),   dL/dC = 2 sum_t g[t] h[t],   dL/dA = 2 C sum_t g[t] s[t],

where a = exp(A) and g is the gradient of y. The input's gradient is the same recurrence from the last token to the
first. All sums are taken in a fixed order, so results repeat bit for bit.

Triton has no complex numbers: real and imaginary parts are read from and written to PyTorch's own pairs. PyTorch's
gradient of a complex number is the conjugate of the derivative above; that is taken outside of the kernels.

The convolution is a matrix product. Of sequences that are cut into blocks of T tokens, a block of outputs is

    y_i = sum_j K_(i-j) u_j,   K_d[r, c] = kernel[d T + r - c], zero where that is before the first tap,

and every channel multiplies the same Toeplitz matrices with the blocks of all its rows, side by side as columns. The
input's gradient takes them transposed. The gradient of the kernel is sum_i g_i u_(i-d)^T, a T x T matrix for each lag d
of blocks, of which a tap is the sum of a diagonal. The work grows with the square of the length: a long sequence is
left to PyTorch's FFT.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..operators import differentiable, operator
from ..triton_kernels import exp, launch
from . import torch_impl

MAX_STATES = 256
"""Largest number of poles of a channel: they are divided among the lanes of a warp, up to eight each."""

POWERS = 32
"""Steps of ssm_kernel that a program takes at a time, a lane for each."""

SPAN = 64 * POWERS
"""Steps of a program of ssm_kernel: each POWERS of them multiply its factor once, and errors add up."""


ENOUGH_THREADS = 528 * 32
"""Threads to aim at: a warp for each scheduler of a large GPU."""

BLOCK = 64
"""Tokens of a block of long_conv, T above: rows of a matrix, which the matrix units of all GPUs take whole."""

STEP = 32
"""Columns of a Toeplitz matrix that are multiplied at a time: more would not fit the registers."""


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


def kernel_forward(A: Tensor, C: Tensor, length: int) -> Tensor:
    """K, (E, L)."""
    E, N = A.shape
    K = torch.empty(E, length, dtype=torch.float32, device=A.device)
    block = triton.next_power_of_2(N)
    launch(
        _response_kernel, (E, triton.cdiv(length, SPAN)),
        torch.view_as_real(A), torch.view_as_real(C), K, length,
        N=N, BLOCK=block, POWERS=POWERS, SPAN=SPAN, num_warps=max(1, block // 32),
    )  # fmt: skip
    return K


def kernel_backward(grad: Tensor, A: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of A and C from that of K."""
    (E, N), length = A.shape, grad.shape[1]
    n_spans = triton.cdiv(length, SPAN)
    sums, timed = (A.new_empty(n_spans, E, N) for _ in range(2))  # of g[t] exp(A t) and t g[t] exp(A t)
    block = triton.next_power_of_2(N)
    launch(
        _response_gradient_kernel, (E, n_spans),
        torch.view_as_real(A), grad.contiguous(), torch.view_as_real(sums), torch.view_as_real(timed), length,
        N=N, BLOCK=block, POWERS=POWERS, SPAN=SPAN, num_warps=max(1, block // 16),
    )  # fmt: skip
    return (2 * C * timed.sum(0)).conj().resolve_conj(), (2 * sums.sum(0)).conj().resolve_conj()


_kernel = operator("ssm_kernel_triton", kernel_forward)
_kernel_backward = operator("ssm_kernel_triton_backward", kernel_backward)


def _kernel_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[:2])


def _kernel_gradients(ctx, grad: Tensor):
    return *_kernel_backward(grad, *ctx.saved_tensors), None


differentiable(_kernel, _kernel_gradients, _kernel_setup)


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


# The convolution


def long_conv(u: Tensor, kernel: Tensor, D: Tensor | None = None) -> Tensor:
    """Same contract as reference.long_conv. Differentiable once. Where products_win says no, the FFT is cuFFT's.

    A channel's tokens are neighbours inside, which makes columns of a matrix of them, so u and y are transposed here,
    as for the FFT: one more read and write of each, which torch.compile can do together with what is around.
    """
    if not products_win(u.shape[0], u.shape[1], u.dtype):
        return torch_impl.long_conv(u, kernel, D)
    return _conv(u.mT.contiguous(), kernel.float(), None if D is None else D.float()).mT.contiguous()


def products_win(batch: int, length: int, dtype: torch.dtype) -> bool:
    """Whether matrix products take less time than the FFT: a prediction, which no GPU has confirmed.

    Counted for each token and channel. The FFT moves 104 bytes: padding to 2 L 12, two transforms 32, the product of
    the spectra 16, the copy and the scaling of the inverse 32, the skip connection 12. Products move six numbers, two
    for the transposition of u, two for that of y, two in the kernel, and multiply half of the length with it, plus
    half of the blocks that are side by side, whose own past differs; 2 FLOPs each, twice for bfloat16 and three times
    for float32 at half the rate. Half of the peak of an H100 or an A100 is about 100 FLOPs in bfloat16 for each byte.
    """
    _, blocks = columns(batch, length, most_columns(dtype))
    taps = (length + min(length, blocks * BLOCK)) / 2
    flops = 2 * taps * (2 if dtype == torch.bfloat16 else 2 * 3)
    return 6 * dtype.itemsize + flops / 100 <= 104


def most_columns(dtype: torch.dtype) -> int:
    """Columns for which the registers suffice. Float32, and float16 as float32, is multiplied in more parts."""
    return 128 if dtype == torch.bfloat16 else 64


def columns(batch: int, length: int, most: int) -> tuple[int, int]:
    """Rows and consecutive blocks of each that are columns side by side, 16 to `most`; as many rows as there are."""
    rows = min(most, triton.next_power_of_2(batch))
    blocks = min(most // rows, triton.next_power_of_2(triton.cdiv(length, BLOCK)))
    return rows, max(blocks, 16 // rows)


def conv_forward(x: Tensor, kernel: Tensor, D: Tensor | None) -> Tensor:
    """y, (B, E, L), of x, (B, E, L), the kernel, (E, L), and D, (E,), in float32."""
    return _multiply_blocks(x, kernel, D, transposed=False)


def input_gradient(grad: Tensor, kernel: Tensor, D: Tensor | None) -> Tensor:
    """The gradient of x, (B, E, L), from that of y."""
    return _multiply_blocks(grad, kernel, D, transposed=True)


def _multiply_blocks(x: Tensor, kernel: Tensor, D: Tensor | None, *, transposed: bool) -> Tensor:
    """Products with the Toeplitz matrices of the kernel, or with these transposed, (B, E, L)."""
    batch, E, L = x.shape
    n_blocks = triton.cdiv(L, BLOCK)
    # zeros around the taps: masks would double what the kernel executes
    taps = F.pad(kernel, (BLOCK, n_blocks * BLOCK - L))
    if D is not None:
        taps[:, BLOCK] += D
    y = torch.empty_like(x)
    rows, blocks = columns(batch, L, most_columns(x.dtype))
    launch(
        _toeplitz_kernel, (triton.cdiv(n_blocks, blocks) * E, triton.cdiv(batch, rows)),
        x, taps, y, batch, L, E,
        TRANSPOSED=transposed, T=BLOCK, STEP=STEP, ROWS=rows, BLOCKS=blocks, num_warps=4, num_stages=3,
    )  # fmt: skip
    return y


def kernel_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient of the kernel, (E, L), in float32, from that of y and from x, (B, E, L)."""
    batch, E, L = x.shape
    n_blocks = triton.cdiv(L, BLOCK)
    # by lag of blocks: sums of the diagonals above the main one, of taps of the lag before, and of the others
    sums = torch.empty(E, n_blocks, 2, BLOCK, dtype=torch.float32, device=x.device)
    rows, blocks = columns(batch, L, most_columns(x.dtype) // 2)  # both factors are loaded anew
    launch(
        _correlation_kernel, (n_blocks * E,),
        grad, x, sums, batch, L, E,
        T=BLOCK, ROWS=rows, BLOCKS=blocks, num_warps=4, num_stages=3,
    )  # fmt: skip
    taps = sums[:, :, 1]
    taps[:, :-1] += sums[:, 1:, 0]
    return taps.flatten(1)[:, :L].contiguous()


def conv_backward(
    grad: Tensor, x: Tensor, kernel: Tensor, D: Tensor | None, with_x: bool, with_kernel: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the kernel; empty where not asked for."""
    grad = grad.contiguous()
    return (
        input_gradient(grad, kernel, D) if with_x else x.new_empty(0),
        kernel_gradient(grad, x) if with_kernel else kernel.new_empty(0),
    )


_conv = operator("long_conv_triton", conv_forward)
_conv_backward = operator("long_conv_triton_backward", conv_backward)


def _conv_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _conv_gradients(ctx, grad: Tensor):
    with_x, with_kernel, with_D = ctx.needs_input_grad
    grad_x, grad_kernel = _conv_backward(grad, *ctx.saved_tensors, with_x, with_kernel or with_D)
    return (
        grad_x if with_x else None,
        grad_kernel if with_kernel else None,
        grad_kernel[:, 0].clone() if with_D else None,  # the skip connection is a part of the first tap
    )


differentiable(_conv, _conv_gradients, _conv_setup)


@triton.jit
def _times(k, x, acc):
    """acc + k x for k in float32, which two numbers of bfloat16 hold to 16 bits."""
    if x.dtype == tl.bfloat16:
        high = k.to(tl.bfloat16)
        low = (k - high.to(tl.float32)).to(tl.bfloat16)
        return tl.dot(low, x, tl.dot(high, x, acc))
    # float16 has no room for the small taps of a long kernel
    return tl.dot(k, x.to(tl.float32), acc, input_precision="tf32x3")


@triton.jit
def _toeplitz_kernel(
    X, TAPS, Y, B, L, E, TRANSPOSED: tl.constexpr,
    T: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # grid (groups of BLOCKS blocks and E, B / ROWS): the groups of a channel share its inputs  # fmt: skip
    n_groups = tl.cdiv(L, BLOCKS * T)
    group = tl.program_id(0) % n_groups
    if not TRANSPOSED:
        group = n_groups - 1 - group  # those with the longest past first
    e = (tl.program_id(0) // n_groups).to(tl.int64)
    column = tl.arange(0, ROWS * BLOCKS)
    b, block = tl.program_id(1) * ROWS + column // BLOCKS, group * BLOCKS + column % BLOCKS
    row, is_row, first = (b * E + e) * L, (b < B)[None, :], block * T
    r, c = tl.arange(0, T), tl.arange(0, STEP)
    TAPS += e * ((tl.cdiv(L, T) + 1) * T) + T
    # c begins `distance` tokens before the blocks of outputs, or transposed after them
    if TRANSPOSED:
        begin, end = 0, L - group * (BLOCKS * T)
    else:
        begin, end = STEP - T, (tl.minimum((group + 1) * (BLOCKS * T), L) - 1) // T * T + 1
    acc = tl.zeros([T, ROWS * BLOCKS], tl.float32)
    for distance in range(begin, end, STEP):
        if TRANSPOSED:
            lag, t = c[None, :] - r[:, None], first[None, :] + c[:, None] + distance
        else:
            lag, t = r[:, None] - c[None, :], first[None, :] + c[:, None] - distance
        k = tl.load(TAPS + distance + lag)
        x = tl.load(X + row[None, :] + t, mask=is_row & (t >= 0) & (t < L), other=0.0)
        acc = _times(k, x, acc)
    t = first[None, :] + r[:, None]
    tl.store(Y + row[None, :] + t, acc.to(Y.dtype.element_ty), mask=is_row & (t < L))


@triton.jit
def _correlation_kernel(
    DY, X, SUMS, B, L, E, T: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr
):  # grid (L / T lags of blocks and E)
    n_blocks = tl.cdiv(L, T)
    d = tl.program_id(0) % n_blocks
    e = (tl.program_id(0) // n_blocks).to(tl.int64)
    column, r = tl.arange(0, ROWS * BLOCKS), tl.arange(0, T)
    n_groups = tl.cdiv(n_blocks - d, BLOCKS)
    acc = tl.zeros([T, T], tl.float32)
    for i in range(0, n_groups * tl.cdiv(B, ROWS)):
        b, block = i // n_groups * ROWS + column // BLOCKS, i % n_groups * BLOCKS + column % BLOCKS
        row, is_row, first = (b * E + e) * L, b < B, block * T
        t, s = first[None, :] + r[:, None] + d * T, first[:, None] + r[None, :]
        dy = tl.load(DY + row[None, :] + t, mask=is_row[None, :] & (t < L), other=0.0)
        x = tl.load(X + row[:, None] + s, mask=is_row[:, None] & (s < L), other=0.0)
        acc = tl.dot(dy, x, acc, input_precision="tf32x3")
    # entry (r, c) belongs to the tap r - c after d T: each diagonal and the one T above it become a column
    wrapped = tl.gather(acc, (r[:, None] - r[None, :]) & (T - 1), 1)
    is_after = r[:, None] >= r[None, :]
    SUMS += tl.program_id(0).to(tl.int64) * (2 * T) + r
    tl.store(SUMS, tl.sum(tl.where(is_after, 0.0, wrapped), 0))
    tl.store(SUMS + T, tl.sum(tl.where(is_after, wrapped, 0.0), 0))


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
        Unsupported: if A is complex128, or has more than MAX_STATES poles a channel.
    """
    _check(A)
    if u.shape[1] == 1:  # a decode step has nothing to scan
        return torch_impl.ssm_scan(u, A, C, D, initial_state, starts)
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    D = None if D is None else D.float().contiguous()
    return _scan(u.contiguous(), _plain(A), _plain(C), D, _plain(initial_state), starts)


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
        _sums_kernel, (triton.cdiv(E, config["W"] * config["DL"]), batch),
        u, grad_y, torch.view_as_real(torch.exp(A)), torch.view_as_real(initial_state), _marks(starts),
        torch.view_as_real(states), torch.view_as_real(slopes), torch.view_as_real(last),
        skips, L, E,
        N=N, **config,
    )  # fmt: skip
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
        _scan_kernel, (triton.cdiv(E, config["W"] * config["DL"]), batch),
        x, torch.view_as_real(torch.exp(A)), torch.view_as_real(C), D, torch.view_as_real(state), _marks(starts),
        y, torch.view_as_real(last), L, E,
        N=N, REVERSE=reverse, **config,
    )  # fmt: skip
    return y, last


def _marks(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)


_scan = operator("ssm_scan_triton", scan_forward)
_scan_backward = operator("ssm_scan_triton_backward", scan_backward)


def _scan_setup(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.set_materialize_grads(True)


def _scan_gradients(ctx, grad_y: Tensor, grad_state: Tensor):
    inputs = ctx.saved_tensors
    grad_u, grad_A, grad_C, grad_D, grad_initial = _scan_backward(grad_y, grad_state, *inputs)
    return grad_u, grad_A, grad_C, None if inputs[3] is None else grad_D, grad_initial, None


differentiable(_scan, _scan_gradients, _scan_setup)


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
    """Repeats x for every state, [T, M, W, NL, DL]: in the layout of the states, where M copies are one register."""
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
    for part in tl.static_range(2):
        if part == REVERSE:
            h_re, h_im = _scan_tokens(
                X, Y, STARTS, a_re, a_im, c_re, c_im, skip, h_re, h_im, channel, E, row, 0, n_whole, REVERSE,
                T, M, W, NL, DL,
            )  # fmt: skip
        else:
            h_re, h_im = _scan_tokens(
                X, Y, STARTS, a_re, a_im, c_re, c_im, skip, h_re, h_im, channel, E, row, n_whole, L, REVERSE,
                1, M, W, NL, DL,
            )  # fmt: skip
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
