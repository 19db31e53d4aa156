"""Reads the files of a comparison: run folders written by the trainer, context cells written by the benchmark."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from ...files import read_json, read_json_lines
from ...options import Length, Range, check_table
from ...train.score import BITS_PER_BYTE, Score
from ..context.cell import Cell, over_repeats, read_cells
from .crossovers import Crossover, Curve, Direction, Point, all_crossovers

__all__ = [
    "METRICS",
    "Check",
    "Comparison",
    "Metric",
    "Run",
    "baseline_among",
    "budget_checks",
    "crossovers_of",
    "curve",
    "load_comparison",
    "load_run",
    "mean_and_spread",
    "quality",
    "tokens_per_step",
]


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A measured quantity of a context cell whose crossovers are reported."""

    name: str
    phase: str
    key: str
    direction: Direction
    verbs: tuple[str, str]
    """Verb for one model and for several: "Mamba trains", "Mamba and Jamba train"."""
    better: str
    """Word for the better model: "faster"."""
    title: str
    """What the best model does: "Trains fastest"."""
    note: str
    """What is measured, in few words."""


METRICS = (
    Metric(
        name="training tokens/s",
        phase="train",
        key="tokens_per_second",
        direction="higher",
        verbs=("trains", "train"),
        better="faster",
        title="Trains fastest",
        note="tokens per second",
    ),
    Metric(
        name="prefill tokens/s",
        phase="prefill",
        key="tokens_per_second",
        direction="higher",
        verbs=("reads a prompt", "read a prompt"),
        better="faster",
        title="Reads a prompt fastest",
        note="tokens per second",
    ),
    Metric(
        name="decode tokens/s",
        phase="decode",
        key="tokens_per_second",
        direction="higher",
        verbs=("generates", "generate"),
        better="faster",
        title="Generates fastest",
        note="tokens per second, after a prompt of this length",
    ),
    Metric(
        name="decode tokens/s of many",
        phase="decode_many",
        key="tokens_per_second",
        direction="higher",
        verbs=("serves many at once", "serve many at once"),
        better="faster",
        title="Serves many fastest",
        note="tokens per second, as many sequences at once as fit",
    ),
    Metric(
        name="seconds to the first token",
        phase="first_token",
        key="seconds",
        direction="lower",
        verbs=("begins to answer", "begin to answer"),
        better="sooner",
        title="Begins to answer soonest",
        note="seconds to the first token, after a prompt of this length",
    ),
    Metric(
        name="tokens/s of a long prompt",
        phase="long_prompt",
        key="tokens_per_second",
        direction="higher",
        verbs=("serves a long prompt", "serve a long prompt"),
        better="faster",
        title="Serves long prompts fastest",
        note="tokens per second of a request: long prompt, short answer",
    ),
    Metric(
        name="tokens/s of a long answer",
        phase="long_answer",
        key="tokens_per_second",
        direction="higher",
        verbs=("serves a long answer", "serve a long answer"),
        better="faster",
        title="Serves long answers fastest",
        note="tokens per second of a request: short prompt, long answer",
    ),
    Metric(
        name="peak training memory",
        phase="train",
        key="peak_bytes",
        direction="lower",
        verbs=("trains", "train"),
        better="in less memory",
        title="Trains in least memory",
        note="peak",
    ),
    Metric(
        name="decoding state",
        phase="decode",
        key="state_bytes",
        direction="lower",
        verbs=("carries", "carry"),
        better="less state",
        title="Carries the smallest state",
        note="while decoding",
    ),
)


_NUMBER: Any = Annotated[float, Range(0)]
_COUNT: Any = Length

_INFO: dict[str, Any] = {
    "arch": str,
    "label": str,
    "seed": int,
    "n_params": _COUNT,
    "n_active_params": _COUNT,
    "flops_per_token": _NUMBER,
    "state_bytes": _NUMBER | None,
    "model": Mapping,
    "model.d_model": int | None,
    "model.n_layers": int | None,
    "config.data": Mapping,
    "config.data.packing": str | None,
    "config.optim": Mapping,
    "config.optim.lr": float | None,
    "config.optim.schedule": str | None,
    "config.optim.betas": list[float] | None,
    "config.optim.eps": _NUMBER | None,
    "config.optim.weight_decay": _NUMBER | None,
    "config.optim.clip": _NUMBER | None,
    "config.optim.warmup": _NUMBER | None,
    "config.optim.min_lr_ratio": _NUMBER | None,
    "config.train.batch_size": _COUNT,
    "config.train.seq_len": _COUNT,
    "config.train.eval_tokens": _COUNT,
    "config.train.final_eval_tokens": _COUNT,
    "corpus.name": str,
    "corpus.digest": str,
    "corpus.n_documents": int,
    "corpus.n_val_documents": int,
    "corpus.train_bytes": _NUMBER,
    "corpus.val_bytes": _NUMBER,
    "corpus.reference_bits_per_byte": dict[str, float],
    "corpus.tokenizer": Mapping[str, Any] | None,
    "corpus.tokenizer.name": str | None,
    "objective": Mapping[str, Any] | None,
    "stretches": list[dict[str, Any]] | None,
    "provenance": Mapping,
    "provenance.imports": list[str] | None,
    "provenance.plugins": list[str] | None,
}
"""What reports read of run.json."""

_RESULT: dict[str, Any] = {
    "error": str | None,
    "tokens": _COUNT | None,
    "steps": _COUNT | None,
    "train_seconds": _NUMBER | None,
    "val_bytes": _NUMBER | None,
    "sample": str | None,
    "backend": dict[str, list[str]] | None,
    "position_bits_per_byte": list[dict[str, Any]] | None,
    "by_length": list[dict[str, Any]] | None,
    "context_cut": list[dict[str, Any]] | None,
    "accuracy_by_length": list[dict[str, Any]] | None,
}
"""What they read of result.json."""

_DONE: dict[str, Any] = {"tokens": _COUNT, "steps": _COUNT, "train_seconds": _NUMBER}

_SPAN: dict[str, Any] = {"start": _NUMBER, "stop": _COUNT, "bits_per_byte": float | None}

_READ: dict[str, Any] = {"context_len": _COUNT, "bits_per_byte": float | None, "status": str | None}

_ANSWERED: dict[str, Any] = {"context_len": _COUNT, "accuracy": float | None, "floor": _NUMBER, "status": str | None}

_VALIDATION: dict[str, Any] = {"tokens": _NUMBER, "seconds": _NUMBER}
"""What they read of a line of metrics.jsonl that has the score."""

_COMPARISON: dict[str, Any] = {
    "config": Mapping[str, Any] | None,
    "config.archs": list[str] | None,
    "config.context": list[int] | None,
    "config.params": _COUNT | None,
    "config.seeds": _COUNT | None,
    "config.seq_len": int | list[int] | None,
    "config.equal": str | None,
    "config.baseline": str | None,
    "config.optim": Mapping[str, Any] | None,
    "config.optim.lr": float | None,
    "labels": dict[str, str] | None,
    "failures": dict[str, str] | None,
    "provenance": Mapping[str, Any] | None,
    "provenance.command": str | None,
    "tuning": Mapping[str, Any] | None,
    "tuning.rounds": list[int] | None,
    "tuning.n_trials": int | None,
    "tuning.n_documents": int | None,
}
"""What they read of compare.json."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run as its folder tells it."""

    folder: Path
    info: Mapping[str, Any]
    """run.json"""
    result: Mapping[str, Any]
    """result.json; empty while the run has none"""
    metrics: Sequence[Mapping[str, Any]]
    """metrics.jsonl"""

    @property
    def arch(self) -> str:
        """Architecture."""
        return self.info["arch"]

    @property
    def seed(self) -> int:
        """Seed of weights and data order."""
        return self.info["seed"]

    @property
    def seq_len(self) -> int:
        """Trained length in tokens."""
        return self.info["config"]["train"]["seq_len"]

    @property
    def status(self) -> str:
        """done, out_of_memory, failed, interrupted, or unfinished where no result.json was written."""
        return self.result.get("status") or "unfinished"

    @property
    def score(self) -> Score:
        """The number by which the run is compared."""
        return Score.from_dict(self.info.get("score"))

    @property
    def quality(self) -> float | None:
        """Final value of the score, of a finished run."""
        return self.result.get(self.score.key) if self.status == "done" else None

    @property
    def learning_rate(self) -> float | None:
        """Peak learning rate: the resolved one of run.json."""
        return self.info["config"]["optim"].get("lr")

    def curve(self) -> list[Mapping[str, Any]]:
        """Validation records by step; where a resumed run passed a step twice, the later record."""
        by_step = {line["step"]: line for line in self.metrics if line.get(self.score.tag) is not None}
        return [by_step[step] for step in sorted(by_step)]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that is known about a comparison, from its folder."""

    folder: Path
    info: Mapping[str, Any]
    """compare.json; empty for a folder of runs that no comparison made"""
    runs: Sequence[Run]
    cells: Sequence[Cell]
    """One of each architecture, phase and length: medians over the processes that measured it"""
    processes: Sequence[Cell] = ()
    """What each of these processes measured"""
    failures: Mapping[str, str] = field(default_factory=dict)
    """Runs that left no run.json, with the reason, from compare.json"""
    chosen_baseline: str | None = None
    """The model that the others are compared with, where the reader of the folder chose it"""

    @property
    def archs(self) -> list[str]:
        """Architectures in the order of the command, others after them."""
        found = {*(run.arch for run in self.runs), *(cell.arch for cell in self.cells)}
        return [arch for arch in self.asked if arch in found]

    @property
    def asked(self) -> list[str]:
        """Architectures that the command asked for, and others found."""
        found = [*(run.arch for run in self.runs), *(cell.arch for cell in self.cells)]
        return list(dict.fromkeys([*self.info.get("config", {}).get("archs", []), *found]))

    @property
    def baseline(self) -> str:
        """The architecture that the others are compared with: the one asked for, the Transformer, or else the first."""
        asked = self.chosen_baseline or self.info.get("config", {}).get("baseline")
        return asked or baseline_among(self.archs)

    @property
    def others(self) -> list[str]:
        """Architectures but the baseline."""
        return [arch for arch in self.archs if arch != self.baseline]

    @property
    def equal(self) -> str:
        """What every run had equally much of: tokens, flops or seconds."""
        equal: str = self.info.get("config", {}).get("equal", "tokens")
        return "FLOPs" if equal == "flops" else equal

    @property
    def trained_lengths(self) -> list[int]:
        """Lengths in tokens at which models were trained, and those that the command asked for."""
        asked = self.info.get("config", {}).get("seq_len", [])
        return sorted({*([asked] if isinstance(asked, int) else asked), *(run.seq_len for run in self.runs)})

    @property
    def context(self) -> list[int]:
        """Context lengths that the command asked for, and others measured."""
        asked = self.info.get("config", {}).get("context", [])
        return sorted({*asked, *(cell.context_len for cell in self.cells)})

    @property
    def corpus(self) -> Mapping[str, Any] | None:
        """Summary of the corpus that all runs share."""
        return self.runs[0].info["corpus"] if self.runs else None

    @property
    def score(self) -> Score:
        """The number by which all runs are compared."""
        return self.runs[0].score if self.runs else BITS_PER_BYTE

    @property
    def predicts_text(self) -> bool:
        """Whether the runs are compared by how well they predict held-out text, as compressors can be too."""
        return self.score == BITS_PER_BYTE

    @property
    def held_out(self) -> str:
        """Name, in a sentence, of what the runs are judged on."""
        return "held-out text" if self.predicts_text else "held-out rows"

    @property
    def references(self) -> Mapping[str, float]:
        """Bits per byte of general-purpose compressors on the held-out text; empty where the score is another."""
        return (self.corpus or {}).get("reference_bits_per_byte", {}) if self.predicts_text else {}

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Machine and versions that trained the runs, or measured where there are none; empty where no file tells."""
        return self.runs[0].info["provenance"] if self.runs else self.info.get("provenance", {})

    @property
    def ordered_cells(self) -> list[Cell]:
        """All cells by phase, architecture and length."""
        phases = ("train", "prefill", "decode", "decode_many", "first_token", "long_prompt", "long_answer")
        return [cell for phase in phases for arch in self.archs for cell in self.cells_of(arch, phase)]

    def label(self, arch: str) -> str:
        """The architecture's name as written in text; the plain name where no file tells."""
        of_cells = {cell.arch: cell.label for cell in self.cells}
        of_runs = {run.arch: run.info["label"] for run in self.runs}
        return {**of_cells, **of_runs, **self.info.get("labels", {})}.get(arch, arch)

    def runs_of(self, arch: str, seq_len: int | None = None) -> list[Run]:
        """Runs of one architecture by trained length and seed, or those of one length."""
        runs = (run for run in self.runs if run.arch == arch and seq_len in (None, run.seq_len))
        return sorted(runs, key=lambda run: (run.seq_len, run.seed))

    def ranked_cells(self, arch: str, metric: Metric) -> list[Cell]:
        """Cells of one architecture that a metric compares, by length.

        Speeds of decoding are those of compiled steps where any model has one: beside them, what calls modules for
        every token measures Python.
        """
        cells = self.cells_of(arch, metric.phase)
        if metric.key == "tokens_per_second" and self.decodes_compiled(metric.phase):
            return [cell for cell in cells if cell.is_compiled or not cell.done]
        return cells

    def rounds(self, cell: Cell, metric: Metric) -> dict[int, float]:
        """What a metric was in each of the processes that measured a cell, where there are several; else nothing."""
        values = {
            other.repeat: getattr(other, metric.key)
            for other in self.processes
            if (other.arch, other.phase, other.context_len) == (cell.arch, cell.phase, cell.context_len) and other.done
        }
        values = {repeat: max(value, 1e-9) for repeat, value in values.items() if value is not None}
        return values if len(values) > 1 else {}

    def decodes_compiled(self, phase: str = "decode") -> bool:
        """Whether any model was decoded by a compiled step in a phase."""
        return any(cell.is_compiled for cell in self.cells if cell.phase == phase)

    def cells_of(self, arch: str, phase: str) -> list[Cell]:
        """Cells of one architecture and phase by length."""
        cells = (cell for cell in self.cells if cell.arch == arch and cell.phase == phase)
        return sorted(cells, key=lambda cell: cell.context_len)


def baseline_among(archs: Sequence[str]) -> str:
    """The architecture that others are compared with if none is asked for: the Transformer, else the first."""
    return "transformer" if "transformer" in archs else archs[0]


def load_run(folder: Path) -> Run:
    """Reads a run folder; result.json and metrics.jsonl may be missing.

    Raises:
        ValueError: naming the file, if it cannot be read, was written by a newer version, or the score is no number.
    """
    result = folder / "result.json"
    run = Run(
        folder=folder,
        info=read_json(folder / "run.json"),
        result=read_json(result) if result.exists() else {},
        metrics=read_json_lines(folder / "metrics.jsonl"),
    )
    try:
        key = run.score.key
    except ValueError as error:
        raise ValueError(f"{folder / 'run.json'}: {error}") from None
    check_table(run.result, {"status": str | None, key: float | None}, result)
    return run


def _check_run(run: Run) -> None:
    """Raises ValueError, naming the file, unless a run has what reports read."""
    check_table(run.info, _INFO, run.folder / "run.json")
    done = _DONE | {run.score.key: float} if run.status == "done" else {}
    check_table(run.result, _RESULT | done, run.folder / "result.json")
    for span in run.result.get("position_bits_per_byte") or ():
        check_table(span, _SPAN, f"{run.folder / 'result.json'}: position_bits_per_byte")
    for key, wanted in (("by_length", _READ), ("context_cut", _READ), ("accuracy_by_length", _ANSWERED)):
        for entry in run.result.get(key) or ():
            check_table(entry, wanted, f"{run.folder / 'result.json'}: {key}")
    for number, line in enumerate(run.metrics, 1):
        validation = _VALIDATION | {run.score.tag: float} if line.get(run.score.tag) is not None else {}
        check_table(line, {"step": int} | validation, f"{run.folder / 'metrics.jsonl'}, record {number}")


def load_comparison(folder: Path, *, baseline: str | None = None) -> Comparison:
    """Reads a comparison folder, a folder of runs, or one run.

    Args:
        folder: where the files are.
        baseline: the model that the others are compared with; None leaves it to the files.

    Raises:
        ValueError: if there is nothing to report, the baseline is not among the models, or the runs cannot be compared:
            they were made on different data, or for different scores.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder; give the folder of a comparison or of runs")
    homes = [folder] if (folder / "run.json").exists() else sorted(path.parent for path in folder.glob("*/run.json"))
    runs = [load_run(home) for home in homes]
    for run in runs:
        _check_run(run)
    measured = list({cell.key: cell for cell in read_cells(folder / "context.jsonl")}.values())
    cells = over_repeats(measured)
    if not runs and not cells:
        raise ValueError(f"{folder} holds neither runs (*/run.json) nor context measurements (context.jsonl)")
    for run in runs[1:]:
        ours, first = run.info["corpus"]["digest"], runs[0].info["corpus"]["digest"]
        if ours != first:
            raise ValueError(
                f"{runs[0].folder.name} and {run.folder.name} were trained on different data "
                f"(corpus digests {first[:12]} and {ours[:12]}) and cannot be compared; report them apart"
            )
        if run.score != runs[0].score:
            raise ValueError(
                f"{runs[0].folder.name} and {run.folder.name} have different scores ({runs[0].score.name} and "
                f"{run.score.name}) and cannot be compared; report them apart"
            )
    settings = {json.dumps(cell.settings, sort_keys=True) for cell in cells}
    if len(settings) > 1:
        raise ValueError(f"{folder / 'context.jsonl'} mixes measurements made with different settings; start it over")
    info = read_json(folder / "compare.json") if (folder / "compare.json").exists() else {}
    check_table(info, _COMPARISON, folder / "compare.json")
    info = {key: _without_none(value) for key, value in _without_none(info).items()}
    comparison = Comparison(
        folder=folder,
        info=info,
        runs=runs,
        cells=cells,
        processes=measured,
        failures=info.get("failures", {}),
        chosen_baseline=baseline,
    )
    if baseline is not None and baseline not in comparison.archs:
        raise ValueError(f"--baseline {baseline} is not among the models of {folder}: {', '.join(comparison.archs)}")
    return comparison


def _without_none(value: Any) -> Any:
    """A table without the entries that say nothing; anything else as it is."""
    return {key: entry for key, entry in value.items() if entry is not None} if isinstance(value, dict) else value


def mean_and_spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation; None instead of a deviation where there is one value."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def quality(comparison: Comparison) -> list[dict[str, Any]]:
    """Lists architectures that have runs by trained length: sizes, costs, the score (mean and spread over seeds)."""
    score, rows = comparison.score, []
    for arch, seq_len in ((arch, length) for arch in comparison.archs for length in comparison.trained_lengths):
        runs = comparison.runs_of(arch, seq_len)
        if not runs:
            continue
        done = [run for run in runs if run.quality is not None]
        values = [run.quality for run in done if run.quality is not None]
        mean, spread = mean_and_spread(values) if values else (None, None)
        info, first = runs[0].info, (done or runs)[0]
        statuses = sorted({run.status for run in runs})
        rows.append(
            {
                "arch": arch,
                "label": comparison.label(arch),
                "d_model": info["model"].get("d_model"),
                "n_layers": info["model"].get("n_layers"),
                "n_params": info["n_params"],
                "n_active_params": info["n_active_params"],
                "flops_per_token": info["flops_per_token"],
                "state_bytes": info.get("state_bytes"),
                "lr": runs[0].learning_rate,
                "tokens": first.result.get("tokens"),
                "train_seconds": statistics.fmean(run.result["train_seconds"] for run in done) if done else None,
                "score": score.name,
                score.key: mean,
                f"{score.key}_std": spread,
                "n_seeds": len(done),
                "seeds": " ".join(str(run.seed) for run in done),
                "status": ", ".join(statuses),
                "seq_len": seq_len,
            }
        )
    return rows


def crossovers_of(comparison: Comparison) -> list[Crossover]:
    """Crossovers of every metric and ordered pair of architectures, from the context cells."""
    found = []
    for metric in METRICS:
        curves = {arch: curve(comparison, arch, metric) for arch in comparison.archs}
        found += all_crossovers(metric.name, {arch: some for arch, some in curves.items() if some}, metric.direction)
    return found


def curve(comparison: Comparison, arch: str, metric: Metric) -> Curve:
    """Points of one model. What ran out of memory, or of time where speed is asked, is worse than any value; cells that
    failed, or are beyond the positions that the model was built with, say nothing."""
    points = []
    for cell in comparison.ranked_cells(arch, metric):
        value, speed = getattr(cell, metric.key), metric.key in ("tokens_per_second", "seconds")
        if cell.done and value is None:
            continue
        if cell.done:
            low, high = _spread(cell, metric)
            pairs = comparison.rounds(cell, metric)
            points.append(Point(context_len=cell.context_len, value=max(value, 1e-9), low=low, high=high, pairs=pairs))
        elif metric.key == "state_bytes" and value:
            points.append(Point(context_len=cell.context_len, value=value))
        elif cell.status == "out_of_memory" or (cell.status == "timeout" and speed):
            seconds = cell.settings.get("timeout") if cell.status == "timeout" else None
            points.append(Point(context_len=cell.context_len, value=None, stopped_after=seconds))
    return points


def _spread(cell: Cell, metric: Metric) -> tuple[float, float] | tuple[None, None]:
    """The spread of a cell in the unit of a metric of time; nothing where it has none."""
    if cell.spread is None or metric.key not in ("tokens_per_second", "seconds"):
        return None, None
    low, high = cell.spread
    if metric.key == "tokens_per_second":
        return low, high
    if cell.seconds is None or cell.tokens_per_second is None:
        return None, None
    work = cell.seconds * cell.tokens_per_second
    return work / high, work / low


def tokens_per_step(comparison: Comparison) -> str:
    """Says how many tokens the measured training steps took, from their own batches; empty where none is known."""
    steps = [cell for cell in comparison.cells if cell.phase == "train"]
    counts = sorted({cell.batch_size * cell.context_len for cell in steps if cell.batch_size})
    if not counts:
        return ""
    if len(counts) == 1:
        return f"{counts[0]:,} tokens per step at every length"
    return f"{counts[0]:,} to {counts[-1]:,} tokens per step, depending on the length"


@dataclass(frozen=True, kw_only=True)
class Check:
    """A part of the equal-budget statement."""

    name: str
    equal: bool
    statement: str


def budget_checks(comparison: Comparison, tolerance: float = 0.02) -> list[Check]:
    """Verifies from the run folders that every run had the same budget.

    Parameters may differ by `tolerance` from the size asked for, or where no size was asked from their mean. Tokens and
    steps are compared among finished runs only; unfinished ones are listed elsewhere.
    """
    runs = comparison.runs
    if not runs:
        return []
    done = [run for run in runs if run.status == "done"]
    sizes = {run.arch: run.info["n_params"] for run in runs}
    asked = comparison.info.get("config", {}).get("params")
    target = asked if asked is not None else statistics.fmean(sizes.values())
    worst = max(sizes, key=lambda arch: abs(sizes[arch] - target))
    off = sizes[worst] / target - 1
    checks = [
        Check(
            name="parameters",
            equal=abs(off) <= tolerance,
            statement=f"{target:,.0f} {'on average' if asked is None else 'asked for'}; the furthest is "
            f"{comparison.label(worst)} with {sizes[worst]:,} ({off:+.1%})",
        )
    ]
    counted = (("tokens", "tokens"), ("steps", "steps")) if comparison.equal == "tokens" else ()
    for name, key in counted:
        values = sorted({run.result[key] for run in done})
        checks.append(Check(name=name, equal=len(values) <= 1, statement=_joined(f"{value:,}" for value in values)))
    if comparison.equal != "tokens":
        key = "train_seconds" if comparison.equal == "seconds" else "train_flops"
        spent = [run.result[key] for run in done if run.result.get(key)]
        within = 0.05 if comparison.equal == "seconds" else tolerance
        equal = not spent or max(spent) <= (1 + within) * min(spent)
        statement = f"{min(spent):.4g} to {max(spent):.4g}" if spent else "not recorded"
        checks.append(Check(name=f"training {comparison.equal}", equal=equal, statement=statement))
    if comparison.equal == "seconds":
        checks.append(_turns_check(done))
    read = {
        key: _distinct(run.info["config"]["train"].get(key) for run in runs)
        for key in ("eval_tokens", "final_eval_tokens")
    }
    checks.append(
        Check(
            name=comparison.held_out,
            equal=all(len(values) == 1 for values in read.values()),
            statement="; ".join(f"{key} {_joined(map(str, values))}" for key, values in read.items()),
        )
    )
    shapes = sorted({(run.seq_len, run.info["config"]["train"]["batch_size"]) for run in runs})
    n_tokens = [seq_len * batch_size for seq_len, batch_size in shapes]
    digests = _distinct(run.info["corpus"]["digest"][:12] for run in runs)
    packing = _distinct(run.info["config"]["data"].get("packing") for run in runs)
    seeds = {arch: sorted(run.seed for run in comparison.runs_of(arch)) for arch in comparison.archs}
    lengths = _distinct(str(sorted({run.seq_len for run in comparison.runs_of(arch)})) for arch in comparison.archs)
    lengths = [some for some in lengths if some != "[]"]
    same_seeds = len(_distinct(str(s) for s in seeds.values() if s)) <= 1
    checks.append(
        Check(
            name="data and its order",
            equal=len(shapes) == len({seq_len for seq_len, _ in shapes})
            and (len(shapes) == 1 or max(n_tokens) <= (1 + tolerance) * min(n_tokens))
            and all(len(values) == 1 for values in (digests, packing))
            and len(lengths) <= 1
            and same_seeds,
            statement=f"corpus {_joined(digests)}; "
            f"{_joined(f'{batch_size} sequences of {seq_len}' for seq_len, batch_size in shapes)} tokens per step, "
            "drawn from (seed, step) alone" + ("" if same_seeds else "; not every architecture has the same seeds"),
        )
    )
    objectives = _distinct(_objective(run) for run in runs)
    if objectives != [""]:  # runs of older versions all learned to predict the next token, and do not say it
        checks.append(Check(name="objective", equal=len(objectives) == 1, statement="; ".join(objectives)))
    optim = [{k: v for k, v in run.info["config"]["optim"].items() if k != "lr"} for run in runs]
    differing = sorted({key for values in optim for key in values if values[key] != optim[0].get(key)})
    checks.append(
        Check(
            name="optimizer and schedule",
            equal=not differing,
            statement=f"{optim[0].get('schedule')} schedule, weight decay {optim[0].get('weight_decay')}, "
            f"clip {optim[0].get('clip')}; the peak learning rate is each architecture's own"
            if not differing
            else f"runs differ in {_joined(differing)}",
        )
    )
    machine = {
        key: _distinct(str(run.info["provenance"].get(key)) for run in runs)
        for key in ("precision", "device", "threads")
    }
    checks.append(
        Check(
            name="arithmetic and machine",
            equal=all(len(values) == 1 for values in machine.values()),
            statement="; ".join(f"{key} {_joined(values)}" for key, values in machine.items()),
        )
    )
    return checks


def _turns_check(runs: Sequence[Run]) -> Check:
    """Verifies that the runs of each seed and length have taken turns, so that a slower machine was so for all."""
    apart = []
    for run in runs:
        beside = {name for stretch in run.info.get("stretches") or () for name in stretch.get("in_turns_with", ())}
        same = {other.folder.name for other in runs if (other.seed, other.seq_len) == (run.seed, run.seq_len)}
        if not same - {run.folder.name} <= beside:
            apart.append(run.folder.name)
    return Check(
        name="turns",
        equal=not apart,
        statement=f"{_joined(apart)} did not train in turns with all others of the seed and length, so that a machine "
        "that was slower for a while may have favoured some"
        if apart
        else "the models of each seed and length trained in turns of some steps",
    )


def _objective(run: Run) -> str:
    """Names the objective of a run and its options; empty where run.json does not tell."""
    options = dict(run.info.get("objective") or {})
    return ", ".join([*filter(None, [options.pop("kind", "")]), *(f"{key} {value}" for key, value in options.items())])


def _distinct(values: Any) -> list[Any]:
    return list(dict.fromkeys(values))


def _joined(words: Any) -> str:
    return ", ".join(words)
