"""What a training step spends its time on, by kind: the one place that says which kind an operator is of.

Names are those of PyTorch's profiler: its operators are `aten::NAME`, ours `crossover::NAME`, and nodes of the backward
pass are called like what they differentiate.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence

__all__ = ["KINDS", "WELL_SPENT", "kind_of", "shares", "shares_by_kind"]

PRODUCTS, ATTENTION, SCANS, LONG = "products", "attention", "scans", "long conv"
SHORT, NORMS, GATES, ARITHMETIC = "short conv", "norms", "gates", "arithmetic"
COPIES, OPTIMIZER, REST = "copies", "optimizer", "rest"

KINDS: tuple[str, ...] = (PRODUCTS, ATTENTION, SCANS, LONG, SHORT, NORMS, GATES, ARITHMETIC, COPIES, OPTIMIZER, REST)
"""All kinds, in the order of the table's columns."""
WELL_SPENT = frozenset({PRODUCTS, ATTENTION, SCANS, LONG})
"""What a model is made of; of all other kinds a step should have little."""

_TABLE = {
    PRODUCTS: """mm addmm grouped_mm_torch grouped_mm_torch_weight_gradient linear_cross_entropy _log_softmax
        nll_loss_forward""",
    ATTENTION: "attention_cpu rotary_cpu _Attention _scaled_dot_product_flash_attention_for_cpu",
    SCANS: "selective_scan_cpu ssd_cpu turned_heads_cpu gated_delta_rule_cpu lstm_scan_cpu",
    # only the kernels of S4, S4D and H3 multiply batches of matrices
    LONG: "_fft_r2c _fft_c2r bmm _Convolution",
    SHORT: "causal_conv1d_cpu",
    NORMS: "rms_norm_cpu native_layer_norm",
    GATES: "swiglu_cpu gelu_tanh_cpu gelu glu silu sigmoid softplus tanh relu _softmax threshold",
    ARITHMETIC: """add addcmul sub rsub mul div neg reciprocal sum mean cumsum exp log cos sin pow sqrt angle sgn abs
        clamp clamp_min clamp_max where eq ne lt gt le ge logical_not logical_and bitwise_and bitwise_not maximum""",
    COPIES: """copy cat stack fill zero zeros zeros_like ones ones_like full full_like new_zeros new_full clone
        contiguous constant_pad_nd flip roll repeat index index_select _index_put_impl index_put gather scatter
        index_add masked_fill _to_copy tril arange""",
    OPTIMIZER: "_fused_adamw linalg_vector_norm Optimizer.step#AdamW.step Optimizer.zero_grad#AdamW.zero_grad",
    REST: """step embedding embedding_dense sort topk cumprod bincount histc nonzero item _local_scalar_dense
        empty empty_like empty_strided new_empty new_empty_strided new_ones resize set detach lift_fresh
        as_strided view reshape _reshape_alias _unsafe_view expand expand_as permute transpose t mT movedim
        slice select narrow split split_with_sizes chunk unbind unsqueeze squeeze flatten unflatten unfold alias
        view_as view_as_real view_as_complex real imag complex conj _conj _neg_view resolve_conj resolve_neg
        is_nonzero to type_as result_type isfinite isnan all any max min argmax matmul linear fft_rfft fft_irfft
        layer_norm pad mH adjoint""",
}
"""Names without what stands before `::`, without the mark of the backward pass and of writing in place."""
_KINDS = {name: kind for kind, names in _TABLE.items() for name in names.split()}
_LONG_TAPS = {("h3", "causal_conv1d_cpu")}
"""What has many taps in one architecture: H3's shift state space model."""
_NODES = re.compile(r"autograd::engine::evaluate_function: .*|torch::autograd::.*|\w+Backward\d+")
"""Nodes of the backward pass that only call operators, and what the engine does around them."""
_OPERATOR = re.compile(
    r"(?:aten::|crossover::|GeneratedBackwardFor_crossover_)?(.+?)(?:_default)?(?:Backward|_backward)?"
)


def kind_of(arch: str, name: str) -> str | None:
    """The kind of an operator of an architecture by the profiler's name, or None where it is not in the table."""
    if _NODES.fullmatch(name):
        return REST
    match = _OPERATOR.fullmatch(name)
    assert match
    for plain in (match[1], match[1].removesuffix("_")):  # what ends in _ writes in place
        if plain in _KINDS:
            return LONG if (arch, plain) in _LONG_TAPS else _KINDS[plain]
    return None


def shares(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The share of each name in a step, by the median over some steps of its seconds; they sum to one."""
    names = {name for step in steps for name in step}
    medians = {name: statistics.median(step.get(name, 0.0) for step in steps) for name in names}
    total = sum(medians.values())
    return {name: seconds / total for name, seconds in sorted(medians.items(), key=lambda item: -item[1])}


def shares_by_kind(arch: str, by_name: Mapping[str, float]) -> dict[str, float]:
    """The share of each kind, those of `KINDS` first; a name that is not in the table is a kind of its own."""
    found: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    for name, share in by_name.items():
        kind = kind_of(arch, name) or name
        found[kind] = found.get(kind, 0.0) + share
    return found
