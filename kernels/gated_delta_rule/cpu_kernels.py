"""The gated delta rule and its adjoint as numba kernels on explicit vectors (see kernels/simd.py).

Chunks of CHUNK tokens are products of small matrices (arXiv:2412.06464, section 3.3), which stay in the first-level
cache. With the state S that enters a chunk, e[i] its decay until token i, d[i, j] that of what token j wrote, and the
transpose of S as scratch has it, forward finds for each token

    r[i] = v[i] - e[i] k[i] S - sum over j < i of d[i, j] (k[i] k[j]) u[j],    u[i] = b[i] r[i],
    o[i] =        e[i] q[i] S + sum over j <= i of d[i, j] (q[i] k[j]) u[j],

and the state after the chunk, e S + the sum of d k[j]^T u[j]. Keys and queries are treated alike but for a sign, so
they lie side by side: "tokens" are the CHUNK keys and then the CHUNK queries, "outcomes" the rows r and then the rows
o. A chunk ends where a document does, and so nothing of one document is ever multiplied by anything of another.

Decays are products of those of single tokens, never quotients. Backward needs r and the state before every SPAN tokens.

A task is `width` channels of the values of one head of one row of the batch. Tasks share no output, so any number of
threads gives the same bits.
"""

from __future__ import annotations

import numpy as np

from ..chunks import clear, copy, multiply, read, transpose_into, write
from ..simd import (
    BLOCK_ROWS,
    LANES,
    STATES,
    Bools2,
    Floats3,
    Floats4,
    aligned_zeros,
    called,
    exp,
    full,
    kernel,
    load,
    load_tile,
    rounded_up,
    store,
    total,
)

CHUNK = 16
"""Tokens of a chunk: a multiple of LANES."""

SPAN = 64
"""Tokens between two stored states: a multiple of CHUNK."""

assert CHUNK % LANES == 0


# Memory


@called
def _dot(a, b, n_rows, four):
    """The sum of a[i, j] b[i, j]; `four` is scratch."""
    s0 = full(0.0)
    s1, s2, s3 = s0, s0, s0
    for i in range(0, n_rows, 4):
        for j in range(0, a.shape[1], LANES):
            s0 = s0 + load(a, (i, j)) * load(b, (i, j))
            s1 = s1 + load(a, (i + 1, j)) * load(b, (i + 1, j))
            s2 = s2 + load(a, (i + 2, j)) * load(b, (i + 2, j))
            s3 = s3 + load(a, (i + 3, j)) * load(b, (i + 3, j))
    s = np.float32(0.0)
    store(four, (0, 0), (s0 + s1) + (s2 + s3))
    for i in range(LANES):
        s += four[0, i]
    return s


@called
def _add(scratch, n_rows, result):
    """result[i, j] += scratch[i, j]."""
    for i in range(n_rows):
        for j in range(0, scratch.shape[1], LANES):
            store(result, (i, j), load(result, (i, j)) + load(scratch, (i, j)))


@called
def _scale(scratch, n_rows, factor):
    for i in range(n_rows):
        for j in range(0, scratch.shape[1], LANES):
            store(scratch, (i, j), load(scratch, (i, j)) * factor)


@called
def _scale_columns(scratch, n_rows, factors):
    for j in range(0, scratch.shape[1], LANES):
        factor = load(factors, j)
        for i in range(n_rows):
            store(scratch, (i, j), load(scratch, (i, j)) * factor)


@called
def _scale_rows(scratch, row, n_rows, factors):
    for i in range(row, row + n_rows):
        for j in range(0, scratch.shape[1], LANES):
            store(scratch, (i, j), load(scratch, (i, j)) * factors[i])


# A chunk


@called
def _end(starts, b, t, L):
    """The first token after the chunk that begins at token t."""
    end = min(t // CHUNK * CHUNK + CHUNK, L)
    for i in range(t + 1, end):
        if starts[b, i]:
            return i
    return end


@called
def _decay(log_decay, b, t0, h, n_tokens, factors):
    """Decays by token."""
    for t in range(n_tokens):
        x = log_decay[b, t0 + t, h]
        factors[t] = x if x == x else np.nan  # as IEEE arithmetic makes it: exp would misread the low bits of another
    for t in range(0, CHUNK, LANES):
        store(factors, t, exp(load(factors, t)))


@called
def _read_strengths(beta, b, t0, h, n_tokens, betas):
    for t in range(CHUNK):
        betas[t] = beta[b, t0 + t, h] if t < n_tokens else np.float32(0.0)


@called
def _read_residuals(residuals, task, t0, n_tokens, betas, us, rs):
    """The rows r and u = b r, up to whole blocks."""
    for t in range(n_tokens):
        for p in range(0, us.shape[1], LANES):
            r = load(residuals, (task, t0 + t, p))
            store(rs, (t, p), r)
            store(us, (t, p), betas[t] * r)
    for rows in (us, rs):
        clear(rows, n_tokens, rounded_up(n_tokens, BLOCK_ROWS))


@called
def _leaving(factors, n_tokens, leave):
    """leave[j] = the decay of token j at the end of the chunk; returns that of the state."""
    d = np.float32(1.0)
    for t in range(n_tokens - 1, -1, -1):
        leave[t] = d
        d *= factors[t]
    return d


@called
def _mix(tokens_t, N, factors, n_tokens, enter, decays, mixing):
    """What tokens take of the state and of each other.

    Args:
        tokens_t: tokens as columns, (N, 2 CHUNK).
        N: channels of a key.
        factors: decays by token.
        n_tokens: tokens of the chunk.
        enter: of the state by token, (2 CHUNK,), written: -e[i] and e[i].
        decays: (CHUNK, 2 CHUNK), written: row j has -d[i, j] for i > j and d[i, j] for i >= j, zeros elsewhere.
        mixing: (CHUNK, 2 CHUNK), written: decays times the products of key j with the tokens.
    """
    if n_tokens < CHUNK:  # what another chunk left behind these tokens may be no number
        enter[:], decays[:] = 0, 0
    e = np.float32(1.0)
    for j in range(n_tokens):
        e *= factors[j]
        enter[j], enter[CHUNK + j] = -e, e
        d = np.float32(1.0)
        decays[j, CHUNK + j] = d
        for i in range(j + 1, n_tokens):
            d *= factors[i]
            decays[j, i], decays[j, CHUNK + i] = -d, d
    multiply(mixing, tokens_t, tokens_t, 0, n_tokens, mixing.shape[1], 0, N, False)
    for j in range(CHUNK):
        for i in range(0, 2 * CHUNK, LANES):
            store(mixing, (j, i), load(mixing, (j, i)) * load(decays, (j, i)))


@called
def _solve(mixing, betas, n_tokens, outcomes, us):
    """Subtracts from the rows r what tokens before have written, and writes u = b r, a block of rows at a time."""
    for i in range(0, n_tokens, BLOCK_ROWS):
        multiply(outcomes, mixing, us, i, BLOCK_ROWS, outcomes.shape[1], 0, i, True)
        for t in range(i, i + BLOCK_ROWS):
            for p in range(0, us.shape[1], LANES):
                r = load(outcomes, (t, p))
                for j in range(i, t):
                    r = r + mixing[j, t] * load(us, (j, p))
                store(outcomes, (t, p), r)
                store(us, (t, p), betas[t] * r)


@called
def _solve_back(mixing_t, betas, n_tokens, grad_outcomes, grad_us):
    """The adjoint of `_solve`: adds to du what later tokens and outputs have read, and writes the rows dr = b du."""
    for i in range((n_tokens - 1) // BLOCK_ROWS * BLOCK_ROWS, -1, -BLOCK_ROWS):
        end = i + BLOCK_ROWS
        multiply(grad_us, mixing_t, grad_outcomes, i, BLOCK_ROWS, grad_us.shape[1], end, n_tokens, True)
        multiply(grad_us, mixing_t, grad_outcomes, i, BLOCK_ROWS, grad_us.shape[1], CHUNK + i, CHUNK + n_tokens, True)
        for t in range(end - 1, i - 1, -1):
            for p in range(0, grad_us.shape[1], LANES):
                u = load(grad_us, (t, p))
                for j in range(t + 1, end):
                    u = u + mixing_t[j, t] * load(grad_outcomes, (j, p))
                store(grad_us, (t, p), u)
                store(grad_outcomes, (t, p), betas[t] * u)


@called
def _advance(tokens, N, us, leave, whole, n_tokens, S):
    """S = whole S + the sum of leave[j] k[j]^T u[j]; scales the keys."""
    _scale_rows(tokens, 0, n_tokens, leave)
    _scale(S, N, whole)
    multiply(S, tokens, us, 0, N, S.shape[1], 0, n_tokens, True)


@kernel
def forward(
    first: int,
    last: int,
    width: int,
    q: Floats4,
    k: Floats4,
    v: Floats4,
    log_decay: Floats3,
    beta: Floats3,
    initial_state: Floats4,
    starts: Bools2,
    o: Floats4,
    state: Floats4,
    residuals: Floats3,
    checkpoints: Floats4,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        width: channels of a task, a multiple of LANES.
        q: (B, L, H, N).
        k: (B, L, H, N).
        v: (B, L, H, P).
        log_decay: (B, L, H).
        beta: (B, L, H).
        initial_state: (B, H, P, N).
        starts: (B, L).
        o: (B, L, H, P), written.
        state: (B, H, P, N), written.
        residuals: r, (tasks, L, width), written; empty where no backward is to come.
        checkpoints: transposed states before every SPAN tokens, (tasks, L / SPAN, N, width), written; empty likewise.
    """
    L, H, N, P = q.shape[1], q.shape[2], q.shape[3], v.shape[3]
    n_parts, keep = -(-P // width), checkpoints.shape[0] > 0
    S, channels = aligned_zeros(rounded_up(N, BLOCK_ROWS), width), rounded_up(N, max(LANES, BLOCK_ROWS))
    tokens, tokens_t = aligned_zeros(2 * CHUNK, channels), aligned_zeros(channels, 2 * CHUNK)
    decays, mixing = aligned_zeros(CHUNK, 2 * CHUNK), aligned_zeros(CHUNK, 2 * CHUNK)
    outcomes, us = aligned_zeros(2 * CHUNK, width), aligned_zeros(CHUNK, width)
    factors, leave, betas = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    enter = np.zeros(2 * CHUNK, np.float32)
    for task in range(first, last):
        row, p0 = task // n_parts, task % n_parts * width
        b, h = row // H, row % H
        n_channels = min(width, P - p0)
        S[:] = 0
        for p in range(n_channels):
            for n in range(N):
                S[n, p] = initial_state[b, h, p0 + p, n]
        t = 0
        while t < L:
            if keep and t % SPAN == 0:
                copy(S, checkpoints[task, t // SPAN])
            if starts[b, t]:
                S[:] = 0
            n_tokens = _end(starts, b, t, L) - t
            read(k[b, :, h], t, 0, n_tokens, N, tokens, 0)
            read(q[b, :, h], t, 0, n_tokens, N, tokens, CHUNK)
            transpose_into(tokens_t, tokens, 2 * CHUNK, channels)
            _decay(log_decay, b, t, h, n_tokens, factors)
            whole = _leaving(factors, n_tokens, leave)
            _mix(tokens_t, N, factors, n_tokens, enter, decays, mixing)
            _read_strengths(beta, b, t, h, n_tokens, betas)
            _scale_columns(tokens_t, N, enter)
            read(v[b, :, h], t, p0, n_tokens, n_channels, outcomes, 0)
            multiply(outcomes, tokens_t, S, 0, n_tokens, width, 0, N, True)
            multiply(outcomes, tokens_t, S, CHUNK, n_tokens, width, 0, N, False)
            _solve(mixing, betas, n_tokens, outcomes, us)
            for i in range(0, n_tokens, BLOCK_ROWS):
                end = min(i + BLOCK_ROWS, n_tokens)
                multiply(outcomes, mixing, us, CHUNK + i, BLOCK_ROWS, width, 0, end, True)
            write(outcomes, CHUNK, n_tokens, n_channels, o[b, :, h], t, p0)
            if keep:
                for i in range(n_tokens):
                    for p in range(0, width, LANES):
                        store(residuals, (task, t + i, p), load(outcomes, (i, p)))
            _advance(tokens, N, us, leave, whole, n_tokens, S)
            t += n_tokens
        for p in range(n_channels):
            for n in range(N):
                state[b, h, p0 + p, n] = S[n, p]


@called
def _decayed(grads_t, tokens_t, N, decays, shares):
    """Multiplies gradients of tokens by decays; shares[i] is token i times its gradient, that of the log decay."""
    for i in range(0, grads_t.shape[1], LANES):
        decay, share = load(decays, i), full(0.0)
        for n in range(N):
            grad = load(grads_t, (n, i)) * decay
            share = share + grad * load(tokens_t, (n, i))
            store(grads_t, (n, i), grad)
        store(shares, i, share)


@called
def _mixed(grad_mixing, mixing, decays, n_tokens, grad_pairs):
    """Gradients of the products of tokens in the place of those of `mixing`, and those of the log decays of pairs."""
    for j in range(n_tokens):
        for i in range(0, CHUNK, LANES):
            of_key, of_query = load(grad_mixing, (j, i)), load(grad_mixing, (j, CHUNK + i))
            share = of_key * load(mixing, (j, i)) + of_query * load(mixing, (j, CHUNK + i))
            store(grad_pairs, (j, i), share)
            store(grad_mixing, (j, i), of_key * load(decays, (j, i)))
            store(grad_mixing, (j, CHUNK + i), of_query * load(decays, (j, CHUNK + i)))


@called
def _dot_rows(a, b, n_rows, scratch, result):
    """result[i] = sum over j of a[i, j] b[i, j]."""
    for i in range(n_rows):
        s = full(0.0)
        for j in range(0, a.shape[1], LANES):
            s = s + load(a, (i, j)) * load(b, (i, j))
        store(scratch, (i, 0), s)
    for i in range(0, n_rows, STATES):
        store(result, i, total(load_tile(scratch, (i, 0))))


@called
def _sum_decays(grad_pairs, later, entered, left, kept, n_tokens, sums, grad_logs):
    """Gradients of the log decays: that of token t is in all that lies before it and is read from it on.

    Args:
        grad_pairs: (CHUNK, CHUNK), [j, i] of the decay from token j to token i.
        later: (CHUNK, CHUNK), [j, t] 1 for t > j, else 0.
        entered: (2 CHUNK,), of the decays until token i of the state that enters: read by keys, and by queries.
        left: (CHUNK,), of the decays from token j to the end of the chunk.
        kept: of the decay of the state over the chunk.
        n_tokens: tokens of the chunk.
        sums: (CHUNK, CHUNK), scratch.
        grad_logs: (CHUNK,), written.
    """
    for i in range(rounded_up(n_tokens, BLOCK_ROWS)):
        for t in range(0, CHUNK, LANES):
            store(sums, (i, t), full(entered[i] + entered[CHUNK + i]))
    multiply(sums, grad_pairs, later, 0, n_tokens, sums.shape[1], 0, n_tokens, True)  # [i, t] over j < t
    for t in range(0, CHUNK, LANES):
        grad = full(kept)
        for i in range(n_tokens):
            is_later = load(later, (i, t))
            grad = grad + load(sums, (i, t)) * (1.0 - is_later) + is_later * left[i]
        store(grad_logs, t, grad)


@kernel
def backward(
    first: int,
    last: int,
    width: int,
    q: Floats4,
    k: Floats4,
    log_decay: Floats3,
    beta: Floats3,
    starts: Bools2,
    residuals: Floats3,
    checkpoints: Floats4,
    grad_o: Floats4,
    grad_state: Floats4,
    grad_q: Floats4,
    grad_k: Floats4,
    grad_v: Floats4,
    grad_log_decay: Floats3,
    grad_beta: Floats3,
    grad_initial_state: Floats4,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass, from the last chunk to the first.

    What the tasks of a head add to is left in parts: grad_q and grad_k are (parts * B, L, H, N), grad_log_decay and
    grad_beta (parts * B, L, H). The states inside a span are computed again.
    """
    B, L, H, N, P = q.shape[0], q.shape[1], q.shape[2], q.shape[3], grad_o.shape[3]
    n_parts, n_states, channels = -(-P // width), rounded_up(N, BLOCK_ROWS), rounded_up(N, max(LANES, BLOCK_ROWS))
    S, dS = aligned_zeros(n_states, width), aligned_zeros(n_states, width)
    states = aligned_zeros(SPAN // CHUNK * n_states, width)
    tokens, tokens_t = aligned_zeros(2 * CHUNK, channels), aligned_zeros(channels, 2 * CHUNK)
    decays, mixing, mixing_t = (
        aligned_zeros(CHUNK, 2 * CHUNK),
        aligned_zeros(CHUNK, 2 * CHUNK),
        aligned_zeros(2 * CHUNK, CHUNK),
    )
    grad_mixing, grad_mixing_t = aligned_zeros(CHUNK, 2 * CHUNK), aligned_zeros(2 * CHUNK, CHUNK)
    rs, us, us_t = aligned_zeros(CHUNK, width), aligned_zeros(CHUNK, width), aligned_zeros(width, CHUNK)
    grad_us, grad_outcomes = aligned_zeros(CHUNK, width), aligned_zeros(2 * CHUNK, width)
    grad_outcomes_t = aligned_zeros(width, 2 * CHUNK)
    grad_tokens, grad_tokens_t = aligned_zeros(2 * CHUNK, channels), aligned_zeros(channels, 2 * CHUNK)
    grad_keys_t, sums = aligned_zeros(channels, CHUNK), aligned_zeros(CHUNK, LANES)
    grad_pairs, later, sums_of_pairs = (
        aligned_zeros(CHUNK, CHUNK),
        aligned_zeros(CHUNK, CHUNK),
        aligned_zeros(CHUNK, CHUNK),
    )
    for j in range(CHUNK):
        later[j, j + 1 :] = 1
    factors, leave, betas = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    enter, entered, left = np.zeros(2 * CHUNK, np.float32), np.zeros(2 * CHUNK, np.float32), np.zeros(CHUNK, np.float32)
    grad_logs, grad_betas, begins = np.zeros(CHUNK, np.float32), np.zeros(CHUNK, np.float32), np.zeros(SPAN, np.int64)
    for task in range(first, last):
        row, part, p0 = task // n_parts, task % n_parts, task % n_parts * width
        b, h = row // H, row % H
        b_part, n_channels = part * B + b, min(width, P - p0)
        dS[:] = 0
        for p in range(n_channels):
            for n in range(N):
                dS[n, p] = grad_state[b, h, p0 + p, n]
        for t0 in range((L - 1) // SPAN * SPAN, -1, -SPAN):
            end = min(t0 + SPAN, L)
            copy(checkpoints[task, t0 // SPAN], S)
            n_chunks, t = 0, t0
            while t < end:
                if starts[b, t]:
                    S[:] = 0
                if t % CHUNK == 0:
                    at = (t - t0) // CHUNK * n_states
                    copy(S, states[at : at + n_states])
                begins[n_chunks] = t
                n_chunks += 1
                n_tokens = _end(starts, b, t, L) - t
                if t + n_tokens < end:
                    read(k[b, :, h], t, 0, n_tokens, N, tokens, 0)
                    _decay(log_decay, b, t, h, n_tokens, factors)
                    whole = _leaving(factors, n_tokens, leave)
                    _read_strengths(beta, b, t, h, n_tokens, betas)
                    _read_residuals(residuals, task, t, n_tokens, betas, us, rs)
                    _advance(tokens, N, us, leave, whole, n_tokens, S)
                t += n_tokens
            for c in range(n_chunks - 1, -1, -1):
                t = begins[c]
                n_tokens, end = end - t, t
                is_start = starts[b, t]
                at = (t - t0) // CHUNK * n_states
                before = states[at : at + n_states]
                read(k[b, :, h], t, 0, n_tokens, N, tokens, 0)
                read(q[b, :, h], t, 0, n_tokens, N, tokens, CHUNK)
                transpose_into(tokens_t, tokens, 2 * CHUNK, channels)
                _decay(log_decay, b, t, h, n_tokens, factors)
                whole = _leaving(factors, n_tokens, leave)
                _mix(tokens_t, N, factors, n_tokens, enter, decays, mixing)
                transpose_into(mixing_t, mixing, CHUNK, 2 * CHUNK)
                _read_strengths(beta, b, t, h, n_tokens, betas)
                _read_residuals(residuals, task, t, n_tokens, betas, us, rs)
                read(grad_o[b, :, h], t, p0, n_tokens, n_channels, grad_outcomes, CHUNK)
                # through the state that leaves, and what is read inside the chunk
                multiply(grad_us, tokens_t, dS, 0, n_tokens, width, 0, N, False)
                _scale_rows(grad_us, 0, n_tokens, leave)
                _solve_back(mixing_t, betas, n_tokens, grad_outcomes, grad_us)
                _dot_rows(grad_us, rs, n_tokens, sums, grad_betas)
                write(grad_outcomes, 0, n_tokens, n_channels, grad_v[b, :, h], t, p0)
                # products of what was written with what was read
                transpose_into(us_t, us, CHUNK, width)
                transpose_into(grad_outcomes_t, grad_outcomes, 2 * CHUNK, width)
                multiply(grad_mixing, us_t, grad_outcomes_t, 0, n_tokens, 2 * CHUNK, 0, n_channels, False)
                _mixed(grad_mixing, mixing, decays, n_tokens, grad_pairs)
                transpose_into(grad_mixing_t, grad_mixing, CHUNK, 2 * CHUNK)
                # keys in the state that leaves
                multiply(grad_keys_t, dS.T, us_t, 0, N, CHUNK, 0, n_channels, False)
                _decayed(grad_keys_t, tokens_t, N, leave, left)
                # what is read of the state that enters
                if is_start:
                    entered[:], kept = 0, np.float32(0.0)
                else:
                    multiply(grad_tokens_t, before.T, grad_outcomes_t, 0, N, 2 * CHUNK, 0, n_channels, False)
                    _decayed(grad_tokens_t, tokens_t, N, enter, entered)
                    kept = whole * _dot(before, dS, n_states, sums)
                _sum_decays(grad_pairs, later, entered, left, kept, n_tokens, sums_of_pairs, grad_logs)
                # what tokens are multiplied by each other for
                multiply(grad_tokens_t, tokens, grad_mixing, 0, N, 2 * CHUNK, 0, n_tokens, not is_start)
                multiply(grad_keys_t, tokens, grad_mixing_t, 0, N, CHUNK, 0, n_tokens, True)
                multiply(grad_keys_t, tokens, grad_mixing_t, 0, N, CHUNK, CHUNK, CHUNK + n_tokens, True)
                _add(grad_keys_t, N, grad_tokens_t)
                transpose_into(grad_tokens, grad_tokens_t, channels, 2 * CHUNK)
                write(grad_tokens, 0, n_tokens, N, grad_k[b_part, :, h], t, 0)
                write(grad_tokens, CHUNK, n_tokens, N, grad_q[b_part, :, h], t, 0)
                for i in range(n_tokens):
                    grad_log_decay[b_part, t + i, h], grad_beta[b_part, t + i, h] = grad_logs[i], grad_betas[i]
                # the state that entered
                if is_start:
                    dS[:] = 0
                else:
                    _scale_rows(tokens, 0, n_tokens, enter)
                    _scale_rows(tokens, CHUNK, n_tokens, enter)
                    _scale(dS, N, whole)
                    multiply(dS, tokens, grad_outcomes, 0, N, width, 0, n_tokens, True)
                    multiply(dS, tokens, grad_outcomes, 0, N, width, CHUNK, CHUNK + n_tokens, True)
        for p in range(n_channels):
            for n in range(N):
                grad_initial_state[b, h, p0 + p, n] = dS[n, p]
