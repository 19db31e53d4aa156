"""Every operation of the project, each callable as an ordinary function: the only door of this folder.

Adding an operation: `<folder>/reference.py` is its definition and judge, `<folder>/torch_impl.py` runs on any device,
`<folder>/cases.py` says what it is checked and timed on, and one line here makes it an `Op`. tests/kernels compares
every backend of every operation with the reference. In all tables operations come in the order in which they are here,
the most important first.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import ParamSpec, TypeVar

from .attention.reference import attention as _attention
from .autocast import product_dtype as product_dtype
from .causal_conv1d.reference import causal_conv1d as _causal_conv1d
from .dispatch import Op, triton_can_run
from .dispatch import Unsupported as Unsupported
from .dispatch import forced_backend as forced_backend
from .dispatch import note as note
from .dispatch import switched_off as switched_off
from .dispatch import transform as transform
from .documents import isolated as isolated
from .dplr.reference import dplr_kernel as _dplr_kernel
from .dplr.reference import dplr_scan as _dplr_scan
from .gated_delta_rule.reference import gated_delta_rule as _gated_delta_rule
from .gelu_tanh.reference import gelu_tanh as _gelu_tanh
from .grouped_mm.reference import grouped_mm as _grouped_mm
from .linear_cross_entropy.reference import linear_cross_entropy as _linear_cross_entropy
from .long_conv.reference import long_conv as _long_conv
from .long_conv.reference import ssm_kernel as _ssm_kernel
from .long_conv.reference import ssm_scan as _ssm_scan
from .lstm_scan.reference import lstm_scan as _lstm_scan
from .rms_norm.reference import gated_rms_norm as _gated_rms_norm
from .rms_norm.reference import rms_norm as _rms_norm
from .rotary.reference import rotary as _rotary
from .selective_scan.reference import selective_scan as _selective_scan
from .ssd.reference import ssd as _ssd
from .state_update.reference import state_update as _state_update
from .step.program import Program as Program
from .swiglu.reference import swiglu as _swiglu
from .turned_heads.reference import turned_heads as _turned_heads

P = ParamSpec("P")
R = TypeVar("R")


def _op(reference: Callable[P, R]) -> Op[P, R]:
    """The operation of a reference, with the functions of its name in the other files of its folder.

    Triton's are imported only where they can run. tests/kernels holds all to the reference's signature.
    """
    folder, name = reference.__module__.rpartition(".")[0], reference.__name__

    def file(which: str) -> ModuleType | None:
        path = f"{folder}.{which}"
        return importlib.import_module(path) if importlib.util.find_spec(path) else None

    return Op(
        reference,
        torch=getattr(file("torch_impl"), name),
        cpu=getattr(file("cpu"), name, None),
        triton=getattr(file("triton_kernels"), name, None) if triton_can_run() else None,
        cases=getattr(file("cases"), name),
    )


selective_scan = _op(_selective_scan)
ssd = _op(_ssd)
attention = _op(_attention)
causal_conv1d = _op(_causal_conv1d)
rms_norm = _op(_rms_norm)
gated_rms_norm = _op(_gated_rms_norm)
gated_delta_rule = _op(_gated_delta_rule)
state_update = _op(_state_update)
ssm_kernel = _op(_ssm_kernel)
long_conv = _op(_long_conv)
ssm_scan = _op(_ssm_scan)
dplr_kernel = _op(_dplr_kernel)
dplr_scan = _op(_dplr_scan)
lstm_scan = _op(_lstm_scan)
rotary = _op(_rotary)
turned_heads = _op(_turned_heads)
swiglu = _op(_swiglu)
gelu_tanh = _op(_gelu_tanh)
linear_cross_entropy = _op(_linear_cross_entropy)
grouped_mm = _op(_grouped_mm)

OPS: dict[str, Op] = {name: op for name, op in globals().items() if isinstance(op, Op)}
"""Operations by name."""


def named(names: Sequence[str]) -> tuple[str, ...]:
    """Returns these names of operations, or all where none is given.

    Raises:
        ValueError: if one does not exist; the message has the most similar name, or all.
    """
    for name in names:
        if name not in OPS:
            match = difflib.get_close_matches(name, OPS, n=1)
            hint = f"did you mean {match[0]!r}?" if match else f"known are {', '.join(sorted(OPS))}"
            raise ValueError(f"unknown operation {name!r}; {hint}")
    return tuple(names or OPS)
