"""The rotation as a numba kernel on explicit vectors (see kernels/simd.py). A task is one token of one row."""

from __future__ import annotations

from ..simd import LANES, Floats2, Floats4, kernel, load_first, store_first


@kernel
def rotate(first: int, last: int, x: Floats4, cos: Floats2, sin: Floats2, y: Floats4) -> None:
    """Does the tasks first .. last - 1: x and y are (B, L, H, P), cos and sin (L, P/2)."""
    L, H, half = x.shape[1], x.shape[2], x.shape[3] // 2
    for task in range(first, last):
        b, t = task // L, task % L
        for i in range(0, half, LANES):
            n = half - i
            c, s = load_first(cos, (t, i), n), load_first(sin, (t, i), n)
            for h in range(H):
                u, v = load_first(x, (b, t, h, i), n), load_first(x, (b, t, h, half + i), n)
                store_first(y, (b, t, h, i), u * c - v * s, n)
                store_first(y, (b, t, h, half + i), v * c + u * s, n)
