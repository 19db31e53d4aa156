"""Inputs that attention is checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    past = N if optional else 0
    tensors = {"q": normal(B, L, 4, 2 * N), "k": normal(B, past + L, 2, 2 * N), "v": normal(B, past + L, 2, 2 * N)}
    return tensors | ({"first_key": torch.randint(past, (B,)), "starts": starts} if optional else {})


def _inputs(
    make: Maker, *, B: int, L: int, H: int, H_kv: int, P: int, S: int | None = None, W: int | None = None
) -> Inputs:
    S = S or L
    q = make.act(B, L, H, P)
    pairs = B * H * float(sum(min(S - L + t + 1, W or S) for t in range(L)))
    return Inputs(
        tensors={"q": q, "k": make.act(B, S, H_kv, P), "v": make.act(B, S, H_kv, P)},
        options={"window": W} if W else {},
        written=q.nbytes,
        flops=(4 * P * pairs, 10 * P * pairs),
        exps=(pairs, pairs),
        has_backward=L > 1,
    )


def _prediction(L: int) -> dict[str, tuple[float, float]]:
    """Milliseconds at 128 channels and B H = 64, from the visible pairs of a head and TFLOP/s, worst and best."""
    product = 4 * 64 * 128 * L * (L + 1) / 2 / 1e9
    least, most = product / 520, product / 450
    return {"fwd": (least, most), "fwd+bwd": (least + 2.5 * product / 350, most + 2.5 * product / 300)}


attention = Cases(
    example_tensors=_example,
    optional_options={"window": 7},
    # wider heads than for others
    blocks=({"L": 300, "N": 64, "optional": True}, {"L": 256, "N": 32, "optional": False}),
    inputs=_inputs,
    cpu=lambda B, L, E: {
        "B": max(1, B // 4),
        "L": L,
        "H": max(1, E // 64),
        "H_kv": max(1, E // 64),
        "P": min(64, E),
    },
    gpu=(
        size(_prediction(4096), B=4, L=4096, H=16, H_kv=16, P=128),
        size(B=4, L=16384, H=16, H_kv=16, P=128, W=1024),
        size(B=64, L=1, S=8192, H=16, H_kv=4, P=128),
        size(B=4, L=8192, H=16, H_kv=4, P=128),
        size(_prediction(8192), B=4, L=8192, H=16, H_kv=16, P=128),
        size(_prediction(16384), B=4, L=16384, H=16, H_kv=16, P=128),
        size(B=4, L=4096, H=16, H_kv=16, P=64),
        size(B=4, L=8192, H=16, H_kv=16, P=64),
        size(B=4, L=16384, H=16, H_kv=16, P=64),
    ),
    quick=(
        size(B=1, L=32, H=2, H_kv=2, P=16),
        size(B=1, L=32, H=2, H_kv=1, P=16, W=8),
        size(B=2, L=1, S=32, H=2, H_kv=1, P=16),
    ),
    aot={
        "64 wide": {"B": 4, "L": 4096, "H": 16, "H_kv": 16, "P": 64},
        "128 wide": {"B": 4, "L": 4096, "H": 16, "H_kv": 16, "P": 128},
        "one query": {"B": 4, "L": 1, "S": 8192, "H": 16, "H_kv": 4, "P": 128},
    },
)
