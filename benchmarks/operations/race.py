"""Operations on the CPU, raced against plain PyTorch, torch.compile, the definition and PyTorch's own modules.

The contestants of a row take turns in short repeats, and medians are compared: other work on the machine then slows
all of them alike. Each row is also held against what its bytes, products or exponentials alone would take.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...kernels.dispatch import KernelFallbackWarning, record_backends
from ...train.runtime import is_out_of_memory
from ..harness.progress import StatusLine
from ..harness.timing import clock_of, take_turns, timed
from .limits import CpuLimits
from .options import KernelsConfig
from .race_cases import Case, Compiler, Contestant, case_of, cases, compiled, contestants, one_pass

__all__ = ["operation_rows"]

_CPU = torch.device("cpu")
_SHORT = 64
"""Tokens on which the definition is tried first."""


def operation_rows(
    names: Sequence[str], config: KernelsConfig, *, limits: Mapping[int, CpuLimits], status: StatusLine
) -> Iterator[dict[str, Any]]:
    """Measures every operation: each size, forward alone and with backward, on each number of threads.

    Args:
        names: of the operations.
        config: sizes and times.
        limits: what the processor does at most, by the number of threads.
        status: shows on a terminal what is going on.
    """
    compiler = Compiler(config.compile_box)
    for name in names:
        for case in cases(name, config):
            racing = contestants(case)
            if config.compile_box and (contestant := compiled(case)):
                racing["compiled"] = contestant
            for backward in (False, True):
                for n in limits:
                    torch.set_num_threads(n)
                    passes = "forward and backward" if backward else "forward"
                    status.show(f"{case.op} {case.shape}, {passes}, {n} threads ...")
                    yield _row(case, racing, config, compiler, limits[n], backward=backward)


def _row(
    case: Case,
    racing: Mapping[str, Contestant],
    config: KernelsConfig,
    compiler: Compiler,
    limits: CpuLimits,
    *,
    backward: bool,
) -> dict[str, Any]:
    clocked = functools.partial(timed, _CPU, clock=clock_of(limits.threads))
    works = {name: one_pass(contestant, backward) for name, contestant in racing.items()}
    skipped: dict[str, str] = {}
    with warnings.catch_warnings(), record_backends() as used:
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", KernelFallbackWarning)  # never measure a slower path than the one named
        first = {"ours": clocked(works["ours"])}
    backend = ", ".join(used.get(case.op, ()))
    if backend == "torch":
        works.pop("torch")
    if reason := _too_slow(case, config, backward):
        skipped["definition"] = reason
        works.pop("definition")
    if limits.threads > 1:  # for another number of threads all would be compiled once more
        works.pop("compiled", None)
    elif "compiled" in works and (reason := compiler.first_call(case, backward, works["compiled"])):
        skipped["compiled"] = reason
        works.pop("compiled")
    for name in [name for name in works if name != "ours"]:
        try:
            first[name] = clocked(works[name])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            skipped[name] = "out of memory"
            works.pop(name)
            continue
    # one that would fill the box alone runs no second time
    slow = {name for name in works if name != "ours" and first[name] > config.time_box}
    racing_on = {name: functools.partial(clocked, works[name]) for name in works if name not in slow}
    seconds = take_turns(racing_on, seconds=config.time_box)
    seconds |= {name: [first[name]] for name in slow}
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    counts, whole = case.inputs.counts, "fwd+bwd" if backward else "fwd"
    bound = limits.at(counts["fwd"].bytes).floor(counts[whole]) if whole in counts else None
    return {
        "kind": "operation",
        "op": case.op,
        "shape": case.shape,
        "length": case.length,
        "pass": whole,
        "threads": limits.threads,
        "clock": "cpu" if limits.threads == 1 else "wall",
        "dtype": "float32",
        "backend": backend,
        "seconds": medians,
        "fastest": {name: min(turns) for name, turns in seconds.items()},
        "repeats": {name: len(turns) for name, turns in seconds.items()},
        "ratios": {name: medians[name] / medians["ours"] for name in medians if name != "ours"},
        "skipped": skipped,
        "bound": None if bound is None else {"seconds": bound[0] / 1e3, "by": bound[1]},
        "times_bound": None if bound is None else medians["ours"] / bound[0] * 1e3,
    }


def _too_slow(case: Case, config: KernelsConfig, backward: bool) -> str | None:
    """Lets the definition near the whole length step by step; returns why not, or None.

    Its time may grow with the square of the length: the gradient of every slice of an input is as large as the input.
    """
    length = _SHORT
    while length < case.length:
        seconds = timed(_CPU, one_pass(contestants(case_of(case.op, length, config))["definition"], backward))
        if seconds * min(4, case.length / length) ** 2 > 2 * config.time_box:
            return f"too slow: {seconds:.2g} s at length {length}"
        length *= 4
    return None
