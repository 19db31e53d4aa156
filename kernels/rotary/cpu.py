"""The CPU path: a numba kernel that reads and writes each number once (cpu_kernels.py), float32 inside."""

from __future__ import annotations

from torch import Tensor

from ..operators import operator
from ..parallel import floats, is_small, run
from . import torch_impl


def rotary(q: Tensor, k: Tensor, positions: Tensor, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Same contract as reference.rotary, in float32."""
    if is_small(q):
        return torch_impl.rotary(q, k, positions, theta)
    cos, sin = torch_impl.table(q, positions, theta)
    rotated = (_rotated(x.float(), cos, sin).to(x.dtype) for x in (q, k))
    return next(rotated), next(rotated)


def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """(B, L, H, P) rotated by a table, (L, P/2) each."""
    from . import cpu_kernels

    y = floats(x.shape)
    run(cpu_kernels.rotate, x.shape[0] * x.shape[1], x, cos, sin, y)
    return y


_rotated = operator("rotary_cpu", forward, device_types="cpu")


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs[1:])


def _backward(ctx, grad_y: Tensor):
    cos, sin = ctx.saved_tensors
    return _rotated(grad_y, cos, -sin), None, None  # the adjoint of a rotation turns back


_rotated.register_autograd(_backward, setup_context=_setup_context)
