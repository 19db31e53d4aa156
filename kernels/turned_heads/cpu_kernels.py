"""B and C of the heads, and the adjoint, as numba kernels on explicit vectors (see kernels/simd.py).

A task is a span of tokens of one row. It writes what it makes of the last of them for the token after it, which is the
next task's, or for nobody.
"""

from __future__ import annotations

import numpy as np

from ..simd import (
    LANES,
    Floats2,
    Floats3,
    Floats4,
    called,
    cos_and_sin,
    differences,
    doubled,
    exchanged,
    full,
    inline,
    kernel,
    load,
    load_first,
    opposed,
    store,
    store_first,
    sum_of,
    upper_half,
)


@called
def _table(angle, cos, sin):
    """The cosine of every state's angle, and its sine, negative for the first of a pair; 1 and 0 where nothing turns.

    angle is (A,); cos and sin are of whole vectors, twice LANES at a time.
    """
    A = len(angle)
    for i in range(0, len(cos), 2 * LANES):
        k = i // 2
        if k < A:
            c, s = cos_and_sin(load_first(angle, k, A - k))
            store(cos, i, doubled(c))
            store(sin, i, opposed(s))
            store(cos, i + LANES, doubled(upper_half(c)))
            store(sin, i + LANES, opposed(upper_half(s)))
        else:
            for j in range(i, i + 2 * LANES, LANES):
                store(cos, j, full(1.0))
                store(sin, j, full(0.0))


@inline
def _turned(t, cos, sin):
    return t * cos + exchanged(t) * sin


@inline
def _turned_back(t, cos, sin):
    return t * cos - exchanged(t) * sin


@kernel
def forward(
    first: int,
    last: int,
    span: int,
    B: Floats3,
    C: Floats3,
    B_bias: Floats2,
    C_bias: Floats2,
    drive: Floats3,
    angle: Floats4,
    before: Floats3,
    late: Floats4,
    c: Floats4,
    dot: Floats3,
    final: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the forward pass.

    Args:
        first: first task.
        last: the task after the last.
        span: tokens of a task.
        B: (B, L, N), as C.
        C: (B, L, N).
        B_bias: (H, N), as C_bias.
        C_bias: (H, N).
        drive: (B, L, H).
        angle: (B, L, H, A).
        before: (B, H, N).
        late: drive[t] b[t-1], (B, L, H, N), written.
        c: (B, L, H, N), written.
        dot: b[t] c[t], (B, L, H), written.
        final: b of the last token, (B, H, N), written.
    """
    (L, N), H = B.shape[1:], B_bias.shape[0]
    width, n_spans = -(-N // (2 * LANES)) * 2 * LANES, -(-L // span)
    cos, sin = np.empty(width, np.float32), np.empty(width, np.float32)
    for task in range(first, last):
        row, begin = task // n_spans, task % n_spans * span
        if begin == 0:
            for h in range(H):
                for i in range(0, N, LANES):
                    store_first(late, (row, 0, h, i), drive[row, 0, h] * load_first(before, (row, h, i), N - i), N - i)
        for t in range(begin, min(begin + span, L)):
            for h in range(H):
                _table(angle[row, t, h], cos, sin)
                sums = full(0.0)
                factor = drive[row, t + 1, h] if t + 1 < L else np.float32(0.0)
                for i in range(0, N, LANES):
                    n, p, q = N - i, load(cos, i), load(sin, i)
                    b_i = _turned(load_first(B, (row, t, i), n) + load_first(B_bias, (h, i), n), p, q)
                    c_i = _turned(load_first(C, (row, t, i), n) + load_first(C_bias, (h, i), n), p, q)
                    sums = sums + b_i * c_i
                    store_first(c, (row, t, h, i), c_i, n)
                    if t + 1 < L:
                        store_first(late, (row, t + 1, h, i), factor * b_i, n)
                    else:
                        store_first(final, (row, h, i), b_i, n)
                dot[row, t, h] = sum_of(sums)


@kernel
def backward(
    first: int,
    last: int,
    span: int,
    grad_late: Floats4,
    grad_c: Floats4,
    grad_dot: Floats3,
    grad_final: Floats3,
    B: Floats3,
    C: Floats3,
    B_bias: Floats2,
    C_bias: Floats2,
    drive: Floats3,
    angle: Floats4,
    before: Floats3,
    grad_B: Floats3,
    grad_C: Floats3,
    grad_B_bias: Floats3,
    grad_C_bias: Floats3,
    grad_drive: Floats3,
    grad_angle: Floats4,
    grad_before: Floats3,
) -> None:
    """Does the tasks first .. last - 1 of the backward pass; arguments as `forward`, and the gradients of all.

    Each task has its own part of the gradients of the biases, (tasks, H, N).
    """
    (L, N), H, A = B.shape[1:], B_bias.shape[0], angle.shape[3]
    width, n_spans = -(-N // (2 * LANES)) * 2 * LANES, -(-L // span)
    cos, sin = np.empty(width, np.float32), np.empty(width, np.float32)
    turns = np.zeros(width, np.float32)
    of_B, of_C = np.empty(width, np.float32), np.empty(width, np.float32)
    of_B_bias, of_C_bias = np.empty((H, width), np.float32), np.empty((H, width), np.float32)
    for task in range(first, last):
        row, begin = task // n_spans, task % n_spans * span
        of_B_bias[:], of_C_bias[:] = 0.0, 0.0
        if begin == 0:
            for h in range(H):
                sums = full(0.0)
                for i in range(0, N, LANES):
                    g, n = load_first(grad_late, (row, 0, h, i), N - i), N - i
                    store_first(grad_before, (row, h, i), drive[row, 0, h] * g, n)
                    sums = sums + g * load_first(before, (row, h, i), n)
                grad_drive[row, 0, h] = sum_of(sums)
        for t in range(begin, min(begin + span, L)):
            of_B[:], of_C[:] = 0.0, 0.0
            for h in range(H):
                _table(angle[row, t, h], cos, sin)
                sums, g_dot = full(0.0), grad_dot[row, t, h]
                factor = drive[row, t + 1, h] if t + 1 < L else np.float32(1.0)
                for i in range(0, N, LANES):
                    n, p, q = N - i, load(cos, i), load(sin, i)
                    b_i = _turned(load_first(B, (row, t, i), n) + load_first(B_bias, (h, i), n), p, q)
                    c_i = _turned(load_first(C, (row, t, i), n) + load_first(C_bias, (h, i), n), p, q)
                    if t + 1 < L:
                        g_b = load_first(grad_late, (row, t + 1, h, i), n)
                        sums = sums + g_b * b_i
                    else:
                        g_b = load_first(grad_final, (row, h, i), n)
                    g_b, g_c = factor * g_b + g_dot * c_i, load_first(grad_c, (row, t, h, i), n) + g_dot * b_i
                    # of the angle of states a and b: those that turn into -b and a
                    store(turns, i, g_b * exchanged(b_i) + g_c * exchanged(c_i))
                    g_b, g_c = _turned_back(g_b, p, q), _turned_back(g_c, p, q)
                    store(of_B, i, load(of_B, i) + g_b)
                    store(of_C, i, load(of_C, i) + g_c)
                    store(of_B_bias, (h, i), load(of_B_bias, (h, i)) + g_b)
                    store(of_C_bias, (h, i), load(of_C_bias, (h, i)) + g_c)
                if t + 1 < L:
                    grad_drive[row, t + 1, h] = sum_of(sums)
                for k in range(0, A, LANES):
                    found = differences(load(turns, 2 * k), load(turns, 2 * k + LANES))
                    store_first(grad_angle, (row, t, h, k), found, A - k)
            for i in range(0, N, LANES):
                store_first(grad_B, (row, t, i), load(of_B, i), N - i)
                store_first(grad_C, (row, t, i), load(of_C, i), N - i)
        for h in range(H):
            for i in range(0, N, LANES):
                store_first(grad_B_bias, (task, h, i), load(of_B_bias, (h, i)), N - i)
                store_first(grad_C_bias, (task, h, i), load(of_C_bias, (h, i)), N - i)
