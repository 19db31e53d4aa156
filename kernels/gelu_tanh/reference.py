"""The definition, in float32 or float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..arguments import takes


@takes(x="... F")
def gelu_tanh(x: Tensor) -> Tensor:
    """Computes x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2 (arXiv:1606.08415, section 2).

    Args:
        x: (..., F).

    Returns:
        (..., F), in x's dtype.
    """
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3))) / 2).to(x.dtype)
