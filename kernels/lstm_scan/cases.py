"""Inputs that the LSTM's recurrence is checked and timed on.

It is timed with the projection of its input, which PyTorch's LSTM does too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ..cases import Cases, Inputs, Maker, normal, size


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    # larger weights make it chaotic: no two ways of rounding then agree for long
    tensors = {"gates": normal(B, L, 4 * E), "weight": 2 * E**-0.5 * normal(4 * E, E)}
    return tensors | ({"initial_state": normal(B, 2, E), "starts": starts} if optional else {})


def _inputs(make: Maker, *, B: int, L: int, E: int) -> Inputs:
    x = make.act(B, L, E)
    tensors = {
        "x": x,
        "input_weight": make.act(4 * E, E) * E**-0.5,
        "bias": make.act(4 * E),
        "weight": make.act(4 * E, E) * E**-0.5,
    }
    flops = 2.0 * 2 * B * L * 4 * E * E
    return Inputs(tensors=tensors, written=x.nbytes, flops=(flops, 2 * flops), exps=(10.0 * B * L * E, 0.0))


def _call(op: Callable[..., Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    return op(F.linear(tensors["x"], tensors["input_weight"], tensors["bias"]), tensors["weight"], **options)


def _library(tensors: Mapping[str, Tensor]) -> tuple[Callable[[], Any], Sequence[Tensor]]:
    """torch.nn.LSTM: on a GPU cuDNN's."""
    E, x = tensors["weight"].shape[1], tensors["x"]
    lstm = nn.LSTM(E, E, batch_first=True, device=x.device, dtype=x.dtype)
    return lambda: lstm(x), [x, *lstm.parameters()]


lstm_scan = Cases(
    example_tensors=_example,
    inputs=_inputs,
    call=_call,
    cpu=lambda B, L, E: {"B": B, "L": L, "E": E // 2},
    gpu=(size(B=64, L=512, E=1024),),
    quick=(size(B=2, L=16, E=32),),
    aot={"": {"B": 64, "L": 2048, "E": 512}},
    compiles=False,
    library=_library,
)
