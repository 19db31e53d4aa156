"""The CPU path: causal self-attention as numba kernels in blocks (cpu_kernels.py), float32 inside, memory linear in L.

Training asks for nothing else. Decode steps, windows, documents, padding and attention that is not causal run plain
PyTorch, and so do small inputs, where it is faster.
"""

from __future__ import annotations

from torch import Tensor

from ..operators import differentiable, operator
from ..parallel import floats, is_small, run
from . import reference, torch_impl


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    window: int | None = None,
    starts: Tensor | None = None,
    first_key: Tensor | None = None,
    kv_len: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Same contract as reference.attention, in float32. Differentiable once."""
    (L, P), S = q.shape[1::2], k.shape[1]
    masked = (window is not None and window < S) or any(t is not None for t in (starts, first_key, kv_len))
    if masked or not causal or L != S or L == 1 or is_small(q):
        return torch_impl.attention(q, k, v, causal, window, starts, first_key, kv_len, scale)
    o, *_ = _attention(q.float(), k.float(), v.float(), P**-0.5 if scale is None else scale)
    return o.to(q.dtype)


def forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """o, (B, L, H, P), and of each query, (B, H, L), its largest score and the sum of its weights relative to that."""
    from . import cpu_kernels

    B, L, H, _ = q.shape
    o, maxima, sums = floats(B, L, H, v.shape[3]), floats(B, H, L), floats(B, H, L)
    run(cpu_kernels.forward, B * H, q, k, v, scale, o, maxima, sums)
    return o, maxima, sums


_attention = operator("attention_cpu", forward, device_types="cpu")


def backward(
    grad_o: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float, o: Tensor, maxima: Tensor, sums: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    from . import cpu_kernels

    grads = floats(q.shape), floats(k.shape), floats(v.shape)
    run(cpu_kernels.backward, k.shape[0] * k.shape[2], q, k, v, scale, o, maxima, sums, grad_o, *grads)
    return grads


_attention_backward = operator("attention_cpu_backward", backward, device_types="cpu")


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, ctx.scale = inputs
    ctx.save_for_backward(q, k, v, *output)


def _backward(ctx, grad_o: Tensor, *_: Tensor):
    q, k, v, *saved = ctx.saved_tensors
    return *_attention_backward(grad_o, q, k, v, ctx.scale, *saved), None


def _again(ctx):
    def definition(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        return reference.attention(q, k, v, scale=scale)

    return definition, (*ctx.saved_tensors[:3], ctx.scale)


differentiable(_attention, _backward, _setup_context, _again)
