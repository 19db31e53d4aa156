"""Checks every operation on this machine: each backend and dtype, values and gradients, against the definition.

The judge is the reference in float64 on the same, rounded inputs. A backend may be off by twice what the reference
itself loses in that dtype, and a floor for sums taken in another order. What fails is switched off: training and
measurements on this machine pass it over until the doctor finds it sound.
"""

from __future__ import annotations

import dataclasses
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..archs.config import nearest
from ..kernels import dispatch, ops
from ..kernels.check import example, options, relative_error, to, values_and_gradients
from ..train.files import write_json
from ..train.health import identity, store_verdict, version
from ..train.progress import duration
from ..train.record import cpu_model
from ..train.runtime import choose_precision
from .config import DoctorConfig

__all__ = ["Check", "checks", "doctor", "machine"]

FLOORS = {torch.float32: 2e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
"""Relative error that is always allowed, by dtype."""

# whole and partial vectors and blocks, with and without all that is optional, and one token as in decoding
_EXAMPLES = (
    {"L": 37, "E": 24, "N": 8, "optional": True},
    {"L": 64, "E": 16, "N": 8, "optional": False},
    {"L": 1, "E": 5, "N": 4, "optional": True},
)


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    op: str
    backend: str
    device: str
    dtype: str
    outputs: float | None = None
    """Relative error of the output that comes nearest to what it is allowed."""
    gradients: float | None = None
    """The same of the gradients."""
    allowed: float | None = None
    """What the nearest of them all is allowed."""
    status: str
    """ok, failed, not supported, not here, not checked"""
    reason: str | None = None


@dataclass(frozen=True, kw_only=True)
class _Case:
    tensors: dict[str, Tensor]
    others: dict[str, Any]
    expected: dict[str, Tensor]
    allowed: dict[str, float]


def doctor(config: DoctorConfig) -> int:
    """Prints the machine and the table, stores what is to be switched off; returns 1 if anything failed, else 0.

    Raises:
        ValueError: if an operation does not exist, or the folder of --json.
    """
    names = config.ops or tuple(ops.OPS)
    for name in names:
        if name not in ops.OPS:
            raise ValueError(f"unknown operation {name!r}{nearest(name, ops.OPS)}")
    if config.json is not None and not config.json.parent.is_dir():
        raise ValueError(f"{config.json.parent} is not a folder: give another --json")
    begin = time.monotonic()
    here = machine()
    for key, value in here.items():
        print(f"{key:<8}  {value}")
    print()
    done = list(_printed(checks(names), names))
    failures: dict[tuple[str, str], str] = {}
    for one in done:
        if one.status == "failed":
            failures.setdefault((one.op, one.backend), f"{one.dtype}: {one.reason}")
    if config.json is not None:
        rows = [dataclasses.asdict(one) for one in done]
        write_json(config.json, {"machine": here, "identity": identity(), "checks": rows})
    path = store_verdict(names, failures)
    _print_summary(done, failures, path, time.monotonic() - begin)
    return 1 if failures else 0


def machine() -> dict[str, str]:
    """What the checks run on, in words."""
    has_gpu = torch.cuda.is_available()
    devices = [torch.device("cpu")] + [torch.device("cuda")] * has_gpu
    return {
        "CPU": f"{cpu_model()}, {torch.get_num_threads()} threads",
        "GPU": torch.cuda.get_device_name() if has_gpu else "none",
        "bfloat16": "; ".join(choose_precision("auto", device).reason for device in devices),
        "versions": ", ".join(
            [f"Python {platform.python_version()}"]
            + [f"{name} {version(name) or 'not installed'}" for name in ("torch", "triton", "numba")]
        ),
    }


def checks(names: Sequence[str]) -> Iterator[Check]:
    """Checks the operations of these names, one line after the other."""
    gpu_is_lost = False
    for name in names:
        cases = {dtype: _cases(name, dtype) for dtype in FLOORS}
        for backend in ops.OPS[name].backends[1:]:
            for device in _devices(backend):
                for dtype, of_dtype in cases.items():
                    if not of_dtype:
                        continue
                    where: dict[str, Any] = {"op": name, "backend": backend, "device": device, "dtype": _name(dtype)}
                    if gpu_is_lost and device == "cuda":
                        yield Check(**where, status="not checked", reason="an earlier failure left the GPU unusable")
                        continue
                    one = _check(where, of_dtype)
                    gpu_is_lost = gpu_is_lost or (one.status == "failed" and device == "cuda" and not _gpu_works())
                    yield one
        if "triton" not in ops.OPS[name].backends and _has_triton(name):
            reason = "no GPU" if version("triton") else "triton is not installed"
            yield Check(op=name, backend="triton", device="cuda", dtype="all", status="not here", reason=reason)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _devices(backend: str) -> list[str]:
    if backend == "cpu" or not torch.cuda.is_available():
        return ["cpu"]
    return ["cuda"] if backend == "triton" else ["cpu", "cuda"]


def _has_triton(name: str) -> bool:
    sources = Path(ops.__file__).parent.glob("*/triton_kernels.py")
    return any(f"\ndef {name}(" in path.read_text(encoding="utf-8") for path in sources)


def _gpu_works() -> bool:
    try:
        return bool((torch.ones(1, device="cuda") + 1).item() == 2)
    except RuntimeError:
        return False


def _cases(name: str, dtype: torch.dtype) -> list[_Case]:
    """The examples of an operation with what is expected and allowed; none where no input can have the dtype."""
    op, cases = ops.OPS[name], []
    for sizes in _EXAMPLES:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tensors = to(example(name, **sizes), dtype)
        others = options(name, optional=sizes["optional"], L=sizes["L"])
        if dtype != torch.float32 and not any(t.dtype == dtype for t in tensors.values()):
            continue
        with dispatch.use_backend("reference"):
            expected = values_and_gradients(op, to(tensors, torch.float64), **others)
            plain = values_and_gradients(op, tensors, **others)
        allowed = {k: 2 * relative_error(plain[k], expected[k]) + FLOORS[dtype] for k in expected}
        cases.append(_Case(tensors=tensors, others=others, expected=expected, allowed=allowed))
    return cases


def _check(where: Mapping[str, Any], cases: Sequence[_Case]) -> Check:
    found: list[tuple[float, float, str]] = []  # error, allowed, what
    op, device = ops.OPS[where["op"]], torch.device(where["device"])
    for case in cases:
        try:
            with dispatch.use_backend(where["backend"]):
                actual = values_and_gradients(_on(device, op), case.tensors, **case.others)
        except Exception as error:  # whatever a broken backend raises is what is looked for
            return Check(**where, **_explained(error))
        for key, value in case.expected.items():
            if actual[key].shape != value.shape:
                reason = f"{key} has shape {tuple(actual[key].shape)}, expected {tuple(value.shape)}"
                return Check(**where, status="failed", reason=reason)
            found.append((relative_error(actual[key], value), case.allowed[key], key))

    def nearest_to_its_limit(start: str) -> tuple[float, float, str]:
        return max((one for one in found if one[2].startswith(start)), key=lambda one: one[0] / one[1])

    error, allowed, what = nearest_to_its_limit("")
    is_ok = error <= allowed
    return Check(
        **where,
        outputs=_finite(nearest_to_its_limit("output")[0]),
        gradients=_finite(nearest_to_its_limit("gradient")[0]),
        allowed=allowed,
        status="ok" if is_ok else "failed",
        reason=None if is_ok else f"{what} is off by {error:.1e}, allowed {allowed:.1e}",
    )


def _finite(error: float) -> float | None:
    return error if error < float("inf") else None


def _explained(error: Exception) -> dict[str, Any]:
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


def _printed(rows: Iterator[Check], names: Sequence[str]) -> Iterator[Check]:
    """Prints each row before it goes on; the operation is named once."""
    width, before = max(len("operation"), *map(len, names)), ""
    form = f"{{:<{width}}}  {{:<12}}  {{:<8}}  {{:>8}}  {{:>9}}  {{:>8}}  {{}}"
    print(form.format("operation", "backend", "dtype", "outputs", "gradients", "allowed", "").rstrip())
    for row in rows:
        errors = ["-" if error is None else f"{error:.1e}" for error in (row.outputs, row.gradients, row.allowed)]
        backend = f"{row.backend} on GPU" if row.device == "cuda" and row.backend == "torch" else row.backend
        verdict = "FAILED" if row.status == "failed" else row.status
        verdict += f": {row.reason}" if row.reason else ""
        op = row.op if row.op != before else ""
        print(form.format(op, backend, row.dtype, *errors, verdict), flush=True)
        before = row.op
        yield row


def _print_summary(done: Sequence[Check], failures: Mapping[tuple[str, str], str], path: Path, seconds: float) -> None:
    counts: dict[str, int] = {}
    for one in done:
        counts[one.status] = counts.get(one.status, 0) + 1
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())} in {duration(seconds)}.")
    print("Errors are relative to the float64 reference, each of the tensor that comes nearest to what it is allowed.")
    if failures:
        print("Training and measurements on this machine pass over, until the doctor is run again:")
        for (op, backend), reason in failures.items():
            print(f"  {backend} of {op} ({reason})")
    print(f"Recorded in {path}")
