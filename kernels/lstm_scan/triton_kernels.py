"""The LSTM's recurrence for the GPU: a program takes ROWS rows of the batch through the whole sequence.

All cells of a row belong to one program, so no program waits for another: the state goes through memory, with a barrier
inside the program after every token. In return every program reads the whole recurrent weight at every token, from the
second-level cache. With 16-bit weights and the 64 bytes a clock that a multiprocessor gets from there, a token takes at
least E^2 / 8 clocks, forward and backward each: at E = 256 some 5 microseconds, at E = 1024 some 75, for any batch of
up to ROWS rows a multiprocessor. What a loop of PyTorch operations pays is several launches a token; what a library
does better is to divide the weight among multiprocessors that keep it, which takes a barrier across all of them.

The product takes the precision of the gates and accumulates in float32; the state is float32. Backward walks the tokens
in reverse and leaves the gradient of the weight to one matrix product over all of them. No atomics: results repeat bit
for bit.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..operators import operator
from ..triton_kernels import exp, launch, sigmoid
from . import torch_impl
from .gradients import register_gradients, weight_gradient

ROWS = 16
"""Rows of a program: the least that the matrix units take."""


def lstm_scan(
    gates: Tensor, weight: Tensor, initial_state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.lstm_scan. Differentiable once."""
    if gates.shape[1] == 1:  # a decode step has nothing to scan
        return torch_impl.lstm_scan(gates, weight, initial_state, starts)
    inputs = (gates, weight, initial_state)
    keep = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    batch, E = gates.shape[0], weight.shape[1]
    if initial_state is None:
        initial_state = torch.zeros(batch, 2, E, device=gates.device)
    y, state, _, _ = _scan(gates.contiguous(), weight.to(gates.dtype), initial_state.float(), starts, keep)
    return y, state


def configuration(E: int, itemsize: int) -> dict[str, int]:
    """Cells of a block and how many numbers of a product are taken at a time; four bytes allow half as many."""
    block = max(16, min(64 if itemsize < 4 else 32, triton.next_power_of_2(E)))
    return {"ROWS": ROWS, "BLOCK": block, "DEPTH": block, "num_warps": 4, "num_stages": 3 if itemsize < 4 else 2}


def forward(
    gates: Tensor, weight: Tensor, initial_state: Tensor, starts: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, (B, L, E); the final state, (B, 2, E); activated gates, (B, L, 4 E), and cells, (B, L, E), if `keep`."""
    (batch, L, _), E = gates.shape, weight.shape[1]
    y = torch.empty(batch, L, E, dtype=gates.dtype, device=gates.device)
    activated, cells = (initial_state.new_empty(batch if keep else 0, L, n * E) for n in (4, 1))
    states = torch.stack([initial_state, torch.empty_like(initial_state)])  # before and after a token, in turns
    launch(
        _forward_kernel, (triton.cdiv(batch, ROWS),),
        gates, weight.contiguous(), _marks(starts), states, y,
        activated if keep else None, cells if keep else None, batch, L,
        E=E, **configuration(E, gates.element_size()),
    )  # fmt: skip
    return y, states[L % 2].clone(), activated, cells


def backward(
    grad_y: Tensor,
    grad_state: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    activated: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of gates, (B, L, 4 E), and of the initial state, (B, 2, E)."""
    batch, L, E = cells.shape
    grad_gates = torch.empty(batch, L, 4 * E, dtype=grad_y.dtype, device=grad_y.device)
    grad_states = torch.stack([grad_state, torch.empty_like(grad_state)])  # after and before a token, in turns
    launch(
        _backward_kernel, (triton.cdiv(batch, ROWS),),
        grad_y.contiguous(), weight.contiguous(), _marks(starts), initial_state.contiguous(), activated, cells,
        grad_states, grad_gates, batch, L,
        E=E, **configuration(E, grad_y.element_size()),
    )  # fmt: skip
    return grad_gates, grad_states[L % 2].clone()


def _marks(starts: Tensor | None) -> Tensor | None:
    return None if starts is None else starts.contiguous().view(torch.int8)


def gradients(
    grad_y: Tensor,
    grad_state: Tensor,
    weight: Tensor,
    initial_state: Tensor,
    starts: Tensor | None,
    y: Tensor,
    activated: Tensor,
    cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gates, of the recurrent weight and of the initial state."""
    grad_gates, grad_initial = backward(grad_y, grad_state, weight, initial_state, starts, activated, cells)
    return grad_gates, weight_gradient(grad_gates, y, initial_state, starts), grad_initial


_scan = operator("lstm_scan_triton", forward)
_scan_backward = operator("lstm_scan_triton_backward", gradients)
register_gradients(_scan, _scan_backward)


@triton.jit
def _tanh(x):
    """tanh x; near zero, where the quotient cancels, by its series."""
    q = x * x
    series = x - x * q * (0.33333333 - q * (0.13333333 - q * 0.053968254))
    return tl.where(q < 0.01, series, 1.0 - 2.0 / (1.0 + exp(2.0 * x)))


@triton.jit
def _rows(batch, ROWS: tl.constexpr):
    """The rows of this program and which of them exist, [ROWS, 1]."""
    b = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    return b.to(tl.int64), b < batch


@triton.jit
def _goes_on(STARTS, exists):
    """Says in which rows the token continues a document."""
    if STARTS is None:
        return exists
    else:
        return tl.load(STARTS, mask=exists, other=1) == 0


@triton.jit
def _forward_kernel(
    GATES, W, STARTS, STATES, Y, ACTIVATED, CELLS, batch, L,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # grid (B / ROWS,)  # fmt: skip
    b, exists = _rows(batch, ROWS)
    if STARTS is not None:
        STARTS += b * L
    # all threads read the state of one place while some already write the other
    before, after = STATES + b * (2 * E), STATES + (batch + b) * (2 * E)
    row = b * L
    for _ in range(0, L):
        goes_on = _goes_on(STARTS, exists)
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)[None, :]
            mask = exists & (e < E)
            gates = GATES + (row * (4 * E) + e)
            i, f = tl.load(gates, mask=mask, other=0.0), tl.load(gates + E, mask=mask, other=0.0)
            g, o = tl.load(gates + 2 * E, mask=mask, other=0.0), tl.load(gates + 3 * E, mask=mask, other=0.0)
            i, f, g, o = i.to(tl.float32), f.to(tl.float32), g.to(tl.float32), o.to(tl.float32)
            for k0 in range(0, E, DEPTH):
                k = k0 + tl.arange(0, DEPTH)
                h = tl.load(before + k[None, :], mask=goes_on & (k < E)[None, :], other=0.0).to(W.dtype.element_ty)
                weight, in_weight = W + (e * E + k[:, None]), (e < E) & (k < E)[:, None]
                i = tl.dot(h, tl.load(weight, mask=in_weight, other=0.0), i, input_precision="ieee")
                f = tl.dot(h, tl.load(weight + E * E, mask=in_weight, other=0.0), f, input_precision="ieee")
                g = tl.dot(h, tl.load(weight + 2 * E * E, mask=in_weight, other=0.0), g, input_precision="ieee")
                o = tl.dot(h, tl.load(weight + 3 * E * E, mask=in_weight, other=0.0), o, input_precision="ieee")
            i, f, g, o = sigmoid(i), sigmoid(f), _tanh(g), sigmoid(o)
            c = i * g + f * tl.load(before + (E + e), mask=goes_on & (e < E), other=0.0)
            y = o * _tanh(c)
            in_e = row * E + e
            tl.store(Y + in_e, y.to(Y.dtype.element_ty), mask=mask)
            tl.store(after + e, y, mask=mask)
            tl.store(after + (E + e), c, mask=mask)
            if ACTIVATED is not None:
                activated = ACTIVATED + (row * (4 * E) + e)
                tl.store(activated, i, mask=mask)
                tl.store(activated + E, f, mask=mask)
                tl.store(activated + 2 * E, g, mask=mask)
                tl.store(activated + 3 * E, o, mask=mask)
                tl.store(CELLS + in_e, c, mask=mask)
        tl.debug_barrier()
        before, after = after, before
        row += 1
        if STARTS is not None:
            STARTS += 1


@triton.jit
def _backward_kernel(
    DY, W, STARTS, H0, ACTIVATED, CELLS, DSTATES, DGATES, batch, L,
    E: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # grid (B / ROWS,)  # fmt: skip
    b, exists = _rows(batch, ROWS)
    row = b * L + (L - 1)
    if STARTS is not None:
        STARTS += row
    after, before = DSTATES + b * (2 * E), DSTATES + (batch + b) * (2 * E)  # see forward
    for t in range(0, L):  # from the last token to the first
        goes_on = _goes_on(STARTS, exists)
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)[None, :]
            mask, carries = exists & (e < E), goes_on & (e < E)
            in_e, in_gates = row * E + e, row * (4 * E) + e
            activated, grads = ACTIVATED + in_gates, DGATES + in_gates
            i, f = tl.load(activated, mask=mask, other=0.0), tl.load(activated + E, mask=mask, other=0.0)
            g, o = tl.load(activated + 2 * E, mask=mask, other=0.0), tl.load(activated + 3 * E, mask=mask, other=0.0)
            tanh_c = _tanh(tl.load(CELLS + in_e, mask=mask, other=0.0))
            if t < L - 1:
                c_before = tl.load(CELLS + (in_e - E), mask=carries, other=0.0)
            else:
                c_before = tl.load(H0 + (b * (2 * E) + E + e), mask=carries, other=0.0)
            grad_y = tl.load(DY + in_e, mask=mask, other=0.0).to(tl.float32)
            grad_y += tl.load(after + e, mask=mask, other=0.0)
            grad_c = tl.load(after + (E + e), mask=mask, other=0.0) + grad_y * o * (1.0 - tanh_c * tanh_c)
            tl.store(before + (E + e), tl.where(goes_on, grad_c * f, 0.0), mask=mask)
            element = DGATES.dtype.element_ty
            tl.store(grads, (grad_c * g * (i * (1.0 - i))).to(element), mask=mask)
            tl.store(grads + E, (grad_c * c_before * (f * (1.0 - f))).to(element), mask=mask)
            tl.store(grads + 2 * E, (grad_c * i * (1.0 - g * g)).to(element), mask=mask)
            tl.store(grads + 3 * E, (grad_y * tanh_c * (o * (1.0 - o))).to(element), mask=mask)
        tl.debug_barrier()
        for e0 in range(0, E, BLOCK):
            e = e0 + tl.arange(0, BLOCK)[None, :]
            grad_y = tl.zeros([ROWS, BLOCK], tl.float32)
            for k0 in range(0, 4 * E, DEPTH):
                k = k0 + tl.arange(0, DEPTH)
                grads = tl.load(DGATES + (row * (4 * E) + k[None, :]), mask=goes_on & (k < 4 * E)[None, :], other=0.0)
                weight = tl.load(W + (k[:, None] * E + e), mask=(k < 4 * E)[:, None] & (e < E), other=0.0)
                grad_y = tl.dot(grads, weight, grad_y, input_precision="ieee")
            tl.store(before + e, grad_y, mask=exists & (e < E))
        tl.debug_barrier()
        before, after = after, before
        row -= 1
        if STARTS is not None:
            STARTS -= 1
