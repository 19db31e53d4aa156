"""Checks every operation on this machine: each backend and dtype, values and gradients, against the definition.

What fails is switched off: training and measurements on this machine pass it over until the doctor finds it sound.
"""

from __future__ import annotations

import dataclasses
import itertools
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from ...files import write_json
from ...kernels import ops
from ...train.progress import duration
from ...train.record import cpu_model
from ...train.runtime import choose_precision
from ...train.verdict import identity, store_verdict, version
from .checks import Check, checks
from .decode_checks import DECODE, decode_checks
from .options import DoctorConfig

__all__ = ["Check", "checks", "doctor", "machine"]


def doctor(config: DoctorConfig) -> int:
    """Prints the machine and the table, stores what is to be switched off; returns 1 if anything failed, else 0.

    Raises:
        ValueError: if an operation does not exist, or the folder of --json.
    """
    names = ops.named(config.ops)
    if config.json is not None and not config.json.parent.is_dir():
        raise ValueError(f"{config.json.parent} is not a folder: give another --json")
    begin = time.monotonic()
    here = machine()
    for key, value in here.items():
        print(f"{key:<8}  {value}")
    print()
    lines, checked = checks(names), names
    if not config.ops:
        lines, checked = itertools.chain(lines, decode_checks()), (*names, DECODE)
    done = list(_printed(lines, checked))
    failures: dict[tuple[str, str], str] = {}
    for check in done:
        if check.status == "failed":
            failures.setdefault((check.op, check.backend), f"{check.dtype}: {check.reason}")
    if config.json is not None:
        rows = [dataclasses.asdict(check) for check in done]
        write_json(config.json, {"machine": here, "identity": identity(), "checks": rows})
    path = store_verdict(checked, failures)
    _print_summary(done, failures, path, time.monotonic() - begin)
    return 1 if failures else 0


def machine() -> dict[str, str]:
    """Describes in words the machine that the checks run on."""
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
    for check in done:
        counts[check.status] = counts.get(check.status, 0) + 1
    print(f"\n{', '.join(f'{n} {status}' for status, n in counts.items())} in {duration(seconds)}.")
    print("Errors are relative to the float64 reference, each of the tensor that comes nearest to what it is allowed.")
    if failures:
        print("Training and measurements on this machine pass over, until the doctor is run again:")
        for (op, backend), reason in failures.items():
            print(f"  {backend} of {op} ({reason})")
    print(f"Recorded in {path}")
