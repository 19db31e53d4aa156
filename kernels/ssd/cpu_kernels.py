"""The recurrence of SSD and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

As the selective scan without exponentials: the states of a channel share one decay, which comes ready. A task is one
group of one row of the batch and `blocks_per_task` blocks of LANES of its channels. It walks the sequence in chunks of
CHUNK tokens, in which it takes STATES states of one block after another through the tokens, in registers. Tasks share
no output, so any number of threads gives the same bits.

Scratch arrays are indexed as kernels/blocks.py says.
"""

from __future__ import annotations

import numpy as np

from ..blocks import pack, padded, read, read_tokens, scratch, unpack, write, write_tokens
from ..simd import (
    LANES,
    STATES,
    TILE,
    Bools2,
    Floats4,
    fold,
    full,
    kernel,
    load,
    load_tile,
    repeat,
    spread,
    store,
    total,
)

CHUNK = 32
"""Tokens between two stored states."""


def checkpoint_shape(rows: int, L: int, E: int, N: int) -> tuple[int, int, int, int]:
    """Shape of the states before every chunk: (B G, chunks, blocks, padded states * LANES)."""
    return rows, -(-L // CHUNK), -(-E // LANES), padded(N)


@kernel
def forward(
    first: int,
    last: int,
    tasks_per_row: int,
    blocks_per_task: int,
    drive: Floats4,
    decay: Floats4,
    B: Floats4,
    C: Floats4,
    initial_state: Floats4,
    starts: Bools2,
    checkpoints: Floats4,
    y: Floats4,
    state: Floats4,
) -> None:
    """Does the tasks first .. last - 1 of h[t] = decay[t] h[t-1] + drive[t] B[t]^T, y[t] = h[t] C[t].

    Args:
        first: first task.
        last: the task after the last.
        tasks_per_row: tasks of a group of a row.
        blocks_per_task: blocks of a task.
        drive: (B, L, G, E), where E are the channels of a group.
        decay: (B, L, G, E).
        B: (B, L, G, N).
        C: (B, L, G, N).
        initial_state: (B, G, E, N).
        starts: (B, L): at these the state before is forgotten, whatever it is.
        checkpoints: as checkpoint_shape says, written; empty where no backward is to come.
        y: (B, L, G, E), written.
        state: (B, G, E, N), written.
    """
    L, G, E, N = drive.shape[1], drive.shape[2], drive.shape[3], B.shape[3]
    n_tiles = -(-N // STATES)
    keep = checkpoints.shape[0] > 0
    states = np.zeros((blocks_per_task, n_tiles * TILE), np.float32)
    Bs, Cs = np.zeros((CHUNK, n_tiles * STATES), np.float32), np.zeros((CHUNK, n_tiles * STATES), np.float32)
    drives, decays = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    sums = scratch(blocks_per_task, CHUNK)
    zero = repeat(full(0.0))
    for task in range(first, last):
        row, first_block = task // tasks_per_row, task % tasks_per_row * blocks_per_task
        b, g = row // G, row % G
        n_blocks, e0 = min(blocks_per_task, -(-E // LANES) - first_block), first_block * LANES
        for block in range(n_blocks):
            pack(initial_state[b, g], e0 + block * LANES, states[block], np.float32(1.0))
        for t0 in range(0, L, CHUNK):
            n_tokens = min(CHUNK, L - t0)
            read_tokens(B[:, :, g], b, t0, n_tokens, Bs)
            read_tokens(C[:, :, g], b, t0, n_tokens, Cs)
            read(drive[:, :, g], b, t0, n_tokens, e0, n_blocks, drives)
            read(decay[:, :, g], b, t0, n_tokens, e0, n_blocks, decays)
            sums.fill(0)
            for i in range(n_tiles):
                for block in range(n_blocks):
                    h = load_tile(states, (block, i * TILE))
                    if keep:
                        store(checkpoints, (row, t0 // CHUNK, first_block + block, i * TILE), h)
                    for t in range(n_tokens):
                        if starts[b, t0 + t]:
                            h = zero
                        added = repeat(load(drives, (block, t, 0))) * spread(Bs, (t, i * STATES))
                        h = repeat(load(decays, (block, t, 0))) * h + added
                        store(sums, (block, t, 0), load(sums, (block, t, 0)) + fold(h * spread(Cs, (t, i * STATES))))
                    store(states, (block, i * TILE), h)
            write(sums, y[:, :, g], b, t0, n_tokens, e0, n_blocks)
        for block in range(n_blocks):
            unpack(states[block], e0 + block * LANES, state[b, g])


@kernel
def backward(
    first: int,
    last: int,
    tasks_per_row: int,
    blocks_per_task: int,
    drive: Floats4,
    decay: Floats4,
    B: Floats4,
    C: Floats4,
    starts: Bools2,
    checkpoints: Floats4,
    grad_y: Floats4,
    grad_state: Floats4,
    grad_drive: Floats4,
    grad_decay: Floats4,
    grad_B: Floats4,
    grad_C: Floats4,
    grad_initial_state: Floats4,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass.

    The gradient of a state is dh[t] = grad_y[t] C[t]^T + r[t+1], and r[t] = decay[t] dh[t] is carried to the left, so
    nothing is divided by a decay. What several tasks add to is left in parts: grad_B and grad_C are
    (tasks per row * B, L, G, N).
    """
    L, G, E, N = drive.shape[1], drive.shape[2], drive.shape[3], B.shape[3]
    n_tiles = -(-N // STATES)
    rs = np.zeros((blocks_per_task, n_tiles * TILE), np.float32)
    Bs, Cs = np.zeros((CHUNK, n_tiles * STATES), np.float32), np.zeros((CHUNK, n_tiles * STATES), np.float32)
    drives, grad_drives = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    decays, grad_decays = scratch(blocks_per_task, CHUNK), scratch(blocks_per_task, CHUNK)
    gs, states = scratch(blocks_per_task, CHUNK), np.zeros((CHUNK, TILE), np.float32)
    grad_Bs, grad_Cs = np.zeros((CHUNK, TILE), np.float32), np.zeros((CHUNK, TILE), np.float32)
    zero = repeat(full(0.0))
    for task in range(first, last):
        row, part = task // tasks_per_row, task % tasks_per_row
        b, g, first_block = row // G, row % G, part * blocks_per_task
        n_blocks, e0 = min(blocks_per_task, -(-E // LANES) - first_block), first_block * LANES
        for block in range(n_blocks):
            pack(grad_state[b, g], e0 + block * LANES, rs[block], np.float32(1.0))
        for t0 in range((L - 1) // CHUNK * CHUNK, -1, -CHUNK):
            n_tokens = min(CHUNK, L - t0)
            read_tokens(B[:, :, g], b, t0, n_tokens, Bs)
            read_tokens(C[:, :, g], b, t0, n_tokens, Cs)
            read(drive[:, :, g], b, t0, n_tokens, e0, n_blocks, drives)
            read(decay[:, :, g], b, t0, n_tokens, e0, n_blocks, decays)
            read(grad_y[:, :, g], b, t0, n_tokens, e0, n_blocks, gs)
            grad_drives.fill(0)
            grad_decays.fill(0)
            for i in range(n_tiles):
                grad_Bs.fill(0)
                grad_Cs.fill(0)
                for block in range(n_blocks):
                    h = load_tile(checkpoints, (row, t0 // CHUNK, first_block + block, i * TILE))
                    for t in range(n_tokens):
                        store(states, (t, 0), h)
                        if starts[b, t0 + t]:
                            h = zero
                        added = repeat(load(drives, (block, t, 0))) * spread(Bs, (t, i * STATES))
                        h = repeat(load(decays, (block, t, 0))) * h + added
                    r = load_tile(rs, (block, i * TILE))
                    for t in range(n_tokens - 1, -1, -1):
                        grad = repeat(load(gs, (block, t, 0)))
                        dh = grad * spread(Cs, (t, i * STATES)) + r
                        store(grad_Cs, (t, 0), load_tile(grad_Cs, (t, 0)) + grad * h)
                        store(grad_Bs, (t, 0), load_tile(grad_Bs, (t, 0)) + dh * repeat(load(drives, (block, t, 0))))
                        r, h = repeat(load(decays, (block, t, 0))) * dh, load_tile(states, (t, 0))
                        before = h
                        if starts[b, t0 + t]:
                            r, before = zero, zero
                        from_drive, from_decay = fold(dh * spread(Bs, (t, i * STATES))), fold(dh * before)
                        store(grad_drives, (block, t, 0), load(grad_drives, (block, t, 0)) + from_drive)
                        store(grad_decays, (block, t, 0), load(grad_decays, (block, t, 0)) + from_decay)
                    store(rs, (block, i * TILE), r)
                for t in range(n_tokens):
                    store(Bs, (t, i * STATES), total(load_tile(grad_Bs, (t, 0))))
                    store(Cs, (t, i * STATES), total(load_tile(grad_Cs, (t, 0))))
            write(grad_drives, grad_drive[:, :, g], b, t0, n_tokens, e0, n_blocks)
            write(grad_decays, grad_decay[:, :, g], b, t0, n_tokens, e0, n_blocks)
            # the scratch of B and C now holds their gradients
            write_tokens(Bs, grad_B[:, :, g], part * drive.shape[0] + b, t0, n_tokens)
            write_tokens(Cs, grad_C[:, :, g], part * drive.shape[0] + b, t0, n_tokens)
        for block in range(n_blocks):
            unpack(rs[block], e0 + block * LANES, grad_initial_state[b, g])
