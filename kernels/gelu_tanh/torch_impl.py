"""Plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def gelu_tanh(x: Tensor) -> Tensor:
    """Same contract as reference.gelu_tanh."""
    return F.gelu(x, approximate="tanh")
