"""The definition, in float32 or float64."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(gate="... F", up="... F")
def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Computes gate / (1 + e^-gate) * up (Shazeer 2020, arXiv:2002.05202, eq. 5, without its projections).

    Args:
        gate: (..., F).
        up: shaped like gate.

    Returns:
        (..., F), in gate's dtype.
    """
    dtype = torch.promote_types(gate.dtype, torch.float32)
    wide = gate.to(dtype)
    return (wide * torch.sigmoid(wide) * up.to(dtype)).to(gate.dtype)
