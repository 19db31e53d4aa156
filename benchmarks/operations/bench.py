"""`crossover bench kernels`: measures operations and models on the CPU, and says first where they are behind."""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ...archs import presets
from ...files import read_json_lines, write_text
from ...kernels import ops
from ...train.record import provenance
from ...train.runtime import keep_freed_memory
from ...train.verdict import apply_verdict
from ..harness.folder import append_jsonl, folder_for
from ..harness.progress import StatusLine
from .limits import CpuLimits, measure_limits
from .models import absent_rows, decoding_rows, profile_rows, training_rows
from .options import KernelsConfig
from .race import operation_rows
from .table import line_of, markdown, page, to_text

__all__ = ["bench_kernels"]


def bench_kernels(config: KernelsConfig, *, command: Sequence[str]) -> int:
    """Writes kernels.jsonl, kernels.md and, once all is measured or it is stopped, the page; returns the exit code.

    Each row is a line on standard error as it is measured.

    Raises:
        ValueError: if an operation or architecture does not exist, or the folder cannot be written.
    """
    names = ops.named(config.ops)
    for arch in config.archs:
        presets.find(arch)
    with folder_for(config.out, fresh=False) as logs, _threads_left_as_they_are():
        keep_freed_memory()
        verdict = apply_verdict()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        threads = torch.get_num_threads()
        where = {**provenance(torch.device("cpu"), command), "doctor": verdict, "against": _commit(config.against)}
        path = config.out / "kernels.jsonl"
        path.unlink(missing_ok=True)
        print(f"{where['cpu']}, {threads} threads, torch {where['torch']}", flush=True)
        try:
            with StatusLine() as status:
                for row in _rows(names, config, sorted({1, threads}), logs, status):
                    append_jsonl(path, {**row, "provenance": where})
                    status.show("")
                    status.say(line_of(row))
        finally:  # a run that is stopped leaves the page of what it has measured
            rows = read_json_lines(path) if path.exists() else []
            write_text(config.out / "kernels.md", markdown(rows, where, threads))
            print(f"\n{to_text(page(rows))}")
    print(f"\nThis page: {config.out / 'kernels.md'}")
    return 0


def _rows(
    names: Sequence[str], config: KernelsConfig, threads: Sequence[int], logs: Path, status: StatusLine
) -> Iterator[Mapping[str, Any]]:
    models = {"training": training_rows, "profiles": profile_rows, "decoding": decoding_rows}
    if "operations" in config.parts:
        limits: dict[int, CpuLimits] = {}
        for n in threads:
            torch.set_num_threads(n)
            limits[n] = measure_limits()
            yield {"kind": "limits", **dataclasses.asdict(limits[n])}
        yield from operation_rows(names, config, limits=limits, status=status)
    if not {"training", "decoding"}.isdisjoint(config.parts):
        yield from absent_rows(config)
    for part, rows in models.items():
        if part in config.parts:
            yield from rows(config, threads=threads, logs=logs, status=status)


def _commit(folder: Path | None) -> str | None:
    """The commit of another checkout, or its folder where git does not know it; None where there is no other."""
    if folder is None:
        return None
    try:
        words = ["git", "-C", str(folder), "rev-parse", "--show-toplevel", "HEAD"]
        found = subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return str(folder)
    return found[1] if Path(found[0]) == folder.resolve() else str(folder)


@contextlib.contextmanager
def _threads_left_as_they_are() -> Iterator[None]:
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
