"""Inputs that the gated delta rule is checked and timed on."""

from __future__ import annotations

import torch
from torch import Tensor

from ..cases import Cases, normal, steps, uniform


def _example(*, B: int, L: int, E: int, N: int, starts: Tensor, optional: bool) -> dict[str, Tensor]:
    q, k = (torch.nn.functional.normalize(normal(B, L, 3, N), dim=-1) for _ in range(2))  # longer keys can explode
    tensors = {"q": q, "k": k, "v": normal(B, L, 3, E)}
    tensors |= {"log_decay": -4 * steps(B, L, 3), "beta": uniform(B, L, 3)}
    return tensors | ({"initial_state": normal(B, 3, E, N), "starts": starts} if optional else {})


gated_delta_rule = Cases(example_tensors=_example)
