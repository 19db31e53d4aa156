"""The SSD scan for the GPU: a program walks the chunks of one head with the state in registers (arXiv:2405.21060).

Once the step sizes and their sums are laid out, forward is one kernel: neither the states between chunks nor C B^T
ever leave the multiprocessor. Where the heads are too few to fill the GPU, the sequence is cut into segments: a first
run finds what each of them adds to the state, a small kernel carries the states across, and a second run starts every
segment from its own. Backward writes out the state that enters each chunk and the gradient of the state that
leaves it, by one kernel run in either direction, and from then on treats all chunks at once: first what belongs to one
head, then the gradients of B and C, for which a program takes the heads of a group in turn and sums in registers. No
atomics: results repeat bit for bit.

Products take the inputs' own precision and accumulate in float32; decays and states are float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..documents import document_ids
from ..operators import differentiable, operator
from ..triton_kernels import LOG2_E, launch, shared_memory, sigmoid, silu, silu_slope, softplus

MAX_STATES = 256
"""Largest number of states of a head: C and B of a chunk must fit the memory of a multiprocessor."""

MAX_HEAD_DIM = 128
"""Widest head: backward has all of it in one program."""

PROGRAMS = 264
"""Programs that backward wants at least, by dividing the heads of a group: two for each multiprocessor."""

FILLED = 132
"""Programs that fill the GPU in forward: one for each multiprocessor, whose registers it takes."""

SEGMENT = 4
"""Fewest chunks of a segment: shorter ones would not be worth the second run."""

FORGOTTEN = tl.constexpr(-160.0)
"""Binary logarithm of a decay that leaves nothing in float32: the bound of one step, lest sums of them lose digits."""


def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
    chunk_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.ssd. Differentiable once.

    Args:
        chunk_len: as there; rounded down to a power of two, from 16 to 64: more does not fit the registers.

    Raises:
        Unsupported: if a head is wider than MAX_HEAD_DIM or has more than MAX_STATES states, or backward, should it
            follow, would not fit the GPU's shared memory.
    """
    P, N = x.shape[3], B.shape[3]
    if P > MAX_HEAD_DIM or N > MAX_STATES:
        raise Unsupported(f"heads of {P} x {N} are more than {MAX_HEAD_DIM} x {MAX_STATES}")
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
        room, needed = shared_memory(x.device), backward_memory(16, P, N, x.element_size())
        if needed > room:
            raise Unsupported(f"backward takes {needed} bytes of shared memory, and {x.device} has {room}")
    ids = None if starts is None else F.pad(document_ids(starts).int(), (1, 0))
    x, B, C = _tokens(x), _tokens(B.to(x.dtype)), _tokens(C.to(x.dtype))
    z = None if z is None else _tokens(z)
    A, D, dt_bias = (None if t is None else t.contiguous() for t in (A, D, dt_bias))
    return _ssd(x, _tokens(dt), A, B, C, D, z, dt_bias, initial_state, ids, dt_softplus, chunk_len or 0)


def _tokens(t: Tensor) -> Tensor:
    """The tensor with the numbers of a token side by side, copied only where it must be."""
    return t if t[0, 0].is_contiguous() else t.contiguous()


def configuration(L: int, P: int, N: int, itemsize: int, chunk_len: int = 0) -> dict[str, int]:
    """Tokens of a chunk, the part of a head that a program keeps, warps and stages of the kernels that walk the chunks.

    Numbers of four bytes take twice the memory and none of the matrix units, so their blocks are half as large.
    """
    largest = 64 if itemsize < 4 else 32
    wanted = 1 << min(chunk_len, 64).bit_length() - 1 if chunk_len else largest
    Q = max(16, min(wanted, triton.next_power_of_2(L)))
    block_p, block_n = max(16, min(largest, triton.next_power_of_2(P))), max(16, triton.next_power_of_2(N))
    warps = 8 if block_p * block_n * itemsize >= 8192 else 4
    stages = 2 if itemsize < 4 else 1
    return {"Q": Q, "BLOCK_P": block_p, "BLOCK_N": block_n, "STAGES": stages, "num_warps": warps, "num_stages": stages}


def backward_memory(Q: int, P: int, N: int, itemsize: int) -> int:
    """Bytes of shared memory that the gradients of a head need: x, that of y, B, C and the state, in whole blocks."""
    P, N = (max(16, triton.next_power_of_2(width)) for width in (P, N))
    return itemsize * (2 * Q * P + 2 * Q * N + P * N)


def splits(programs: int, heads_per_group: int) -> int:
    """Parts that the heads of a group are divided into, for at least PROGRAMS in all where there are heads enough."""
    divisors = [n for n in range(1, heads_per_group + 1) if heads_per_group % n == 0]
    return next((n for n in divisors if n * programs >= PROGRAMS), heads_per_group)


def segment_chunks(programs: int, n_chunks: int) -> int:
    """Chunks of a segment: as few as fill the GPU, or all of them where the heads alone fill more than half of it."""
    n_segments = min(FILLED // programs, n_chunks // SEGMENT)
    return triton.cdiv(n_chunks, n_segments) if n_segments > 1 else n_chunks


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    dt_softplus: bool,
    chunk_len: int,
) -> tuple[Tensor, Tensor]:
    """y and the final state; `ids` numbers the documents of the tokens, (B, 1 + L), after a zero."""
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    config = configuration(L, P, N, x.element_size(), chunk_len)
    steps, sums = _steps(dt, A, dt_bias, dt_softplus, config["Q"])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    state = torch.empty(batch, H, P, N, dtype=torch.float32, device=x.device)
    h = None if initial_state is None else initial_state.float().contiguous()
    n_chunks, n_parts = triton.cdiv(L, config["Q"]), triton.cdiv(P, config["BLOCK_P"])
    span = segment_chunks(batch * H * n_parts, n_chunks) * config["Q"]
    n_segments = triton.cdiv(L, span)

    def walk(c: Tensor | None, d: Tensor | None, z: Tensor | None, *rest: Tensor | None) -> None:
        launch(
            _forward_kernel, (batch * H, n_parts, n_segments),
            x, steps, sums, B, c, d, z, *rest, L, H, H // G, span,
            *_strides(x, B, c, z),
            **config, P=P, N=N,
        )  # fmt: skip

    if n_segments == 1:
        walk(C, D, z, h, ids, y, state, None)
        return y, state
    added, entering = (torch.empty(n_segments, *state.shape, dtype=torch.float32, device=x.device) for _ in range(2))
    kept = torch.empty(n_segments, batch * H, dtype=torch.float32, device=x.device)
    walk(None, None, None, None, ids, None, added, kept)
    block = min(1024, triton.next_power_of_2(P * N))
    launch(
        _carry_kernel, (batch * H, triton.cdiv(P * N, block)),
        added, kept, h, entering, state, n_segments, P * N,
        BLOCK=block, num_warps=4, num_stages=1,
    )  # fmt: skip
    walk(C, D, z, entering, ids, y, None, None)
    return y, state


def _strides(*tensors: Tensor | None) -> tuple[int, ...]:
    """Lists the strides of batch and token, for each tensor."""
    return tuple(s for t in tensors for s in ((0, 0) if t is None else t.stride()[:2]))


def _steps(dt: Tensor, A: Tensor, dt_bias: Tensor | None, dt_softplus: bool, Q: int) -> tuple[Tensor, Tensor]:
    """Step sizes, (B, H, chunks * Q), and, from the start of each chunk, sums of the binary logarithms of the decays.

    The sums are (B, H, chunks, 2, Q): float32 and what that leaves of them, so that a difference of two is as good as
    the sum of what lies between. Beyond the end steps are zero, which leaves the state as it is.
    """
    batch, L, H = dt.shape
    n_chunks = triton.cdiv(L, Q)
    steps = torch.empty(batch, H, n_chunks * Q, dtype=torch.float32, device=dt.device)
    sums = torch.empty(batch, H, n_chunks, 2, Q, dtype=torch.float32, device=dt.device)
    block = min(32, triton.next_power_of_2(H))
    launch(
        _steps_kernel, (batch * n_chunks, triton.cdiv(H, block)),
        dt, A, dt_bias, steps, sums, L, H, n_chunks, *_strides(dt),
        Q=Q, BLOCK_H=block, SOFTPLUS=dt_softplus, num_warps=4, num_stages=1,
    )  # fmt: skip
    return steps, sums


def backward(
    grad_y: Tensor,
    grad_state: Tensor | None,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    ids: Tensor | None,
    dt_softplus: bool,
    chunk_len: int,
) -> list[Tensor]:
    """Gradients of x, dt, A, B, C, D, z, dt_bias and initial_state in this order; empty for what is absent."""
    (batch, L, H, P), (G, N) = x.shape, B.shape[2:]
    grad_y = _tokens(grad_y.to(x.dtype))
    config = configuration(L, P, N, x.element_size(), chunk_len)
    while config["Q"] > 16 and backward_memory(config["Q"], P, N, x.element_size()) > shared_memory(x.device):
        config["Q"] //= 2
    steps, sums = _steps(dt, A, dt_bias, dt_softplus, config["Q"])
    n_chunks = triton.cdiv(L, config["Q"])

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=x.device)

    states, grad_states = (empty(batch, n_chunks, H, N, P, dtype=x.dtype) for _ in range(2))
    grad_initial = empty(0) if initial_state is None else empty(batch, H, P, N)
    first, last = (None if t is None else t.float().contiguous() for t in (initial_state, grad_state))
    gated = grad_y if z is None else empty(*x.shape, dtype=x.dtype)
    for reverse, arguments in (
        (False, (x, B, None, None, first, states, None)),
        (True, (grad_y, C, z, gated, last, grad_states, None if initial_state is None else grad_initial)),
    ):
        launch(
            _states_kernel, (batch * H, triton.cdiv(P, config["BLOCK_P"])),
            *arguments, steps, sums, ids, L, H, H // G, n_chunks,
            *_strides(*arguments[:3]),
            **config, P=P, N=N, REVERSE=reverse,
        )  # fmt: skip

    constants = {"Q": config["Q"], "BLOCK_P": max(16, triton.next_power_of_2(P)), "BLOCK_N": config["BLOCK_N"]}
    grad_x, grad_dt = empty(*x.shape, dtype=x.dtype), empty(*dt.shape, dtype=dt.dtype)
    grad_z = empty(0, dtype=x.dtype) if z is None else empty(*z.shape, dtype=z.dtype)
    parts = empty(3, batch * n_chunks, H)  # gradients of A, D and dt_bias from every chunk
    launch(
        _heads_kernel, (batch * n_chunks * H,),
        grad_y, gated, x, dt, A, B, C, D, z, dt_bias, steps, sums, ids, states, grad_states,
        grad_x, grad_dt, grad_z if z is not None else None, parts, L, H, H // G, n_chunks, batch * n_chunks * H,
        *_strides(grad_y, gated, x, dt, B, C, z),
        **constants, P=P, N=N, SOFTPLUS=dt_softplus, num_warps=8 if x.element_size() < 4 else 16, num_stages=1,
    )  # fmt: skip
    grad_A, grad_D, grad_bias = (
        empty(0) if t is None else part.sum(0).to(t.dtype) for t, part in zip((A, D, dt_bias), parts, strict=True)
    )

    n_splits = splits(batch * n_chunks * G, H // G)
    sum_dtype = B.dtype if n_splits == 1 else torch.float32
    grad_B, grad_C = (empty(n_splits, batch, L, G, N, dtype=sum_dtype) for _ in range(2))
    launch(
        _groups_kernel, (batch * n_chunks, G * n_splits),
        gated, x, B, C, steps, sums, ids, states, grad_states, grad_B, grad_C,
        L, H, H // G, n_chunks, batch, G, n_splits,
        *_strides(gated, x, B, C),
        **constants, P=P, N=N, num_warps=8, num_stages=1,
    )  # fmt: skip
    grad_B, grad_C = (t[0] if n_splits == 1 else t.sum(0).to(B.dtype) for t in (grad_B, grad_C))
    return [grad_x, grad_dt, grad_A, grad_B, grad_C, grad_D, grad_z, grad_bias, grad_initial]


_ssd = operator("ssd_triton", forward)
_ssd_backward = operator("ssd_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.dt_softplus, ctx.chunk_len = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_y: Tensor | None, grad_state: Tensor | None):
    tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    grads = _ssd_backward(grad_y, grad_state, *tensors, ctx.dt_softplus, ctx.chunk_len)
    return *(None if t is None else g for t, g in zip(tensors[:9], grads, strict=True)), None, None, None


differentiable(_ssd, _backward, _setup_context)


@triton.jit
def _steps_kernel(
    DT, A, BIAS, STEPS, SUMS, L, H, n_chunks, stride_b, stride_t,
    Q: tl.constexpr, BLOCK_H: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # grid (B * chunks, H / BLOCK_H)  # fmt: skip
    batch, chunk = (tl.program_id(0) // n_chunks).to(tl.int64), (tl.program_id(0) % n_chunks).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    t = chunk * Q + tl.arange(0, Q)
    inside = (t < L)[:, None] & (h < H)[None, :]
    dt = tl.load(DT + batch * stride_b + t[:, None] * stride_t + h[None, :], mask=inside, other=0.0).to(tl.float32)
    if BIAS is not None:
        dt += tl.load(BIAS + h, mask=h < H, other=0.0).to(tl.float32)[None, :]
    if SOFTPLUS:
        dt = softplus(dt)
    dt = tl.where(inside, dt, 0.0)
    a = tl.load(A + h, mask=h < H, other=0.0).to(tl.float32) * LOG2_E
    out = (batch * H + h[None, :]) * (n_chunks * Q) + t[:, None]
    tl.store(STEPS + out, dt, mask=(h < H)[None, :])
    sums = tl.cumsum(tl.maximum(dt * a[None, :], FORGOTTEN).to(tl.float64), 0)
    rounded = sums.to(tl.float32)
    SUMS += (batch * H + h[None, :]) * (2 * n_chunks * Q) + chunk * (2 * Q) + tl.arange(0, Q)[:, None]
    tl.store(SUMS, rounded, mask=(h < H)[None, :])
    tl.store(SUMS + Q, (sums - rounded.to(tl.float64)).to(tl.float32), mask=(h < H)[None, :])


@triton.jit
def _decays(SUMS, IDS, q, left, Q: tl.constexpr):
    """Decay from the entering state to each token, from each token to the leaving state, and from state to state.

    SUMS points at the chunk, IDS at the token before it; `left` tokens remain.
    """
    s, rest = tl.load(SUMS + q), tl.load(SUMS + Q + q)
    total, rest_of_total = tl.load(SUMS + Q - 1), tl.load(SUMS + 2 * Q - 1)
    enter, leave, whole = tl.exp2(s), tl.exp2((total - s) + (rest_of_total - rest)), tl.exp2(total)
    if IDS is not None:
        here = tl.load(IDS + 1 + q, mask=q < left, other=-1)
        entering, leaving = tl.load(IDS), tl.load(IDS + tl.minimum(left, Q))
        enter = tl.where(here == entering, enter, 0.0)
        leave = tl.where(here == leaving, leave, 0.0)
        whole = tl.where(entering == leaving, whole, 0.0)
    return enter, leave, whole


@triton.jit
def _pair_decay(SUMS, IDS, q, left, Q: tl.constexpr):
    """Decay from token j to token i of the same chunk, (Q, Q): zero above the diagonal and across starts."""
    s, rest = tl.load(SUMS + q), tl.load(SUMS + Q + q)
    related = q[:, None] >= q[None, :]
    if IDS is not None:
        here = tl.load(IDS + 1 + q, mask=q < left, other=-1)
        related = related & (here[:, None] == here[None, :])
    # masked before the exponential, which would overflow above the diagonal
    between = (s[:, None] - s[None, :]) + (rest[:, None] - rest[None, :])
    return tl.exp2(tl.where(related, between, -float("inf")))


@triton.jit
def _forward_kernel(
    X, STEPS, SUMS, B, C, D, Z, H0, IDS, Y, HT, KEPT, L, H, heads_per_group, span,
    stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct, stride_zb, stride_zt,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):  # grid (B * H, P / BLOCK_P, L / span)  # fmt: skip
    """The outputs of a segment of `span` tokens, and what is in the state after it and has been KEPT of that before.

    Both without Y: the state alone.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    group = head // heads_per_group
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    begin = tl.program_id(2).to(tl.int64) * span
    # pointers move from chunk to chunk: 32-bit offsets within one never overflow
    X += batch * stride_xb + begin * stride_xt + head * P
    B += batch * stride_bb + begin * stride_bt + group * N
    STEPS += tl.program_id(0).to(tl.int64) * (tl.cdiv(L, Q) * Q) + begin
    SUMS += 2 * (tl.program_id(0).to(tl.int64) * (tl.cdiv(L, Q) * Q) + begin)
    if Y is not None:
        Y += ((batch * L + begin) * H + head) * P
        C += batch * stride_cb + begin * stride_ct + group * N
    if Z is not None:
        Z += batch * stride_zb + begin * stride_zt + head * P
    if IDS is not None:
        IDS += batch * (L + 1) + begin
    of_head = tl.program_id(2).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    corner = of_head * (P * N) + p[None, :] * N + n[:, None]
    of_state = (n < N)[:, None] & (p < P)[None, :]
    h = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if H0 is not None:
        h += tl.load(H0 + corner, mask=of_state, other=0.0)
    kept = 1.0
    remaining = L - tl.program_id(2) * span
    for first in tl.range(0, tl.minimum(remaining, span), Q, num_stages=STAGES):
        left = remaining - first
        of_x = (q < left)[:, None] & (p < P)[None, :]
        of_b = (q < left)[:, None] & (n < N)[None, :]
        x = tl.load(X + q[:, None] * stride_xt + p[None, :], mask=of_x, other=0.0)
        b = tl.load(B + q[:, None] * stride_bt + n[None, :], mask=of_b, other=0.0)
        dt = tl.load(STEPS + q)
        enter, leave, whole = _decays(SUMS, IDS, q, left, Q)
        if Y is not None:
            c = tl.load(C + q[:, None] * stride_ct + n[None, :], mask=of_b, other=0.0)
            y = tl.dot(c, h.to(c.dtype), input_precision="ieee") * enter[:, None]
            mixing = tl.dot(c, tl.trans(b), input_precision="ieee") * _pair_decay(SUMS, IDS, q, left, Q) * dt[None, :]
            y = tl.dot(mixing.to(x.dtype), x, y, input_precision="ieee")
            if D is not None:
                y += tl.load(D + head).to(tl.float32) * x.to(tl.float32)
            if Z is not None:
                y *= silu(tl.load(Z + q[:, None] * stride_zt + p[None, :], mask=of_x, other=0.0).to(tl.float32))
                Z += Q * stride_zt
            tl.store(Y + q[:, None] * (H * P) + p[None, :], y.to(Y.dtype.element_ty), mask=of_x)
            Y += Q * (H * P)
            C += Q * stride_ct
        u = (x.to(tl.float32) * (dt * leave)[:, None]).to(x.dtype)
        h = tl.dot(tl.trans(b), u, h * whole, input_precision="ieee")
        X += Q * stride_xt
        B += Q * stride_bt
        STEPS += Q
        SUMS += 2 * Q
        if IDS is not None:
            IDS += Q
        if KEPT is not None:
            kept *= whole
    if HT is not None:
        tl.store(HT + corner, h, mask=of_state)
    if KEPT is not None:
        tl.store(KEPT + of_head, kept, mask=tl.program_id(1) == 0)


@triton.jit
def _carry_kernel(
    ADDED, KEPT, FIRST, ENTERING, LAST, n_segments, size, BLOCK: tl.constexpr
):  # grid (B * H, P * N / BLOCK)
    """The state that enters each segment and the one after the last, from what each keeps of it and adds to it."""
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at, stride = tl.program_id(0).to(tl.int64) * size + i, tl.num_programs(0).to(tl.int64) * size
    KEPT += tl.program_id(0)
    h = tl.zeros([BLOCK], tl.float32)
    if FIRST is not None:
        h += tl.load(FIRST + at, mask=i < size, other=0.0)
    for _ in range(n_segments):
        tl.store(ENTERING + at, h, mask=i < size)
        h = h * tl.load(KEPT) + tl.load(ADDED + at, mask=i < size, other=0.0)
        at += stride
        KEPT += tl.num_programs(0)
    tl.store(LAST + tl.program_id(0).to(tl.int64) * size + i, h, mask=i < size)


@triton.jit
def _states_kernel(
    U, V, Z, GATED, FIRST, STATES, LAST, STEPS, SUMS, IDS, L, H, heads_per_group, n_chunks,
    stride_ub, stride_ut, stride_vb, stride_vt, stride_zb, stride_zt,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, REVERSE: tl.constexpr,
):  # grid (B * H, P / BLOCK_P)  # fmt: skip
    """Computes what enters each chunk, in either direction.

    Forward: the state, from x and B. In reverse: the gradient of the state that leaves, from that of y and C, which is
    the same recurrence, since token i reaches back to the entering state by as much as it is reached. There Z gates U,
    and the product is written out for the kernels that follow: recomputed by them it would be so for every matrix unit.
    """
    batch, head = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    group = head // heads_per_group
    q, n = tl.arange(0, Q), tl.arange(0, BLOCK_N)
    p = tl.program_id(1) * BLOCK_P + tl.arange(0, BLOCK_P)
    U += batch * stride_ub + head * P
    V += batch * stride_vb + group * N
    STEPS += tl.program_id(0).to(tl.int64) * (n_chunks * Q)
    SUMS += tl.program_id(0).to(tl.int64) * (2 * n_chunks * Q)
    STATES += (batch * n_chunks * H + head) * (P * N) + n[:, None] * P + p[None, :]
    if Z is not None:
        Z += batch * stride_zb + head * P
        GATED += (batch * L * H + head) * P
    if IDS is not None:
        IDS += batch * (L + 1)
    step = 1
    if REVERSE:
        step = -1
        last = tl.cast(n_chunks - 1, tl.int64)
        U += last * Q * stride_ut
        V += last * Q * stride_vt
        STEPS += last * Q
        SUMS += last * 2 * Q
        STATES += last * H * (P * N)
        if Z is not None:
            Z += last * Q * stride_zt
            GATED += last * Q * (H * P)
        if IDS is not None:
            IDS += last * Q
    corner = tl.program_id(0).to(tl.int64) * (P * N) + p[None, :] * N + n[:, None]
    of_state = (n < N)[:, None] & (p < P)[None, :]
    state = tl.zeros([BLOCK_N, BLOCK_P], tl.float32)
    if FIRST is not None:
        state += tl.load(FIRST + corner, mask=of_state, other=0.0)
    for i in tl.range(0, n_chunks, num_stages=STAGES):
        left = L - (n_chunks - 1 - i if REVERSE else i) * Q
        of_u = (q < left)[:, None] & (p < P)[None, :]
        of_v = (q < left)[:, None] & (n < N)[None, :]
        u = tl.load(U + q[:, None] * stride_ut + p[None, :], mask=of_u, other=0.0)
        v = tl.load(V + q[:, None] * stride_vt + n[None, :], mask=of_v, other=0.0)
        enter, leave, whole = _decays(SUMS, IDS, q, left, Q)
        weight = enter if REVERSE else leave * tl.load(STEPS + q)
        if Z is not None:
            z = tl.load(Z + q[:, None] * stride_zt + p[None, :], mask=of_u, other=0.0).to(tl.float32)
            u = (u.to(tl.float32) * silu(z)).to(u.dtype)
            tl.store(GATED + q[:, None] * (H * P) + p[None, :], u, mask=of_u)
            Z += step * Q * stride_zt
            GATED += step * Q * (H * P)
        weighted = u.to(tl.float32) * weight[:, None]
        tl.store(STATES, state.to(STATES.dtype.element_ty), mask=of_state)
        state = tl.dot(tl.trans(v), weighted.to(u.dtype), state * whole, input_precision="ieee")
        U += step * Q * stride_ut
        V += step * Q * stride_vt
        STEPS += step * Q
        SUMS += step * 2 * Q
        STATES += step * H * (P * N)
        if IDS is not None:
            IDS += step * Q
    if LAST is not None:
        tl.store(LAST + corner, state, mask=of_state)


@triton.jit
def _heads_kernel(
    DY, GATED, X, DT, A, B, C, D, Z, BIAS, STEPS, SUMS, IDS, STATES, DSTATES, DX, DDT, DZ, PARTS,
    L, H, heads_per_group, n_chunks, n_parts,
    stride_dyb, stride_dyt, stride_gb, stride_gt, stride_xb, stride_xt, stride_dtb, stride_dtt,
    stride_bb, stride_bt, stride_cb, stride_ct, stride_zb, stride_zt,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr, SOFTPLUS: tl.constexpr,
):  # grid (B * chunks * H,)  # fmt: skip
    """Gradients that belong to one head: of x, dt and z, and parts of those of A, D and dt_bias."""
    batch, head = (tl.program_id(0) // (n_chunks * H)).to(tl.int64), tl.program_id(0) % H
    chunk, group = (tl.program_id(0) // H % n_chunks).to(tl.int64), head // heads_per_group
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    left = (L - chunk * Q).to(tl.int32)
    of_x = (q < left)[:, None] & (p < P)[None, :]
    of_b = (q < left)[:, None] & (n < N)[None, :]
    of_state = (n < N)[:, None] & (p < P)[None, :]
    X += batch * stride_xb + chunk * Q * stride_xt + head * P
    GATED += batch * stride_gb + chunk * Q * stride_gt + head * P
    B += batch * stride_bb + chunk * Q * stride_bt + group * N
    C += batch * stride_cb + chunk * Q * stride_ct + group * N
    STEPS += ((batch * H + head) * n_chunks + chunk) * Q
    SUMS += ((batch * H + head) * n_chunks + chunk) * (2 * Q)
    if IDS is not None:
        IDS += batch * (L + 1) + chunk * Q
    token = batch * L + chunk * Q
    state = tl.program_id(0).to(tl.int64) * (P * N) + n[:, None] * P + p[None, :]
    x = tl.load(X + q[:, None] * stride_xt + p[None, :], mask=of_x, other=0.0)
    dy = tl.load(GATED + q[:, None] * stride_gt + p[None, :], mask=of_x, other=0.0)
    b = tl.load(B + q[:, None] * stride_bt + n[None, :], mask=of_b, other=0.0)
    c = tl.load(C + q[:, None] * stride_ct + n[None, :], mask=of_b, other=0.0)
    h = tl.load(STATES + state, mask=of_state, other=0.0)
    dt = tl.load(STEPS + q)
    enter, leave, whole = _decays(SUMS, IDS, q, left, Q)
    mixing = tl.dot(c, tl.trans(b), input_precision="ieee") * _pair_decay(SUMS, IDS, q, left, Q)
    entered = tl.dot(c, h, input_precision="ieee") * enter[:, None]
    skip = 0.0
    if D is not None:
        skip = tl.load(D + head).to(tl.float32)
    if Z is not None:
        Z += batch * stride_zb + chunk * Q * stride_zt + head * P
        DY += batch * stride_dyb + chunk * Q * stride_dyt + head * P
        z = tl.load(Z + q[:, None] * stride_zt + p[None, :], mask=of_x, other=0.0).to(tl.float32)
        raw_dy = tl.load(DY + q[:, None] * stride_dyt + p[None, :], mask=of_x, other=0.0).to(tl.float32)
        y = tl.dot((mixing * dt[None, :]).to(x.dtype), x, entered, input_precision="ieee") + skip * x.to(tl.float32)
        grad_z = raw_dy * y * silu_slope(z)
        out = (token * H + head) * P + q[:, None] * (H * P) + p[None, :]
        tl.store(DZ + out, grad_z.to(DZ.dtype.element_ty), mask=of_x)
    # The log decay of token t is in every pair j < t <= i, in what enters for i >= t, in what leaves for j < t.
    # All are sums, of which none is a difference of two: there is nothing to cancel.
    grad_log = tl.dot(dy, tl.trans(x), input_precision="ieee") * mixing * dt[None, :]
    dh = tl.load(DSTATES + state, mask=of_state, other=0.0)
    grad_u = tl.dot(b, dh, input_precision="ieee") * leave[:, None]
    # j <= t, pairs with i > t: of token t + 1
    before = tl.sum(tl.where(q[:, None] > q[None, :], tl.cumsum(grad_log, 1), 0.0), 0)
    before += tl.cumsum(tl.sum(x.to(tl.float32) * grad_u, 1) * dt, 0)
    through = tl.where(q[:, None] >= q[None, :], tl.sum(dy.to(tl.float32) * entered, 1)[:, None], 0.0)
    grad_step = tl.sum(through + tl.where(q[:, None] + 1 == q[None, :], before[:, None], 0.0), 0)
    grad_step += whole * tl.sum(tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1), 0)
    grad_u = tl.dot(tl.trans(mixing.to(x.dtype)), dy, grad_u, input_precision="ieee")
    grad_x = grad_u * dt[:, None] + skip * dy.to(tl.float32)
    tl.store(DX + (token * H + head) * P + q[:, None] * (H * P) + p[None, :], grad_x.to(DX.dtype.element_ty), mask=of_x)
    grad_dt = grad_step * tl.load(A + head).to(tl.float32) + tl.sum(grad_u * x.to(tl.float32), 1)
    if SOFTPLUS:
        DT += batch * stride_dtb + chunk * Q * stride_dtt + head
        raw = tl.load(DT + q * stride_dtt, mask=q < left, other=0.0).to(tl.float32)
        if BIAS is not None:
            raw += tl.load(BIAS + head).to(tl.float32)
        grad_dt *= sigmoid(raw)
    grad_dt = tl.where(q < left, grad_dt, 0.0)
    tl.store(DDT + token * H + head + q * H, grad_dt.to(DDT.dtype.element_ty), mask=q < left)
    PARTS += tl.program_id(0)
    tl.store(PARTS, tl.sum(grad_step * dt, 0))
    if D is not None:
        tl.store(PARTS + n_parts, tl.sum(tl.sum(x.to(tl.float32) * dy.to(tl.float32), 1), 0))
    if BIAS is not None:
        tl.store(PARTS + 2 * n_parts, tl.sum(grad_dt, 0))


@triton.jit
def _groups_kernel(
    DY, X, B, C, STEPS, SUMS, IDS, STATES, DSTATES, DB, DC,
    L, H, heads_per_group, n_chunks, n_batch, n_groups, n_splits,
    stride_dyb, stride_dyt, stride_xb, stride_xt, stride_bb, stride_bt, stride_cb, stride_ct,
    Q: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    P: tl.constexpr, N: tl.constexpr,
):  # grid (B * chunks, G * splits)  # fmt: skip
    """Gradients of B and C, which the heads of a group share: a program takes the heads of its part in turn."""
    batch, chunk = (tl.program_id(0) // n_chunks).to(tl.int64), (tl.program_id(0) % n_chunks).to(tl.int64)
    group, split = tl.program_id(1) // n_splits, tl.program_id(1) % n_splits
    heads = heads_per_group // n_splits
    head = group * heads_per_group + split * heads  # the first one
    q, n, p = tl.arange(0, Q), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P)
    left = (L - chunk * Q).to(tl.int32)
    of_x = (q < left)[:, None] & (p < P)[None, :]
    of_b = (q < left)[:, None] & (n < N)[None, :]
    of_state = (n < N)[:, None] & (p < P)[None, :]
    X += batch * stride_xb + chunk * Q * stride_xt + head * P
    DY += batch * stride_dyb + chunk * Q * stride_dyt + head * P
    STEPS += ((batch * H + head) * n_chunks + chunk) * Q
    SUMS += ((batch * H + head) * n_chunks + chunk) * (2 * Q)
    if IDS is not None:
        IDS += batch * (L + 1) + chunk * Q
    STATES += (tl.program_id(0).to(tl.int64) * H + head) * (P * N)
    DSTATES += (tl.program_id(0).to(tl.int64) * H + head) * (P * N)
    grad_scores = tl.zeros([Q, Q], tl.float32)
    grad_b = tl.zeros([Q, BLOCK_N], tl.float32)
    grad_c = tl.zeros([Q, BLOCK_N], tl.float32)
    for _ in range(heads):
        x = tl.load(X + q[:, None] * stride_xt + p[None, :], mask=of_x, other=0.0)
        dy = tl.load(DY + q[:, None] * stride_dyt + p[None, :], mask=of_x, other=0.0)
        dt = tl.load(STEPS + q)
        enter, leave, _ = _decays(SUMS, IDS, q, left, Q)
        grad_mixing = tl.dot(dy, tl.trans(x), input_precision="ieee")
        grad_scores += grad_mixing * _pair_decay(SUMS, IDS, q, left, Q) * dt[None, :]
        h = tl.load(STATES + n[None, :] * P + p[:, None], mask=tl.trans(of_state), other=0.0)  # (P, N)
        reached = (dy.to(tl.float32) * enter[:, None]).to(x.dtype)
        grad_c = tl.dot(reached, h, grad_c, input_precision="ieee")
        dh = tl.load(DSTATES + n[None, :] * P + p[:, None], mask=tl.trans(of_state), other=0.0)
        kept = (x.to(tl.float32) * (dt * leave)[:, None]).to(x.dtype)
        grad_b = tl.dot(kept, dh, grad_b, input_precision="ieee")
        X += P
        DY += P
        STEPS += n_chunks * Q
        SUMS += 2 * n_chunks * Q
        STATES += P * N
        DSTATES += P * N
    b = tl.load(
        B + batch * stride_bb + chunk * Q * stride_bt + group * N + q[:, None] * stride_bt + n[None, :], of_b, 0.0
    )
    c = tl.load(
        C + batch * stride_cb + chunk * Q * stride_ct + group * N + q[:, None] * stride_ct + n[None, :], of_b, 0.0
    )
    grad_c = tl.dot(grad_scores.to(b.dtype), b, grad_c, input_precision="ieee")
    grad_b = tl.dot(tl.trans(grad_scores.to(c.dtype)), c, grad_b, input_precision="ieee")
    out = ((split * n_batch + batch) * L + chunk * Q) * (n_groups * N) + group * N
    out = out + q[:, None] * (n_groups * N) + n[None, :]
    tl.store(DB + out, grad_b.to(DB.dtype.element_ty), mask=of_b)
    tl.store(DC + out, grad_c.to(DC.dtype.element_ty), mask=of_b)
