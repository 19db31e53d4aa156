"""Plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract as reference.swiglu."""
    return (F.silu(gate) * up).to(gate.dtype)
