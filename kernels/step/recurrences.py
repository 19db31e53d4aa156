"""Instructions that take the state of a recurrence one token further, in place, STATES channels at a time."""

from __future__ import annotations

import math

import numpy as np

from ..simd import (
    LANES,
    STATES,
    called,
    exchanged,
    exp,
    floats_at,
    full,
    inline,
    load_few,
    load_first,
    load_rows,
    load_rows_first,
    repeat,
    sigmoid,
    softplus,
    spread,
    store,
    store_first,
    store_rows,
    store_rows_first,
    tanh,
    total,
)
from .instruction import float_of, share, unpack


@inline
def _rows_of(array, at, stride, n):
    """A tile of STATES rows, of each the first n values if there are fewer than LANES."""
    if n >= LANES:
        return load_rows(array, at, stride)
    return load_rows_first(array, at, stride, n)


@inline
def _write_rows(array, at, stride, tile, n):
    if n >= LANES:
        store_rows(array, at, stride, tile)
    else:
        store_rows_first(array, at, stride, tile, n)


@inline
def _silu(x):
    return x / (np.float32(1.0) + math.exp(-x))


def selective_scan(words: int, rank: int, n_ranks: int) -> None:
    """h = exp(dt A) h + dt u B and y = (C h + D u) silu(z), with dt = softplus(dt + bias) (arXiv:2312.00752, eq. 2).

    h (rows, E, N) · u, dt, z, y (rows, E) · A (E, N) · B, C (rows, N) · bias, D (E,). dt and scratch (rows, 2 E) are
    used up.
    """
    h, u, u_stride, dt, dt_stride, bias, A, B, B_stride, C, C_stride, D, z, z_stride, scratch, y, E, N, rows = unpack(
        words, 19
    )
    hs, us, dts, offsets, As = floats_at(h), floats_at(u), floats_at(dt), floats_at(bias), floats_at(A)
    Bs, Cs, Ds, zs, ys = floats_at(B), floats_at(C), floats_at(D), floats_at(z), floats_at(y)
    sizes = floats_at(scratch)
    first, last = share(-(-E // TASK), rank, n_ranks)
    first, last = first * TASK, min(E, last * TASK)
    for row in range(rows):
        steps, drives = row * 2 * E, row * 2 * E + E
        for e in range(first, last, LANES):
            size = softplus(load_first(dts, row * dt_stride + e, last - e) + load_first(offsets, e, last - e))
            store_first(sizes, steps + e, size, last - e)
            store_first(sizes, drives + e, size * load_first(us, row * u_stride + e, last - e), last - e)
        for e in range(first, last - STATES + 1, STATES):
            sums = repeat(full(0.0))
            size, drive = spread(sizes, steps + e), spread(sizes, drives + e)
            at = (row * E + e) * N
            for n in range(0, N, LANES):
                decay = exp(size * _rows_of(As, e * N + n, N, N - n))
                value = decay * _rows_of(hs, at + n, N, N - n)
                value = value + drive * repeat(load_first(Bs, row * B_stride + n, N - n))
                _write_rows(hs, at + n, N, value, N - n)
                sums = sums + value * repeat(load_first(Cs, row * C_stride + n, N - n))
            store(ys, row * E + e, total(sums))
        for e in range(last - (last - first) % STATES, last):
            value = np.float32(0.0)
            for n in range(N):
                at = (row * E + e) * N + n
                held = math.exp(sizes[steps + e] * As[e * N + n]) * hs[at]
                hs[at] = held + sizes[drives + e] * Bs[row * B_stride + n]
                value += hs[at] * Cs[row * C_stride + n]
            ys[row * E + e] = value
        for e in range(first, last, LANES):
            gate = load_first(zs, row * z_stride + e, last - e)
            skip = load_first(Ds, e, last - e) * load_first(us, row * u_stride + e, last - e)
            value = (load_first(ys, row * E + e, last - e) + skip) * gate * sigmoid(gate)
            store_first(ys, row * E + e, value, last - e)


TASK = 64
"""Channels that one thread takes at least: no two threads write to one line of the cache."""


def heads_scan(words: int, rank: int, n_ranks: int) -> None:
    """h = decay h + step x B^T and y = h C + D x per head (arXiv:2405.21060).

    h (rows, H, P, N) · x, y (rows, H P) · step, decay (rows, H) · B, C (rows, G N) · D (H,).
    """
    h, x, x_stride, step, decay, B, B_stride, C, C_stride, D, y, H, P, N, G, rows = unpack(words, 16)
    hs, xs, steps, decays = floats_at(h), floats_at(x), floats_at(step), floats_at(decay)
    Bs, Cs, Ds, ys = floats_at(B), floats_at(C), floats_at(D), floats_at(y)
    first, last = share(rows * H, rank, n_ranks)
    for task in range(first, last):
        row, head = task // H, task % H
        group = head // (H // G) * N
        B_at, C_at = row * B_stride + group, row * C_stride + group
        fade, size, skip = decays[task], steps[task], Ds[head]
        for p in range(0, P - STATES + 1, STATES):
            x_at, at = row * x_stride + head * P + p, (task * P + p) * N
            sums, drive = repeat(full(0.0)), size * spread(xs, x_at)
            for n in range(0, N, LANES):
                value = fade * _rows_of(hs, at + n, N, N - n)
                value = value + drive * repeat(load_first(Bs, B_at + n, N - n))
                _write_rows(hs, at + n, N, value, N - n)
                sums = sums + value * repeat(load_first(Cs, C_at + n, N - n))
            store(ys, task * P + p, total(sums) + skip * load_few(xs, x_at))
        for p in range(P - P % STATES, P):
            x_at, at, value = row * x_stride + head * P + p, (task * P + p) * N, np.float32(0.0)
            for n in range(N):
                hs[at + n] = fade * hs[at + n] + size * xs[x_at] * Bs[B_at + n]
                value += hs[at + n] * Cs[C_at + n]
            ys[task * P + p] = value + skip * xs[x_at]


def delta_rule(words: int, rank: int, n_ranks: int) -> None:
    """S = decay S, S = S + beta (v - S k) k^T and o = S q per head (arXiv:2412.06464).

    S (rows, H, P, N) · q, k (rows, H N) · v, o (rows, H P) · decay, beta (rows, H).
    """
    S, q, q_stride, k, k_stride, v, v_stride, decay, beta, o, H, P, N, rows = unpack(words, 14)
    Ss, qs, ks, vs = floats_at(S), floats_at(q), floats_at(k), floats_at(v)
    decays, betas, os = floats_at(decay), floats_at(beta), floats_at(o)
    first, last = share(rows * H, rank, n_ranks)
    for task in range(first, last):
        row, head = task // H, task % H
        q_at, k_at, v_at = row * q_stride + head * N, row * k_stride + head * N, row * v_stride + head * P
        fade, strength = decays[task], betas[task]
        for p in range(0, P - STATES + 1, STATES):
            at, sums = (task * P + p) * N, repeat(full(0.0))
            for n in range(0, N, LANES):
                sums = sums + _rows_of(Ss, at + n, N, N - n) * repeat(load_first(ks, k_at + n, N - n))
            store(os, task * P + p, strength * (load_few(vs, v_at + p) - fade * total(sums)))
            sums, written = repeat(full(0.0)), spread(os, task * P + p)
            for n in range(0, N, LANES):
                value = fade * _rows_of(Ss, at + n, N, N - n)
                value = value + written * repeat(load_first(ks, k_at + n, N - n))
                _write_rows(Ss, at + n, N, value, N - n)
                sums = sums + value * repeat(load_first(qs, q_at + n, N - n))
            store(os, task * P + p, total(sums))
        for p in range(P - P % STATES, P):
            at, held, value = (task * P + p) * N, np.float32(0.0), np.float32(0.0)
            for n in range(N):
                Ss[at + n] *= fade
                held += Ss[at + n] * ks[k_at + n]
            for n in range(N):
                Ss[at + n] += strength * (vs[v_at + p] - held) * ks[k_at + n]
                value += Ss[at + n] * qs[q_at + n]
            os[task * P + p] = value


def lstm_cell(words: int, rank: int, n_ranks: int) -> None:
    """c = sigmoid(f) c + sigmoid(i) tanh(g) and y = sigmoid(o) tanh(c).

    gates (rows, 4 E): i, f, g, o · state (rows, 2, E): y and c of the last token, then of this one · y (rows, E).
    """
    gates, state, y, E, rows = unpack(words, 5)
    gs, states, ys = floats_at(gates), floats_at(state), floats_at(y)
    first, last = share(-(-E // LANES), rank, n_ranks)
    for row in range(rows):
        at, cell = row * 4 * E, (2 * row + 1) * E
        for block in range(first, last):
            e = block * LANES
            left = E - e
            c = sigmoid(load_first(gs, at + E + e, left)) * load_first(states, cell + e, left)
            c = c + sigmoid(load_first(gs, at + e, left)) * tanh(load_first(gs, at + 2 * E + e, left))
            out = sigmoid(load_first(gs, at + 3 * E + e, left)) * tanh(c)
            store_first(states, cell + e, c, left)
            store_first(states, cell - E + e, out, left)
            store_first(ys, row * E + e, out, left)


@inline
def _times(value, real, imag):
    """A complex product: of value, and real, each real part twice, and imag, each imaginary part as (-b, b)."""
    return value * real + exchanged(value) * imag


def diagonal_scan(words: int, rank: int, n_ranks: int) -> None:
    """h = a h + u and y = 2 Re(C h) + D u per channel, with complex h and a (S4D, arXiv:2206.11893).

    h (rows, E, N) complex · real, imag (E, 2 N): a as `_times` takes it · C (E, 2 N): 2 Re C and -2 Im C in turn · ones
    (2 N,): 1 and 0 in turn · u, y (rows, E) · D (E,).
    """
    h, u, u_stride, real, imag, C, ones, D, y, E, n_numbers, rows = unpack(words, 12)
    hs, us, reals, imags = floats_at(h), floats_at(u), floats_at(real), floats_at(imag)
    Cs, units, Ds, ys = floats_at(C), floats_at(ones), floats_at(D), floats_at(y)
    first, last = share(-(-E // TASK), rank, n_ranks)
    first, last = first * TASK, min(E, last * TASK)
    for row in range(rows):
        for e in range(first, last - STATES + 1, STATES):
            at, weight = (row * E + e) * n_numbers, e * n_numbers
            sums, drive = repeat(full(0.0)), spread(us, row * u_stride + e)
            for n in range(0, n_numbers, LANES):
                left = n_numbers - n
                value = _times(
                    _rows_of(hs, at + n, n_numbers, left),
                    _rows_of(reals, weight + n, n_numbers, left),
                    _rows_of(imags, weight + n, n_numbers, left),
                )
                value = value + drive * repeat(load_first(units, n, left))
                _write_rows(hs, at + n, n_numbers, value, left)
                sums = sums + value * _rows_of(Cs, weight + n, n_numbers, left)
            store(ys, row * E + e, total(sums) + load_few(Ds, e) * load_few(us, row * u_stride + e))
        for e in range(last - (last - first) % STATES, last):
            at, weight, drive = (row * E + e) * n_numbers, e * n_numbers, us[row * u_stride + e]
            value = Ds[e] * drive
            for n in range(0, n_numbers, 2):
                a, b = hs[at + n], hs[at + n + 1]
                hs[at + n] = a * reals[weight + n] + b * imags[weight + n] + drive
                hs[at + n + 1] = b * reals[weight + n] - a * imags[weight + n]
                value += hs[at + n] * Cs[weight + n] + hs[at + n + 1] * Cs[weight + n + 1]
            ys[row * E + e] = value


def dplr_scan(words: int, rank: int, n_ranks: int) -> None:
    """h = M v - Q Re(w v) - h with v = 2 h + B u, and y = 2 Re(C h) + D u per channel (S4, arXiv:2111.00396, eq. 3).

    h (rows, E, N) complex · real, imag (E, 2 N): M as `_times` takes it · w, C (E, 2 N): Re w and -Im w in turn, and
    twice those of C · Q, B (E, 2 N): complex · u, y (rows, E) · D (E,).
    """
    h, u, u_stride, real, imag, w, Q, B, C, D, y, E, n_numbers, rows = unpack(words, 14)
    hs, us, reals, imags, ws = floats_at(h), floats_at(u), floats_at(real), floats_at(imag), floats_at(w)
    Qs, Bs, Cs, Ds, ys = floats_at(Q), floats_at(B), floats_at(C), floats_at(D), floats_at(y)
    first, last = share(-(-E // TASK), rank, n_ranks)
    first, last = first * TASK, min(E, last * TASK)
    for row in range(rows):
        for e in range(first, last - STATES + 1, STATES):
            at, weight = (row * E + e) * n_numbers, e * n_numbers
            sums, drive = repeat(full(0.0)), spread(us, row * u_stride + e)
            for n in range(0, n_numbers, LANES):
                left = n_numbers - n
                v = 2.0 * _rows_of(hs, at + n, n_numbers, left) + drive * _rows_of(Bs, weight + n, n_numbers, left)
                sums = sums + v * _rows_of(ws, weight + n, n_numbers, left)
            store(ys, row * E + e, total(sums))
            inner, sums = spread(ys, row * E + e), repeat(full(0.0))
            for n in range(0, n_numbers, LANES):
                left = n_numbers - n
                held = _rows_of(hs, at + n, n_numbers, left)
                v = 2.0 * held + drive * _rows_of(Bs, weight + n, n_numbers, left)
                value = _times(
                    v,
                    _rows_of(reals, weight + n, n_numbers, left),
                    _rows_of(imags, weight + n, n_numbers, left),
                )
                value = value - inner * _rows_of(Qs, weight + n, n_numbers, left) - held
                _write_rows(hs, at + n, n_numbers, value, left)
                sums = sums + value * _rows_of(Cs, weight + n, n_numbers, left)
            store(ys, row * E + e, total(sums) + load_few(Ds, e) * load_few(us, row * u_stride + e))
        for e in range(last - (last - first) % STATES, last):
            at, weight, drive = (row * E + e) * n_numbers, e * n_numbers, us[row * u_stride + e]
            inner, value = np.float32(0.0), Ds[e] * drive
            for n in range(n_numbers):
                inner += (2 * hs[at + n] + drive * Bs[weight + n]) * ws[weight + n]
            for n in range(0, n_numbers, 2):
                a = 2 * hs[at + n] + drive * Bs[weight + n]
                b = 2 * hs[at + n + 1] + drive * Bs[weight + n + 1]
                re = a * reals[weight + n] + b * imags[weight + n] - inner * Qs[weight + n] - hs[at + n]
                im = b * reals[weight + n] - a * imags[weight + n] - inner * Qs[weight + n + 1] - hs[at + n + 1]
                hs[at + n], hs[at + n + 1] = re, im
                value += re * Cs[weight + n] + im * Cs[weight + n + 1]
            ys[row * E + e] = value


def outer(words: int, rank: int, n_ranks: int) -> None:
    """y[i, j, h] = k[h, i] v[h, j]: k, v (rows, H P) · y (rows, P, P, H)."""
    k, k_stride, v, v_stride, y, H, P, rows = unpack(words, 8)
    ks, vs, ys = floats_at(k), floats_at(v), floats_at(y)
    first, last = share(rows * P, rank, n_ranks)
    for task in range(first, last):
        row, i = task // P, task % P
        for j in range(P):
            for h in range(H):
                ys[(task * P + j) * H + h] = ks[row * k_stride + h * P + i] * vs[row * v_stride + h * P + j]


def inner(words: int, rank: int, n_ranks: int) -> None:
    """y[h, j] = sum over i of q[h, i] x[i, j, h]: q, y (rows, H P) · x (rows, P, P, H)."""
    q, q_stride, x, y, H, P, rows = unpack(words, 7)
    qs, xs, ys = floats_at(q), floats_at(x), floats_at(y)
    first, last = share(rows * P, rank, n_ranks)
    for task in range(first, last):
        row, j = task // P, task % P
        for h in range(H):
            value = np.float32(0.0)
            for i in range(P):
                value += qs[row * q_stride + h * P + i] * xs[((row * P + i) * P + j) * H + h]
            ys[row * H * P + h * P + j] = value


def trapezoid_inputs(words: int, rank: int, n_ranks: int) -> None:
    """What trapezoid_scan reads, per head, and the angles after this token (arXiv:2603.15569).

    With t = softplus(dt + bias) and r = 1 + A for A >= 0, 1 / (1 - A) below: decay = exp(-t r), where r is at least
    A_min and t r at least least; own = t sigmoid(mix) and rest = t sigmoid(-mix). angle += t pi tanh(theta), in [0, 2
    pi), by which the pairs of B + B_bias and C + C_bias are turned.

    dt, A, mix (rows, H), theta (rows, n_angles): with one stride · bias (H,) · B, C (rows, N) · B_bias, C_bias (H, N) ·
    angle (rows, H, n_angles), in place · decay, own, rest (rows, H), one after the other · turned_B, turned_C (rows, H,
    N).
    """
    (dt, A, mix, theta, stride, bias, B, B_stride, C, C_stride, B_bias, C_bias, angle, factors, turned_B, turned_C, H,
     n_angles, N, rows, A_min, least) = unpack(words, 22)  # fmt: skip
    dts, As, mixes, thetas, offsets = floats_at(dt), floats_at(A), floats_at(mix), floats_at(theta), floats_at(bias)
    held, scales = floats_at(angle), floats_at(factors)
    first, last = share(rows * H, rank, n_ranks)
    for task in range(first, last):
        row, head = task // H, task % H
        at = row * stride
        size = np.float64(dts[at + head]) + offsets[head]
        size = max(size, 0.0) + math.log1p(math.exp(-abs(size)))
        a = np.float64(As[at + head])
        rate = 1.0 + a if a >= 0 else 1.0 / (1.0 - a)
        own = 1.0 / (1.0 + math.exp(-np.float64(mixes[at + head])))
        scales[task] = math.exp(-max(size * max(rate, float_of(A_min)), float_of(least)))
        scales[rows * H + task] = size * own
        scales[2 * rows * H + task] = size * (1.0 - own)
        for i in range(n_angles):
            angle_now = held[task * n_angles + i] + size * math.pi * math.tanh(thetas[at + i])
            held[task * n_angles + i] = angle_now % (2 * math.pi)
        _turn(B, row * B_stride, B_bias, head * N, held, task * n_angles, n_angles, turned_B, task * N, N)
        _turn(C, row * C_stride, C_bias, head * N, held, task * n_angles, n_angles, turned_C, task * N, N)


@called
def _turn(vector, at, bias, bias_at, angles, angles_at, n_angles, turned, to, N):
    """turned = vector + bias, whose pairs (2 i, 2 i + 1) are turned by angle i."""
    values, offsets, results = floats_at(vector), floats_at(bias), floats_at(turned)
    for n in range(N):
        results[to + n] = values[at + n] + offsets[bias_at + n]
    for i in range(n_angles):
        angle = np.float64(angles[angles_at + i])
        c, s = np.float32(math.cos(angle)), np.float32(math.sin(angle))
        a, b = results[to + 2 * i], results[to + 2 * i + 1]
        results[to + 2 * i], results[to + 2 * i + 1] = a * c - b * s, a * s + b * c


def trapezoid_scan(words: int, rank: int, n_ranks: int) -> None:
    """h = decay (h + rest x' B'^T) + own x B^T and y = h C + D x per head; then B' = B and x' = x.

    h (rows, H, P, N) · x, x', y (rows, H P) · decay, own, rest (rows, H), one after the other · B, B', C (rows, H, N) ·
    D (H,).
    """
    h, x, x_stride, x_last, factors, B, B_last, C, D, y, H, P, N, rows = unpack(words, 14)
    hs, xs, old_xs, scales = floats_at(h), floats_at(x), floats_at(x_last), floats_at(factors)
    Bs, old_Bs, Cs, Ds, ys = floats_at(B), floats_at(B_last), floats_at(C), floats_at(D), floats_at(y)
    first, last = share(rows * H, rank, n_ranks)
    for task in range(first, last):
        row, head, vectors = task // H, task % H, task * N
        fade, own, skip = scales[task], scales[rows * H + task], Ds[head]
        rest = fade * scales[2 * rows * H + task]
        for p in range(0, P - STATES + 1, STATES):
            x_at, at = row * x_stride + head * P + p, (task * P + p) * N
            sums, drive, late = repeat(full(0.0)), own * spread(xs, x_at), rest * spread(old_xs, task * P + p)
            for n in range(0, N, LANES):
                left = N - n
                value = fade * _rows_of(hs, at + n, N, left) + late * repeat(load_first(old_Bs, vectors + n, left))
                value = value + drive * repeat(load_first(Bs, vectors + n, left))
                _write_rows(hs, at + n, N, value, left)
                sums = sums + value * repeat(load_first(Cs, vectors + n, left))
            store(ys, task * P + p, total(sums) + skip * load_few(xs, x_at))
        for p in range(P - P % STATES, P):
            x_at, at, value = row * x_stride + head * P + p, (task * P + p) * N, np.float32(0.0)
            for n in range(N):
                driven = rest * old_xs[task * P + p] * old_Bs[vectors + n] + own * xs[x_at] * Bs[vectors + n]
                hs[at + n] = fade * hs[at + n] + driven
                value += hs[at + n] * Cs[vectors + n]
            ys[task * P + p] = value + skip * xs[x_at]
        for n in range(N):
            old_Bs[vectors + n] = Bs[vectors + n]
        for p in range(P):
            old_xs[task * P + p] = xs[row * x_stride + head * P + p]
