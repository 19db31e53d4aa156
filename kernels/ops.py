"""Every operation of the project, each callable as an ordinary function: the only door of this folder.

Adding an operation: `<name>/reference.py` is its definition and judge, `<name>/torch_impl.py` runs on any device, and
one line here makes it an `Op`. tests/kernels compares every backend of every operation with the reference.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .attention import cpu as _attention_cpu
from .attention import reference as _attention
from .attention import torch_impl as _attention_torch
from .causal_conv1d import cpu as _causal_conv1d_cpu
from .causal_conv1d import reference as _causal_conv1d
from .causal_conv1d import torch_impl as _causal_conv1d_torch
from .dispatch import Op, triton_can_run
from .dplr import reference as _dplr
from .dplr import torch_impl as _dplr_torch
from .gated_delta_rule import reference as _gated_delta_rule
from .gated_delta_rule import torch_impl as _gated_delta_rule_torch
from .grouped_mm import reference as _grouped_mm
from .grouped_mm import torch_impl as _grouped_mm_torch
from .linear_cross_entropy import reference as _linear_cross_entropy
from .linear_cross_entropy import torch_impl as _linear_cross_entropy_torch
from .long_conv import reference as _long_conv
from .long_conv import torch_impl as _long_conv_torch
from .lstm_scan import cpu as _lstm_scan_cpu
from .lstm_scan import reference as _lstm_scan
from .lstm_scan import torch_impl as _lstm_scan_torch
from .rms_norm import cpu as _rms_norm_cpu
from .rms_norm import reference as _rms_norm
from .rms_norm import torch_impl as _rms_norm_torch
from .rotary import cpu as _rotary_cpu
from .rotary import reference as _rotary
from .rotary import torch_impl as _rotary_torch
from .selective_scan import cpu as _selective_scan_cpu
from .selective_scan import reference as _selective_scan
from .selective_scan import torch_impl as _selective_scan_torch
from .ssd import cpu as _ssd_cpu
from .ssd import reference as _ssd
from .ssd import torch_impl as _ssd_torch
from .state_update import reference as _state_update
from .state_update import torch_impl as _state_update_torch
from .swiglu import cpu as _swiglu_cpu
from .swiglu import reference as _swiglu
from .swiglu import torch_impl as _swiglu_torch


def _triton(name: str, folder: str | None = None) -> Callable[..., Any] | None:
    """The Triton implementation of an operation, imported only where it can run."""
    if not triton_can_run():
        return None
    return getattr(importlib.import_module(f".{folder or name}.triton_kernels", __package__), name)


attention = Op(
    _attention.attention,
    torch=_attention_torch.attention,
    cpu=_attention_cpu.attention,
    triton=_triton("attention"),
)
selective_scan = Op(
    _selective_scan.selective_scan,
    torch=_selective_scan_torch.selective_scan,
    cpu=_selective_scan_cpu.selective_scan,
    triton=_triton("selective_scan"),
)
ssd = Op(_ssd.ssd, torch=_ssd_torch.ssd, cpu=_ssd_cpu.ssd, triton=_triton("ssd"))
causal_conv1d = Op(
    _causal_conv1d.causal_conv1d,
    torch=_causal_conv1d_torch.causal_conv1d,
    cpu=_causal_conv1d_cpu.causal_conv1d,
    triton=_triton("causal_conv1d"),
)
gated_delta_rule = Op(_gated_delta_rule.gated_delta_rule, torch=_gated_delta_rule_torch.gated_delta_rule)
state_update = Op(_state_update.state_update, torch=_state_update_torch.state_update, triton=_triton("state_update"))
ssm_kernel = Op(_long_conv.ssm_kernel, torch=_long_conv_torch.ssm_kernel, triton=_triton("ssm_kernel", "long_conv"))
long_conv = Op(_long_conv.long_conv, torch=_long_conv_torch.long_conv, triton=_triton("long_conv"))
ssm_scan = Op(_long_conv.ssm_scan, torch=_long_conv_torch.ssm_scan, triton=_triton("ssm_scan", "long_conv"))
dplr_kernel = Op(_dplr.dplr_kernel, torch=_dplr_torch.dplr_kernel)
dplr_scan = Op(_dplr.dplr_scan, torch=_dplr_torch.dplr_scan)
lstm_scan = Op(
    _lstm_scan.lstm_scan,
    torch=_lstm_scan_torch.lstm_scan,
    cpu=_lstm_scan_cpu.lstm_scan,
    triton=_triton("lstm_scan"),
)
rms_norm = Op(
    _rms_norm.rms_norm, torch=_rms_norm_torch.rms_norm, cpu=_rms_norm_cpu.rms_norm, triton=_triton("rms_norm")
)
gated_rms_norm = Op(
    _rms_norm.gated_rms_norm,
    torch=_rms_norm_torch.gated_rms_norm,
    cpu=_rms_norm_cpu.gated_rms_norm,
    triton=_triton("gated_rms_norm", "rms_norm"),
)
rotary = Op(_rotary.rotary, torch=_rotary_torch.rotary, cpu=_rotary_cpu.rotary, triton=_triton("rotary"))
swiglu = Op(_swiglu.swiglu, torch=_swiglu_torch.swiglu, cpu=_swiglu_cpu.swiglu, triton=_triton("swiglu"))
linear_cross_entropy = Op(
    _linear_cross_entropy.linear_cross_entropy,
    torch=_linear_cross_entropy_torch.linear_cross_entropy,
    triton=_triton("linear_cross_entropy"),
)
grouped_mm = Op(_grouped_mm.grouped_mm, torch=_grouped_mm_torch.grouped_mm, triton=_triton("grouped_mm"))

OPS: dict[str, Op] = {name: op for name, op in globals().items() if isinstance(op, Op)}
"""All of the above by name."""

__all__ = [
    "OPS",
    "attention",
    "causal_conv1d",
    "dplr_kernel",
    "dplr_scan",
    "gated_delta_rule",
    "gated_rms_norm",
    "grouped_mm",
    "linear_cross_entropy",
    "long_conv",
    "lstm_scan",
    "rms_norm",
    "rotary",
    "selective_scan",
    "ssd",
    "ssm_kernel",
    "ssm_scan",
    "state_update",
    "swiglu",
]
