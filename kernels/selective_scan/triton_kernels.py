"""The selective scan for the GPU: time runs sequentially, states stay in registers, nothing is added atomically.

A program takes R W DL channels with all their states through the sequence, T tokens at a time. Forward keeps the state
before every CHUNK tokens; backward walks the chunks in reverse, computes the states inside one again, and runs the
adjoint recurrence r[t] = a[t] (C[t] g[t] + r[t+1]), which needs no division by the decay. Where rows and channels are
too few to fill the device, the sequence is split: a first pass finds how each part changes the state, the parts are
chained, and the main pass starts each with the right state.

The currency is instructions per state and token, so the layout is chosen by shape. Hot tensors are
[T, R, M, W, NL, DL]: T tokens, R channels and M states in registers, W warps over channels, and NL lanes over states
times DL lanes over channels, 32 in all; Triton's default layout deals them out in just this order. To keep it, nothing
is loaded at this rank or reshaped into it: what is loaded at a lower rank gets its other axes by indexing with None.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..operators import operator
from ..triton_kernels import LOG2_E, launch, sigmoid, silu, silu_slope, softplus
from . import torch_impl
from .gradients import register_gradients

CHUNK = 64
"""Tokens between two states that forward keeps."""

PROGRAM_WARPS = 1056
"""Warps to aim at when splitting a sequence: two for each scheduler of a large GPU."""

MAX_STATES = 256

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")
"""Whether the interpreter runs the kernels: it gets plain forms where sparing an instruction costs it several calls."""


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.selective_scan. Differentiable once.

    Raises:
        Unsupported: if there are more than MAX_STATES states.
    """
    if A.shape[1] > MAX_STATES:
        raise Unsupported(f"d_state={A.shape[1]} is more than {MAX_STATES}")
    if u.shape[1] == 1:  # a decode step has nothing to scan
        return torch_impl.selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, initial_state, starts)
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    u, delta, z = u.contiguous(), delta.contiguous(), z if z is None or z.stride(-1) == 1 else z.contiguous()
    # in bfloat16, B and C would be unpacked once for every channel that reads them
    A, B, C, D, bias, h = (t if t is None else t.float().contiguous() for t in (A, B, C, D, delta_bias, initial_state))
    y, state, _ = _scan(u, delta, A, B, C, D, z, bias, delta_softplus, h, starts, keep)
    return y, state


def forward_configuration(E: int, N: int) -> dict[str, int]:
    """Layout of forward: up to sixteen states in a thread, more over its neighbours; up to four warps over channels."""
    states = max(4, triton.next_power_of_2(N))
    lanes = max(1, states // 16)
    channels = 32 // lanes
    warps = min(4, triton.next_power_of_2(triton.cdiv(E, channels)))
    return {"T": 4, "R": 1, "M": states // lanes, "W": warps, "NL": lanes, "DL": channels, "num_warps": warps}


def backward_configuration(E: int, N: int) -> dict[str, int]:
    """Layout of backward, which holds four tensors where forward holds one: four states in a thread, one warp."""
    states = max(4, triton.next_power_of_2(N))
    lanes = min(32, states // 4)
    channels = 32 // lanes
    repeats = min(4, triton.next_power_of_2(triton.cdiv(E, channels)))
    return {"T": 2, "R": repeats, "M": states // lanes, "W": 1, "NL": lanes, "DL": channels, "num_warps": 1}


def split_length(batch: int, L: int, E: int, config: dict[str, int]) -> int:
    """Tokens of a part of the sequence, a multiple of CHUNK: all of them where the programs fill the device anyway."""
    n_chunks = triton.cdiv(L, CHUNK)
    warps = batch * triton.cdiv(E, _width(config)) * config["W"]
    n_splits = max(1, min(n_chunks, PROGRAM_WARPS // warps))
    return triton.cdiv(n_chunks, n_splits) * CHUNK


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    initial_state: Tensor | None,
    starts: Tensor | None,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, (B, L, E); final state, (B, E, N); the state before every CHUNK tokens, (B, L / CHUNK, E, N), if `keep`."""
    (batch, L, E), N = u.shape, A.shape[1]
    config = forward_configuration(E, N)
    length = split_length(batch, L, E, config)
    n_splits = triton.cdiv(L, length)
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    states = A.new_empty(batch if keep else 0, triton.cdiv(L, CHUNK), E, N)
    marks = None if starts is None else starts.contiguous().view(torch.int8)

    def run(entering: Tensor | None, y: Tensor | None, time: Tensor | None) -> Tensor:
        """A pass over all parts: of the state alone if there is no y, and then `time` gets what decides its decay."""
        leaving = A.new_empty(batch * n_splits, E, N)
        launch(
            _forward_kernel, (triton.cdiv(E, _width(config)), batch * n_splits),
            u, delta, A, B, C, D, z if y is not None else None, delta_bias, entering, marks,
            y, states if keep and y is not None else None, leaving, time,
            L, E, n_splits, length, *_strides(z),
            N=N, CHUNK=CHUNK, SOFTPLUS=delta_softplus, **config,
        )  # fmt: skip
        return leaving

    if n_splits > 1:
        time = A.new_empty(batch * n_splits, E)
        change = run(None, None, time)
        initial_state = _chain(change, time, A, initial_state, n_splits)
    leaving = run(initial_state, y, None)
    return y, leaving.view(batch, n_splits, E, N)[:, -1].clone(), states


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    starts: Tensor | None,
    states: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C, D, z (empty without a gate), delta_bias and the initial state."""
    (batch, L, E), N = u.shape, A.shape[1]
    config = backward_configuration(E, N)
    length = split_length(batch, L, E, config)
    n_splits, n_blocks = triton.cdiv(L, length), triton.cdiv(E, _width(config))
    grad_y, grad_state = grad_y.contiguous(), grad_state.contiguous()
    marks = None if starts is None else starts.contiguous().view(torch.int8)
    grad_u = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    grad_delta = torch.empty(u.shape, dtype=delta.dtype, device=u.device)
    grad_z = torch.empty(u.shape if z is not None else (0,), dtype=u.dtype, device=u.device)
    # every program writes its own part of the sums over channels (B, C) and over rows (A, D, delta_bias)
    parts_A = A.new_empty(batch * n_splits, E, N)
    parts_D, parts_bias = (A.new_empty(batch * n_splits, E) for _ in range(2))
    parts_B, parts_C = (A.new_empty(n_blocks, batch, L, N) for _ in range(2))
    padded = config["M"] * config["NL"]
    scratch = A.new_empty(batch * n_splits * n_blocks, CHUNK // config["T"], _width(config) * padded)

    def run(entering: Tensor, time: Tensor | None) -> Tensor:
        """A pass over all parts, of the state's gradient alone if `time` is asked for."""
        leaving = A.new_empty(batch * n_splits, E, N)
        whole = time is None
        grads = (grad_u, grad_delta, grad_z if z is not None else None) if whole else (None, None, None)
        launch(
            _backward_kernel, (n_blocks, batch * n_splits),
            u, delta, A, B, C, D, z, delta_bias, marks, states, grad_y, entering,
            *grads, parts_A, parts_B, parts_C, parts_D, parts_bias, leaving, scratch, time,
            L, E, n_splits, length, *_strides(z),
            N=N, CHUNK=CHUNK, SOFTPLUS=delta_softplus, **config,
        )  # fmt: skip
        return leaving

    entering = grad_state
    if n_splits > 1:
        time = A.new_empty(batch * n_splits, E)
        change = run(A.new_zeros(batch * n_splits, E, N), time)
        entering = _chain(change, time, A, grad_state, n_splits, reverse=True)
    leaving = run(entering, None)
    grad_initial = leaving.view(batch, n_splits, E, N)[:, 0].clone()
    sums = (parts.sum(0) for parts in (parts_A, parts_B, parts_C, parts_D))
    return grad_u, grad_delta, *sums, grad_z, parts_bias.sum(0), grad_initial


def _width(config: dict[str, int]) -> int:
    """Channels of a program."""
    return config["R"] * config["W"] * config["DL"]


def _strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def _chain(
    change: Tensor, time: Tensor, A: Tensor, state: Tensor | None, n_splits: int, *, reverse: bool = False
) -> Tensor:
    """The state that enters each part, (B S, E, N).

    Args:
        change: state that each part leaves if none enters, (B S, E, N).
        time: sum of the step sizes in each part, (B S, E), infinite where a document begins; dt A adds up, so that a
            state of the one end reaches the other multiplied by exp(time A).
        A: (E, N).
        state: the one that enters the whole, (B, E, N); zeros when None.
        n_splits: S.
        reverse: from the last part to the first.
    """
    change = change.unflatten(0, (-1, n_splits))
    time = time.unflatten(0, (-1, n_splits))[..., None]
    decay = torch.where(time.isinf(), 0.0, torch.exp(time * A))
    now = torch.zeros_like(change[:, 0]) if state is None else state
    entering = torch.empty_like(change)
    for i in reversed(range(n_splits)) if reverse else range(n_splits):
        entering[:, i] = now
        now = decay[:, i] * now + change[:, i]
    return entering.flatten(0, 1)


# Register axes


_scan = operator("selective_scan_triton", forward)
_scan_backward = operator("selective_scan_triton_backward", backward)


register_gradients(_scan, _scan_backward)


@triton.jit
def _is(i: tl.constexpr, SIZE: tl.constexpr, AXIS: tl.constexpr):
    here = tl.arange(0, SIZE) == i
    if AXIS == 0:
        return here[:, None, None, None, None, None]
    elif AXIS == 1:
        return here[None, :, None, None, None, None]
    else:
        return here[None, None, :, None, None, None]


@triton.jit
def _pick(x, i: tl.constexpr, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """x at index i of a register axis. The compiler knows each register's place, and adding integer zeros folds away
    (adding 0.0 would not: it turns -0.0 into 0.0), so this is no instruction at all."""
    if INTERPRETED:
        return tl.sum(tl.where(_is(i, SIZE, AXIS), x, 0.0), AXIS)
    bits = tl.where(_is(i, SIZE, AXIS), x.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits, AXIS).to(tl.float32, bitcast=True)


@triton.jit
def _put(x, value, i: tl.constexpr, T: tl.constexpr):
    """x with `value` at index i of the tokens."""
    return tl.where(_is(i, T, 0), value[None], x)


@triton.jit
def _contract(x, y, SIZE: tl.constexpr, AXIS: tl.constexpr):
    """The sum of x y over a register axis as a chain of fused multiply-adds, which tl.sum of a product is not."""
    if INTERPRETED:
        return tl.sum(x * y, AXIS)
    y = tl.broadcast_to(y, x.shape)  # in the layout of x, so that picking moves nothing between lanes
    total = _pick(x, 0, SIZE, AXIS) * _pick(y, 0, SIZE, AXIS)
    for i in tl.static_range(1, SIZE):
        total = _pick(x, i, SIZE, AXIS) * _pick(y, i, SIZE, AXIS) + total
    return total


@triton.jit
def _scan_tile(decay, drive, h, T: tl.constexpr):
    """h[t] = decay[t] h[t-1] + drive[t] over one tile: the state after each token, and after the last."""
    after = tl.zeros_like(decay)
    for i in tl.static_range(T):
        h = _pick(decay, i, T, 0) * h + _pick(drive, i, T, 0)
        after = _put(after, h, i, T)
    return after, h


@triton.jit
def _before(after, h, T: tl.constexpr):
    """The state before each token of a tile, from those after each and the one before the first."""
    before = tl.zeros_like(after)
    for i in tl.static_range(T):
        before = _put(before, h, i, T)
        h = _pick(after, i, T, 0)
    return before


@triton.jit
def _fence(x):
    """x itself, by a sum over an axis of one, behind which Triton 3.6 does not compute the same value once more in each
    layout that needs it. x is [T, R, W, DL]."""
    return tl.sum(tl.cumsum(x[:, :, :, :, None], 4), 4)


# The places of a program's numbers


@triton.jit
def _channels(R: tl.constexpr, W: tl.constexpr, DL: tl.constexpr):
    """Channels of this program, [R, W, DL]."""
    r, w, lane = tl.arange(0, R), tl.arange(0, W), tl.arange(0, DL)
    first = tl.program_id(0) * (R * W * DL)
    return first + (r * (W * DL))[:, None, None] + (w * DL)[None, :, None] + lane[None, None, :]


@triton.jit
def _states(M: tl.constexpr, NL: tl.constexpr):
    """States, [M, NL]."""
    return tl.arange(0, M)[:, None] + (tl.arange(0, NL) * M)[None, :]


@triton.jit
def _of_states(channel, n, E, N: tl.constexpr):
    """Offsets into (E, N) and which of them exist, [R, M, W, NL, DL]."""
    offsets = channel[:, None, :, None, :] * N + n[None, :, None, :, None]
    return offsets, (channel < E)[:, None, :, None, :] & (n < N)[None, :, None, :, None]


@triton.jit
def _read(pointer, offsets, mask):
    """Values of a tile, [T, R, W, DL], in float32. The pointer is one for all, so that offsets fit 32 bits."""
    return tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _step_size(raw, bias, mask, SOFTPLUS: tl.constexpr):
    """Delta with its bias, and dt, which is zero beyond the end: there the state stays as it is."""
    raw += bias[None]
    dt = raw
    if SOFTPLUS:
        dt = softplus(raw)
    return raw, _fence(tl.where(mask, dt, 0.0))


@triton.jit
def _forget(STARTS, t, is_token):
    """Says at which tokens a document begins, (T,)."""
    return tl.load(STARTS + t, mask=is_token, other=0) != 0


# The kernels


@triton.jit
def _forward_kernel(
    U, DELTA, A, B, C, D, Z, BIAS, H0, STARTS, Y, KEPT, LAST, TIME,
    L, E, n_splits, split_len, stride_zb, stride_zt,
    N: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    # grid (E / (R W DL), B n_splits); without Y only the state and TIME, the sum of dt, are found
    part = tl.program_id(1)
    b = (part // n_splits).to(tl.int64)
    first = (part % n_splits) * split_len
    end = tl.minimum(first + split_len, L)
    channel, n = _channels(R, W, DL), _states(M, NL)
    is_channel = channel < E
    of_state, exists = _of_states(channel, n, E, N)
    rate = tl.load(A + of_state, mask=exists, other=0.0)[None] * LOG2_E
    h = tl.zeros([R, M, W, NL, DL], tl.float32)
    if H0 is not None:
        # a sum over an axis of one, behind which the layout of the load does not reach the loop
        h = tl.sum(tl.load(H0 + part.to(tl.int64) * E * N + of_state, mask=exists, other=0.0)[None], 0)
    if Y is None:
        time = tl.zeros([T, R, W, DL], tl.float32)
    elif D is not None:
        skip = tl.load(D + channel, mask=is_channel, other=0.0)[None]
    bias = tl.zeros([R, W, DL], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + channel, mask=is_channel, other=0.0)
    token = tl.arange(0, T)
    in_e = token[:, None, None, None] * E + channel[None]
    in_n = token[:, None, None] * N + n[None]
    for t0 in range(first, end, T):
        row = b * L + t0
        if KEPT is not None:
            if t0 % CHUNK == 0:
                chunk = b * tl.cdiv(L, CHUNK) + t0 // CHUNK
                tl.store(KEPT + chunk * E * N + of_state, h, mask=exists)
        is_token = t0 + token < end
        mask = is_token[:, None, None, None] & is_channel[None]
        mask_n = is_token[:, None, None] & (n < N)[None]
        x = _read(U + row * E, in_e, mask)
        _, dt = _step_size(_read(DELTA + row * E, in_e, mask), bias, mask, SOFTPLUS)
        decay = tl.exp2(dt[:, :, None, :, None, :] * rate)
        if STARTS is not None:
            forget = _forget(STARTS + row, token, is_token)
            decay = tl.where(forget[:, None, None, None, None, None], 0.0, decay)
        inputs = tl.load(B + row * N + in_n, mask=mask_n, other=0.0)
        drive = (dt * x)[:, :, None, :, None, :] * inputs[:, None, :, None, :, None]
        after, h = _scan_tile(decay, drive, h, T)
        if Y is None:
            if STARTS is not None:
                dt = tl.where(forget[:, None, None, None], float("inf"), dt)
            time += dt
        else:
            outputs = tl.load(C + row * N + in_n, mask=mask_n, other=0.0)
            y = tl.sum(_contract(after, outputs[:, None, :, None, :, None], M, 2), 3)
            if D is not None:
                y += x * skip
            if Z is not None:
                in_z = token[:, None, None, None] * stride_zt + channel[None]
                y *= silu(_read(Z + b * stride_zb + (row - b * L) * stride_zt, in_z, mask))
            tl.store(Y + row * E + in_e, y.to(Y.dtype.element_ty), mask=mask)
    tl.store(LAST + part.to(tl.int64) * E * N + of_state, h, mask=exists)
    if Y is None:
        tl.store(TIME + part.to(tl.int64) * E + channel, tl.sum(time, 0), mask=is_channel)


@triton.jit
def _backward_kernel(
    U, DELTA, A, B, C, D, Z, BIAS, STARTS, KEPT, DY, R0,
    DU, DDELTA, DZ, DA, DB, DC, DD, DBIAS, R1, SCRATCH, TIME,
    L, E, n_splits, split_len, stride_zb, stride_zt,
    N: tl.constexpr, CHUNK: tl.constexpr, SOFTPLUS: tl.constexpr,
    T: tl.constexpr, R: tl.constexpr, M: tl.constexpr, W: tl.constexpr, NL: tl.constexpr, DL: tl.constexpr,
):  # fmt: skip
    # grid (E / (R W DL), B n_splits); without DU only r and TIME, the sum of dt, are found
    part = tl.program_id(1)
    b = (part // n_splits).to(tl.int64)
    first = (part % n_splits) * split_len
    end = tl.minimum(first + split_len, L)
    channel, n = _channels(R, W, DL), _states(M, NL)
    is_channel = channel < E
    of_state, exists = _of_states(channel, n, E, N)
    rate = tl.load(A + of_state, mask=exists, other=0.0)[None]
    r = tl.sum(tl.load(R0 + part.to(tl.int64) * E * N + of_state, mask=exists, other=0.0)[None], 0)  # see forward
    bias = tl.zeros([R, W, DL], tl.float32)
    if BIAS is not None:
        bias = tl.load(BIAS + channel, mask=is_channel, other=0.0)
    token = tl.arange(0, T)
    in_e = token[:, None, None, None] * E + channel[None]
    in_n = token[:, None, None] * N + n[None]
    if DU is None:
        time = tl.zeros([T, R, W, DL], tl.float32)
    else:
        grad_rate = tl.zeros([R, M, W, NL, DL], tl.float32)
        grad_skip, grad_bias = tl.zeros([R, W, DL], tl.float32), tl.zeros([R, W, DL], tl.float32)
        if D is not None:
            skip = tl.load(D + channel, mask=is_channel, other=0.0)[None]
        # states before each tile of a chunk, written and read by the same threads
        place = channel[:, None, :, None, :] - tl.program_id(0) * (R * W * DL)
        place = place * (M * NL) + n[None, :, None, :, None]
        program = part.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
        SCRATCH += program * (CHUNK // T) * (R * M * W * NL * DL) + place
    n_chunks = tl.cdiv(end - first, CHUNK)
    for i in range(0, n_chunks):
        t_chunk = first + (n_chunks - 1 - i) * CHUNK
        n_tiles = tl.cdiv(tl.minimum(t_chunk + CHUNK, end) - t_chunk, T)
        if DU is not None:
            kept = b * tl.cdiv(L, CHUNK) + t_chunk // CHUNK
            h = tl.load(KEPT + kept * E * N + of_state, mask=exists, other=0.0)
            for j in range(0, n_tiles - 1):
                tl.store(SCRATCH + j * (R * M * W * NL * DL), h)
                t0 = t_chunk + j * T
                row = b * L + t0
                is_token = t0 + token < end
                mask = is_token[:, None, None, None] & is_channel[None]
                x = _read(U + row * E, in_e, mask)
                _, dt = _step_size(_read(DELTA + row * E, in_e, mask), bias, mask, SOFTPLUS)
                decay = tl.exp2((dt * LOG2_E)[:, :, None, :, None, :] * rate)
                if STARTS is not None:
                    forget = _forget(STARTS + row, token, is_token)
                    decay = tl.where(forget[:, None, None, None, None, None], 0.0, decay)
                inputs = tl.load(B + row * N + in_n, mask=is_token[:, None, None] & (n < N)[None], other=0.0)
                drive = (dt * x)[:, :, None, :, None, :] * inputs[:, None, :, None, :, None]
                _, h = _scan_tile(decay, drive, h, T)
            tl.store(SCRATCH + (n_tiles - 1) * (R * M * W * NL * DL), h)
            tl.debug_barrier()
        for j in range(0, n_tiles):
            tile = n_tiles - 1 - j
            t0 = t_chunk + tile * T
            row = b * L + t0
            is_token = t0 + token < end
            mask = is_token[:, None, None, None] & is_channel[None]
            mask_n = is_token[:, None, None] & (n < N)[None]
            raw, dt = _step_size(_read(DELTA + row * E, in_e, mask), bias, mask, SOFTPLUS)
            grad_y = _read(DY + row * E, in_e, mask)
            g = grad_y
            if Z is not None:
                in_z = token[:, None, None, None] * stride_zt + channel[None]
                gate = _read(Z + b * stride_zb + (row - b * L) * stride_zt, in_z, mask)
                g = _fence(grad_y * silu(gate))
            decay = tl.exp2((dt * LOG2_E)[:, :, None, :, None, :] * rate)
            if STARTS is not None:
                forget = _forget(STARTS + row, token, is_token)
                decay = tl.where(forget[:, None, None, None, None, None], 0.0, decay)
            outputs = tl.load(C + row * N + in_n, mask=mask_n, other=0.0)[:, None, :, None, :, None]
            grad_h, r_before = tl.zeros_like(decay), tl.zeros_like(decay)
            g6 = tl.broadcast_to(g[:, :, None, :, None, :], decay.shape)
            c6 = tl.broadcast_to(outputs, decay.shape)
            for k in tl.static_range(T - 1, -1, -1):
                grad_h_k = _pick(g6, k, T, 0) * _pick(c6, k, T, 0) + r
                r = _pick(decay, k, T, 0) * grad_h_k
                grad_h = _put(grad_h, grad_h_k, k, T)
                r_before = _put(r_before, r, k, T)
            if DU is None:
                if STARTS is not None:
                    dt = tl.where(forget[:, None, None, None], float("inf"), dt)
                time += dt
            else:
                x = _read(U + row * E, in_e, mask)
                inputs = tl.load(B + row * N + in_n, mask=mask_n, other=0.0)[:, None, :, None, :, None]
                drive = dt * x
                h = tl.load(SCRATCH + tile * (R * M * W * NL * DL))
                after, _ = _scan_tile(decay, drive[:, :, None, :, None, :] * inputs, h, T)
                # over channels: registers first, then lanes, then warps
                grad_c = tl.sum(tl.sum(_contract(after, g[:, :, None, :, None, :], R, 1), 4), 2)
                grad_b = tl.sum(tl.sum(_contract(grad_h, drive[:, :, None, :, None, :], R, 1), 4), 2)
                out = (tl.program_id(0) * (tl.num_programs(1) // n_splits) * L + row) * N
                tl.store(DC + out + in_n, grad_c, mask=mask_n)
                tl.store(DB + out + in_n, grad_b, mask=mask_n)
                grad_exponent = r_before * _before(after, h, T)  # of log decay = dt A
                grad_rate += _contract(grad_exponent, dt[:, :, None, :, None, :], T, 0)
                grad_drive = tl.sum(_contract(grad_h, inputs, M, 2), 3)
                grad_dt = grad_drive * x + tl.sum(_contract(grad_exponent, rate, M, 2), 3)
                grad_x = grad_drive * dt
                if D is not None:
                    grad_x += g * skip
                    grad_skip += tl.sum(g * x, 0)
                if Z is not None:
                    y = tl.sum(_contract(after, outputs, M, 2), 3)
                    if D is not None:
                        y += x * skip
                    tl.store(DZ + row * E + in_e, (grad_y * y * silu_slope(gate)).to(DZ.dtype.element_ty), mask=mask)
                if SOFTPLUS:
                    grad_dt *= sigmoid(raw)
                grad_dt = tl.where(mask, grad_dt, 0.0)
                grad_bias += tl.sum(grad_dt, 0)
                tl.store(DU + row * E + in_e, grad_x.to(DU.dtype.element_ty), mask=mask)
                tl.store(DDELTA + row * E + in_e, grad_dt.to(DDELTA.dtype.element_ty), mask=mask)
        tl.debug_barrier()
    tl.store(R1 + part.to(tl.int64) * E * N + of_state, r, mask=exists)
    of_channel = part.to(tl.int64) * E + channel
    if DU is None:
        tl.store(TIME + of_channel, tl.sum(time, 0), mask=is_channel)
    else:
        tl.store(DA + part.to(tl.int64) * E * N + of_state, grad_rate, mask=exists)
        tl.store(DD + of_channel, grad_skip, mask=is_channel)
        tl.store(DBIAS + of_channel, grad_bias, mask=is_channel)
