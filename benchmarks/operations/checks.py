"""Checks backends of operations against the definition: values and gradients, in every precision, on any device.

The judge is the reference in float64 on the same, rounded inputs. A backend may be off by twice what the reference
itself loses in that dtype, and a floor for sums taken in another order.
"""

from __future__ import annotations

import contextlib
import importlib.util
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import dispatch, ops
from ...kernels.cases import Example
from ...kernels.compare import cast, relative_error, values_and_gradients

__all__ = ["EXAMPLES", "FLOORS", "Check", "checks", "checks_of", "device_works", "explained", "finite"]

FLOORS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error that is always allowed, by dtype."""

# whole and partial vectors and blocks, with and without all that is optional, and one token as in decoding
EXAMPLES: tuple[Example, ...] = (
    {"L": 37, "E": 24, "N": 8, "optional": True},
    {"L": 64, "E": 16, "N": 8, "optional": False},
    {"L": 1, "E": 5, "N": 4, "optional": True},
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """Result of one check, a line of the table."""

    op: str
    backend: str
    device: str
    dtype: str
    outputs: float | None = None
    """Relative error of the output that comes nearest to what it is allowed."""
    gradients: float | None = None
    """Relative error of the gradient that comes nearest to what it is allowed."""
    allowed: float | None = None
    """Relative error that is allowed for the nearest of them all."""
    status: str
    """ok, failed, not supported, not here, not checked"""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Case:
    tensors: dict[str, Tensor]
    others: dict[str, Any]
    expected: dict[str, Tensor]
    allowed: dict[str, float]


def checks(names: Sequence[str]) -> Iterator[Check]:
    """Checks the operations of these names, one line after the other."""
    gpu_is_lost = False
    for name in names:
        cases = {dtype: _cases(name, dtype, EXAMPLES) for dtype in FLOORS}
        for backend in ops.OPS[name].backends[1:]:
            for device in _devices(backend):
                for dtype, of_dtype in cases.items():
                    if not of_dtype:
                        continue
                    where = _where(name, backend, device, dtype)
                    if gpu_is_lost and device == "cuda":
                        yield Check(**where, status="not checked", reason="an earlier failure left the GPU unusable")
                        continue
                    check = _check(where, of_dtype)
                    gpu_is_lost = gpu_is_lost or (check.status == "failed" and not device_works(device))
                    yield check
        if "triton" not in ops.OPS[name].backends and _has_triton(name):
            reason = "no GPU" if importlib.util.find_spec("triton") else "triton is not installed"
            yield Check(op=name, backend="triton", device="cuda", dtype="all", status="not here", reason=reason)


def checks_of(
    name: str, backend: str, device: str, dtype: torch.dtype, *, examples: Sequence[Example], repeats: int
) -> Iterator[Check]:
    """Checks one backend in one precision, example by example, with all that the operation allocates poisoned.

    Args:
        name: name of the operation.
        backend: backend of the operation.
        device: cpu or cuda.
        dtype: dtype of the floating inputs. An operation without such inputs is not checked.
        examples: each gives a line.
        repeats: runs, not poisoned, that must agree in every bit.
    """
    for sizes in examples:
        cases = _cases(name, dtype, [sizes])
        if cases:
            yield _check(_where(name, backend, device, dtype), cases, repeats=repeats, poison=True)


def _where(name: str, backend: str, device: str, dtype: torch.dtype) -> dict[str, Any]:
    return {"op": name, "backend": backend, "device": device, "dtype": str(dtype).removeprefix("torch.")}


def _devices(backend: str) -> list[str]:
    if backend == "cpu" or not torch.cuda.is_available():
        return ["cpu"]
    return ["cuda"] if backend == "triton" else ["cpu", "cuda"]


def _has_triton(name: str) -> bool:
    sources = Path(ops.__file__).parent.glob("*/triton_kernels.py")
    return any(f"\ndef {name}(" in path.read_text(encoding="utf-8") for path in sources)


def device_works(device: str) -> bool:
    """Whether a device still computes in this process: after an access beyond its memory, a GPU does not."""
    try:
        return bool((torch.ones(1, device=device) + 1).item() == 2)
    except RuntimeError:
        return False


def _cases(name: str, dtype: torch.dtype, examples: Sequence[Example]) -> list[_Case]:
    """The examples of an operation with what is expected and allowed; none where no input can have the dtype."""
    op, cases = ops.OPS[name], []
    for sizes in examples:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tensors = cast(ops.OPS[name].cases.example(**sizes), dtype)
        others = ops.OPS[name].cases.example_options(optional=sizes["optional"], L=sizes["L"])
        if dtype != torch.float32 and not any(t.dtype == dtype for t in tensors.values()):
            continue
        with dispatch.use_backend("reference"):
            expected = values_and_gradients(op, cast(tensors, torch.float64), **others)
            plain = values_and_gradients(op, tensors, **others)
        allowed = {k: 2 * relative_error(plain[k], expected[k]) + FLOORS[dtype] for k in expected}
        cases.append(_Case(tensors=tensors, others=others, expected=expected, allowed=allowed))
    return cases


def _check(where: Mapping[str, Any], cases: Sequence[_Case], *, repeats: int = 0, poison: bool = False) -> Check:
    found: list[tuple[float, float, str]] = []  # error, allowed, what
    op, device = ops.OPS[where["op"]], torch.device(where["device"])
    for case in cases:

        def run(case: _Case = case) -> dict[str, Tensor]:
            with dispatch.use_backend(where["backend"]):
                return values_and_gradients(_on(device, op), case.tensors, **case.others)

        try:
            with _poisoned_memory() if poison else contextlib.nullcontext():
                actual = run()
            changing = _changing(run, repeats)
        except Exception as error:  # whatever a broken backend raises is what is looked for
            return Check(**where, **explained(error))
        if changing:
            return Check(**where, status="failed", reason=f"{changing} is not the same in {repeats} runs")
        for key, value in case.expected.items():
            if actual[key].shape != value.shape:
                reason = f"{key} has shape {tuple(actual[key].shape)}, expected {tuple(value.shape)}"
                return Check(**where, status="failed", reason=reason)
            found.append((relative_error(actual[key], value), case.allowed[key], key))

    def nearest_to_its_limit(start: str) -> tuple[float, float, str]:
        return max((entry for entry in found if entry[2].startswith(start)), key=lambda entry: entry[0] / entry[1])

    error, allowed, what = nearest_to_its_limit("")
    is_ok = error <= allowed
    return Check(
        **where,
        outputs=finite(nearest_to_its_limit("output")[0]),
        gradients=finite(nearest_to_its_limit("gradient")[0]),
        allowed=allowed,
        status="ok" if is_ok else "failed",
        reason=None if is_ok else f"{what} is off by {error:.1e}, allowed {allowed:.1e}",
    )


@contextlib.contextmanager
def _poisoned_memory() -> Iterator[None]:
    """Fills what is allocated inside the block with NaN, integers with their largest value: PyTorch's own debug aid."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that an operation of PyTorch's is not deterministic
        warnings.simplefilter("error", dispatch.KernelFallbackWarning)
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _changing(run: Callable[[], dict[str, Tensor]], repeats: int) -> str | None:
    """Names the first tensor that differs in any bit between that many runs; None where none does."""
    if not repeats:
        return None
    first = run()
    for _ in range(repeats - 1):
        for key, value in run().items():
            if not torch.equal(_bits(value), _bits(first[key])):
                return key
    return None


def _bits(x: Tensor) -> Tensor:
    # a NaN differs from itself; that it is wrong the comparison with the reference finds
    return (torch.view_as_real(x) if x.is_complex() else x).nan_to_num()


def finite(error: float) -> float | None:
    """The error, or None where it is infinite, which JSON cannot hold."""
    return error if error < float("inf") else None


def explained(error: Exception) -> dict[str, Any]:
    """Status and reason of a Check whose backend raised: a refusal is not a failure."""
    line = (str(error).strip().partition("\n")[0] or type(error).__name__)[:200]
    if isinstance(error, dispatch.Unsupported) or "not implemented for" in line:
        return {"status": "not supported", "reason": line}
    return {"status": "failed", "reason": f"{type(error).__name__}: {line}"}


def _on(device: torch.device, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function computed on a device, for tensors on the CPU."""

    def call(**arguments: Any) -> Any:
        moved = {k: a.to(device) if isinstance(a, Tensor) else a for k, a in arguments.items()}
        out = function(**moved)
        return tuple(t.cpu() for t in out) if isinstance(out, tuple) else out.cpu()

    return call
