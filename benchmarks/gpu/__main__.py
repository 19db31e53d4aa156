"""Checks every Triton kernel on the GPU at hand and times it against its floor and its peers, in one short run.

    make gpu                    in a plain checkout, with a Python that has PyTorch for CUDA
    make gpu GPU="--ops ssd"    or any other options; --help lists them

First the machine: how fast it copies, multiplies and takes exponentials. Then every kernel is compiled and checked, in
many processes at a time: in three precisions against the float64 definition, and at the sizes that are timed against
plain PyTorch. Then the clock: an operation a row, the most important first, beside the peers in the same process.

Writes gpu.jsonl, a line for each finding as it is made, and gpu.md. Needs nothing but PyTorch for CUDA and NumPy. Exit
codes: 0, 1 if a check or an operation of ours failed, 2 for a mistake.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...kernels import ops
from ...kernels.dispatch import KernelFallbackWarning
from ...train.runtime import Interrupted, stop_signals
from ..harness.limits import Limits
from ..harness.processes import module_command
from ..operations.race_cases import Case, Contestant, one_pass
from .cases import PASSES, Spec, build, in_order, specs_of
from .limits import Clock, CpuClock, CudaClock, machine, measure_limits
from .peers import backend_of, one_line, racing
from .prepare import free_memory, jobs, run_jobs
from .table import line_of, markdown

__all__ = ["Setup", "main", "run", "timed_rows"]

_PREPARING = 0.5
"""Part of the time that compiling and checking may take."""
_MOST_PROCESSES = 16


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Settings of a run."""

    names: Sequence[str]
    """Operations, in the order in which they are timed."""
    device: torch.device
    backend: str
    """Backend under test: triton, except in tests."""
    dtype: torch.dtype
    """Dtype of the activations that are timed."""
    clock: Clock
    seconds: float
    """Time for the whole run."""
    parallel: int
    """Processes that compile and check; 0 does it in this one."""
    quick: bool
    with_peers: bool
    out: Path


def main(words: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    asked = _parser().parse_args(words)
    try:
        setup = _setup(asked)
        setup.out.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"gpu: {error}", file=sys.stderr)
        return 2
    command = [*module_command("crossover.benchmarks.gpu"), *(sys.argv[1:] if words is None else words)]
    try:
        with stop_signals(at_once=True):  # a run that is stopped from outside writes its table too
            return run(setup, command=command)
    except Interrupted as stop:
        return stop.exit_code


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("results/gpu"), help="folder that gets gpu.jsonl and gpu.md")
    parser.add_argument("--seconds", type=float, default=540.0, help="time for everything (%(default)s)")
    parser.add_argument("--ops", nargs="+", default=(), metavar="OP", help="operations; all when not given")
    parser.add_argument("--quick", action="store_true", help="small sizes and few repeats, to try the command itself")
    parser.add_argument("--skip-peers", action="store_true", help="time our own backends alone")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="cpu tries the command without a GPU")
    parser.add_argument("--backend", default="triton", help="backend that is checked and timed (%(default)s)")
    parser.add_argument("--processes", type=int, help="that compile and check; 0 for none but this one")
    return parser


def _setup(asked: argparse.Namespace) -> Setup:
    names = in_order(ops.named(asked.ops))
    device, on_gpu = torch.device(asked.device), asked.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        raise ValueError(
            f"torch {torch.__version__} finds no NVIDIA GPU: run it where there is one, with PyTorch for CUDA "
            "(make gpu PY=python3), or try the command with --device cpu --quick"
        )
    if not asked.seconds > 0:
        raise ValueError(f"--seconds must be positive, got {asked.seconds}")
    box = 0.01 if asked.quick else 0.1
    parallel = min(_MOST_PROCESSES, os.cpu_count() or 1) if asked.processes is None else asked.processes
    return Setup(
        names=names,
        device=device,
        backend=asked.backend,
        dtype=torch.bfloat16 if on_gpu else torch.float32,
        clock=CudaClock(device, seconds=box) if on_gpu else CpuClock(seconds=box),
        seconds=asked.seconds,
        parallel=parallel,
        quick=asked.quick,
        with_peers=not asked.skip_peers,
        out=asked.out,
    )


def run(setup: Setup, *, command: Sequence[str]) -> int:
    """Measures everything, writes each finding as it is made and the table at the end; returns 0, or 1 for failures."""
    begin = time.monotonic()
    where = _provenance(setup.device, command)
    rows: list[dict[str, Any]] = []
    with (setup.out / "gpu.jsonl").open("w", encoding="utf-8") as file:

        def keep(row: Mapping[str, Any]) -> None:
            rows.append({**row, "provenance": where})
            file.write(json.dumps(rows[-1], allow_nan=False) + "\n")
            file.flush()
            print(line_of(row), flush=True)

        try:
            for row in _findings(setup, begin):
                keep(row)
        finally:  # a run that is stopped leaves the table of what it has found
            (setup.out / "gpu.md").write_text(markdown(rows, where, time.monotonic() - begin), encoding="utf-8")
    print(f"\nTable: {setup.out / 'gpu.md'}")
    return 1 if any(row.get("status") == "failed" for row in rows) else 0


def _findings(setup: Setup, begin: float) -> Iterator[dict[str, Any]]:
    """Yields every row of a run that began at `begin`, a value of time.monotonic()."""
    # what is tried out in one process is found by the next one: compiled kernels, and which of their variants is best
    for name, value in (("TRITON_CACHE_AUTOTUNING", "1"), ("TORCHINDUCTOR_COMPILE_THREADS", "1")):
        os.environ.setdefault(name, value)
    yield {"kind": "machine", **machine(setup.device)}
    limits, row = _limits(setup)
    yield row
    shared = {
        "device": setup.device.type,
        "backend": setup.backend,
        "timed_dtype": str(setup.dtype).removeprefix("torch."),
        "quick": setup.quick,
        "with_peers": setup.with_peers,
    }
    ready: dict[tuple[str, ...], str | None] = {}
    folder = setup.out / "processes"
    folder.mkdir(exist_ok=True)
    until = begin + _PREPARING * setup.seconds
    for row in run_jobs(jobs(setup.names, **shared), parallel=setup.parallel, folder=folder, deadline=until):
        if row["kind"] == "ready":
            ready[row["op"], row["shape"], row["pass"], row["who"]] = row["error"]
        else:
            yield row
    with contextlib.suppress(OSError):  # holds the logs of processes that did not end well
        folder.rmdir()
    yield from timed_rows(setup, limits, ready, deadline=begin + setup.seconds)
    yield {"kind": "machine", "when": "after the last row", **machine(setup.device)}  # hot, and as fast as it then is


def _limits(setup: Setup) -> tuple[Limits, dict[str, Any]]:
    try:
        limits = measure_limits(setup.device, setup.clock, quick=setup.quick)
    except Exception as error:  # without floors all the rest is still worth having
        return Limits(), {"kind": "limits", "status": "failed", "reason": one_line(error)}
    return limits, {"kind": "limits", "status": "ok", **vars(limits)}


def timed_rows(
    setup: Setup, limits: Limits, ready: Mapping[tuple[str, ...], str | None], *, deadline: float
) -> Iterator[dict[str, Any]]:
    """Times every operation, each size forward alone and with backward.

    Args:
        setup: what is timed and how.
        limits: measured limits of the machine, for the floors.
        ready: None for a contestant that has run before, or why it cannot, by operation, shape, pass and contestant.
        deadline: a value of time.monotonic(); what does not fit is listed as left out.
    """
    for name in setup.names:
        for spec in specs_of(name, quick=setup.quick):
            if time.monotonic() > deadline:
                yield _row(spec, setup, status="left out", reason="no time left")
                continue
            try:
                case = build(spec, setup.device, setup.dtype)
                contestants = racing(case, setup.backend, with_peers=setup.with_peers)
                for which in case.inputs.counts:
                    yield _timed_row(spec, setup, case, contestants, limits, ready, which, deadline)
            except Exception as error:  # out of memory, most likely: a row as any other
                yield _row(spec, setup, status="failed", reason=one_line(error))
            case = contestants = None
            free_memory()


def _row(spec: Spec, setup: Setup, **found: Any) -> dict[str, Any]:
    dtype = str(setup.dtype).removeprefix("torch.")
    return {"kind": "time", "op": spec.op, "shape": spec.shape, "dtype": dtype, **found}


def _timed_row(
    spec: Spec,
    setup: Setup,
    case: Case,
    contestants: Mapping[str, Contestant | str],
    limits: Limits,
    ready: Mapping[tuple[str, ...], str | None],
    which: str,
    deadline: float,
) -> dict[str, Any]:
    """Times ours and the peers, for one row. The row also says what went wrong with any of them."""

    def key(who: str) -> tuple[str, ...]:
        return spec.op, spec.shape, which, who

    row = _row(spec, setup, backend=backend_of(spec.op, setup.backend)) | {"pass": which}
    ours = contestants["ours"]
    assert isinstance(ours, Contestant)
    if reason := ready.get(key("ours")):
        return row | {"status": "failed", "reason": reason}
    work = one_pass(ours, which != PASSES[0])
    timing = _tried(lambda: setup.clock(work))
    if isinstance(timing, str):
        return row | {"status": "failed", "reason": timing}
    counts = case.inputs.counts[which]
    floor = limits.floor(counts)
    seconds = timing.ms / 1e3
    row |= {
        "status": "ok",
        "ms": timing.ms,
        "launch_ms": timing.launch_ms,
        "repeats": timing.repeats,
        "do_bench_ms": _do_bench(work) if setup.device.type == "cuda" else None,
        "bytes": counts.bytes,
        "flops": counts.flops,
        "exps": counts.exps,
        "tb_per_second": counts.bytes / seconds / 1e12,
        "tflop_per_second": counts.flops / seconds / 1e12,
        "floor_ms": floor[0] if floor else None,
        "floor_is": floor[1] if floor else None,
        "percent_of_floor": 100 * floor[0] / timing.ms if floor else None,
        "predicted_ms": spec.size.predicted.get(which),
    }
    peers: dict[str, dict[str, Any]] = {}
    for who, contestant in contestants.items():
        if who == "ours":
            continue
        reason = contestant if isinstance(contestant, str) else ready.get(key(who))
        if reason is None and ready and key(who) not in ready:
            reason = "was not ready in time"
        if reason is None and time.monotonic() > deadline:
            reason = "no time left"
        if reason is None:
            assert isinstance(contestant, Contestant)
            their_work = one_pass(contestant, which != PASSES[0])
            theirs = _tried(lambda work=their_work: setup.clock(work))
            if not isinstance(theirs, str):
                peers[who] = {"ms": theirs.ms, "launch_ms": theirs.launch_ms, "ratio": theirs.ms / timing.ms}
                continue
            reason = theirs
        peers[who] = {"absent": reason}
    return row | {"peers": peers}


def _tried(measure: Callable[[], Any]) -> Any:
    """Returns what `measure` gives, or in one line why it failed: out of memory, a compiler's error, anything."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", KernelFallbackWarning)  # never measure a slower path than the one named
            return measure()
    except Exception as error:
        reason = one_line(error)
    free_memory()  # outside, where the traceback keeps nothing alive any more
    return reason


def _do_bench(work: Callable[[], object]) -> float | None:
    """The number that triton.testing.do_bench gives, for comparison with what others publish."""
    found = _tried(lambda: importlib.import_module(".triton_kernels", __package__).do_bench_ms(work))
    return None if isinstance(found, str) else found


def _provenance(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    try:
        # here: its package needs tyro, which a machine may lack that has PyTorch and little else
        from ...train.record import provenance
    except ModuleNotFoundError as error:
        missing = f"{error.name} is not installed"
        return {"command": shlex.join(command), "torch": torch.__version__, "incomplete": missing}
    return provenance(device, command)


if __name__ == "__main__":
    sys.exit(main())
