"""Attention for the GPU: scores stay on the chip (Dao 2023, arXiv:2307.08691), so memory is linear in the length.

Every mask is an interval: query i sees the keys from first(i) to last(i), and neither ever decreases with i. So a block
of queries sees one run of keys, and only the blocks of keys at the two ends of the run need a mask.

Backward takes two kernels, one that owns queries and one that owns keys, and computes the scores in both: nothing is
added up between programs, so gradients repeat bit for bit. A few queries (decoding) are packed with all heads that
share their keys into one block, and the keys are split among programs until the device is full.

Scores are kept in powers of two, and log-sum-exp with them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..dispatch import Unsupported
from ..documents import tokens_since_start
from ..operators import differentiable, operator
from ..triton_kernels import LOG2_E, launch, shared_memory

MAX_WIDTH = 256
"""Widest head: a block of rows must fit the registers of one program."""

DECODE_ROWS = 64
"""Largest number of queries, over all heads that share a key head, that are packed into one block."""

MAX_SPLITS = 32
"""Largest number of programs that share the keys of one head."""

ROOMY = 110_000
"""Bytes of shared memory that suffice for the backward of the widest heads as it is fastest, which takes 102,656."""

SLOTS = 264
"""Programs that run at once: two on each of the 132 multiprocessors of an H100. Elsewhere only the balance suffers."""

# A row that has seen nothing yet has a maximum of EMPTY, far above a hidden score: its weights are zero without a test.
EMPTY = tl.constexpr(-0.5e30)
HIDDEN = tl.constexpr(-1e30)


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
    """Same contract as reference.attention, but a query that sees no key gives zeros. Differentiable once.

    Raises:
        Unsupported: if a head is wider than MAX_WIDTH, the dtypes differ or are not floats of 16 or 32 bits, scale is
            negative, or backward, should it follow, would not fit the GPU's shared memory.
    """
    L, S, P = q.shape[1], k.shape[1], q.shape[3]
    if max(P, v.shape[3]) > MAX_WIDTH:
        raise Unsupported(f"a head of {max(P, v.shape[3])} channels is wider than {MAX_WIDTH}")
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16) or not q.dtype == k.dtype == v.dtype:
        raise Unsupported(f"dtypes {q.dtype}, {k.dtype} and {v.dtype} are not one float of 16 or 32 bits")
    scale = P**-0.5 if scale is None else scale
    if scale < 0:
        raise Unsupported(f"scale={scale} is negative")
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        room = shared_memory(q.device)
        needed = backward_memory(P, v.shape[3], q.dtype, room)
        if needed > room:
            raise Unsupported(f"backward takes {needed} bytes of shared memory, and {q.device} has {room}")
    if window is not None and window >= S:
        window = None
    first, last = _documents(starts, first_key, (S if kv_len is None else kv_len) - L, L, S)
    o, _ = _attention(q, k, v, first, last, kv_len, causal, window, scale)
    return o


def _documents(
    starts: Tensor | None, first_key: Tensor | None, past: Tensor | int, L: int, S: int
) -> tuple[Tensor | None, Tensor | None]:
    """Finds where each query's document begins and ends, (B, L) int32 each, in positions from the first query on.

    None where nothing bounds it; keys of the past have negative positions.
    """
    first = last = None
    if starts is not None:
        position = torch.arange(L, device=starts.device)
        first = position - tokens_since_start(starts)
        coming = torch.where(starts, position, L).flip(1).cummin(1).values.flip(1)  # the next mark, or a mark here
        last = F.pad(coming[:, 1:], (0, 1), value=L).int()
    if first_key is not None:
        key = (first_key - past)[:, None].expand(-1, L)
        first = key if first is None else torch.maximum(first, key)
    return None if first is None else first.clamp(-S, L).int().contiguous(), last


def configuration(kernel: str, width: int, dtype: torch.dtype, room: int = ROOMY) -> dict[str, int]:
    """Queries and keys of a block, warps, and blocks in flight, for heads padded to `width` channels.

    Args:
        kernel: "forward", "decode", "dq" or "dkdv". Decoding chooses its number of queries itself.
        width: power of two.
        dtype: dtype of the inputs; float32 is multiplied outside the tensor cores and takes smaller blocks.
        room: bytes of shared memory.
    """
    size = 0 if width <= 64 else 1 if width <= 128 else 2
    if dtype == torch.float32:
        narrow = {
            "forward": ((64, 32, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
            "decode": ((16, 32, 4, 2), (16, 32, 8, 2), (16, 32, 8, 2)),
            "dq": ((64, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2)),
            "dkdv": ((32, 32, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2)),
        }
        chosen = narrow[kernel][size]
    else:
        wide = {
            "forward": ((128, 64, 8, 3), (128, 64, 8, 3), (64, 32, 4, 2)),
            "decode": ((16, 64, 4, 3), (16, 64, 4, 3), (16, 32, 4, 3)),
            "dq": ((128, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2 if room >= ROOMY else 1)),
            "dkdv": ((64, 128, 8, 2), (64, 128, 8, 2), (32 if room >= ROOMY else 16, 64, 8, 2)),
        }
        chosen = wide[kernel][size]
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), chosen, strict=True))


def backward_memory(P: int, PV: int, dtype: torch.dtype, room: int) -> int:
    """Bytes of shared memory that backward needs: a block of queries, one of keys, and two numbers of each query."""
    D, DV = (max(16, triton.next_power_of_2(width)) for width in (P, PV))
    configs = [configuration(kernel, max(D, DV), dtype, room) for kernel in ("dq", "dkdv")]
    return max((c["BLOCK_M"] + c["BLOCK_N"]) * (D + DV) * dtype.itemsize + 8 * c["BLOCK_M"] for c in configs)


def splits(n_programs: int, n_keys: int, block: int) -> int:
    """Chooses how many parts the keys of each program are cut into, so that the last of the programs ends soonest.

    A part costs as much as its keys, and another two blocks to start it and to combine it.
    """

    def cost(parts: int) -> int:
        return triton.cdiv(n_programs * parts, SLOTS) * (triton.cdiv(n_keys, block * parts) + 2)

    return min(range(1, min(MAX_SPLITS, triton.cdiv(n_keys, block)) + 1), key=cost)


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    end: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, (B, L, H, P), and log2 of the sum of 2^score, (B, H, L)."""
    q, k, v = _rows(q), _rows(k), _rows(v)
    (B, L, H, _), S = q.shape, k.shape[1]
    o = torch.empty(B, L, H, v.shape[3], dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, L, dtype=torch.float32, device=q.device)
    constants = _constants(q, k, v, causal)
    bounds = (end, first, last, L, S, window, scale * LOG2_E.value)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    rows = L * constants["GROUP"]
    if rows > DECODE_ROWS:
        config = configuration("forward", max(constants["D"], constants["DV"]), q.dtype)
        grid = (triton.cdiv(L, config["BLOCK_M"]), H, B)
        launch(_forward_kernel, grid, q, k, v, o, lse, *bounds, *strides, **constants, **config)
        return o, lse

    config = configuration("decode", max(constants["D"], constants["DV"]), q.dtype)
    config["BLOCK_M"] = max(16, triton.next_power_of_2(rows))
    n_programs, n_keys = B * k.shape[2], S if window is None else min(S, L + window)
    parts = splits(n_programs, n_keys, config["BLOCK_N"])
    part_o, part_lse = o, lse
    if parts > 1:
        part_o = torch.empty(parts, *o.shape, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, *lse.shape, dtype=torch.float32, device=q.device)
    grid = (parts, k.shape[2], B)
    launch(_decode_kernel, grid, q, k, v, part_o, part_lse, *bounds, *strides, **constants, **config)
    if parts > 1:
        sizes = {"PARTS": parts, "PADDED": triton.next_power_of_2(parts), "PV": v.shape[3], "DV": constants["DV"]}
        launch(_combine_kernel, (L, H, B), part_o, part_lse, o, lse, **sizes, num_warps=4)
    return o, lse


def backward(
    grad_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    first: Tensor | None,
    last: Tensor | None,
    end: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, contiguous."""
    grad_o, q, k, v = _rows(grad_o), _rows(q), _rows(k), _rows(v)
    (B, L, H, _), (S, n_kv_heads) = q.shape, k.shape[1:3]
    grad_q, grad_k, grad_v = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    constants = _constants(q, k, v, causal)
    bounds = (end, first, last, L, S, window, scale, scale * LOG2_E.value)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad_o.stride()[:3])
    width = max(constants["D"], constants["DV"])

    room = shared_memory(q.device)
    config = configuration("dq", width, q.dtype, room)
    grid = (triton.cdiv(L, config["BLOCK_M"]), H, B)
    tensors = (q, k, v, o, grad_o, lse, delta, grad_q)
    launch(_query_gradient_kernel, grid, *tensors, *bounds, *strides, **constants, **config)
    config = configuration("dkdv", width, q.dtype, room)
    grid = (triton.cdiv(S, config["BLOCK_N"]), n_kv_heads, B)
    tensors = (q, k, v, grad_o, lse, delta, grad_k, grad_v)
    launch(_key_gradient_kernel, grid, *tensors, *bounds, *strides, **constants, **config)
    return grad_q, grad_k, grad_v


def _rows(x: Tensor) -> Tensor:
    """The tensor with a contiguous last axis, copied only where it must be."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _constants(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> dict[str, Any]:
    """Constants of every kernel: heads that share a key head, widths, and widths padded for the dots."""
    P, PV = q.shape[3], v.shape[3]
    D, DV = (max(16, triton.next_power_of_2(width)) for width in (P, PV))
    return {"GROUP": q.shape[2] // k.shape[2], "P": P, "PV": PV, "D": D, "DV": DV, "CAUSAL": causal}


_attention = operator("attention_triton", forward)
_attention_backward = operator("attention_triton_backward", backward)


def _setup_context(ctx, inputs, output) -> None:
    q, k, v, first, last, end, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *output, first, last, end)


def _backward(ctx, grad_o: Tensor, _: Tensor):
    return *_attention_backward(grad_o, *ctx.saved_tensors, *ctx.options), *(None,) * 6


differentiable(_attention, _backward, _setup_context)


@triton.jit
def _past(END, L, S):
    """Number of valid keys before the first query; there are no more than S, whatever END says."""
    return S - L if END is None else tl.minimum(tl.maximum(tl.load(END), 0), S).to(tl.int32) - L


@triton.jit
def _interval(i, past, FIRST, LAST, L, window, CAUSAL: tl.constexpr):
    """First visible key of queries i, and the key after the last; queries beyond L repeat the last one."""
    i = tl.minimum(i, L - 1)
    position = past + i
    first = i * 0
    last = i * 0 + (past + L)
    if CAUSAL:
        last = position + 1
    if window is not None:
        first = tl.maximum(first, position - window + 1)
        last = tl.minimum(last, position + window)
    if FIRST is not None:
        first = tl.maximum(first, past + tl.load(FIRST + i))
    if LAST is not None:
        last = tl.minimum(last, past + tl.load(LAST + i))
    return first, last


@triton.jit
def _key_blocks(i, past, FIRST, LAST, L, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The run of keys that queries i to i + BLOCK_M see: where it begins, is whole, is whole no more, and ends."""
    begin, whole_end = _interval(i, past, FIRST, LAST, L, window, CAUSAL)
    whole, end = _interval(i + BLOCK_M - 1, past, FIRST, LAST, L, window, CAUSAL)
    begin = begin // BLOCK_N * BLOCK_N
    whole = tl.maximum(tl.cdiv(whole, BLOCK_N) * BLOCK_N, begin)
    return begin, whole, tl.maximum(whole_end // BLOCK_N * BLOCK_N, whole), end


@triton.jit
def _load(X, row, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Rows of a matrix from `row` on, (ROWS, PADDED), with zeros beyond WIDTH and, if MASKED, from row `end` on."""
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    # the first row's offset may not fit 32 bits, those inside the block do
    at = X + tl.cast(row, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    if MASKED:
        x = tl.load(at, mask=(row + r < end)[:, None] & (d < WIDTH)[None, :], other=0.0)
    elif WIDTH < PADDED:
        x = tl.load(at, mask=(d < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(at)
    return x


@triton.jit
def _store(X, x, row, end, stride, ROWS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Writes what `_load` reads."""
    r, d = tl.arange(0, ROWS), tl.arange(0, PADDED)
    at = X + tl.cast(row, tl.int64) * stride + (r[:, None] * stride + d[None, :])
    tl.store(at, x.to(X.dtype.element_ty), mask=(row + r < end)[:, None] & (d < WIDTH)[None, :])


@triton.jit
def _loop(begin, whole, whole_end, stop, MASKED: tl.constexpr):
    """Bounds of a loop over the whole part of a run, or if MASKED over both its ends, and the gap between these."""
    gap = whole_end - whole
    if MASKED:
        stop -= gap
    else:
        begin, stop = whole, whole_end
    return begin, stop, gap


@triton.jit
def _skip(j, whole, gap, MASKED: tl.constexpr):
    """The block at step j of such a loop."""
    if MASKED:
        j = tl.where(j < whole, j, j + gap)
    return j


@triton.jit
def _attend(
    acc,
    m,
    l,
    q,
    K,
    V,
    begin,
    whole,
    whole_end,
    stop,
    first,
    last,
    end,
    scale,
    stride_kl,
    stride_vl,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds the ends of a run of keys, or its whole part, to the weighted sum acc, maximum m and sum of weights l."""
    begin, stop, gap = _loop(begin, whole, whole_end, stop, MASKED)
    for j in range(begin, stop, BLOCK_N):
        n = _skip(j, whole, gap, MASKED)
        k = _load(K, n, end, stride_kl, BLOCK_N, P, D, MASKED)
        v = _load(V, n, end, stride_vl, BLOCK_N, PV, DV, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((key >= first[:, None]) & (key < last[:, None]), s * scale, HIDDEN)
            new_m = tl.maximum(m, tl.max(s, 1))
            p = tl.exp2(s - new_m[:, None])
        else:
            new_m = tl.maximum(m, tl.max(s, 1) * scale)
            p = tl.exp2(s * scale - new_m[:, None])
        decay = tl.exp2(m - new_m)
        l = l * decay + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        m = new_m
    return acc, m, l


@triton.jit
def _forward_kernel(
    Q,
    K,
    V,
    O,
    LSE,
    END,
    FIRST,
    LAST,
    L,
    S,
    window,
    scale,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (L / BLOCK_M, H, B)
    i = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M  # long rows first, so that short ones fill the end
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    Q += batch * stride_qb + head * stride_qh
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh
    if FIRST is not None:
        FIRST += batch * L
    if LAST is not None:
        LAST += batch * L
    past = _past(END, L, S)
    end = past + L
    begin, whole, whole_end, stop = _key_blocks(i, past, FIRST, LAST, L, window, CAUSAL, BLOCK_M, BLOCK_N)
    first, last = _interval(i + tl.arange(0, BLOCK_M), past, FIRST, LAST, L, window, CAUSAL)

    q = _load(Q, i, L, stride_ql, BLOCK_M, P, D, True)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    m = tl.full([BLOCK_M], EMPTY, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for MASKED in tl.static_range(2):  # the blocks that every query sees whole, then the ends
        acc, m, l = _attend(
            acc, m, l, q, K, V, begin, whole, whole_end, stop, first, last, end, scale, stride_kl, stride_vl,
            P, PV, D, DV, BLOCK_N, MASKED
        )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)  # a query of padding sees nothing
    _store(O + (batch * L * H + head) * PV, acc / l[:, None], i, L, H * PV, BLOCK_M, PV, DV)
    row = i + tl.arange(0, BLOCK_M)
    tl.store(LSE + (batch * H + head) * L + row, m + tl.log2(l), mask=row < L)


@triton.jit
def _decode_kernel(
    Q,
    K,
    V,
    O,
    LSE,
    END,
    FIRST,
    LAST,
    L,
    S,
    window,
    scale,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (parts, H_kv, B); a row of the block is one query of one head of the group
    part, parts, n_kv_heads = tl.program_id(0), tl.num_programs(0), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    H = n_kv_heads * GROUP
    r, d, c = tl.arange(0, BLOCK_M), tl.arange(0, D), tl.arange(0, DV)
    i, head = r // GROUP, tl.program_id(1) * GROUP + r % GROUP
    K += batch * stride_kb + tl.program_id(1).to(tl.int64) * stride_kh
    V += batch * stride_vb + tl.program_id(1).to(tl.int64) * stride_vh
    if FIRST is not None:
        FIRST += batch * L
    if LAST is not None:
        LAST += batch * L
    past = _past(END, L, S)
    # masked throughout: what a few queries do not all see is little, and memory is what they wait for
    begin, _, _, end = _key_blocks(0, past, FIRST, LAST, L, window, CAUSAL, BLOCK_M, BLOCK_N)
    first, last = _interval(i, past, FIRST, LAST, L, window, CAUSAL)
    share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), parts) * BLOCK_N
    begin += part * share

    at = Q + batch * stride_qb + i.to(tl.int64)[:, None] * stride_ql + head[:, None] * stride_qh + d[None, :]
    q = tl.load(at, mask=(i < L)[:, None] & (d < P)[None, :], other=0.0)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    m = tl.full([BLOCK_M], EMPTY, tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    acc, m, l = _attend(
        acc, m, l, q, K, V, begin, begin, begin, tl.minimum(begin + share, end), first, last, past + L, scale,
        stride_kl, stride_vl, P, PV, D, DV, BLOCK_N, True
    )  # fmt: skip

    l = tl.where(l == 0.0, 1.0, l)
    place = part * tl.num_programs(2) + batch
    row = place * (L * H) + i * H + head
    at = O + row[:, None] * PV + c[None, :]
    tl.store(at, (acc / l[:, None]).to(O.dtype.element_ty), mask=(i < L)[:, None] & (c < PV)[None, :])
    tl.store(LSE + place * (H * L) + head * L + i, m + tl.log2(l), mask=i < L)


@triton.jit
def _combine_kernel(
    PART_O, PART_LSE, O, LSE, PARTS: tl.constexpr, PADDED: tl.constexpr, PV: tl.constexpr, DV: tl.constexpr
):  # grid (L, H, B)
    i, L = tl.program_id(0), tl.num_programs(0)
    head, H = tl.program_id(1), tl.num_programs(1)
    batch, B = tl.program_id(2).to(tl.int64), tl.num_programs(2)
    part, c = tl.arange(0, PADDED), tl.arange(0, DV)
    row = (batch * L + i) * H + head
    lse_row = (batch * H + head) * L + i
    s = tl.load(PART_LSE + part * (B * H * L) + lse_row, mask=part < PARTS, other=HIDDEN)
    m = tl.max(s, 0)
    weight = tl.exp2(s - m)
    total = tl.sum(weight, 0)
    at = PART_O + (part.to(tl.int64) * (B * L * H) + row)[:, None] * PV + c[None, :]
    o = tl.load(at, mask=(part < PARTS)[:, None] & (c < PV)[None, :], other=0.0)
    o = tl.sum(o * (weight / total)[:, None], 0)
    tl.store(O + row * PV + c, o.to(O.dtype.element_ty), mask=c < PV)
    tl.store(LSE + lse_row, m + tl.log2(total))


@triton.jit
def _add_to_query_gradient(
    dq,
    q,
    do,
    lse,
    delta,
    K,
    V,
    begin,
    whole,
    whole_end,
    stop,
    first,
    last,
    end,
    scale,
    stride_kl,
    stride_vl,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds p (dp - delta) k, where dp = do v^T, over the ends of a run of keys or its whole part."""
    begin, stop, gap = _loop(begin, whole, whole_end, stop, MASKED)
    for j in range(begin, stop, BLOCK_N):
        n = _skip(j, whole, gap, MASKED)
        k = _load(K, n, end, stride_kl, BLOCK_N, P, D, MASKED)
        v = _load(V, n, end, stride_vl, BLOCK_N, PV, DV, MASKED)
        s = tl.dot(q, tl.trans(k), input_precision="ieee") * scale - lse[:, None]
        if MASKED:
            key = (n + tl.arange(0, BLOCK_N))[None, :]
            s = tl.where((key >= first[:, None]) & (key < last[:, None]), s, HIDDEN)
        dp = tl.dot(do, tl.trans(v), input_precision="ieee")
        ds = tl.exp2(s) * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit
def _query_gradient_kernel(
    Q,
    K,
    V,
    O,
    DO,
    LSE,
    DELTA,
    GRAD_Q,
    END,
    FIRST,
    LAST,
    L,
    S,
    window,
    scale,
    scale_log2,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (L / BLOCK_M, H, B); also writes delta = do . o of its queries, for the kernel of the keys
    i = (tl.num_programs(0) - 1 - tl.program_id(0)) * BLOCK_M
    head, H = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    Q += batch * stride_qb + head * stride_qh
    K += batch * stride_kb + head // GROUP * stride_kh
    V += batch * stride_vb + head // GROUP * stride_vh
    DO += batch * stride_dob + head * stride_doh
    if FIRST is not None:
        FIRST += batch * L
    if LAST is not None:
        LAST += batch * L
    past = _past(END, L, S)
    end = past + L
    begin, whole, whole_end, stop = _key_blocks(i, past, FIRST, LAST, L, window, CAUSAL, BLOCK_M, BLOCK_N)
    first, last = _interval(i + tl.arange(0, BLOCK_M), past, FIRST, LAST, L, window, CAUSAL)

    row = i + tl.arange(0, BLOCK_M)
    rows = (batch * H + head) * L + row
    do = _load(DO, i, L, stride_dol, BLOCK_M, PV, DV, True)
    o = _load(O + (batch * L * H + head) * PV, i, L, H * PV, BLOCK_M, PV, DV, True)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + rows, delta, mask=row < L)
    lse = tl.load(LSE + rows, mask=row < L, other=0.0)
    q = _load(Q, i, L, stride_ql, BLOCK_M, P, D, True)
    dq = tl.zeros([BLOCK_M, D], tl.float32)
    for MASKED in tl.static_range(2):
        dq = _add_to_query_gradient(
            dq, q, do, lse, delta, K, V, begin, whole, whole_end, stop, first, last, end, scale_log2,
            stride_kl, stride_vl, P, PV, D, DV, BLOCK_N, MASKED
        )  # fmt: skip
    _store(GRAD_Q + (batch * L * H + head) * P, dq * scale, i, L, H * P, BLOCK_M, P, D)


@triton.jit
def _query_blocks(n, past, FIRST, LAST, L, window, CAUSAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The run of queries that see keys n to n + BLOCK_N: where it begins, is whole, is whole no more, and ends.

    Exact but for documents, which may make it longer at its ends and not whole anywhere.
    """
    n -= past  # keys are counted from the first query too
    begin = n * 0
    whole = n * 0
    end = n * 0 + L
    whole_end = end
    if CAUSAL:
        begin = n
        whole = n + BLOCK_N - 1
    if window is not None:
        if not CAUSAL:
            begin = n - window + 1
            whole = n + BLOCK_N - window
        whole_end = tl.minimum(whole_end, n + window)
        end = tl.minimum(end, n + BLOCK_N - 1 + window)
    if LAST is not None:  # keys of the past count as the first query's document, at worst it is the next one
        whole_end = tl.minimum(whole_end, tl.load(LAST + tl.minimum(tl.maximum(n, 0), L - 1)))
        end = tl.minimum(end, tl.load(LAST + tl.minimum(tl.maximum(n + BLOCK_N - 1, 0), L - 1)))
    begin = tl.maximum(begin, 0) // BLOCK_M * BLOCK_M
    whole = tl.maximum(tl.cdiv(tl.maximum(whole, 0), BLOCK_M) * BLOCK_M, begin)
    whole_end = tl.maximum(tl.maximum(whole_end, 0) // BLOCK_M * BLOCK_M, whole)
    # neither end of a visible interval decreases, so if the outermost queries see every key then all between do
    _, last = _interval(whole, past, FIRST, LAST, L, window, CAUSAL)
    first, _ = _interval(tl.maximum(whole_end - 1, 0), past, FIRST, LAST, L, window, CAUSAL)
    whole_end = tl.where((first <= n + past) & (last >= n + past + BLOCK_N), whole_end, whole)
    return begin, whole, whole_end, end


@triton.jit
def _add_to_key_gradients(
    dk,
    dv,
    k,
    v,
    n,
    Q,
    DO,
    LSE,
    DELTA,
    begin,
    whole,
    whole_end,
    stop,
    past,
    FIRST,
    LAST,
    L,
    window,
    scale,
    stride_ql,
    stride_qh,
    stride_dol,
    stride_doh,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Adds p do to dv and p (dp - delta) q to dk, where p and dp = v do^T are (keys, queries) here."""
    begin, stop, gap = _loop(begin, whole, whole_end, stop, MASKED)
    steps = tl.cdiv(tl.maximum(stop - begin, 0), BLOCK_M)
    for j in range(steps * GROUP):
        head = j // steps if GROUP > 1 else 0  # one loop over heads and blocks takes fewer registers than two
        i = _skip(begin + (j - head * steps) * BLOCK_M, whole, gap, MASKED)
        head = tl.cast(head, tl.int64)
        q = _load(Q + head * stride_qh, i, L, stride_ql, BLOCK_M, P, D, MASKED)
        do = _load(DO + head * stride_doh, i, L, stride_dol, BLOCK_M, PV, DV, MASKED)
        row = i + tl.arange(0, BLOCK_M)
        at = head * L
        lse = tl.load(LSE + at + row, mask=row < L, other=0.0) if MASKED else tl.load(LSE + at + row)
        s = tl.dot(k, tl.trans(q), input_precision="ieee") * scale - lse[None, :]
        if MASKED:  # queries beyond L add nothing: their do and delta are zero
            key = (n + tl.arange(0, BLOCK_N))[:, None]
            first, last = _interval(row, past, FIRST, LAST, L, window, CAUSAL)
            visible = key < last[None, :]
            if (window is not None) or (FIRST is not None):
                visible &= key >= first[None, :]
            s = tl.where(visible, s, HIDDEN)
        p = tl.exp2(s)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision="ieee")
        dp = tl.dot(v, tl.trans(do), input_precision="ieee")
        # loaded as late as here because registers are short
        delta = tl.load(DELTA + at + row, mask=row < L, other=0.0) if MASKED else tl.load(DELTA + at + row)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _key_gradient_kernel(
    Q,
    K,
    V,
    DO,
    LSE,
    DELTA,
    GRAD_K,
    GRAD_V,
    END,
    FIRST,
    LAST,
    L,
    S,
    window,
    scale,
    scale_log2,
    stride_qb,
    stride_ql,
    stride_qh,
    stride_kb,
    stride_kl,
    stride_kh,
    stride_vb,
    stride_vl,
    stride_vh,
    stride_dob,
    stride_dol,
    stride_doh,
    GROUP: tl.constexpr,
    P: tl.constexpr,
    PV: tl.constexpr,
    D: tl.constexpr,
    DV: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # grid (S / BLOCK_N, H_kv, B), the first keys have the most queries
    n = tl.program_id(0) * BLOCK_N
    kv_head, n_kv_heads = tl.program_id(1).to(tl.int64), tl.num_programs(1)
    batch = tl.program_id(2).to(tl.int64)
    K += batch * stride_kb + kv_head * stride_kh
    V += batch * stride_vb + kv_head * stride_vh
    Q += batch * stride_qb + kv_head * GROUP * stride_qh
    DO += batch * stride_dob + kv_head * GROUP * stride_doh
    LSE += (batch * n_kv_heads + kv_head) * GROUP * L
    DELTA += (batch * n_kv_heads + kv_head) * GROUP * L
    if FIRST is not None:
        FIRST += batch * L
    if LAST is not None:
        LAST += batch * L
    past = _past(END, L, S)
    begin, whole, whole_end, stop = _query_blocks(n, past, FIRST, LAST, L, window, CAUSAL, BLOCK_M, BLOCK_N)

    k = _load(K, n, past + L, stride_kl, BLOCK_N, P, D, True)
    v = _load(V, n, past + L, stride_vl, BLOCK_N, PV, DV, True)
    dk = tl.zeros([BLOCK_N, D], tl.float32)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for MASKED in tl.static_range(2):
        dk, dv = _add_to_key_gradients(
            dk, dv, k, v, n, Q, DO, LSE, DELTA, begin, whole, whole_end, stop, past, FIRST, LAST, L, window, scale_log2,
            stride_ql, stride_qh, stride_dol, stride_doh, GROUP, P, PV, D, DV, CAUSAL, BLOCK_M, BLOCK_N, MASKED
        )  # fmt: skip

    out = batch * S * n_kv_heads + kv_head
    _store(GRAD_K + out * P, dk * scale, n, S, n_kv_heads * P, BLOCK_N, P, D)
    _store(GRAD_V + out * PV, dv, n, S, n_kv_heads * PV, BLOCK_N, PV, DV)
