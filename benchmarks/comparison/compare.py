"""The main job: train every architecture at one budget, measure it against the context length, write the report."""

import contextlib
import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...train.config import DataConfig, ModelSpec, OptimConfig, RunConfig, TrainConfig
from ...train.files import write_json
from ...train.runtime import Interrupted, stop_signals
from ..config import CompareConfig, ContextConfig
from ..context.cells import Failure, cell_tasks, measure_cells, reusable_cells
from ..context.jobs import ContextJob, context_jobs
from ..harness.folder import folder_for
from ..harness.format import format_bytes
from ..harness.processes import module_command
from ..harness.progress import Progress, Schedule
from ..harness.sizes import SizedArch, size_arch
from ..report.write import write_report
from .runs import arguments, check_resumable, share_threads, train_runs, training_tasks

__all__ = ["bench_context", "check_archs", "compare", "open_corpus", "print_table", "run_configs"]


def compare(config: CompareConfig, *, command: Sequence[str]) -> int:
    """Runs a comparison and returns the exit code: 0, 1 if a run did not finish, 130 or 143 if stopped.

    Raises:
        ValueError: before any work is done, if the configuration cannot be run.
    """
    check_archs(config.archs)
    with folder_for(config.out, fresh=config.fresh) as logs:
        corpus = open_corpus(
            DataConfig(source=config.data, column=config.column, tokenizer=config.tokenizer), config.seq_len
        )
        sizes = {
            arch: size_arch(
                arch, n_params=config.params, vocab_size=corpus.tokenizer.vocab_size, seq_len=config.seq_len
            )
            for arch in config.archs
        }
        print_sizes(list(sizes.values()))
        n_runs = len(config.archs) * config.seeds
        at_once, threads = share_threads(config.jobs, config.threads, device=config.device, n_runs=n_runs)
        runs = run_configs(config, sizes, longest=len(corpus.val) - 1, threads=threads)
        check_resumable(runs, corpus.digest)
        provenance = _provenance(config, command)
        jobs = _context_jobs(config, list(sizes.values()), provenance)
        reusable_cells(config.out / "context.jsonl", jobs)
        print("\nEach run can be repeated by hand, for example:")
        print(f"  {shlex.join(module_command('crossover.train', *arguments(runs[0])))}\n", flush=True)

        labels = {sized.arch: sized.label for sized in sizes.values()}
        record = {"config": _plain(config), "labels": labels, "provenance": provenance, "failures": {}}
        write_json(config.out / "compare.json", record)
        tasks = [*training_tasks(runs, sizes), *cell_tasks(jobs)]
        schedule = Schedule(tasks, known=frozenset({"cell"}), at_once={"train": at_once})
        progress = Progress(schedule)
        try:
            with stop_signals(at_once=True), progress:
                record["failures"] = train_runs(runs, progress, logs=logs, jobs=at_once)
                write_json(config.out / "compare.json", record)
                failed = measure_cells(jobs, config.out / "context.jsonl", progress, logs=logs)
        except Interrupted as stop:
            return _stopped(stop, config.out, command, progress)
        page = write_report(config.out)
        _print_headline(config.out)
        print(f"\nReport: {page}")
        for name, reason in record["failures"].items():
            print(f"crossover: {name} did not finish: {reason} (log: {logs / name}.log)", file=sys.stderr)
        _print_failures(failed)
        return 1 if record["failures"] or failed else 0


def bench_context(config: ContextConfig, *, command: Sequence[str]) -> int:
    """Measures speed and memory against the context length alone; returns the exit code.

    Raises:
        ValueError: before any work is done, if the configuration cannot be run.
    """
    check_archs(config.archs)
    with folder_for(config.out, fresh=config.fresh) as logs:
        sizes = [
            size_arch(arch, n_params=config.params, vocab_size=config.vocab_size, seq_len=config.context[0])
            for arch in config.archs
        ]
        provenance = _provenance(config, command)
        jobs = _context_jobs(config, sizes, provenance)
        reusable_cells(config.out / "context.jsonl", jobs)
        labels = {sized.arch: sized.label for sized in sizes}
        record = {"config": _plain(config), "labels": labels, "provenance": provenance, "failures": {}}
        write_json(config.out / "compare.json", record)
        progress = Progress(Schedule(cell_tasks(jobs), known=frozenset({"cell"})))
        try:
            with stop_signals(at_once=True), progress:
                failed = measure_cells(jobs, config.out / "context.jsonl", progress, logs=logs)
        except Interrupted as stop:
            return _stopped(stop, config.out, command, progress)
        page = write_report(config.out)
        _print_headline(config.out)
        print(f"\nReport: {page}")
        _print_failures(failed)
        return 1 if failed else 0


def check_archs(archs: Sequence[str]) -> None:
    """Raises ValueError, with the nearest valid name, if an architecture does not exist."""
    from ...archs.presets import find

    for arch in archs:
        find(arch)


def open_corpus(data: DataConfig, seq_len: int) -> Any:
    """Loads the corpus, which the runs then find prepared, and prints what it is."""
    from ...train.data import check_lengths, load_corpus

    corpus = load_corpus(data, progress=sys.stderr.isatty())
    check_lengths(corpus, seq_len)
    references = ", ".join(f"{name} {value:.2f}" for name, value in corpus.reference_bits_per_byte.items())
    print(
        f"Data: {corpus.name}, {corpus.n_documents:,} documents, {corpus.train_bytes / 1e6:.1f} MB to train on, "
        f"{corpus.val_bytes / 1e6:.2f} MB held out (digest {corpus.digest[:12]})."
    )
    print(f"Compressors on the held-out text, in bits per byte: {references}.\n", flush=True)
    return corpus


def run_configs(
    config: CompareConfig, sizes: Mapping[str, SizedArch], *, longest: int, threads: int | None = None
) -> list[RunConfig]:
    """The training runs of a comparison, seed by seed, so that an unfinished one has every architecture once.

    `longest` is the longest window that the held-out text has; loss by position stays within it.

    Raises:
        ValueError: if the position length asked for is longer.
    """
    if config.position_len is not None and config.position_len > longest:
        raise ValueError(f"--position-len {config.position_len} is more than the {longest} tokens of held-out text")
    position_len = min(longest, 4 * config.seq_len) if config.position_len is None else config.position_len
    archs = config.archs[::-1]  # the baseline, mostly the quickest, then fills the gap beside the last of the slow ones
    return [
        RunConfig(
            name=f"{arch}-s{seed}",
            seed=seed,
            out=config.out,
            model=ModelSpec(preset=arch, n_params=config.params),
            data=DataConfig(source=config.data, column=config.column, tokenizer=config.tokenizer),
            optim=OptimConfig(lr=sizes[arch].lr),
            train=TrainConfig(
                steps=config.steps,
                batch_size=config.batch_size,
                seq_len=config.seq_len,
                precision=config.precision,
                eval_every=max(1, config.steps // 5),
                eval_tokens=config.eval_tokens,
                final_eval_tokens=8 * config.eval_tokens,
                position_len=position_len,
                checkpoint_every=max(1, config.steps // 4),
                device=config.device,
                threads=threads,
            ),
        )
        for seed in range(config.seeds)
        for arch in archs
    ]


def _context_jobs(
    config: CompareConfig | ContextConfig, sizes: Sequence[SizedArch], provenance: Mapping[str, Any]
) -> list[ContextJob]:
    return context_jobs(
        sizes,
        config.context,
        measure=config.measure,
        precision=config.precision,
        device=config.device,
        threads=config.threads,
        provenance=provenance,
    )


def print_sizes(sizes: Sequence[SizedArch]) -> None:
    """Prints what the same number of parameters means in each architecture."""
    print_table(
        ("arch", "d_model", "layers", "params", "active", "training FLOPs/token", "state", "lr"),
        [
            (
                sized.label,
                str(sized.config.d_model),
                str(sized.config.n_layers),
                f"{sized.n_params:,}",
                f"{sized.n_active_params:,}",
                f"{sized.flops_per_token:.3g}",
                format_bytes(sized.state_bytes),
                f"{sized.lr:g}",
            )
            for sized in sizes
        ],
    )


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column is words and whose others are numbers."""
    widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
    for row in [columns, *rows]:
        first, *others = (cell.ljust(widths[0]) if i == 0 else cell.rjust(widths[i]) for i, cell in enumerate(row))
        print("  ".join([first, *others]))
    sys.stdout.flush()


def _stopped(stop: Interrupted, out: Path, command: Sequence[str], progress: Progress) -> int:
    progress.say("")
    with contextlib.suppress(ValueError):  # nothing was finished: there is nothing to report yet
        print(f"Report of what exists: {write_report(out)}")
    print(f"Stopped. The same command goes on from here: {shlex.join(command)}")
    return stop.exit_code


def _print_headline(out: Path) -> None:
    print()
    for paragraph in json.loads((out / "summary.json").read_text())["headline"]:
        print(paragraph)


def _print_failures(failed: Sequence[Failure]) -> None:
    for cell in failed:
        print(f"crossover: {cell.name}: failed: {cell.reason} (log: {cell.log})", file=sys.stderr)


def _provenance(config: CompareConfig | ContextConfig, command: Sequence[str]) -> dict[str, Any]:
    from ...train.record import provenance
    from ...train.runtime import choose_device

    return provenance(choose_device(config.device), command=command)


def _plain(config: Any) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
