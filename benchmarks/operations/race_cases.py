"""What `crossover bench kernels` times: each operation at a standard CPU size, and who takes part in the race."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels import ops
from ...kernels.compare import example, options, to
from ...kernels.dispatch import use_backend

if TYPE_CHECKING:
    from ..config import KernelsConfig

__all__ = ["Case", "Compiler", "Contestant", "cases", "compiled", "contestants", "one_pass"]

_LENGTH = 1024
"""Tokens of all operations but the selective scan, which is timed at several lengths."""

_CHUNK = 16
"""Tokens of the loop that torch.compile unrolls: with half as many it trains much slower, with more it compiles for
minutes."""

# their plain PyTorch form is an opaque operator, into which torch.compile does not look
_OPAQUE = ("selective_scan", "lstm_scan", "linear_cross_entropy", "grouped_mm")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One operation at one size."""

    op: str
    length: int
    shape: str
    """The size as text."""
    tensors: dict[str, Tensor]
    others: dict[str, Any]
    n_exps: int | None = None
    """Exponentials that a forward pass cannot do without, where they decide."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """One way to compute a case."""

    run: Callable[[], Any]
    """Returns the outputs."""
    leaves: Sequence[Tensor]
    """What a backward pass gives the gradients of."""


def cases(name: str, config: KernelsConfig) -> list[Case]:
    """The cases of an operation."""
    longest = config.lengths[-1]
    lengths = config.lengths if name == "selective_scan" else (min(longest, _LENGTH),)
    return [case_at(name, length, config) for length in lengths]


def case_at(name: str, L: int, config: KernelsConfig) -> Case:
    """An operation at length L; for operations without one, L is the number of tokens."""
    torch.manual_seed(0)
    B, E = config.batch_size, config.channels
    N, H, P = 16, max(1, E // 64), min(64, E)
    n_exps = None
    others: dict[str, Any] = {}
    if name == "selective_scan":
        tensors = {
            "u": torch.randn(B, L, E),
            "delta": torch.randn(B, L, E) - 2,
            "A": -torch.arange(1.0, N + 1).repeat(E, 1),
            "B": torch.randn(B, L, N),
            "C": torch.randn(B, L, N),
            "D": torch.ones(E),
            "z": torch.randn(B, L, E),
            "delta_bias": torch.randn(E),
        }
        others, shape, n_exps = {"delta_softplus": True}, f"B={B} L={L} E={E} N={N}", B * L * E * N
    elif name == "ssd":
        tensors = {
            "x": torch.randn(B, L, H, P),
            "dt": torch.randn(B, L, H) - 2,
            "A": -torch.rand(H) * 15 - 1,
            "B": torch.randn(B, L, 1, P),
            "C": torch.randn(B, L, 1, P),
            "D": torch.ones(H),
            "dt_bias": torch.randn(H),
        }
        others, shape = {"dt_softplus": True}, f"B={B} L={L} H={H} P={P} N={P}"
    elif name == "attention":
        B = max(1, B // 4)
        tensors = {k: torch.randn(B, L, H, P) for k in "qkv"}
        shape = f"B={B} L={L} H={H} P={P}"
    elif name == "causal_conv1d":
        tensors = {"x": torch.randn(B, L, E), "weight": torch.randn(E, 4), "bias": torch.randn(E)}
        others, shape = {"activation": "silu"}, f"B={B} L={L} E={E} K=4"
    elif name == "ssm_kernel":
        tensors = {"A": _poles(E, 2 * N), "C": torch.randn(E, 2 * N, dtype=torch.complex64)}
        others, shape = {"length": L}, f"L={L} E={E} N={2 * N}"
    elif name == "long_conv":
        tensors = {"u": torch.randn(B, L, E), "kernel": torch.randn(E, L), "D": torch.ones(E)}
        shape = f"B={B} L={L} E={E}"
    elif name == "ssm_scan":
        tensors = {
            "u": torch.randn(B, L, E),
            "A": _poles(E, 2 * N),
            "C": torch.randn(E, 2 * N, dtype=torch.complex64),
            "D": torch.ones(E),
        }
        shape = f"B={B} L={L} E={E} N={2 * N}"
    elif name == "lstm_scan":
        E //= 2
        tensors = {
            "x": torch.randn(B, L, E),
            "input_weight": torch.randn(4 * E, E) * E**-0.5,
            "bias": torch.zeros(4 * E),
            "weight": torch.randn(4 * E, E) * E**-0.5,
        }
        shape = f"B={B} L={L} E={E}"
    elif name == "rms_norm":
        tensors, others = {"x": torch.randn(B, L, E), "weight": torch.ones(E)}, {"eps": 1e-5}
        shape = f"B={B} L={L} E={E}"
    elif name == "gated_rms_norm":
        tensors = {"x": torch.randn(B, L, E), "z": torch.randn(B, L, E), "weight": torch.ones(E)}
        others, shape = {"eps": 1e-5}, f"B={B} L={L} E={E}"
    elif name == "swiglu":
        tensors, shape = {"gate": torch.randn(B, L, E), "up": torch.randn(B, L, E)}, f"B={B} L={L} F={E}"
    elif name == "rotary":
        tensors = {"q": torch.randn(B, L, H, P), "k": torch.randn(B, L, H, P), "positions": torch.arange(L)}
        shape = f"B={B} L={L} H={H} P={P}"
    elif name == "linear_cross_entropy":
        T, D, V = 2 * L, E // 2, 16 * E
        weight = torch.randn(V, D) * D**-0.5
        tensors = {"x": torch.randn(T, D), "weight": weight, "targets": torch.randint(V, (T,))}
        shape = f"T={T} D={D} V={V}"
    elif name == "grouped_mm":
        tensors = {"x": torch.randn(L, E // 4), "weight": torch.randn(8, E // 2, E // 4)}
        tensors["counts"] = torch.bincount(torch.randint(8, (L,)), minlength=8)
        shape = f"T={L} D={E // 4} F={E // 2} G=8"
    else:
        sizes = {"B": B, "L": L, "E": E // 8, "N": N}
        tensors = to(example(name, **sizes, optional=False), torch.float32)
        others = options(name, optional=False, L=L)
        shape = " ".join(f"{k}={v}" for k, v in sizes.items())
    return Case(op=name, length=L, shape=shape, tensors=tensors, others=others, n_exps=n_exps)


def _poles(E: int, N: int) -> Tensor:
    return torch.complex(-torch.rand(E, N) * 0.1 - 1e-3, torch.randn(E, N))


def contestants(case: Case) -> dict[str, Contestant]:
    """What needs no compiler: "ours" (the backend that is chosen by itself), "torch", "definition", perhaps "peer"."""
    tensors = {k: t.requires_grad_() if t.is_floating_point() or t.is_complex() else t for k, t in case.tensors.items()}
    leaves = [t for t in tensors.values() if t.requires_grad]

    def ours() -> Any:
        if case.op != "lstm_scan":
            return ops.OPS[case.op](**tensors, **case.others)
        return ops.lstm_scan(F.linear(tensors["x"], tensors["input_weight"], tensors["bias"]), tensors["weight"])

    def forced(backend: str) -> Callable[[], Any]:
        def run() -> Any:
            with use_backend(backend):
                return ours()

        return run

    found = {"ours": ours, "torch": forced("torch"), "definition": forced("reference")}
    racing = {name: Contestant(run=run, leaves=leaves) for name, run in found.items()}
    if case.op == "lstm_scan":
        E, x = tensors["weight"].shape[1], tensors["x"]
        peer = nn.LSTM(E, E, batch_first=True, device=x.device, dtype=x.dtype)
        racing["peer"] = Contestant(run=lambda: peer(x), leaves=[x, *peer.parameters()])
    return racing


def one_pass(contestant: Contestant, backward: bool) -> Callable[[], Any]:
    """Forward alone as in inference, which returns the outputs, or with backward, which returns all gradients."""
    incoming: list[Tensor] = []

    def forward() -> Any:
        with torch.no_grad():
            return contestant.run()

    def both() -> Any:
        out = contestant.run()
        y: Tensor = out[0] if isinstance(out, tuple) else out
        if not incoming:  # once: it is no part of the work, and all contestants get the same
            generator = torch.Generator(y.device).manual_seed(1)
            incoming.append(torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device))
        return torch.autograd.grad(y, contestant.leaves, incoming[0], allow_unused=True)

    return both if backward else forward


class Compiler:
    """Hands out torch.compile as long as its seconds last."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._done: set[tuple[object, ...]] = set()

    def first_call(self, case: Case, backward: bool, work: Callable[[], object]) -> str | None:
        """Calls `work`, which compiles; returns None, or in one line why it cannot take part."""
        # the chunks of a longer scan are those of a shorter one
        what = (case.op, backward) if case.op == "selective_scan" else (case.op, backward, case.shape)
        if what in self._done:
            return None
        if self.seconds <= 0:
            return "no time left to compile (--compile-box)"
        begin = time.perf_counter()
        try:
            work()
        except RuntimeError as error:
            return f"does not compile: {(str(error).strip().splitlines() or [''])[0][:120]}"
        finally:
            self.seconds -= time.perf_counter() - begin
        self._done.add(what)
        return None


def compiled(case: Case) -> Contestant | None:
    """Plain PyTorch under torch.compile, for the selective scan a loop; None where that would change nothing."""
    tensors, others = case.tensors, case.others
    leaves = [t for t in tensors.values() if t.requires_grad]
    if case.op == "selective_scan":
        if case.length % _CHUNK:
            return None
        return Contestant(run=lambda: _compiled_loop(**tensors), leaves=leaves)
    if case.op in _OPAQUE:
        return None
    op = ops.OPS[case.op]
    function = torch.compile(lambda tensors: op(**tensors, **others), dynamic=False)

    def run() -> Any:
        with use_backend("torch"):
            return function(tensors)

    return Contestant(run=run, leaves=leaves)


def _compiled_loop(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, delta_bias: Tensor
) -> tuple[Tensor, Tensor]:
    """The selective scan as a loop over chunks, each compiled into one function of _CHUNK unrolled steps."""
    # a compiled function is of certain strides and of what needs a gradient: the same for every chunk and length
    h = u.new_zeros(u.shape[0], *A.shape).requires_grad_(torch.is_grad_enabled())
    ys = []
    for parts in zip(*(t.split(_CHUNK, dim=1) for t in (u, delta, B, C, z)), strict=True):
        y, h = _compiled_chunk()(h, A, D, delta_bias, *(part.contiguous() for part in parts))
        ys.append(y)
    return torch.cat(ys, dim=1), h


def _chunk(
    h: Tensor, A: Tensor, D: Tensor, delta_bias: Tensor, u: Tensor, delta: Tensor, B: Tensor, C: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    dt = F.softplus(delta + delta_bias)
    ys = []
    for t in range(_CHUNK):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[..., None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1))
    return (torch.stack(ys, dim=1) + D * u) * F.silu(z), h


@functools.cache
def _compiled_chunk() -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_chunk, dynamic=False)  # here, since its import takes seconds
