"""The CPU path: numba kernels that read each input once (cpu_kernels.py), float32 inside."""

from __future__ import annotations

from torch import Tensor

from ..operators import differentiable, operator
from ..parallel import floats, is_small, rows, run
from . import reference, torch_impl


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as reference.rms_norm, in float32. Differentiable once."""
    return _normed(x, None, weight, eps, 1)


def gated_rms_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float, n_groups: int = 1) -> Tensor:
    """Same contract as reference.gated_rms_norm, in float32. Differentiable once."""
    return _normed(x, z, weight, eps, n_groups)


def _normed(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> Tensor:
    if is_small(x):
        return (
            torch_impl.rms_norm(x, weight, eps) if z is None else torch_impl.gated_rms_norm(x, z, weight, eps, n_groups)
        )
    y, _ = _norm(rows(x).float(), None if z is None else rows(z).float(), weight.float(), eps, n_groups)
    return y.view(x.shape).to(x.dtype)


def forward(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> tuple[Tensor, Tensor]:
    """y, (T, D), and 1 / rms, (T, G)."""
    from . import cpu_kernels

    y, rstd = floats(x.shape), floats(x.shape[0], n_groups)
    run(cpu_kernels.forward, _n_tasks(x), x, _gate(z, x), weight, eps, y, rstd)
    return y, rstd


_norm = operator("rms_norm_cpu", forward, device_types="cpu")


def backward(
    grad_y: Tensor, x: Tensor, z: Tensor | None, weight: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, z (empty without a gate) and weight."""
    from . import cpu_kernels

    grad_x, grad_z = floats(x.shape), floats(_gate(z, x).shape)
    parts = floats(_n_tasks(x), x.shape[1])
    run(cpu_kernels.backward, _n_tasks(x), grad_y, x, _gate(z, x), weight, rstd, grad_x, grad_z, parts)
    return grad_x, grad_z, parts.sum(0)


_norm_backward = operator("rms_norm_cpu_backward", backward, device_types="cpu")


def _setup_context(ctx, inputs, output) -> None:
    x, z, weight, *ctx.options = inputs
    ctx.save_for_backward(x, z, weight, output[1])


def _backward(ctx, grad_y: Tensor, _: Tensor):
    x, z, weight, rstd = ctx.saved_tensors
    grad_x, grad_z, grad_weight = _norm_backward(grad_y, x, z, weight, rstd)
    return grad_x, None if z is None else grad_z, grad_weight, None, None


def _again(ctx):
    def definition(x: Tensor, z: Tensor | None, weight: Tensor, eps: float, n_groups: int) -> Tensor:
        if z is None:
            return reference.rms_norm(x, weight, eps)
        return reference.gated_rms_norm(x, z, weight, eps, n_groups)

    return definition, (*ctx.saved_tensors[:3], *ctx.options)


differentiable(_norm, _backward, _setup_context, _again)


def _n_tasks(x: Tensor) -> int:
    from . import cpu_kernels

    return -(-x.shape[0] // cpu_kernels.ROWS)


def _gate(z: Tensor | None, x: Tensor) -> Tensor:
    """The gate as kernels take it: no rows where there is none."""
    return x.new_empty(0, x.shape[1]) if z is None else z
