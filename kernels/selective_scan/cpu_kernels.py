"""The recurrence of the selective scan and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and `blocks_per_task` blocks of LANES channels. It walks the sequence in chunks of CHUNK
tokens; inside a chunk, block by block, it first prepares what does not depend on the state (softplus, dt u), STATES
tokens to a tile, then takes STATES states at a time through the chunk's tokens with the state in registers. Tasks share
no output, so any number of threads gives the same bits.

Scratch arrays are indexed [block, state * LANES + channel] or [token, channel], where states are padded to a multiple
of STATES.
"""

from __future__ import annotations

import numpy as np

from ..simd import (
    LANES,
    LOG2_E,
    STATES,
    TILE,
    Bools2,
    Floats1,
    Floats2,
    Floats3,
    Floats4,
    called,
    exp2,
    fold,
    full,
    kernel,
    load,
    load_first,
    load_tile,
    repeat,
    sigmoid,
    softplus,
    spread,
    store,
    store_first,
    total,
)

CHUNK = 32
"""Tokens between two stored states: a chunk's states and decays fit the first-level cache."""

LOG_2 = 1 / LOG2_E

SUM_WIDTH = 4096
"""Columns a task of `sum_parts` adds up."""

TASKS = 32
"""Tasks to aim at: enough for many threads, few enough to share the work on B and C among several blocks."""


def blocks_per_task(batch: int, E: int) -> int:
    """Channel blocks that a task takes together; independent of the number of threads, as the bits depend on it."""
    n_blocks = -(-E // LANES)
    return max(min(2, n_blocks), batch * n_blocks // TASKS)


def tasks_per_row(batch: int, E: int) -> int:
    """Tasks that share a row of the batch."""
    return -(-E // (LANES * blocks_per_task(batch, E)))


def checkpoint_shape(batch: int, L: int, E: int, N: int) -> tuple[int, int, int, int]:
    """Shape of the states before every chunk: (B, chunks, blocks, padded states * LANES)."""
    return batch, -(-L // CHUNK), -(-E // LANES), TILE * -(-N // STATES)


@called
def _scratch(rows, columns):
    return np.zeros((rows, columns), np.float32)


@called
def _pack(matrix, e0, scratch, scale):
    """scratch[n * LANES + lane] = scale * matrix[e0 + lane, n], zero where there is no such channel or state."""
    E, N = matrix.shape
    for n in range(len(scratch) // LANES):
        for lane in range(LANES):
            value = matrix[e0 + lane, n] if n < N and e0 + lane < E else np.float32(0.0)
            # NaN as IEEE arithmetic makes it: exp2 would misread the low bits of another
            scratch[n * LANES + lane] = scale * value if value == value else np.float32(np.nan)


@called
def _unpack(scratch, e0, matrix):
    """matrix[e0 + lane, n] = scratch[n * LANES + lane]."""
    E, N = matrix.shape
    for lane in range(min(LANES, E - e0)):
        for n in range(N):
            matrix[e0 + lane, n] = scratch[n * LANES + lane]


@called
def _copy_tokens(source, b, t0, n_tokens, scratch):
    for t in range(n_tokens):
        for n in range(source.shape[2]):
            scratch[t, n] = source[b, t0 + t, n]


@called
def _read_block(source, b, t0, n_tokens, e, scratch):
    n_channels = source.shape[2] - e
    for t in range(n_tokens):
        store(scratch, (t, 0), load_first(source, (b, t0 + t, e), n_channels))


@called
def _write_block(scratch, target, b, t0, n_tokens, e):
    n_channels = target.shape[2] - e
    for t in range(n_tokens):
        store_first(target, (b, t0 + t, e), load(scratch, (t, 0)), n_channels)


@kernel
def forward(
    first: int,
    last: int,
    tasks_per_row: int,
    blocks_per_task: int,
    u: Floats3,
    delta: Floats3,
    A: Floats2,
    B: Floats3,
    C: Floats3,
    D: Floats1,
    z: Floats3,
    delta_bias: Floats1,
    delta_softplus: bool,
    initial_state: Floats3,
    starts: Bools2,
    checkpoints: Floats4,
    y: Floats3,
    state: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    z and checkpoints may be empty: no gate, no backward to come. Arrays of three axes are (B, L, .) or (B, E, N) with
    any strides, the last axis contiguous; checkpoints is (B, chunks, blocks, padded states * LANES).
    """
    L, E, N = u.shape[1], u.shape[2], A.shape[1]
    n_tiles = -(-N // STATES)
    gated, keep = z.shape[0] > 0, checkpoints.shape[0] > 0
    rates = _scratch(blocks_per_task, n_tiles * TILE)  # A log2(e), for exp2
    states = _scratch(blocks_per_task, n_tiles * TILE)
    Bs, Cs = _scratch(CHUNK, n_tiles * STATES), _scratch(CHUNK, n_tiles * STATES)
    xs, gates, sums = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    dts, drives = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    zero = repeat(full(0.0))
    for task in range(first, last):
        b, first_block = task // tasks_per_row, task % tasks_per_row * blocks_per_task
        n_blocks = min(blocks_per_task, -(-E // LANES) - first_block)
        for block in range(n_blocks):
            e = (first_block + block) * LANES
            _pack(A, e, rates[block], np.float32(LOG2_E))
            _pack(initial_state[b], e, states[block], np.float32(1.0))
        for t0 in range(0, L, CHUNK):
            n_tokens = min(CHUNK, L - t0)
            _copy_tokens(B, b, t0, n_tokens, Bs)
            _copy_tokens(C, b, t0, n_tokens, Cs)
            for block in range(n_blocks):
                e = (first_block + block) * LANES
                bias, skip = repeat(load_first(delta_bias, e, E - e)), repeat(load_first(D, e, E - e))
                _read_block(u, b, t0, n_tokens, e, xs)
                _read_block(delta, b, t0, n_tokens, e, dts)
                for t in range(0, n_tokens, STATES):
                    x, dt = load_tile(xs, (t, 0)), load_tile(dts, (t, 0)) + bias
                    if delta_softplus:
                        dt = softplus(dt)
                    store(dts, (t, 0), dt)
                    store(drives, (t, 0), dt * x)
                    store(sums, (t, 0), skip * x)
                for i in range(n_tiles):
                    rate, h = load_tile(rates, (block, i * TILE)), load_tile(states, (block, i * TILE))
                    if keep:
                        store(checkpoints, (b, t0 // CHUNK, first_block + block, i * TILE), h)
                    for t in range(n_tokens):
                        if starts[b, t0 + t]:
                            h = zero
                        decay = exp2(repeat(load(dts, (t, 0))) * rate)
                        h = decay * h + repeat(load(drives, (t, 0))) * spread(Bs, (t, i * STATES))
                        store(sums, (t, 0), load(sums, (t, 0)) + fold(h * spread(Cs, (t, i * STATES))))
                    store(states, (block, i * TILE), h)
                if gated:
                    _read_block(z, b, t0, n_tokens, e, gates)
                    for t in range(0, n_tokens, STATES):
                        gate = load_tile(gates, (t, 0))
                        store(sums, (t, 0), load_tile(sums, (t, 0)) * (gate * sigmoid(gate)))
                _write_block(sums, y, b, t0, n_tokens, e)
        for block in range(n_blocks):
            _unpack(states[block], (first_block + block) * LANES, state[b])


@kernel
def backward(
    first: int,
    last: int,
    tasks_per_row: int,
    blocks_per_task: int,
    u: Floats3,
    delta: Floats3,
    A: Floats2,
    B: Floats3,
    C: Floats3,
    D: Floats1,
    z: Floats3,
    delta_bias: Floats1,
    delta_softplus: bool,
    starts: Bools2,
    checkpoints: Floats4,
    grad_y: Floats3,
    grad_state: Floats3,
    grad_u: Floats3,
    grad_delta: Floats3,
    grad_A: Floats3,
    grad_B: Floats4,
    grad_C: Floats4,
    grad_D: Floats2,
    grad_z: Floats3,
    grad_bias: Floats2,
    grad_initial_state: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass.

    With g[t] = dL/dy[t] before the gate, the gradient of a state is dh[t] = C[t] g[t] + r[t+1] and r[t] = a[t] dh[t] is
    carried to the left, so nothing is divided by the decay a[t]; r[t] h[t-1] is the gradient of log a[t] = dt[t] A.

    What several tasks add to is left in parts, to be summed over the first axis: grad_A is (B, E, N), grad_D and
    grad_bias (B, E), grad_B and grad_C (tasks per row, B, L, N).
    """
    L, E, N = u.shape[1], u.shape[2], A.shape[1]
    n_tiles = -(-N // STATES)
    gated = z.shape[0] > 0
    rates = _scratch(blocks_per_task, n_tiles * TILE)  # A log2(e), for exp2
    rs, grad_rates = _scratch(blocks_per_task, n_tiles * TILE), _scratch(blocks_per_task, n_tiles * TILE)
    Bs, Cs = _scratch(CHUNK, n_tiles * STATES), _scratch(CHUNK, n_tiles * STATES)
    grad_Bs, grad_Cs = _scratch(CHUNK, n_tiles * TILE), _scratch(CHUNK, n_tiles * TILE)
    xs, gates, sums = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    deltas, dts, drives = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    grad_ys, gs = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    grad_drives, grad_dts = _scratch(CHUNK, LANES), _scratch(CHUNK, LANES)
    decays, states = _scratch(CHUNK, TILE), _scratch(CHUNK + 1, TILE)
    zero = repeat(full(0.0))
    for task in range(first, last):
        b, part = task // tasks_per_row, task % tasks_per_row
        first_block = part * blocks_per_task
        n_blocks = min(blocks_per_task, -(-E // LANES) - first_block)
        for block in range(n_blocks):
            e = (first_block + block) * LANES
            _pack(A, e, rates[block], np.float32(LOG2_E))
            _pack(grad_state[b], e, rs[block], np.float32(1.0))
            store_first(grad_D, (b, e), full(0.0), E - e)
            store_first(grad_bias, (b, e), full(0.0), E - e)
        grad_rates.fill(0)
        for t0 in range((L - 1) // CHUNK * CHUNK, -1, -CHUNK):
            n_tokens = min(CHUNK, L - t0)
            _copy_tokens(B, b, t0, n_tokens, Bs)
            _copy_tokens(C, b, t0, n_tokens, Cs)
            grad_Bs.fill(0)
            grad_Cs.fill(0)
            for block in range(n_blocks):
                e = (first_block + block) * LANES
                bias, skip = repeat(load_first(delta_bias, e, E - e)), repeat(load_first(D, e, E - e))
                _read_block(u, b, t0, n_tokens, e, xs)
                _read_block(delta, b, t0, n_tokens, e, deltas)
                _read_block(grad_y, b, t0, n_tokens, e, grad_ys)
                if gated:
                    _read_block(z, b, t0, n_tokens, e, gates)
                for t in range(0, n_tokens, STATES):
                    x, dt, g = load_tile(xs, (t, 0)), load_tile(deltas, (t, 0)) + bias, load_tile(grad_ys, (t, 0))
                    if delta_softplus:
                        dt = softplus(dt)
                    if gated:
                        gate = load_tile(gates, (t, 0))
                        g = g * (gate * sigmoid(gate))
                    store(dts, (t, 0), dt)
                    store(drives, (t, 0), dt * x)
                    store(sums, (t, 0), skip * x)
                    store(gs, (t, 0), g)
                    store(grad_drives, (t, 0), zero)
                    store(grad_dts, (t, 0), zero)
                for i in range(n_tiles):
                    rate = load_tile(rates, (block, i * TILE))
                    h = load_tile(checkpoints, (b, t0 // CHUNK, first_block + block, i * TILE))
                    for t in range(n_tokens):
                        store(states, (t, 0), h)
                        if starts[b, t0 + t]:
                            h = zero
                        decay = exp2(repeat(load(dts, (t, 0))) * rate)
                        h = decay * h + repeat(load(drives, (t, 0))) * spread(Bs, (t, i * STATES))
                        store(decays, (t, 0), decay)
                        store(sums, (t, 0), load(sums, (t, 0)) + fold(h * spread(Cs, (t, i * STATES))))
                    store(states, (n_tokens, 0), h)
                    r, grad_rate = load_tile(rs, (block, i * TILE)), zero
                    for t in range(n_tokens - 1, -1, -1):
                        g, drive = repeat(load(gs, (t, 0))), repeat(load(drives, (t, 0)))
                        dh = g * spread(Cs, (t, i * STATES)) + r
                        store(grad_Cs, (t, i * TILE), load_tile(grad_Cs, (t, i * TILE)) + g * h)
                        store(grad_Bs, (t, i * TILE), load_tile(grad_Bs, (t, i * TILE)) + dh * drive)
                        store(grad_drives, (t, 0), load(grad_drives, (t, 0)) + fold(dh * spread(Bs, (t, i * STATES))))
                        r, h = load_tile(decays, (t, 0)) * dh, load_tile(states, (t, 0))
                        grad_exponent = r * h
                        if starts[b, t0 + t]:
                            r, grad_exponent = zero, zero
                        grad_rate = grad_rate + grad_exponent * repeat(load(dts, (t, 0)))
                        store(grad_dts, (t, 0), load(grad_dts, (t, 0)) + fold(grad_exponent * rate))
                    store(rs, (block, i * TILE), r)
                    store(grad_rates, (block, i * TILE), load_tile(grad_rates, (block, i * TILE)) + grad_rate)
                for t in range(0, n_tokens, STATES):
                    grad_drive = load_tile(grad_drives, (t, 0))
                    grad_dt = grad_drive * load_tile(xs, (t, 0)) + load_tile(grad_dts, (t, 0)) * LOG_2
                    if delta_softplus:
                        grad_dt = grad_dt * sigmoid(load_tile(deltas, (t, 0)) + bias)
                    store(deltas, (t, 0), grad_dt)
                    store(drives, (t, 0), grad_drive * load_tile(dts, (t, 0)) + load_tile(gs, (t, 0)) * skip)
                    if gated:
                        gate = load_tile(gates, (t, 0))
                        s = sigmoid(gate)
                        slope = s * (1.0 + gate * (1.0 - s))
                        store(gates, (t, 0), load_tile(grad_ys, (t, 0)) * load_tile(sums, (t, 0)) * slope)
                # the scratch of delta, dt u and z now holds the gradients of delta, u and z
                _write_block(deltas, grad_delta, b, t0, n_tokens, e)
                _write_block(drives, grad_u, b, t0, n_tokens, e)
                if gated:
                    _write_block(gates, grad_z, b, t0, n_tokens, e)
                sum_D, sum_bias = full(0.0), full(0.0)
                for t in range(n_tokens):
                    sum_D = sum_D + load(gs, (t, 0)) * load(xs, (t, 0))
                    sum_bias = sum_bias + load(deltas, (t, 0))
                store_first(grad_D, (b, e), load_first(grad_D, (b, e), E - e) + sum_D, E - e)
                store_first(grad_bias, (b, e), load_first(grad_bias, (b, e), E - e) + sum_bias, E - e)
            for t in range(n_tokens):
                for i in range(n_tiles):
                    store(Bs, (t, i * STATES), total(load_tile(grad_Bs, (t, i * TILE))))
                    store(Cs, (t, i * STATES), total(load_tile(grad_Cs, (t, i * TILE))))
                for n in range(N):
                    grad_B[part, b, t0 + t, n] = Bs[t, n]
                    grad_C[part, b, t0 + t, n] = Cs[t, n]
        for block in range(n_blocks):
            e = (first_block + block) * LANES
            _unpack(grad_rates[block], e, grad_A[b])
            _unpack(rs[block], e, grad_initial_state[b])


@kernel
def sum_parts(first: int, last: int, parts: Floats2, result: Floats1) -> None:
    """result[i] = the sum of parts[:, i], taken in order, for the columns first * SUM_WIDTH .. last * SUM_WIDTH - 1."""
    stop = min(last * SUM_WIDTH, result.shape[0])
    for i in range(first * SUM_WIDTH, stop):
        result[i] = parts[0, i]
    for p in range(1, parts.shape[0]):
        for i in range(first * SUM_WIDTH, stop):
            result[i] += parts[p, i]
