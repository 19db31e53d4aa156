"""The CPU path: numba kernels that take the whole sequence at once, recurrent product included (cpu_kernels.py).

Kept for backward, and only if one can follow: the gates as they act and the cells, 5 E numbers a token. The gradient of
the recurrent weight is one matrix product over all tokens at the end: its bits can depend on the number of threads, as
those of PyTorch's matrix products do. All other results are the same bits on every run and for every number of threads.
The kernels are imported when first needed: numba alone takes half a second.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import never_if_none
from ..operators import operator
from ..parallel import floats, run
from . import torch_impl
from .gradients import register_gradients, weight_gradient


def lstm_scan(
    gates: Tensor, weight: Tensor, initial_state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.lstm_scan, in float32. Differentiable once."""
    if gates.shape[1] == 1:  # a decode step: packing the weight would cost more than the product
        return torch_impl.lstm_scan(gates, weight, initial_state, starts)
    inputs = (gates, weight, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    shape = (gates.shape[0], 2, weight.shape[1])
    state = gates.new_zeros(shape, dtype=torch.float32) if initial_state is None else initial_state.float()
    y, state, _, _ = _scan(gates.float(), weight.float(), state, starts, keep)
    return y.to(gates.dtype), state


def forward(
    gates: Tensor, weight: Tensor, initial_state: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, (B, L, E); the final state, (B, 2, E); activated gates, (B, L, 4, E), and cells, (B, L, E), if `keep`."""
    from . import cpu_kernels

    (batch, L, _), E = gates.shape, weight.shape[1]
    kept = batch if keep else 0
    y, state = floats(batch, L, E), floats(batch, 2, E)
    activated, cells = floats(kept, L, 4, E), floats(kept, L, E)
    inputs = (gates.unflatten(2, (4, E)), _by_cells(weight), initial_state, never_if_none(starts, gates))
    run(cpu_kernels.forward, batch, *inputs, y, state, activated, cells)
    return y, state, activated, cells


_scan = operator("lstm_scan_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    y: Tensor,
    activated: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, (B, L, 4 E), of the recurrent weight and of the initial state."""
    from . import cpu_kernels

    batch, L, E = y.shape
    grad_gates, grad_initial_state = floats(batch, L, 4, E), floats(batch, 2, E)
    inputs = (grad_y, grad_state, _by_gates(weight), initial_state, never_if_none(starts, y), activated, cells)
    run(cpu_kernels.backward, batch, *inputs, grad_gates, grad_initial_state)
    grad_gates = grad_gates.flatten(2)
    return grad_gates, weight_gradient(grad_gates, y, initial_state, starts), grad_initial_state


_scan_backward = operator("lstm_scan_cpu_backward", backward, device_types="cpu")


register_gradients(_scan, _scan_backward)


def _by_cells(weight: Tensor) -> Tensor:
    """The weight as forward takes it, packed: four gates of LANES cells side by side, zero where there is no cell."""
    from ..products import packed
    from ..simd import LANES

    gates = weight.unflatten(0, (4, -1))  # (4, E, E)
    gates = F.pad(gates, (0, 0, 0, -gates.shape[1] % LANES)).unflatten(1, (-1, LANES))
    return packed(gates.transpose(0, 1).flatten(0, 2).T)


def _by_gates(weight: Tensor) -> Tensor:
    """The weight as backward takes it, packed: each gate has zeros up to a multiple of LANES cells."""
    from ..products import packed
    from ..simd import LANES

    gates = weight.unflatten(0, (4, -1))  # (4, E, E)
    return packed(F.pad(gates, (0, 0, 0, -gates.shape[1] % LANES)).flatten(0, 1))
