"""The CPU path: one numba kernel each way (cpu_kernels.py), float32 inside; backward keeps nothing but the inputs."""

from __future__ import annotations

from torch import Tensor

from ..operators import differentiable, operator
from ..parallel import floats, is_small, rows, run
from . import reference, torch_impl


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract as reference.swiglu, in float32. Differentiable once."""
    if is_small(gate):
        return torch_impl.swiglu(gate, up)
    return _product(rows(gate).float(), rows(up).float()).view(gate.shape).to(gate.dtype)


def forward(gate: Tensor, up: Tensor) -> Tensor:
    """y, (T, F)."""
    from . import cpu_kernels

    y = floats(gate.shape)
    run(cpu_kernels.forward, gate.shape[0], gate, up, y)
    return y


_product = operator("swiglu_cpu", forward, device_types="cpu")


def backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, (T, F)."""
    from . import cpu_kernels

    grad_gate, grad_up = floats(gate.shape), floats(gate.shape)
    run(cpu_kernels.backward, gate.shape[0], grad_y, gate, up, grad_gate, grad_up)
    return grad_gate, grad_up


_product_backward = operator("swiglu_cpu_backward", backward, device_types="cpu")


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor):
    return _product_backward(grad_y, *ctx.saved_tensors)


differentiable(_product, _backward, _setup_context, lambda ctx: (reference.swiglu, ctx.saved_tensors))
