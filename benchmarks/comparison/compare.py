"""The main job: train every architecture at one budget, measure it against the context length, write the report."""

import contextlib
import dataclasses
import shlex
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import read_json, write_json
from ...train.config import DataConfig, ModelSpec, RunConfig, TrainConfig, plain
from ...train.plugins import explaining, words
from ...train.runtime import Interrupted, stop_signals
from ...train.score import BITS_PER_BYTE
from ...train.turns import TURN_SECONDS
from ..context.cell import read_cells
from ..context.cells import Failure, cell_tasks, measure_cells, reusable_cells
from ..context.jobs import ContextJob, context_jobs
from ..context.options import ContextConfig
from ..harness.folder import folder_for, nowhere
from ..harness.format import format_bytes
from ..harness.precision import decide_precision
from ..harness.processes import module_command
from ..harness.progress import Progress, Schedule
from ..harness.sizes import SizedArch, size_arch
from ..harness.tables import print_table
from ..report.results import baseline_among, load_run
from ..report.write import write_report
from .forecast import forecast, forecast_cells, print_forecast
from .options import CompareConfig
from .runs import arguments, check_resumable, is_done, share_threads, train_in_turns, train_runs, training_tasks
from .tuning import Search

if TYPE_CHECKING:
    from ...train.objective import Objective
    from ...train.runtime import Precision

__all__ = [
    "bench_context",
    "check_archs",
    "compare",
    "open_objective",
    "run_configs",
    "sizes_of",
    "steps_of",
    "with_lengths_of",
]

_WITHIN = 0.02
"""Share by which equal budgets may differ."""

_BUDGETS = {"tokens": "tokens", "flops": "FLOPs of training", "seconds": "seconds of training"}


def compare(config: CompareConfig, *, command: Sequence[str]) -> int:
    """Runs a comparison and returns the exit code: 0, 1 if a run did not finish, 130 or 143 if stopped.

    Raises:
        ValueError: before any work is done, if the configuration cannot be run.
    """
    check_archs(config)
    config = with_lengths_of(config)
    with nowhere() if config.dry_run else folder_for(config.out, fresh=config.fresh) as logs:
        objective = open_objective(config)
        sizes = sizes_of(config, objective)
        print_sizes(list(sizes.values()))
        widths = [sized.config.d_model for sized in sizes.values()]
        precision = decide_precision(config, widths, keep=not config.dry_run)
        config = dataclasses.replace(config, precision=precision.name)
        n_runs = len(config.archs) * len(config.seq_len) * config.seeds
        at_once, threads = share_threads(config.jobs, config.threads, device=config.device, n_runs=n_runs)
        runs = run_configs(config, sizes, longest=max(0, objective.data.n_tokens[1] - 1), threads=threads)
        search = None
        if config.tune_lr:
            search = Search(config, sizes, open_tuning(config), at_once=at_once, threads=threads)
            runs = [with_rate(run, search.rates) for run in runs]
        decided = [run for run in runs if search is None or run.model.preset in search.rates]
        check_resumable(decided, objective.data.digest)
        print_budgets(config, runs, sizes, at_once=at_once)
        provenance = _provenance(config, command)
        jobs = _context_jobs(config, list(sizes.values()), provenance)
        reusable_cells(config.out / "context.jsonl", jobs)
        if config.dry_run:
            path = config.out / "context.jsonl"
            print_forecast(forecast(runs, search, jobs, sizes, at_once=at_once, cells=path, logs=logs))
            return 0
        if search is None:
            print(_by_hand(runs[0]), flush=True)

        labels = {sized.arch: sized.label for sized in sizes.values()}
        record = _record(config, precision, labels, provenance)
        write_json(config.out / "compare.json", record)
        tasks = [*(search.tasks() if search else ()), *training_tasks(runs, sizes), *cell_tasks(jobs)]
        side_by_side = {"train": at_once, "timed train": len(config.archs)}
        schedule = Schedule(tasks, known=frozenset({"cell"}), at_once=side_by_side)
        progress = Progress(schedule)
        try:
            with stop_signals(at_once=True), progress:
                if search is not None:
                    rates = search.run(progress, logs=logs)
                    runs = [with_rate(run, rates) for run in runs]
                    check_resumable(runs, objective.data.digest)
                    record["tuning"] = search.record
                    write_json(config.out / "compare.json", record)
                    progress.say(_by_hand(runs[0]))
                train = train_in_turns if config.equal == "seconds" else train_runs
                record["failures"] = train(runs, progress, logs=logs, jobs=at_once)
                write_json(config.out / "compare.json", record)
                failed = measure_cells(jobs, config.out / "context.jsonl", progress, logs=logs)
        except Interrupted as stop:
            return _stopped(stop, config.out, command, progress)
        page = write_report(config.out)
        _print_spent(config, runs)
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
    check_archs(config)
    with nowhere() if config.dry_run else folder_for(config.out, fresh=config.fresh) as logs:
        sizes = [
            size_arch(arch, n_params=config.params, vocab_size=config.vocab_size, seq_len=config.context[0])
            for arch in config.archs
        ]
        widths = [sized.config.d_model for sized in sizes]
        precision = decide_precision(config, widths, keep=not config.dry_run)
        config = dataclasses.replace(config, precision=precision.name)
        provenance = _provenance(config, command)
        jobs = _context_jobs(config, sizes, provenance)
        reusable_cells(config.out / "context.jsonl", jobs)
        if config.dry_run:
            by_arch, path = {sized.arch: sized for sized in sizes}, config.out / "context.jsonl"
            print_forecast(forecast_cells(jobs, by_arch, n_params=config.params, cells=path, logs=logs))
            return 0
        labels = {sized.arch: sized.label for sized in sizes}
        record = _record(config, precision, labels, provenance)
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


def check_archs(config: CompareConfig | ContextConfig) -> None:
    """Raises ValueError, with the nearest valid name, if an architecture does not exist."""
    from ...archs.presets import find

    with explaining(config.out):
        for arch in config.archs:
            find(arch)


def with_lengths_of(config: CompareConfig) -> CompareConfig:
    """The same with the length that suits its objective, where that takes only one and none is given."""
    from ...train.objectives import OBJECTIVES

    objective = OBJECTIVES.get(config.objective.kind)
    if objective is None or objective.has_windows or config.seq_len != CompareConfig.seq_len:
        return config
    return dataclasses.replace(config, seq_len=(objective.seq_len,))


def open_objective(config: CompareConfig) -> "Objective[Any, Any]":
    """What all runs learn, with its data, which the runs then find prepared; prints what they are.

    Raises:
        ValueError: if the objective does not exist, or its data cannot be used.
    """
    with explaining(config.out):
        objective = _objective_at(config, config.seq_len[-1], config.data)
    data = objective.data
    if not objective.has_windows and (len(config.seq_len) > 1 or config.equal == "flops"):
        raise ValueError(
            f"--objective {config.objective.kind} has rows of their own lengths: several --seq-len and --equal flops "
            "are for objectives of running text, such as next_token"
        )
    held = (
        f"{data.n_documents:,} documents, {data.train_bytes / 1e6:.1f} MB to train on, {data.val_bytes / 1e6:.2f} MB "
        "held out"
    )
    print(f"Data: {data.name}, {data.made or held} (digest {data.digest[:12]}).")
    if objective.score == BITS_PER_BYTE:
        references = ", ".join(f"{name} {value:.2f}" for name, value in data.reference_bits_per_byte.items())
        print(f"Compressors on the held-out text, in bits per byte: {references}.")
    print(flush=True)
    return objective


def open_tuning(config: CompareConfig) -> "Objective[Any, Any]":
    """The same with the documents that learning rates are judged on held out, instead of those that are reported on.

    Raises:
        ValueError: if there are too few documents for a third split.
    """
    objective = _objective_at(config, config.seq_len[0], dataclasses.replace(config.data, held_out="tuning"))
    found = objective.data
    others = f"{found.n_val_documents:,} other documents ({found.val_bytes / 1e6:.2f} MB)"
    print(
        f"\nLearning rates are judged on {'other rows' if found.made else others}, from which no number of the report "
        "comes.",
        flush=True,
    )
    return objective


def _objective_at(config: CompareConfig, seq_len: int, data: DataConfig) -> "Objective[Any, Any]":
    from ...train.objectives import open_objective as open_of_run

    batch_size = config.tokens_per_step // seq_len
    train = TrainConfig(batch_size=batch_size, seq_len=seq_len, carry=config.carry, position_len=0)
    run = RunConfig(objective=config.objective, data=data, train=train)
    return open_of_run(run, progress=sys.stderr.isatty())


def with_rate(run: RunConfig, rates: Mapping[str, float]) -> RunConfig:
    """The run at the rate that was found for its architecture, where one was."""
    lr = rates.get(run.model.preset, run.optim.lr)
    return dataclasses.replace(run, optim=dataclasses.replace(run.optim, lr=lr))


def sizes_of(config: CompareConfig, objective: "Objective[Any, Any]") -> dict[str, SizedArch]:
    """The architectures at the size of a comparison, all of which can learn its objective.

    Raises:
        ValueError: if one cannot, or has no legal size.
    """
    from ...train.carry import check_carry

    vocab_size = objective.data.tokenizer.vocab_size
    sizes = {
        arch: size_arch(
            arch, n_params=config.params, vocab_size=vocab_size, seq_len=config.seq_len[0], others=config.seq_len[1:]
        )
        for arch in config.archs
    }
    for sized in sizes.values():
        try:
            objective.check(sized.config)
            check_carry(objective, sized.config)
        except ValueError as error:
            raise ValueError(f"{sized.label}: {error}; or leave {sized.arch} out of --archs") from None
    return sizes


def run_configs(
    config: CompareConfig, sizes: Mapping[str, SizedArch], *, longest: int, threads: int | None = None
) -> list[RunConfig]:
    """The training runs of a comparison, seed by seed, so that an unfinished one has every architecture once.

    With several trained lengths, length by length within a seed.

    `longest` is the longest window that the held-out text has; loss by position stays within it.

    Raises:
        ValueError: if the position length asked for is longer, or the steps are too few for an equal budget.
    """
    if config.position_len is not None and config.position_len > longest:
        raise ValueError(f"--position-len {config.position_len} is more than the {longest} tokens of held-out text")
    position_len = config.position_len or min(longest, max(4 * config.seq_len[0], 2 * config.seq_len[-1]))
    steps = steps_of(config, sizes)
    archs = config.archs[::-1]  # the baseline, mostly the quickest, then fills the gap beside the last of the slow ones
    return [
        RunConfig(
            name=(name := f"{arch}{f'-l{length}' if len(config.seq_len) > 1 else ''}-s{seed}"),
            seed=seed,
            out=config.out,
            model=ModelSpec(preset=arch, n_params=config.params, set=sizes[arch].options),
            objective=config.objective,
            data=config.data,
            optim=dataclasses.replace(config.optim, lr=config.optim.lr or sizes[arch].lr),
            train=TrainConfig(
                **_duration(config, steps[arch, length]),
                batch_size=config.tokens_per_step // length,
                seq_len=length,
                carry=config.carry,
                precision=config.precision,
                eval_tokens=config.eval_tokens,
                final_eval_tokens=8 * config.eval_tokens,
                position_len=position_len,
                lengths=config.seq_len if len(config.seq_len) > 1 else (),
                length_tokens=config.length_tokens,
                device=config.device,
                threads=threads,
                tensorboard=config.out / "tb" / name,
            ),
        )
        for seed in range(config.seeds)
        for length in config.seq_len
        for arch in archs
    ]


def _duration(config: CompareConfig, steps: int) -> dict[str, Any]:
    """How long a run trains, and how often it is judged and saved, as options of TrainConfig."""
    if config.seconds is not None:
        return {"seconds": config.seconds}
    return {"steps": steps, "eval_every": max(1, steps // 5), "checkpoint_every": max(1, steps // 4)}


def steps_of(config: CompareConfig, sizes: Mapping[str, SizedArch]) -> dict[tuple[str, int], int]:
    """Optimizer steps of each architecture at each trained length, where these are known ahead.

    Raises:
        ValueError: if whole steps cannot spend the budget within 2 %.
    """
    kinds = [(arch, length) for arch in config.archs for length in config.seq_len]
    if config.equal != "flops":
        return dict.fromkeys(kinds, config.steps)
    baseline = config.baseline or baseline_among(config.archs)
    budget = sizes[baseline].flops_per_token * config.steps
    steps = {}
    for arch, length in kinds:
        exact = budget / sizes[arch].flops_at[length]
        steps[arch, length] = max(1, round(exact))
        if abs(steps[arch, length] / exact - 1) > _WITHIN:
            raise ValueError(
                f"the FLOPs of --steps {config.steps} of {baseline} are {exact:.1f} steps of {arch} at {length} "
                f"tokens, which whole steps miss by more than {_WITHIN:.0%}: give more --steps"
            )
    return steps


def print_budgets(
    config: CompareConfig, runs: Sequence[RunConfig], sizes: Mapping[str, SizedArch], *, at_once: int
) -> None:
    """Prints what each run is to spend, where that is not the same for all."""
    if len(config.seq_len) == 1 and config.equal == "tokens":
        return
    if config.equal == "seconds":
        print(
            f"\nEqual {_BUDGETS[config.equal]}: {config.seconds:g} for each run. The {len(config.archs)} models of a "
            f"seed and length take turns of {TURN_SECONDS:g} seconds, {at_once} at a time."
        )
        return
    print(f"\nEqual {_BUDGETS[config.equal]}:")
    rows = []
    for run in runs[: len(config.archs) * len(config.seq_len)]:
        sized, train = sizes[run.model.preset], run.train
        flops = sized.flops_at[train.seq_len] * train.n_tokens
        shape = (f"{train.batch_size} x {train.seq_len:,}", f"{train.steps:,}", f"{train.n_tokens:,}")
        rows.append((sized.label, *shape, f"{flops:.4g}"))
    print_table(("arch", "sequences", "steps", "tokens", "training FLOPs"), rows)


def _print_spent(config: CompareConfig, runs: Sequence[RunConfig]) -> None:
    """Prints what the finished runs have spent, where that is not the same for all: the mean over the seeds."""
    if len(config.seq_len) == 1 and config.equal == "tokens":
        return
    rows = []
    for length in config.seq_len:
        for arch in config.archs:
            same = (run for run in runs if run.model.preset == arch and run.train.seq_len == length)
            kind = [load_run(run.directory) for run in same if is_done(run)]
            if kind:
                spent = [[run.result[key] for run in kind] for key in ("tokens", "train_flops", "train_seconds")]
                tokens, flops, seconds = map(statistics.fmean, spent)
                rows.append((kind[0].info["label"], f"{length:,}", f"{tokens:,.0f}", f"{flops:.4g}", f"{seconds:,.1f}"))
    print(f"\nSpent, at equal {_BUDGETS[config.equal]}:")
    print_table(("arch", "trained at", "tokens", "training FLOPs", "training seconds"), rows)


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
        before=read_cells(config.out / "context.jsonl"),
        phases=config.phases,
        repeats=config.repeats,
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


def _by_hand(run: RunConfig) -> str:
    command = shlex.join(module_command("crossover.train", *words(), *arguments(run)))
    return f"\nEach run can be repeated by hand, for example:\n  {command}\n"


def _stopped(stop: Interrupted, out: Path, command: Sequence[str], progress: Progress) -> int:
    progress.say("")
    with contextlib.suppress(ValueError):  # nothing was finished: there is nothing to report yet
        print(f"Report of what exists: {write_report(out)}")
    print(f"Stopped. The same command goes on from here: {shlex.join(command)}")
    return stop.exit_code


def _print_headline(out: Path) -> None:
    print()
    for paragraph in read_json(out / "summary.json")["headline"]:
        print(paragraph)


def _print_failures(failed: Sequence[Failure]) -> None:
    for cell in failed:
        print(f"crossover: {cell.name}: failed: {cell.reason} (log: {cell.log})", file=sys.stderr)


def _record(
    config: CompareConfig | ContextConfig,
    precision: "Precision",
    labels: Mapping[str, str],
    provenance: Mapping[str, Any],
) -> dict[str, Any]:
    """What compare.json holds before anything has run."""
    return {
        "config": plain(config),
        "precision": vars(precision),
        "labels": labels,
        "provenance": provenance,
        "failures": {},
    }


def _provenance(config: CompareConfig | ContextConfig, command: Sequence[str]) -> dict[str, Any]:
    from ...train.record import provenance
    from ...train.runtime import choose_device

    return provenance(choose_device(config.device), command=command)
