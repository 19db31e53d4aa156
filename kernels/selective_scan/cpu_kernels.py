"""The recurrence of the selective scan and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

A task is one row of the batch and `blocks_per_task` blocks of LANES channels. It walks the sequence in chunks of CHUNK
tokens; in a chunk it first reads the inputs of all its blocks, row by row as memory has them, and prepares what does
not depend on the state (softplus, dt u), STATES tokens to a tile. Then it takes STATES states of one block after
another through the chunk's tokens with the state in registers. Tasks share no output, so any number of threads gives
the same bits.

Scratch arrays are indexed as kernels/blocks.py says.
"""

from __future__ import annotations

import numpy as np

from ..blocks import pack, padded, read, read_tokens, scratch, unpack, write, write_tokens
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

CHUNK = 16
"""Tokens between two stored states: what one block needs of a chunk in backward fits the first-level cache."""

LOG_2 = 1 / LOG2_E


def checkpoint_shape(batch: int, L: int, E: int, N: int) -> tuple[int, int, int, int]:
    """Shape of the states before every chunk: (B, chunks, blocks, padded states * LANES)."""
    return batch, -(-L // CHUNK), -(-E // LANES), padded(N)


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
    rates = np.zeros((blocks_per_task, n_tiles * TILE), np.float32)  # A log2(e), for exp2
    states = np.zeros((blocks_per_task, n_tiles * TILE), np.float32)
    Bs, Cs = np.zeros((CHUNK, n_tiles * STATES), np.float32), np.zeros((CHUNK, n_tiles * STATES), np.float32)
    xs, sums = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    dts, drives = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    zero = repeat(full(0.0))
    for task in range(first, last):
        b, first_block = task // tasks_per_row, task % tasks_per_row * blocks_per_task
        n_blocks, e0 = min(blocks_per_task, -(-E // LANES) - first_block), first_block * LANES
        for block in range(n_blocks):
            pack(A, e0 + block * LANES, rates[block], np.float32(LOG2_E))
            pack(initial_state[b], e0 + block * LANES, states[block], np.float32(1.0))
        for t0 in range(0, L, CHUNK):
            n_tokens = min(CHUNK, L - t0)
            read_tokens(B, b, t0, n_tokens, Bs)
            read_tokens(C, b, t0, n_tokens, Cs)
            read(u, b, t0, n_tokens, e0, n_blocks, xs)
            read(delta, b, t0, n_tokens, e0, n_blocks, dts)
            for block in range(n_blocks):
                e = e0 + block * LANES
                bias, skip = repeat(load_first(delta_bias, e, E - e)), repeat(load_first(D, e, E - e))
                for t in range(0, n_tokens, STATES):
                    x, dt = load_tile(xs, (block, t, 0)), load_tile(dts, (block, t, 0)) + bias
                    if delta_softplus:
                        dt = softplus(dt)
                    store(dts, (block, t, 0), dt)
                    store(drives, (block, t, 0), dt * x)
                    store(sums, (block, t, 0), skip * x)
            for i in range(n_tiles):
                for block in range(n_blocks):
                    rate, h = load_tile(rates, (block, i * TILE)), load_tile(states, (block, i * TILE))
                    if keep:
                        store(checkpoints, (b, t0 // CHUNK, first_block + block, i * TILE), h)
                    for t in range(n_tokens):
                        if starts[b, t0 + t]:
                            h = zero
                        decay = exp2(repeat(load(dts, (block, t, 0))) * rate)
                        h = decay * h + repeat(load(drives, (block, t, 0))) * spread(Bs, (t, i * STATES))
                        store(sums, (block, t, 0), load(sums, (block, t, 0)) + fold(h * spread(Cs, (t, i * STATES))))
                    store(states, (block, i * TILE), h)
            if gated:
                read(z, b, t0, n_tokens, e0, n_blocks, xs)
                for block in range(n_blocks):
                    for t in range(0, n_tokens, STATES):
                        gate = load_tile(xs, (block, t, 0))
                        store(sums, (block, t, 0), load_tile(sums, (block, t, 0)) * (gate * sigmoid(gate)))
            write(sums, y, b, t0, n_tokens, e0, n_blocks)
        for block in range(n_blocks):
            unpack(states[block], e0 + block * LANES, state[b])


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
    rates = np.zeros((blocks_per_task, n_tiles * TILE), np.float32)  # A log2(e), for exp2
    rs, grad_rates = np.zeros_like(rates), np.zeros_like(rates)
    Bs, Cs = np.zeros((CHUNK, n_tiles * STATES), np.float32), np.zeros((CHUNK, n_tiles * STATES), np.float32)
    xs, deltas, gates = (
        scratch(blocks_per_task, CHUNK),
        scratch(blocks_per_task, CHUNK),
        scratch(blocks_per_task, CHUNK),
    )
    grad_ys, gs = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    dts, drives, sums = (
        scratch(blocks_per_task, CHUNK),
        scratch(blocks_per_task, CHUNK),
        scratch(blocks_per_task, CHUNK),
    )
    grad_dts, grad_drives = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    decays, states = np.zeros((CHUNK, TILE), np.float32), np.zeros((CHUNK, TILE), np.float32)
    grad_Bs, grad_Cs = np.zeros((CHUNK, TILE), np.float32), np.zeros((CHUNK, TILE), np.float32)
    zero = repeat(full(0.0))
    for task in range(first, last):
        b, part = task // tasks_per_row, task % tasks_per_row
        first_block = part * blocks_per_task
        n_blocks, e0 = min(blocks_per_task, -(-E // LANES) - first_block), first_block * LANES
        for block in range(n_blocks):
            e = e0 + block * LANES
            pack(A, e, rates[block], np.float32(LOG2_E))
            pack(grad_state[b], e, rs[block], np.float32(1.0))
            store_first(grad_D, (b, e), full(0.0), E - e)
            store_first(grad_bias, (b, e), full(0.0), E - e)
        grad_rates.fill(0)
        for t0 in range((L - 1) // CHUNK * CHUNK, -1, -CHUNK):
            n_tokens = min(CHUNK, L - t0)
            read_tokens(B, b, t0, n_tokens, Bs)
            read_tokens(C, b, t0, n_tokens, Cs)
            read(u, b, t0, n_tokens, e0, n_blocks, xs)
            read(delta, b, t0, n_tokens, e0, n_blocks, deltas)
            read(grad_y, b, t0, n_tokens, e0, n_blocks, grad_ys)
            if gated:
                read(z, b, t0, n_tokens, e0, n_blocks, gates)
            for block in range(n_blocks):
                e = e0 + block * LANES
                bias, skip = repeat(load_first(delta_bias, e, E - e)), repeat(load_first(D, e, E - e))
                for t in range(0, n_tokens, STATES):
                    x, dt = load_tile(xs, (block, t, 0)), load_tile(deltas, (block, t, 0)) + bias
                    g = load_tile(grad_ys, (block, t, 0))
                    if delta_softplus:
                        dt = softplus(dt)
                    if gated:
                        gate = load_tile(gates, (block, t, 0))
                        g = g * (gate * sigmoid(gate))
                    store(dts, (block, t, 0), dt)
                    store(drives, (block, t, 0), dt * x)
                    store(sums, (block, t, 0), skip * x)
                    store(gs, (block, t, 0), g)
                    store(grad_drives, (block, t, 0), zero)
                    store(grad_dts, (block, t, 0), zero)
            for i in range(n_tiles):
                grad_Bs.fill(0)
                grad_Cs.fill(0)
                for block in range(n_blocks):
                    rate = load_tile(rates, (block, i * TILE))
                    h = load_tile(checkpoints, (b, t0 // CHUNK, first_block + block, i * TILE))
                    for t in range(n_tokens):
                        store(states, (t, 0), h)
                        if starts[b, t0 + t]:
                            h = zero
                        decay = exp2(repeat(load(dts, (block, t, 0))) * rate)
                        h = decay * h + repeat(load(drives, (block, t, 0))) * spread(Bs, (t, i * STATES))
                        store(decays, (t, 0), decay)
                        store(sums, (block, t, 0), load(sums, (block, t, 0)) + fold(h * spread(Cs, (t, i * STATES))))
                    r, grad_rate = load_tile(rs, (block, i * TILE)), zero
                    for t in range(n_tokens - 1, -1, -1):
                        g, drive = repeat(load(gs, (block, t, 0))), repeat(load(drives, (block, t, 0)))
                        dh = g * spread(Cs, (t, i * STATES)) + r
                        store(grad_Cs, (t, 0), load_tile(grad_Cs, (t, 0)) + g * h)
                        store(grad_Bs, (t, 0), load_tile(grad_Bs, (t, 0)) + dh * drive)
                        from_state = fold(dh * spread(Bs, (t, i * STATES)))
                        store(grad_drives, (block, t, 0), load(grad_drives, (block, t, 0)) + from_state)
                        r, h = load_tile(decays, (t, 0)) * dh, load_tile(states, (t, 0))
                        grad_exponent = r * h
                        if starts[b, t0 + t]:
                            r, grad_exponent = zero, zero
                        grad_rate = grad_rate + grad_exponent * repeat(load(dts, (block, t, 0)))
                        store(grad_dts, (block, t, 0), load(grad_dts, (block, t, 0)) + fold(grad_exponent * rate))
                    store(rs, (block, i * TILE), r)
                    store(grad_rates, (block, i * TILE), load_tile(grad_rates, (block, i * TILE)) + grad_rate)
                for t in range(n_tokens):
                    store(Bs, (t, i * STATES), total(load_tile(grad_Bs, (t, 0))))
                    store(Cs, (t, i * STATES), total(load_tile(grad_Cs, (t, 0))))
            for block in range(n_blocks):
                e = e0 + block * LANES
                bias, skip = repeat(load_first(delta_bias, e, E - e)), repeat(load_first(D, e, E - e))
                for t in range(0, n_tokens, STATES):
                    grad_drive, g = load_tile(grad_drives, (block, t, 0)), load_tile(gs, (block, t, 0))
                    grad_dt = grad_drive * load_tile(xs, (block, t, 0)) + load_tile(grad_dts, (block, t, 0)) * LOG_2
                    if delta_softplus:
                        grad_dt = grad_dt * sigmoid(load_tile(deltas, (block, t, 0)) + bias)
                    store(deltas, (block, t, 0), grad_dt)
                    store(drives, (block, t, 0), grad_drive * load_tile(dts, (block, t, 0)) + g * skip)
                    if gated:
                        gate = load_tile(gates, (block, t, 0))
                        s = sigmoid(gate)
                        slope = s * (1.0 + gate * (1.0 - s))
                        before_gate = load_tile(grad_ys, (block, t, 0)) * load_tile(sums, (block, t, 0))
                        store(gates, (block, t, 0), before_gate * slope)
                sum_D, sum_bias = full(0.0), full(0.0)
                for t in range(n_tokens):
                    sum_D = sum_D + load(gs, (block, t, 0)) * load(xs, (block, t, 0))
                    sum_bias = sum_bias + load(deltas, (block, t, 0))
                store_first(grad_D, (b, e), load_first(grad_D, (b, e), E - e) + sum_D, E - e)
                store_first(grad_bias, (b, e), load_first(grad_bias, (b, e), E - e) + sum_bias, E - e)
            # the scratch of delta, dt u and z now holds the gradients of delta, u and z
            write(deltas, grad_delta, b, t0, n_tokens, e0, n_blocks)
            write(drives, grad_u, b, t0, n_tokens, e0, n_blocks)
            if gated:
                write(gates, grad_z, b, t0, n_tokens, e0, n_blocks)
            write_tokens(Bs, grad_B[part], b, t0, n_tokens)
            write_tokens(Cs, grad_C[part], b, t0, n_tokens)
        for block in range(n_blocks):
            e = e0 + block * LANES
            unpack(grad_rates[block], e, grad_A[b])
            unpack(rs[block], e, grad_initial_state[b])
