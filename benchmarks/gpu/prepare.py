"""Preparation before timing: kernels are compiled and checked on the GPU, many at a time, each in its own process.

A kernel that reads beyond its memory takes the GPU away from its process for good. Here it takes one job with it; what
it was to tell is then missing, and the run goes on. What is compiled stays in the caches of Triton and torch.compile on
disk, where the process that measures finds it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...kernels import ops
from ...kernels.compare import relative_error
from ...kernels.dispatch import KernelFallbackWarning
from ...train.runtime import signals_held
from ..harness.processes import Child, last_line, ready
from ..operations.checks import EXAMPLES, Check, checks_of, device_works, explained, finite
from ..operations.race_cases import one_pass
from .cases import Spec, build, specs_of
from .peers import backend_of, one_line, racing

__all__ = ["DTYPES", "Job", "carry_out", "free_memory", "jobs", "run_jobs", "send_rows"]

DTYPES = ("float32", "bfloat16", "float16")
REPEATS = 5
"""Runs that must agree in every bit."""
_LAST_WORDS = 1.0
"""Seconds after the deadline for reading what processes have sent before it."""
NEAR = 3e-2
"""Relative difference between our kernel and plain PyTorch that is allowed at standard sizes, in 16 bits."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work of one process."""

    op: str
    dtype: str | None
    """Dtype of the checks; None to try out everything that is to be timed."""
    device: str
    backend: str
    timed_dtype: str
    quick: bool
    with_peers: bool


def jobs(names: Sequence[str], **shared: Any) -> list[Job]:
    """All jobs of these operations; what they share is given once."""
    return [Job(op=name, dtype=dtype, **shared) for name in names for dtype in (None, *DTYPES)]


def carry_out(job: Job) -> Iterator[dict[str, Any]]:
    """Does a job here and now, and yields what it finds: rows of kind "check" and "ready"."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", KernelFallbackWarning)
        if job.dtype is None:
            for spec in specs_of(job.op, quick=job.quick):
                yield from _try_out(spec, job)
                if not device_works(job.device):
                    return  # what is left would fail for no fault of its own
        elif job.backend in ops.OPS[job.op].backends:
            # the doctor's examples fit into one block of most kernels
            examples = EXAMPLES[:1] if job.quick else (*EXAMPLES, *ops.OPS[job.op].cases.blocks)
            dtype = getattr(torch, job.dtype)
            for check in checks_of(
                job.op, job.backend, job.device, dtype, examples=examples, repeats=2 if job.quick else REPEATS
            ):
                yield _check_row(check)


def _check_row(check: Check, shape: str = "") -> dict[str, Any]:
    return {"kind": "check", **dataclasses.asdict(check), "shape": shape}


def _try_out(spec: Spec, job: Job) -> Iterator[dict[str, Any]]:
    """Runs every contestant of a spec once, and compares ours with plain PyTorch on what is to be timed."""
    device = torch.device(job.device)
    case = build(spec, device, getattr(torch, job.timed_dtype))
    contestants = racing(case, job.backend, with_peers=job.with_peers)
    for name in case.inputs.counts:
        results: dict[str, Sequence[Tensor]] = {}
        for who, contestant in contestants.items():
            if isinstance(contestant, str):
                continue
            error, is_ours = None, who in ("ours", "torch")
            try:
                result = one_pass(contestant, name != "fwd")()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if is_ours:
                    results[who] = [t for t in _several(result) if t is not None]
            except torch.OutOfMemoryError:
                continue  # others are at work on the same GPU: alone it may well fit
            except Exception as raised:  # whatever it is, the others go on
                error = raised
            finally:
                result = None
                free_memory()
            reason = None if error is None else one_line(error)
            yield {"kind": "ready", "op": spec.op, "shape": spec.shape, "pass": name, "who": who, "error": reason}
            if who == "ours" and error is not None:
                where = _where(job)
                yield _check_row(Check(**where, **explained(error)), f"{spec.shape}, {name}")
            if error is not None and not device_works(job.device):
                return
        if len(results) == 2:
            yield _check_row(_agreement(results["ours"], results["torch"], _where(job)), f"{spec.shape}, {name}")


def _where(job: Job) -> dict[str, Any]:
    dtype = job.dtype or job.timed_dtype
    return {"op": job.op, "backend": backend_of(job.op, job.backend), "device": job.device, "dtype": dtype}


def _several(result: Any) -> Sequence[Tensor]:
    return result if isinstance(result, tuple) else (result,)


def _agreement(ours: Sequence[Tensor], plain: Sequence[Tensor], where: dict[str, Any]) -> Check:
    errors = [relative_error(a, b) for a, b in zip(ours, plain, strict=True)]
    worst = max(range(len(errors)), key=lambda i: errors[i])
    is_ok = errors[worst] <= NEAR
    return Check(
        **where,
        outputs=finite(errors[worst]),
        allowed=NEAR,
        status="ok" if is_ok else "failed",
        reason=None if is_ok else f"number {worst} of the results differs from plain PyTorch's by {errors[worst]:.1e}",
    )


def free_memory() -> None:
    """Gives back what nobody holds any more on the GPU."""
    if torch.cuda.is_available():
        gc.collect()
        with contextlib.suppress(RuntimeError):  # of a GPU that is lost already
            torch.cuda.empty_cache()


def run_jobs(todo: Sequence[Job], *, parallel: int, folder: Path, deadline: float) -> Iterator[dict[str, Any]]:
    """Does the jobs in processes of their own and yields their rows as they come.

    A job that dies, or does not end in time, becomes a failed check or one that was left out.

    Args:
        todo: the jobs, in the order in which they begin.
        parallel: processes at a time; 0 does everything in this one.
        folder: gets a log for each process, which stays where one does not end well.
        deadline: a value of time.monotonic(); processes still at work then are killed.
    """
    if parallel == 0:
        for job in todo:
            if time.monotonic() > deadline:
                yield _not_done(job, "not checked", "no time left")
            else:
                yield from carry_out(job)
        return
    waiting = list(todo)
    running: dict[Child, tuple[Job, Path]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel and time.monotonic() < deadline:
                job = waiting.pop(0)
                log = folder / f"{job.op}-{job.dtype or 'timed'}.log"
                log.unlink(missing_ok=True)
                with signals_held():
                    running[Child(send_rows, job, log=log, preload=None)] = job, log
            talking = ready(list(running), timeout=deadline - time.monotonic())
            for child in talking:
                try:
                    yield child.receive(timeout=0)
                except EOFError:
                    job, log = running.pop(child)
                    if child.join() != 0:
                        yield _not_done(job, "failed", f"its process died: {last_line(log)}")
                    else:
                        log.unlink(missing_ok=True)
            if not talking or time.monotonic() > deadline + _LAST_WORDS:
                for job, _ in running.values():
                    yield _not_done(job, "not checked", "did not end in time")
                for job in waiting:
                    yield _not_done(job, "not checked", "no time left")
                return
    finally:
        for child in running:
            child.kill()


def _not_done(job: Job, status: str, reason: str) -> dict[str, Any]:
    return _check_row(
        Check(**_where(job), status=status, reason=reason), "" if job.dtype else "at the sizes that are timed"
    )


def send_rows(job: Job, parent: Connection) -> None:
    """The process of a job: sends its rows to the parent."""
    torch.set_num_threads(1)  # many are at work at a time
    code = 0
    try:
        for row in carry_out(job):
            parent.send(row)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # a GPU that is lost may hang the usual way out
