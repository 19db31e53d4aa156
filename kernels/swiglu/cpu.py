"""The CPU path: one numba kernel each way (cpu_kernels.py), float32 inside; backward keeps nothing but the inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import Unsupported
from ..parallel import as_array, is_small, rows, run
from . import torch_impl


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Same contract as reference.swiglu, in float32. Differentiable once.

    Raises:
        Unsupported: if an input is not on the CPU, or gate is float64.
    """
    if any(t.device.type != "cpu" for t in (gate, up)):
        raise Unsupported("an input is not on the CPU")
    if gate.dtype == torch.float64:
        raise Unsupported("gate is float64, and the kernels compute in float32")
    if is_small(gate):
        return torch_impl.swiglu(gate, up)
    return _product(rows(gate).float(), rows(up).float()).view(gate.shape).to(gate.dtype)


@torch.library.custom_op("crossover::swiglu_cpu", mutates_args=(), device_types="cpu")
def _product(gate: Tensor, up: Tensor) -> Tensor:
    from . import cpu_kernels

    y = torch.empty(gate.shape)
    run(cpu_kernels.forward, gate.shape[0], *map(as_array, (gate, up, y)))
    return y


@_product.register_fake
def _(gate, up):
    return gate.new_empty(gate.shape)


@torch.library.custom_op("crossover::swiglu_cpu_backward", mutates_args=(), device_types="cpu")
def _product_backward(grad_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    from . import cpu_kernels

    grad_gate, grad_up = torch.empty(gate.shape), torch.empty(gate.shape)
    run(cpu_kernels.backward, gate.shape[0], *map(as_array, (grad_y, gate, up, grad_gate, grad_up)))
    return grad_gate, grad_up


@_product_backward.register_fake
def _(grad_y, gate, up):
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_y: Tensor):
    return _product_backward(grad_y, *ctx.saved_tensors)


_product.register_autograd(_backward, setup_context=_setup_context)
