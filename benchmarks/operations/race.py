"""Operations and small models on the CPU, raced against plain PyTorch, torch.compile, the definition and Hugging Face.

The contestants of a row take turns in short repeats, and medians are compared: other work on the machine then slows
all of them alike. The selective scan is also held against its floor, the time its exponentials alone would take.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from ...files import read_json_lines, write_text
from ...kernels import ops
from ...kernels.dispatch import KernelFallbackWarning, record_backends
from ...train.record import provenance
from ...train.runtime import is_out_of_memory, keep_freed_memory
from ...train.verdict import apply_verdict
from ..harness.folder import append_jsonl, folder_for
from ..harness.format import number
from ..harness.progress import StatusLine
from ..harness.timing import take_turns, timed
from ..report.document import Block, Heading, Items, Paragraph, Table, to_markdown
from .exp_rate import seconds_per_exp
from .options import KernelsConfig
from .peers import model_rows
from .race_cases import Case, Compiler, Contestant, case_of, cases, compiled, contestants, one_pass

__all__ = ["bench_kernels"]

_CPU = torch.device("cpu")
_OTHERS = ("torch", "compiled", "definition", "peer")
_COLUMNS = ("operation", "size", "pass", "threads", "ours, ms", "backend", *_OTHERS, "exp floor")
_SHORT = 64
"""Tokens on which the definition is tried first."""
_MEANING = (
    "ours: the backend that is chosen by itself. The other columns say how many times longer others take: torch, plain "
    "PyTorch; compiled, torch.compile of it or, where it cannot look in, of a loop over some tokens, on one thread "
    "only; definition, the reference, mostly a loop over tokens that autograd differentiates; peer, PyTorch's own "
    "module, against which ours counts the projections that it does too. exp floor: our time as a multiple of what its "
    "exponentials alone would take. -: took no part."
)


def bench_kernels(config: KernelsConfig, *, command: Sequence[str]) -> int:
    """Prints a row as it is measured, writes kernels.jsonl and kernels.md; returns the exit code.

    Raises:
        ValueError: if an operation does not exist, or the folder cannot be written.
    """
    names = ops.named(config.ops)
    with folder_for(config.out, fresh=False) as logs, _threads_left_as_they_are(), StatusLine() as status:
        keep_freed_memory()
        verdict = apply_verdict()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        threads = torch.get_num_threads()
        where = {**provenance(torch.device("cpu"), command), "doctor": verdict}
        path = config.out / "kernels.jsonl"
        path.unlink(missing_ok=True)
        print(f"{where['cpu']}, {threads} threads, torch {where['torch']}")
        print(f"one thread takes {1e-9 / seconds_per_exp():.2f} G exponentials a second")
        print(f"{textwrap.fill(_MEANING, 120)}\n")
        try:
            print(_line(_COLUMNS), flush=True)
            for row in operation_rows(names, config, threads, status):
                append_jsonl(path, {**row, "provenance": where})
                status.show("")
                print(_line(_cells(row)), flush=True)
            if config.models:
                print()
                for row in model_rows(threads=threads, time_box=config.time_box, logs=logs):
                    append_jsonl(path, {**row, "provenance": where})
                    print(row["text"], flush=True)
        finally:  # a run that is stopped leaves the table of what it has measured
            rows = read_json_lines(path)
            write_text(config.out / "kernels.md", _document(rows, where, threads))
    print(f"\nTable: {config.out / 'kernels.md'}")
    return 0


@contextlib.contextmanager
def _threads_left_as_they_are() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def operation_rows(
    names: Sequence[str], config: KernelsConfig, threads: int, status: StatusLine
) -> Iterator[dict[str, Any]]:
    """Measures every operation: each size, forward alone and with backward, on one thread and on all.

    `status` shows on a terminal what is going on.
    """
    compiler = Compiler(config.compile_box)
    for name in names:
        for case in cases(name, config):
            racing = contestants(case)
            if config.compile_box and (contestant := compiled(case)):
                racing["compiled"] = contestant
            for backward in (False, True):
                for n in sorted({1, threads}):
                    torch.set_num_threads(n)
                    passes = "forward and backward" if backward else "forward"
                    status.show(f"{case.op} {case.shape}, {passes}, {n} threads ...")
                    yield _row(case, racing, config, compiler, backward=backward, threads=n)


def _row(
    case: Case,
    racing: Mapping[str, Contestant],
    config: KernelsConfig,
    compiler: Compiler,
    *,
    backward: bool,
    threads: int,
) -> dict[str, Any]:
    works = {name: one_pass(contestant, backward) for name, contestant in racing.items()}
    skipped: dict[str, str] = {}
    with warnings.catch_warnings(), record_backends() as used:
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("error", KernelFallbackWarning)  # never measure a slower path than the one named
        first = {"ours": timed(_CPU, works["ours"])}
    backend = ", ".join(used.get(case.op, ()))
    if backend == "torch":
        works.pop("torch")
    if reason := _too_slow(case, config, backward):
        skipped["definition"] = reason
        works.pop("definition")
    if threads > 1:  # for another number of threads all would be compiled once more
        works.pop("compiled", None)
    elif "compiled" in works and (reason := compiler.first_call(case, backward, works["compiled"])):
        skipped["compiled"] = reason
        works.pop("compiled")
    for name in [name for name in works if name != "ours"]:
        try:
            first[name] = timed(_CPU, works[name])
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            skipped[name] = "out of memory"
            works.pop(name)
            continue
    # one that would fill the box alone runs no second time
    slow = {name for name in works if name != "ours" and first[name] > config.time_box}
    racing_on = {name: functools.partial(timed, _CPU, works[name]) for name in works if name not in slow}
    seconds = take_turns(racing_on, seconds=config.time_box)
    seconds |= {name: [first[name]] for name in slow}
    medians = {name: statistics.median(turns) for name, turns in seconds.items()}
    floor = None
    if case.inputs.decays and threads == 1:
        # backward computes the states, and so the exponentials, a second time
        floor = case.inputs.decays * (2 if backward else 1) * seconds_per_exp()
    return {
        "op": case.op,
        "shape": case.shape,
        "length": case.length,
        "pass": "fwd+bwd" if backward else "fwd",
        "threads": threads,
        "dtype": "float32",
        "backend": backend,
        "seconds": medians,
        "fastest": {name: min(turns) for name, turns in seconds.items()},
        "repeats": {name: len(turns) for name, turns in seconds.items()},
        "ratios": {name: medians[name] / medians["ours"] for name in medians if name != "ours"},
        "skipped": skipped,
        "floor_seconds": floor,
        "times_floor": None if floor is None else medians["ours"] / floor,
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


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratios = [f"{row['ratios'][name]:.2f}x" if name in row["ratios"] else "-" for name in _OTHERS]
    floor = "-" if row["times_floor"] is None else f"{row['times_floor']:.1f}x"
    milliseconds = number(row["seconds"]["ours"] * 1e3)
    return [row["op"], row["shape"], row["pass"], str(row["threads"]), milliseconds, row["backend"], *ratios, floor]


_WIDTHS = (20, 24, 7, 7, 9, 9, 7, 8, 10, 7, 9)


def _line(cells: Sequence[str]) -> str:
    words = {0, 1, 2, 5}
    padded = (c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(cells, _WIDTHS, strict=True)))
    return " ".join(padded).rstrip()


def _document(rows: Sequence[Mapping[str, Any]], where: Mapping[str, Any], threads: int) -> str:
    measured = [row for row in rows if "op" in row]
    models = [row["text"] for row in rows if "model" in row]
    reasons = [
        f"{row['op']}, {row['shape']}, {row['pass']}, {row['threads']} threads: {name} {reason}"
        for row in measured
        for name, reason in row["skipped"].items()
    ]
    blocks: list[Block] = [Paragraph(text=_MEANING), Table(columns=_COLUMNS, rows=[_cells(row) for row in measured])]
    if models:
        blocks += [Heading(text="Training steps of whole models"), Items(items=models)]
    if reasons:
        blocks += [Heading(text="What took no part"), Items(items=reasons)]
    commit = f", commit {where['git_commit'][:12]}" if where["git_commit"] else ""
    subtitle = (
        f"{where['cpu']}, {threads} threads, torch {where['torch']}{commit}, {where['started']}: {where['command']}"
    )
    return to_markdown("Operations on the CPU", subtitle, blocks, "figures")
