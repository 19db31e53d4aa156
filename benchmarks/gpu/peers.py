"""Peers of our kernels on a GPU: PyTorch's own kernels, torch.compile, and the libraries that are installed.

Each peer gets the same numbers in the layout it likes best, made before the clock starts.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.dispatch import use_backend
from ...kernels.ops import OPS
from ..operations.race_cases import Case, Contestant, compiled, contestants

__all__ = ["PEERS", "Absent", "backend_of", "one_line", "racing"]


class Absent(Exception):
    """A peer that cannot take part. The message says why."""


def backend_of(op: str, wanted: str) -> str:
    """Returns the backend of an operation that is timed as ours: plain PyTorch where the wanted one is missing."""
    return wanted if wanted in OPS[op].backends else "torch"


def racing(case: Case, backend: str, *, with_peers: bool) -> dict[str, Contestant | str]:
    """Collects the contestants of a case: "ours", plain PyTorch as "torch", and the peers, or why one is missing.

    Args:
        case: operation and inputs.
        backend: wanted for ours.
        with_peers: whether others than our own backends take part.
    """
    basic, ours = contestants(case), backend_of(case.op, backend)
    found: dict[str, Contestant | str] = {"ours": _forced(ours, basic["ours"])}
    if ours != "torch":
        found["torch"] = basic["torch"]
    for name, make in PEERS.get(case.op, {}).items() if with_peers else ():
        try:
            found[name] = make(case)
        except Absent as reason:
            found[name] = str(reason)
        except ImportError as error:
            found[name] = f"not installed: {one_line(error)}"
        except Exception as error:  # a library may raise anything; it shall not take our own row with it
            found[name] = one_line(error)
    return found


def one_line(error: Exception) -> str:
    """An error as a reason in a row."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:200]}"


def _forced(backend: str, contestant: Contestant) -> Contestant:
    def run() -> Any:
        with use_backend(backend):
            return contestant.run()

    return Contestant(run=run, leaves=contestant.leaves)


def _sdpa(backend: SDPBackend, case: Case) -> Contestant:
    """scaled_dot_product_attention on one of its backends."""
    if "window" in case.inputs.options:
        raise Absent("has no window")
    q, k, v = (case.inputs.tensors[name] for name in "qkv")

    def run() -> Tensor:
        with sdpa_kernel([backend]):
            causal, gqa = q.shape[1] > 1, q.shape[2] != k.shape[2]
            o = F.scaled_dot_product_attention(
                q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=causal, enable_gqa=gqa
            )
            return o.transpose(1, 2)

    return Contestant(run=run, leaves=[q, k, v])


@functools.cache
def _compiled_flex_attention() -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention  # takes seconds to import

    return torch.compile(flex_attention, dynamic=False)


def _flex(case: Case) -> Contestant:
    """FlexAttention, compiled, where a window or shared keys keep others out."""
    from torch.nn.attention.flex_attention import create_block_mask

    q, k, v = (case.inputs.tensors[name] for name in "qkv")
    if q.shape[1] == 1 or ("window" not in case.inputs.options and q.shape[2] == k.shape[2]):
        raise Absent("only asked where there is a window or a group of heads shares keys")
    window = case.inputs.options.get("window", k.shape[1])

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (query - key < window)

    mask = create_block_mask(visible, None, None, q.shape[1], k.shape[1], device=q.device)

    def run() -> Tensor:
        heads_first = (t.transpose(1, 2) for t in (q, k, v))
        gqa = q.shape[2] != k.shape[2]
        return _compiled_flex_attention()(*heads_first, block_mask=mask, enable_gqa=gqa).transpose(1, 2)

    return Contestant(run=run, leaves=[q, k, v])


def _compiled(case: Case) -> Contestant:
    """Plain PyTorch under torch.compile."""
    found = compiled(case)
    if found is None:
        raise Absent("torch.compile does not look into it")
    return found


@functools.cache
def _compiled_loss() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    def loss(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight).float(), targets)

    return torch.compile(loss, dynamic=False)


def _loss(case: Case) -> Contestant:
    """All logits at once under torch.compile: the memory that a fused loss saves is this one's price."""
    x, weight, targets = (case.inputs.tensors[name] for name in ("x", "weight", "targets"))
    return Contestant(run=lambda: _compiled_loss()(x, weight, targets), leaves=[x, weight])


def _cudnn_lstm(case: Case) -> Contestant:
    return contestants(case)["peer"]


def _grouped_mm(case: Case) -> Contestant:
    """PyTorch's own grouped product, of 16-bit numbers."""
    if not hasattr(F, "grouped_mm"):
        raise Absent("this PyTorch has no grouped_mm")
    x, weight = case.inputs.tensors["x"], case.inputs.tensors["weight"]
    ends = case.inputs.tensors["counts"].cumsum(0).int()
    return Contestant(run=lambda: F.grouped_mm(x, weight.mT, offs=ends), leaves=[x, weight])


def _copies(*tensors: Tensor) -> list[Tensor]:
    """Contiguous leaves of their own."""
    return [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in tensors]


def _fla(case: Case) -> Contestant:
    """flash-linear-attention's chunk_simple_gla: the recurrence alone, with steps and decays computed beforehand."""
    chunk_simple_gla = importlib.import_module("fla.ops.simple_gla").chunk_simple_gla
    t, H = case.inputs.tensors, case.inputs.tensors["x"].shape[2]
    with torch.no_grad():
        dt = F.softplus(t["dt"].float() + t["dt_bias"])
        q, k = (t[name].repeat_interleave(H // t[name].shape[2], dim=2) for name in "CB")
        v, g = (t["x"] * dt[..., None]).to(t["x"].dtype), dt * t["A"]
    q, k, v, g = _copies(q, k, v, g)
    return Contestant(run=lambda: chunk_simple_gla(q, k, v, g, scale=1.0, output_final_state=True), leaves=[q, k, v, g])


def _mamba_ssd(case: Case) -> Contestant:
    """mamba_ssm's Triton kernels of Mamba-2, in chunks of 256, as its own layer asks for."""
    scan = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    t = case.inputs.tensors
    x, dt, A, B, C, D, bias = inputs = [t[name] for name in ("x", "dt", "A", "B", "C", "D", "dt_bias")]
    chunk = min(256, x.shape[1])
    return Contestant(run=lambda: scan(x, dt, A, B, C, chunk, D=D, dt_bias=bias, dt_softplus=True), leaves=inputs)


def _mamba_scan(case: Case) -> Contestant:
    """mamba_ssm's CUDA kernel of Mamba, with channels before time, as it wants them."""
    scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
    u, delta, B, C, z = _copies(*(case.inputs.tensors[name].mT for name in ("u", "delta", "B", "C", "z")))
    A, D, bias = (case.inputs.tensors[name] for name in ("A", "D", "delta_bias"))
    return Contestant(
        run=lambda: scan(u, delta, A, B, C, D, z=z, delta_bias=bias, delta_softplus=True).mT,
        leaves=[u, delta, A, B, C, D, z, bias],
    )


def _causal_conv1d(case: Case) -> Contestant:
    """The causal-conv1d package, with channels last in memory."""
    conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    x, weight, bias = (case.inputs.tensors[name] for name in ("x", "weight", "bias"))
    return Contestant(run=lambda: conv(x.mT, weight, bias, activation="silu").mT, leaves=[x, weight, bias])


PEERS: Mapping[str, Mapping[str, Callable[[Case], Contestant]]] = {
    "selective_scan": {"mamba_ssm": _mamba_scan},
    "ssd": {"fla": _fla, "mamba_ssm": _mamba_ssd},
    "attention": {
        "flash": functools.partial(_sdpa, SDPBackend.FLASH_ATTENTION),
        "cudnn": functools.partial(_sdpa, SDPBackend.CUDNN_ATTENTION),
        "flex": _flex,
    },
    "causal_conv1d": {"compiled": _compiled, "causal_conv1d": _causal_conv1d},
    "rms_norm": {"compiled": _compiled},
    "gated_rms_norm": {"compiled": _compiled},
    "swiglu": {"compiled": _compiled},
    "rotary": {"compiled": _compiled},
    "linear_cross_entropy": {"compiled": _loss},
    "grouped_mm": {"F.grouped_mm": _grouped_mm},
    "lstm_scan": {"cuDNN LSTM": _cudnn_lstm},
}
"""Makers of the peers, by operation and name. A maker raises Absent or ImportError where it cannot."""
