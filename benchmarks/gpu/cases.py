"""What `benchmarks.gpu` times: each operation at standard sizes, with what the computation cannot do without.

Bytes are counted the same way for all: forward reads every input and writes every output once; backward reads the
inputs and the gradient of the output and writes the gradients of the inputs. What a kernel saves for backward, or reads
twice, is its own choice and no part of a floor. Matrix products and exponentials are counted by each case.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.compare import example, options, to
from ..operations.race_cases import Case
from .limits import Counts

__all__ = ["IMPORTANCE", "PASSES", "QUICK", "STANDARD", "Spec", "Workload", "build", "in_order", "specs_of"]

PASSES = ("fwd", "fwd+bwd")

IMPORTANCE = ("selective_scan", "ssd", "attention", "causal_conv1d", "rms_norm", "gated_rms_norm")
"""Operations that are timed first; all others follow as ops.OPS has them."""


@dataclass(frozen=True, kw_only=True)
class Spec:
    """An operation at one size."""

    op: str
    sizes: Mapping[str, int]
    """What the operation's builder takes. Without a builder: what `kernels.compare.example` takes."""
    predicted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Milliseconds, least and most, by pass: what was expected of an H200 before anything had been measured."""

    @property
    def shape(self) -> str:
        """The size as text."""
        return " ".join(f"{name}={n}" for name, n in self.sizes.items())


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A spec with tensors on a device."""

    case: Case
    counts: Mapping[str, Counts]
    """By pass; an operation of inference alone has no second one."""


def _spec(op: str, predicted: Mapping[str, tuple[float, float]] | None = None, /, **sizes: int) -> Spec:
    return Spec(op=op, sizes=sizes, predicted=predicted or {})


def _matmul_rates(pairs: float, fwd: tuple[float, float], bwd: tuple[float, float]) -> dict[str, tuple[float, float]]:
    """Milliseconds of attention at 128 channels, B H = 64: from visible pairs of a head and TFLOP/s, worst and best."""
    forward = [4 * 64 * 128 * pairs / rate / 1e9 for rate in reversed(fwd)]
    both = [f + 2.5 * 4 * 64 * 128 * pairs / rate / 1e9 for f, rate in zip(forward, reversed(bwd), strict=True)]
    return {"fwd": (forward[0], forward[1]), "fwd+bwd": (both[0], both[1])}


def _attention_prediction(L: int) -> dict[str, tuple[float, float]]:
    return _matmul_rates(L * (L + 1) / 2, (450, 520), (300, 350))


STANDARD: tuple[Spec, ...] = (
    _spec("selective_scan", {"fwd": (0.20, 0.24), "fwd+bwd": (1.05, 1.19)}, B=8, L=2048, E=2048, N=16),
    _spec("selective_scan", B=8, L=4096, E=2048, N=16),
    _spec("selective_scan", B=1, L=2048, E=2048, N=16),
    _spec("ssd", {"fwd": (0.060, 0.080), "fwd+bwd": (0.25, 0.30)}, B=8, L=2048, H=32, P=64, G=1, N=128),
    _spec("ssd", B=8, L=4096, H=32, P=64, G=1, N=128),
    _spec("ssd", B=1, L=2048, H=32, P=64, G=1, N=128),
    _spec("attention", _attention_prediction(4096), B=4, L=4096, H=16, H_kv=16, P=128),
    _spec("attention", B=4, L=16384, H=16, H_kv=16, P=128, W=1024),
    _spec("attention", B=64, L=1, S=8192, H=16, H_kv=4, P=128),
    _spec("attention", B=4, L=8192, H=16, H_kv=4, P=128),
    _spec("attention", _attention_prediction(8192), B=4, L=8192, H=16, H_kv=16, P=128),
    _spec("attention", _attention_prediction(16384), B=4, L=16384, H=16, H_kv=16, P=128),
    _spec("attention", B=4, L=4096, H=16, H_kv=16, P=64),
    _spec("attention", B=4, L=8192, H=16, H_kv=16, P=64),
    _spec("attention", B=4, L=16384, H=16, H_kv=16, P=64),
    # of the next three at least 85 % of 4.3 TB/s, of the loss at least 90 % of 790 TFLOP/s
    _spec("causal_conv1d", {"fwd": (0.031, 0.037), "fwd+bwd": (0.078, 0.092)}, B=8, L=2048, E=2048, K=4),
    _spec("rms_norm", {"fwd": (0.031, 0.037), "fwd+bwd": (0.078, 0.092)}, T=16384, D=2048),
    _spec("gated_rms_norm", {"fwd": (0.047, 0.055), "fwd+bwd": (0.125, 0.147)}, T=16384, D=2048),
    _spec("swiglu", T=16384, F=5632),
    _spec("rotary", B=8, L=2048, H=16, P=128),
    _spec("linear_cross_entropy", {"fwd+bwd": (12.8, 14.2)}, T=16384, D=2048, V=50304),
    _spec("grouped_mm", T=32768, D=2048, F=4096, G=16),
    _spec("state_update", {"fwd": (0.031, 0.037)}, B=64, H=32, P=64, N=128),
    # two products in bf16 with three quarters of all pairs, at half of the peak, and both transpositions
    _spec("long_conv", {"fwd": (0.40, 0.60)}, B=8, L=2048, E=2048),
    _spec("ssm_kernel", E=2048, N=32, L=2048),
    _spec("ssm_scan", B=8, L=2048, E=2048, N=32),
    _spec("lstm_scan", B=64, L=512, E=1024),
)

QUICK: tuple[Spec, ...] = (
    _spec("selective_scan", B=1, L=32, E=32, N=16),
    _spec("ssd", B=1, L=32, H=2, P=16, G=1, N=16),
    _spec("attention", B=1, L=32, H=2, H_kv=2, P=16),
    _spec("attention", B=1, L=32, H=2, H_kv=1, P=16, W=8),
    _spec("attention", B=2, L=1, S=32, H=2, H_kv=1, P=16),
    _spec("causal_conv1d", B=1, L=32, E=32, K=4),
    _spec("rms_norm", T=32, D=32),
    _spec("gated_rms_norm", T=32, D=32),
    _spec("swiglu", T=32, F=48),
    _spec("rotary", B=2, L=16, H=2, P=16),
    _spec("linear_cross_entropy", T=32, D=32, V=64),
    _spec("grouped_mm", T=64, D=32, F=32, G=4),
    _spec("state_update", B=2, H=2, P=16, N=16),
    _spec("long_conv", B=1, L=32, E=32),
    _spec("ssm_kernel", E=32, N=4, L=32),
    _spec("ssm_scan", B=1, L=32, E=32, N=4),
    _spec("lstm_scan", B=2, L=16, E=32),
)

_GENERIC = {False: {"B": 8, "L": 2048, "E": 256, "N": 16}, True: {"B": 2, "L": 32, "E": 16, "N": 4}}
"""Sizes of an operation that has no spec, standard and quick."""


def in_order(names: Iterable[str]) -> list[str]:
    """Names of operations, the most important first."""
    order = [*IMPORTANCE, *ops.OPS]
    return sorted(set(names), key=order.index)


def specs_of(name: str, *, quick: bool) -> list[Spec]:
    """Everything that is timed of an operation, an operation of tomorrow included."""
    found = [spec for spec in (QUICK if quick else STANDARD) if spec.op == name]
    return found or [Spec(op=name, sizes=_GENERIC[quick])]


class Maker:
    """Makes random tensors on a device: activations in `dtype`, parameters in float32."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype

    def act(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def param(self, *shape: int) -> Tensor:
        """Standard normal, in float32."""
        return torch.randn(shape, device=self.device)

    def rising(self, n: int) -> Tensor:
        """1, 2, ... n in float32."""
        return torch.arange(1.0, n + 1, device=self.device)


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What a builder gives."""

    tensors: dict[str, Tensor]
    others: dict[str, Any] = field(default_factory=dict)
    written: int
    """Bytes of the outputs."""
    flops: tuple[float, float] = (0.0, 0.0)
    """Of forward and backward."""
    exps: tuple[float, float] = (0.0, 0.0)
    has_backward: bool = True


def build(spec: Spec, device: torch.device, dtype: torch.dtype) -> Workload:
    """The tensors and counts of a spec; on "meta" the counts alone."""
    make = Maker(device, dtype)
    if device.type != "meta":
        torch.manual_seed(0)
    builder = BUILDERS.get(spec.op)
    parts = builder(make, **spec.sizes) if builder else _generic(make, spec.op, **spec.sizes)
    case = Case(op=spec.op, length=spec.sizes.get("L", 1), shape=spec.shape, tensors=parts.tensors, others=parts.others)
    read = sum(t.nbytes for t in parts.tensors.values())
    differentiable = sum(t.nbytes for t in parts.tensors.values() if t.is_floating_point() or t.is_complex())
    forward = Counts(bytes=read + parts.written, flops=parts.flops[0], exps=parts.exps[0])
    backward = Counts(bytes=read + parts.written + differentiable, flops=parts.flops[1], exps=parts.exps[1])
    counts = {"fwd": forward} | ({"fwd+bwd": forward + backward} if parts.has_backward else {})
    return Workload(case=case, counts=counts)


def _selective_scan(make: Maker, *, B: int, L: int, E: int, N: int) -> Parts:
    u = make.act(B, L, E)
    tensors = {
        "u": u,
        "delta": make.act(B, L, E) - 2,
        "A": -make.rising(N).repeat(E, 1),
        "B": make.act(B, L, N),
        "C": make.act(B, L, N),
        "D": make.param(E),
        "z": make.act(B, L, E),
        "delta_bias": make.param(E),
    }
    # softplus and the gate take four more for each number forward, and their slopes five backward
    exps = (B * L * E * (N + 4.0), B * L * E * (N + 5.0))
    return Parts(tensors=tensors, others={"delta_softplus": True}, written=u.nbytes, exps=exps)


def _ssd(make: Maker, *, B: int, L: int, H: int, P: int, G: int, N: int) -> Parts:
    x, Q = make.act(B, L, H, P), min(64, L)
    tensors = {
        "x": x,
        "dt": make.act(B, L, H) - 2,
        "A": -make.rising(H) / H * 15,
        "B": make.act(B, L, G, N),
        "C": make.act(B, L, G, N),
        "D": make.param(H),
        "dt_bias": make.param(H),
    }
    # in chunks of Q tokens: products inside a chunk are Q wide, those with the state N by P
    flops = (B * L * H * (2.0 * Q * (N + P) + 4 * N * P), B * L * H * (2.0 * Q * (3 * N + 2 * P) + 10 * N * P))
    return Parts(tensors=tensors, others={"dt_softplus": True}, written=x.nbytes, flops=flops)


def _attention(
    make: Maker, *, B: int, L: int, H: int, H_kv: int, P: int, S: int | None = None, W: int | None = None
) -> Parts:
    S = S or L
    q = make.act(B, L, H, P)
    pairs = B * H * float(sum(min(S - L + t + 1, W or S) for t in range(L)))
    return Parts(
        tensors={"q": q, "k": make.act(B, S, H_kv, P), "v": make.act(B, S, H_kv, P)},
        others={"window": W} if W else {},
        written=q.nbytes,
        flops=(4 * P * pairs, 10 * P * pairs),
        exps=(pairs, pairs),
        has_backward=L > 1,
    )


def _causal_conv1d(make: Maker, *, B: int, L: int, E: int, K: int) -> Parts:
    x = make.act(B, L, E)
    tensors = {"x": x, "weight": make.act(E, K), "bias": make.act(E)}
    return Parts(tensors=tensors, others={"activation": "silu"}, written=x.nbytes)


def _rms_norm(make: Maker, *, T: int, D: int) -> Parts:
    x = make.act(T, D)
    return Parts(tensors={"x": x, "weight": make.param(D)}, others={"eps": 1e-5}, written=x.nbytes)


def _gated_rms_norm(make: Maker, *, T: int, D: int) -> Parts:
    x = make.act(T, D)
    tensors = {"x": x, "z": make.act(T, D), "weight": make.param(D)}
    return Parts(tensors=tensors, others={"eps": 1e-5}, written=x.nbytes)


def _swiglu(make: Maker, *, T: int, F: int) -> Parts:
    gate = make.act(T, F)
    return Parts(tensors={"gate": gate, "up": make.act(T, F)}, written=gate.nbytes)


def _rotary(make: Maker, *, B: int, L: int, H: int, P: int) -> Parts:
    q = make.act(B, L, H, P)
    tensors = {"q": q, "k": make.act(B, L, H, P), "positions": torch.arange(L, device=make.device)}
    return Parts(tensors=tensors, written=2 * q.nbytes)


def _linear_cross_entropy(make: Maker, *, T: int, D: int, V: int) -> Parts:
    tensors = {
        "x": make.act(T, D),
        "weight": make.act(V, D) * D**-0.5,
        "targets": torch.randint(V, (T,), device=make.device),
    }
    return Parts(tensors=tensors, written=0, flops=(2.0 * T * D * V, 4.0 * T * D * V), exps=(1.0 * T * V, 1.0 * T * V))


def _grouped_mm(make: Maker, *, T: int, D: int, F: int, G: int) -> Parts:
    # experts are never chosen equally often: from half to one and a half of the mean
    shares = [0.5 + g / max(1, G - 1) for g in range(G)]
    ends = [round(T * sum(shares[: g + 1]) / sum(shares)) for g in range(G)]
    counts = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)], device=make.device)
    tensors = {"x": make.act(T, D), "weight": make.act(G, F, D) * D**-0.5, "counts": counts}
    written = T * F * tensors["x"].element_size()
    return Parts(tensors=tensors, written=written, flops=(2.0 * T * D * F, 4.0 * T * D * F))


def _state_update(make: Maker, *, B: int, H: int, P: int, N: int) -> Parts:
    channels, state = H * P + 2 * N, make.param(B, H, P, N)
    tensors = {
        "x": make.act(B, channels),
        "dt": make.act(B, H) - 2,
        "window": make.act(B, 3, channels),
        "state": state,
        "weight": make.param(channels, 4),
        "bias": make.param(channels),
        "A": -make.rising(H) / H * 15,
        "D": make.param(H),
        "dt_bias": make.param(H),
    }
    return Parts(tensors=tensors, written=state.nbytes + tensors["window"].nbytes, has_backward=False)


def _long_conv(make: Maker, *, B: int, L: int, E: int) -> Parts:
    u = make.act(B, L, E)
    return Parts(tensors={"u": u, "kernel": make.param(E, L) / L, "D": make.param(E)}, written=u.nbytes)


def _ssm_kernel(make: Maker, *, E: int, N: int, L: int) -> Parts:
    return Parts(tensors=_poles(make, E, N), others={"length": L}, written=4 * E * L)


def _ssm_scan(make: Maker, *, B: int, L: int, E: int, N: int) -> Parts:
    u = make.act(B, L, E)
    return Parts(tensors={"u": u, **_poles(make, E, N), "D": make.param(E)}, written=u.nbytes)


def _poles(make: Maker, E: int, N: int) -> dict[str, Tensor]:
    A = torch.complex(-torch.rand(E, N, device=make.device) * 0.1 - 1e-3, make.param(E, N))
    return {"A": A, "C": torch.complex(make.param(E, N), make.param(E, N))}


def _lstm_scan(make: Maker, *, B: int, L: int, E: int) -> Parts:
    """With the projection of the input, which cuDNN's LSTM does too."""
    x = make.act(B, L, E)
    tensors = {
        "x": x,
        "input_weight": make.act(4 * E, E) * E**-0.5,
        "bias": make.act(4 * E),
        "weight": make.act(4 * E, E) * E**-0.5,
    }
    flops = 2.0 * 2 * B * L * 4 * E * E
    return Parts(tensors=tensors, written=x.nbytes, flops=(flops, 2 * flops), exps=(10.0 * B * L * E, 0.0))


def _generic(make: Maker, name: str, **sizes: int) -> Parts:
    tensors = to(example(name, **sizes, optional=False), make.dtype)
    moved = {k: t.to(make.device) for k, t in tensors.items()}
    return Parts(tensors=moved, others=options(name, optional=False, L=sizes["L"]), written=0)


Builder = Callable[..., Parts]
BUILDERS: Mapping[str, Builder] = {
    "selective_scan": _selective_scan,
    "ssd": _ssd,
    "attention": _attention,
    "causal_conv1d": _causal_conv1d,
    "rms_norm": _rms_norm,
    "gated_rms_norm": _gated_rms_norm,
    "swiglu": _swiglu,
    "rotary": _rotary,
    "linear_cross_entropy": _linear_cross_entropy,
    "grouped_mm": _grouped_mm,
    "state_update": _state_update,
    "long_conv": _long_conv,
    "ssm_kernel": _ssm_kernel,
    "ssm_scan": _ssm_scan,
    "lstm_scan": _lstm_scan,
}
"""Operations with sizes of their own; any other is built from its example."""
