"""SSD and its adjoint as numba kernels on explicit vectors (see kernels/simd.py): products of small matrices in chunks.

The algorithm is that of torch_impl.py, a chunk of CHUNK tokens at a time, of all heads of a task. Inside a chunk, with
d[i, j] the product of the decays of tokens j + 1 to i, and with the state h that enters it,

    y[i] = sum over j <= i of w[i, j] x[j] + d[i] h C[i],    w[i, j] = (C[i] B[j]) d[i, j] dt[j], and D more for i = j;

what leaves it is d h + sum over j of d[j] dt[j] x[j] B[j]^T. Decays are products of those of single tokens and their
gradients are sums: nothing is divided, and no difference is taken. A chunk ends where a document does, so nothing of a
document is ever multiplied by anything of another one.

Scratch is [token, channel], [token, state], [state, channel] or, of a quantity with one value per head, [head, token];
"T" marks a transpose. Heads lie side by side without padding. What is made of one head at a time is therefore written
in whole vectors from the first head to the last: what spills over is overwritten by the next one.

A task is `heads_per_task` heads of a group of a row of the batch. Tasks share no output, so any number of threads gives
the same bits.
"""

from __future__ import annotations

import numpy as np

from ..chunks import clear, copy, multiply, read, transpose_into, write
from ..simd import (
    BLOCK_ROWS,
    LANES,
    PAIR,
    STATES,
    Bools2,
    Floats1,
    Floats2,
    Floats3,
    Floats4,
    add_narrow_product,
    add_product,
    aligned_zeros,
    called,
    exp,
    full,
    kernel,
    load,
    load_tile,
    narrow_product,
    product,
    rounded_up,
    store,
    total,
)

CHUNK = 32
"""Tokens that are computed at once: a multiple of LANES."""

SPAN = 128
"""Tokens between two stored states, a multiple of CHUNK: backward computes those between them again."""


def checkpoint_shape(tasks: int, L: int, E: int, N: int) -> tuple[int, int, int, int]:
    """Shape of the states before every SPAN tokens, (tasks, spans, N, E), for tasks of E channels."""
    return tasks, -(-L // SPAN), N, rounded_up(E, LANES)


# Memory


@called
def _square_masks():
    """Ones on the diagonal and ones below it, LANES by LANES."""
    identity, below = np.zeros((LANES, LANES), np.float32), np.zeros((LANES, LANES), np.float32)
    for i in range(LANES):
        identity[i, i] = 1
        for j in range(i):
            below[i, j] = 1
    return identity, below


@called
def _pack(source, b, e0, width, state):
    """state[n, i] = source[b, e0 + i, n]."""
    for i in range(width):
        for n in range(source.shape[2]):
            state[n, i] = source[b, e0 + i, n]


@called
def _unpack(state, target, b, e0, width):
    """The reverse of `_pack`."""
    for i in range(width):
        for n in range(target.shape[2]):
            target[b, e0 + i, n] = state[n, i]


# Products


@called
def _range(i, n, causal):
    """The tokens k that are summed over for a block from token i on: k <= i or, in the adjoint, k >= i.

    Some rows of the block have no part in some of them: the factor must be zero there.
    """
    return (0, min(i + BLOCK_ROWS, n)) if causal else (i, n)


@called
def _multiply_triangle(c, a, b, e0, P, n, causal):
    """c[i] = sum over k of a[k, i] b[k], for P columns from e0 on; k as in `_range`."""
    for e in range(e0, e0 + P, PAIR):
        for i in range(0, n, BLOCK_ROWS):
            begin, end = _range(i, n, causal)
            if e0 + P - e > LANES:
                product(c, i, e, a, b, begin, end)
            else:
                narrow_product(c, i, e, a, b, begin, end)


@called
def _add_triangle(c, a, b, n, width, causal):
    """c[i] += sum over k of a[k, i] b[k]; k as in `_range`."""
    for e in range(0, width, PAIR):
        for i in range(0, n, BLOCK_ROWS):
            begin, end = _range(i, n, causal)
            if width - e > LANES:
                add_product(c, i, e, a, b, begin, end)
            else:
                add_narrow_product(c, i, e, a, b, begin, end)


@called
def _by_head(state, tokensT, factors, othersT, n, n_heads, P, N, block, gradsT, sums):
    """gradsT[n, t] += factors[h, t] z and sums[h, t] += othersT[n, t] z, where z = state[n] tokensT[:, t] of head h."""
    for i in range(0, N, BLOCK_ROWS):
        rows = state[i : i + BLOCK_ROWS].T
        for h in range(n_heads):
            for j in range(0, n, PAIR):
                if n - j > LANES:
                    product(block, 0, j, rows, tokensT, h * P, h * P + P)
                else:
                    narrow_product(block, 0, j, rows, tokensT, h * P, h * P + P)
            for j in range(0, n, LANES):
                factor, s = load(factors, (h, j)), load(sums, (h, j))
                for r in range(BLOCK_ROWS):
                    z = load(block, (r, j))
                    store(gradsT, (i + r, j), load(gradsT, (i + r, j)) + factor * z)
                    s = s + load(othersT, (i + r, j)) * z
                store(sums, (h, j), s)


# Decays


@called
def _decays(dt, A, b, t0, h0, n, n_heads, dts, decays, enter, leave, drive):
    """Fills [head, token]: dt, the decay of a token, of a state until it, from it to the end, and the latter times dt.

    Beyond n all are zero.
    """
    for h in range(n_heads):
        for t in range(n):
            dts[h, t] = dt[b, t0 + t, h0 + h]
        for t in range(n, rounded_up(n, LANES)):
            dts[h, t] = 0
        for t in range(0, n, LANES):
            store(decays, (h, t), exp(A[h0 + h] * load(dts, (h, t))))
        kept = np.float32(1.0)
        for t in range(n):
            kept *= decays[h, t]
            enter[h, t] = kept
        kept = np.float32(1.0)
        for t in range(n - 1, -1, -1):
            leave[h, t], drive[h, t] = kept, kept * dts[h, t]
            kept *= decays[h, t]
        for t in range(n, rounded_up(n, LANES)):
            enter[h, t], leave[h, t], drive[h, t] = 0, 0, 0


@called
def _spread(factors, t, n_heads, P, row):
    """row[e] = factors[head of e, t]."""
    for h in range(n_heads):
        factor = full(factors[h, t])
        for e in range(h * P, h * P + P, LANES):
            store(row, e, factor)


@called
def _scaled(tokens, factors, n, n_heads, P, result):
    """result[t, e] = factors[head of e, t] tokens[t, e]."""
    for t in range(n):
        for h in range(n_heads):
            factor = full(factors[h, t])
            for e in range(h * P, h * P + P, LANES):
                store(result, (t, e), factor * load(tokens, (t, e)))


@called
def _add_scaled(tokens, factors, n, n_heads, P, row, result):
    """result[t, e] += factors[head of e, t] tokens[t, e]; `row` is scratch."""
    for t in range(n):
        _spread(factors, t, n_heads, P, row)
        for e in range(0, n_heads * P, LANES):
            store(result, (t, e), load(result, (t, e)) + load(row, e) * load(tokens, (t, e)))


@called
def _weigh(scores, decays, dts, h, skip, n, identity, pairs, weights):
    """Fills pairs[i, j] = d[i, j] and weights[i, j] = w[i, j] of a head, in the vectors that reach the diagonal."""
    for j in range(0, n, LANES):
        dt, pair = load(dts, (h, j)), full(0.0)
        for t in range(j, n):
            pair = pair * decays[h, t]
            if t < j + LANES:
                pair = pair + load(identity, (t - j, 0))
            store(pairs, (t, j), pair)
            store(weights, (t, j), pair * load(scores, (t, j)) * dt)
    for t in range(n):
        weights[t, t] += skip


# Parts of both passes


@called
def _end(starts, b, t0, L):
    """The token after the last one that can be computed with token t0."""
    end = min(t0 // CHUNK * CHUNK + CHUNK, L)
    for t in range(t0 + 1, end):
        if starts[b, t]:
            return t
    return end


@called
def _advance(hs, xs, Bs, enter, drive, n, n_heads, P, driven, row):
    """Takes the state over n tokens; `driven` and `row` are scratch."""
    _spread(enter, n - 1, n_heads, P, row)
    _decay(hs, row, n_heads * P)
    _scaled(xs, drive, n, n_heads, P, driven)
    multiply(hs, Bs, driven, 0, hs.shape[0], n_heads * P, 0, n, True)


@called
def _decay(state, row, E):
    """state[n, e] *= row[e]."""
    for n in range(state.shape[0]):
        for e in range(0, E, LANES):
            store(state, (n, e), load(row, e) * load(state, (n, e)))


@kernel
def forward(
    first: int,
    last: int,
    tasks_per_group: int,
    heads_per_task: int,
    x: Floats3,
    dt: Floats3,
    A: Floats1,
    B: Floats4,
    C: Floats4,
    D: Floats1,
    initial_state: Floats3,
    starts: Bools2,
    checkpoints: Floats4,
    y: Floats3,
    state: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        tasks_per_group: tasks of a group of a row.
        heads_per_task: heads of a task; the last one of a group may have fewer.
        x: (B, L, H P).
        dt: (B, L, H).
        A: (H,).
        B: (B, L, G, N).
        C: (B, L, G, N).
        D: (H,).
        initial_state: (B, H P, N), or (0, H P, N) for zeros.
        starts: (B, L): at these the state before is forgotten, whatever it is.
        checkpoints: as checkpoint_shape says, written; empty where no backward is to come.
        y: (B, L, H P), written.
        state: (B, H P, N), written.
    """
    L, H, G, N = x.shape[1], dt.shape[2], B.shape[2], B.shape[3]
    P, heads_per_group = x.shape[2] // H, H // G
    width, n_states = rounded_up(heads_per_task * P, LANES), rounded_up(N, LANES)
    keep = checkpoints.shape[0] > 0
    hs, row = aligned_zeros(n_states, width), np.zeros(width + LANES, np.float32)
    xs, ys, others = (
        aligned_zeros(CHUNK, width + PAIR),
        aligned_zeros(CHUNK, width + PAIR),
        aligned_zeros(CHUNK, width + PAIR),
    )
    Bs, Cs, BT = aligned_zeros(CHUNK, n_states), aligned_zeros(CHUNK, n_states), aligned_zeros(n_states, CHUNK)
    scores, pairs, weights = aligned_zeros(CHUNK, CHUNK), aligned_zeros(CHUNK, CHUNK), aligned_zeros(CHUNK, CHUNK)
    dts, decays = aligned_zeros(heads_per_task, CHUNK), aligned_zeros(heads_per_task, CHUNK)
    enter, leave, drive = (
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
    )
    identity, _ = _square_masks()
    for task in range(first, last):
        part, b, g = task % tasks_per_group, task // tasks_per_group // G, task // tasks_per_group % G
        h0 = g * heads_per_group + part * heads_per_task
        n_heads = min(heads_per_task, heads_per_group - part * heads_per_task)
        e0, E = h0 * P, n_heads * P
        clear(hs, 0, hs.shape[0])
        alive = initial_state.shape[0] > 0
        if alive:
            _pack(initial_state, b, e0, E, hs)
        t0 = 0
        while t0 < L:
            n = _end(starts, b, t0, L) - t0
            if starts[b, t0]:
                clear(hs, 0, hs.shape[0])
                alive = False
            if keep and t0 % SPAN == 0:
                copy(hs, checkpoints[task, t0 // SPAN])
            read(x[b], t0, e0, n, E, xs, 0)
            read(B[b, :, g], t0, 0, n, N, Bs, 0)
            read(C[b, :, g], t0, 0, n, N, Cs, 0)
            _decays(dt, A, b, t0, h0, n, n_heads, dts, decays, enter, leave, drive)
            transpose_into(BT, Bs, n, N)
            multiply(scores, Cs.T, BT, 0, n, n, 0, N, False)
            for h in range(n_heads):
                _weigh(scores, decays, dts, h, D[h0 + h], n, identity, pairs, weights)
                _multiply_triangle(ys, weights.T, xs, h * P, P, n, True)
            if alive:
                multiply(others, Cs.T, hs, 0, n, E, 0, N, False)
                _add_scaled(others, enter, n, n_heads, P, row, ys)
            write(ys, 0, n, E, y[b], t0, e0)
            _advance(hs, xs, Bs, enter, drive, n, n_heads, P, others, row)
            alive = True
            t0 += n
        _unpack(hs, state, b, e0, E)


# Backward


@called
def _dot_channels(a, b, n_rows, E, result):
    """result[e] = the sum of a[n, e] b[n, e] over n_rows."""
    for e in range(0, E, LANES):
        s = full(0.0)
        for n in range(n_rows):
            s = s + load(a, (n, e)) * load(b, (n, e))
        store(result, e, s)


@called
def _differentiate(grad_weights, scores, pairs, dts, leave, left, h, n, below, grad_scores, direct, parts):
    """The gradients that go through the weights of a head.

    G[i, j] is the gradient of w[i, j] times what dt[j] is multiplied by in it, and the state that leaves is one more
    row, leave[h, j] left[h, j]. direct[h, j] becomes the sum of G[i, j] over i, and parts[t] a vector that sums to the
    sum of dt[j] G[i, j] over j < t <= i, which is what the log decay of token t changes. Adds to grad_scores.
    """
    for t in range(rounded_up(n, STATES)):
        store(parts, (t, 0), full(0.0))
    for j in range(0, n, LANES):
        dt, s = load(dts, (h, j)), load(leave, (h, j)) * load(left, (h, j))
        for t in range(n - 1, j - 1, -1):
            pair, grad = load(pairs, (t, j)), load(grad_weights, (t, j))
            store(grad_scores, (t, j), load(grad_scores, (t, j)) + grad * (pair * dt))
            s = s + grad * (pair * load(scores, (t, j)))
            before = dt * s
            if t < j + LANES:
                before = before * load(below, (t - j, 0))
            store(parts, (t, 0), load(parts, (t, 0)) + before)
        store(direct, (h, j), s)


@kernel
def backward(
    first: int,
    last: int,
    tasks_per_group: int,
    heads_per_task: int,
    x: Floats3,
    dt: Floats3,
    A: Floats1,
    B: Floats4,
    C: Floats4,
    D: Floats1,
    initial_state: Floats3,
    starts: Bools2,
    checkpoints: Floats4,
    grad_y: Floats3,
    grad_state: Floats3,
    grad_x: Floats3,
    grad_dt: Floats3,
    grad_A: Floats2,
    grad_B: Floats4,
    grad_C: Floats4,
    grad_D: Floats2,
    grad_initial_state: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass.

    grad_state may be (0, H P, N) for zeros, and grad_initial_state has the shape of initial_state. What several tasks
    add to is left in parts: grad_A and grad_D are (B, H), grad_B and grad_C (tasks per group * B, L, G, N).
    """
    L, H, G, N = x.shape[1], dt.shape[2], B.shape[2], B.shape[3]
    P, heads_per_group = x.shape[2] // H, H // G
    width, n_states = rounded_up(heads_per_task * P, LANES), rounded_up(N, LANES)
    given = initial_state.shape[0] > 0
    states, rs = aligned_zeros(SPAN // CHUNK * n_states, width), aligned_zeros(n_states, width)
    row, kept = np.zeros(width + LANES, np.float32), np.zeros(width, np.float32)
    xs, gs, others, grad_xs = (
        aligned_zeros(CHUNK, width + PAIR),
        aligned_zeros(CHUNK, width + PAIR),
        aligned_zeros(CHUNK, width + PAIR),
        aligned_zeros(CHUNK, width + PAIR),
    )
    xT, gT = aligned_zeros(width, CHUNK), aligned_zeros(width, CHUNK)
    Bs, Cs, grad_Bs, grad_Cs = (
        aligned_zeros(CHUNK, n_states),
        aligned_zeros(CHUNK, n_states),
        aligned_zeros(CHUNK, n_states),
        aligned_zeros(CHUNK, n_states),
    )
    BT, CT, grad_BT, grad_CT = (
        aligned_zeros(n_states, CHUNK),
        aligned_zeros(n_states, CHUNK),
        aligned_zeros(n_states, CHUNK),
        aligned_zeros(n_states, CHUNK),
    )
    scores, pairs, weights = aligned_zeros(CHUNK, CHUNK), aligned_zeros(CHUNK, CHUNK), aligned_zeros(CHUNK, CHUNK)
    grad_scores, grad_weights, block = (
        aligned_zeros(CHUNK, CHUNK),
        aligned_zeros(CHUNK, CHUNK),
        aligned_zeros(BLOCK_ROWS, CHUNK),
    )
    dts, decays = aligned_zeros(heads_per_task, CHUNK), aligned_zeros(heads_per_task, CHUNK)
    enter, leave, drive = (
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
    )
    entered, left, direct = (
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
        aligned_zeros(heads_per_task, CHUNK),
    )
    parts, logs = aligned_zeros(CHUNK, LANES), np.zeros(CHUNK, np.float32)
    begins = np.zeros(CHUNK, np.int64)
    identity, below = _square_masks()
    for task in range(first, last):
        part, b, g = task % tasks_per_group, task // tasks_per_group // G, task // tasks_per_group % G
        h0 = g * heads_per_group + part * heads_per_task
        n_heads = min(heads_per_task, heads_per_group - part * heads_per_task)
        e0, E = h0 * P, n_heads * P
        for h in range(h0, h0 + n_heads):
            grad_A[b, h], grad_D[b, h] = 0, 0
        clear(rs, 0, rs.shape[0])
        leaves = grad_state.shape[0] > 0
        if leaves:
            _pack(grad_state, b, e0, E, rs)
        for span in range((L - 1) // SPAN, -1, -1):
            copy(checkpoints[task, span], states[:n_states])
            span_end = min(span * SPAN + SPAN, L)
            n_chunks = -(-(span_end - span * SPAN) // CHUNK)
            for chunk in range(n_chunks - 1):
                hs = states[chunk * n_states + n_states : chunk * n_states + 2 * n_states]
                copy(states[chunk * n_states : chunk * n_states + n_states], hs)
                t0 = span * SPAN + chunk * CHUNK
                while t0 < span * SPAN + chunk * CHUNK + CHUNK:
                    n = _end(starts, b, t0, L) - t0
                    if starts[b, t0]:
                        clear(hs, 0, hs.shape[0])
                    read(x[b], t0, e0, n, E, xs, 0)
                    read(B[b, :, g], t0, 0, n, N, Bs, 0)
                    _decays(dt, A, b, t0, h0, n, n_heads, dts, decays, enter, leave, drive)
                    _advance(hs, xs, Bs, enter, drive, n, n_heads, P, others, row)
                    t0 += n
            for chunk in range(n_chunks - 1, -1, -1):
                hs = states[chunk * n_states : chunk * n_states + n_states]
                t0, n_pieces = span * SPAN + chunk * CHUNK, 0
                chunk_end = min(t0 + CHUNK, L)
                while t0 < chunk_end:
                    begins[n_pieces] = t0
                    n_pieces += 1
                    t0 = _end(starts, b, t0, L)
                for piece in range(n_pieces - 1, -1, -1):
                    t0 = begins[piece]
                    n = (begins[piece + 1] if piece + 1 < n_pieces else chunk_end) - t0
                    begun = starts[b, t0]
                    enters = piece == 0 and not begun and (t0 > 0 or given)
                    read(x[b], t0, e0, n, E, xs, 0)
                    read(grad_y[b], t0, e0, n, E, gs, 0)
                    read(B[b, :, g], t0, 0, n, N, Bs, 0)
                    read(C[b, :, g], t0, 0, n, N, Cs, 0)
                    _decays(dt, A, b, t0, h0, n, n_heads, dts, decays, enter, leave, drive)
                    transpose_into(xT, xs, n, E)
                    transpose_into(gT, gs, n, E)
                    transpose_into(BT, Bs, n, N)
                    multiply(scores, Cs.T, BT, 0, n, n, 0, N, False)
                    clear(grad_scores, 0, grad_scores.shape[0])
                    clear(entered, 0, entered.shape[0])
                    clear(left, 0, left.shape[0])
                    # between the tokens and the states that enter and leave
                    if enters:
                        transpose_into(CT, Cs, n, N)
                        clear(grad_CT, 0, grad_CT.shape[0])
                        _by_head(hs, gT, enter, CT, n, n_heads, P, N, block, grad_CT, entered)
                        transpose_into(grad_Cs, grad_CT, n_states, n)
                    else:
                        clear(grad_Cs, 0, grad_Cs.shape[0])
                    if leaves:
                        clear(grad_BT, 0, grad_BT.shape[0])
                        _by_head(rs, xT, drive, BT, n, n_heads, P, N, block, grad_BT, left)
                        transpose_into(grad_Bs, grad_BT, n_states, n)
                        multiply(others, Bs.T, rs, 0, n, E, 0, N, False)
                    else:
                        clear(grad_Bs, 0, grad_Bs.shape[0])
                    # what the state that enters was worth by what is left of it
                    _spread(enter, n - 1, n_heads, P, row)
                    if leaves:
                        _decay(rs, row, E)
                    _dot_channels(rs, hs, N if enters and leaves else 0, E, kept)
                    # between the tokens
                    for h in range(n_heads):
                        _weigh(scores, decays, dts, h, D[h0 + h], n, identity, pairs, weights)
                        multiply(grad_weights, gs.T, xT, 0, n, n, h * P, h * P + P, False)
                        for t in range(n):
                            grad_D[b, h0 + h] += grad_weights[t, t]
                        _differentiate(
                            grad_weights, scores, pairs, dts, leave, left, h, n, below, grad_scores, direct, parts
                        )
                        worth = np.float32(0.0)
                        for e in range(h * P, h * P + P):
                            worth += kept[e]
                        for t in range(0, n, STATES):
                            store(logs, t, total(load_tile(parts, (t, 0))))
                        for t in range(n - 1, -1, -1):
                            worth += entered[h, t] * enter[h, t]
                            grad_log = logs[t] + worth
                            grad_A[b, h0 + h] += grad_log * dts[h, t]
                            grad_dt[b, t0 + t, h0 + h] = grad_log * A[h0 + h] + direct[h, t]
                        _multiply_triangle(grad_xs, weights, gs, h * P, P, n, False)
                    if leaves:
                        _add_scaled(others, drive, n, n_heads, P, row, grad_xs)
                    write(grad_xs, 0, n, E, grad_x[b], t0, e0)
                    _add_triangle(grad_Cs, grad_scores.T, Bs, n, n_states, True)
                    _add_triangle(grad_Bs, grad_scores, Cs, n, n_states, False)
                    write(grad_Bs, 0, n, N, grad_B[part * x.shape[0] + b, :, g], t0, 0)
                    write(grad_Cs, 0, n, N, grad_C[part * x.shape[0] + b, :, g], t0, 0)
                    # the state that enters
                    if begun:
                        clear(rs, 0, rs.shape[0])
                        leaves = False
                    elif t0 > 0 or given:
                        _scaled(gs, enter, n, n_heads, P, others)
                        multiply(rs, Cs, others, 0, n_states, E, 0, n, True)
                        leaves = True
        if given:
            _unpack(rs, grad_initial_state, b, e0, E)
