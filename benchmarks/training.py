"""Trains a list of runs, each in a process of its own, and leaves out those that are done."""

import contextlib
import json
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..train.config import RunConfig
from .processes import last_line, module_command, start, stop
from .progress import Progress, Task
from .results import load_run

if TYPE_CHECKING:
    from ..archs import ModelConfig

__all__ = ["Sized", "arguments", "check_resumable", "is_done", "size", "train_runs", "training_tasks"]

_SAVE_SECONDS = 60.0  # given to a stopped run for its checkpoint


@dataclass(frozen=True, kw_only=True)
class Sized:
    """An architecture at the size of the comparison."""

    arch: str
    label: str
    """The architecture's name as written in text."""
    config: "ModelConfig"
    n_params: int
    n_active_params: int
    flops_per_token: float
    """Training FLOPs (three times the forward pass), mean over a sequence."""
    state_bytes: int
    """State of one sequence of the trained length."""
    lr: float
    """Peak learning rate tuned for this architecture."""


def size(arch: str, *, n_params: int, vocab_size: int, seq_len: int) -> Sized:
    """Solves the architecture for a number of parameters and says what it costs, without allocating it.

    Raises:
        ValueError: if no legal size comes within 2 %.
    """
    from ..archs import build, configure, presets

    config = configure(arch, n_params=n_params, vocab_size=vocab_size)
    lm = build(config, device="meta")
    return Sized(
        arch=arch,
        label=presets.find(arch).label,
        config=config,
        n_params=lm.n_params,
        n_active_params=lm.n_active_params,
        flops_per_token=3 * lm.mean_flops_per_token(seq_len),
        state_bytes=sum(state.nbytes for state in lm.init_state(1, seq_len, device="meta")),
        lr=presets.learning_rate(arch),
    )


def arguments(run: RunConfig) -> list[str]:
    """The command line of `python -m crossover.train` for a run: every option that is not the default."""
    words = []
    for path, value in _leaves(run.to_dict()).items():
        if value != _leaves(RunConfig().to_dict())[path]:
            assert not isinstance(value, list), f"{path} is not set by a comparison"
            words += [f"--{path.replace('_', '-')}", str(value)]
    return words


def _leaves(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    leaves = {}
    for key, value in table.items():
        inner = _leaves(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
        leaves.update(inner)
    return leaves


_NOT_THE_EXPERIMENT = frozenset({"out", "resume", "data.cache", "train.checkpoint_every", "train.keep_checkpoints"})


def _differences(run: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """Settings in which a recorded run is another experiment. None and 'auto' agree with what they were resolved to."""
    recorded = _leaves(found)
    return [
        f"{path} {recorded.get(path)} instead of {value}"
        for path, value in _leaves(run.to_dict()).items()
        if path not in _NOT_THE_EXPERIMENT and value not in (None, "auto", recorded.get(path))
    ]


def check_resumable(runs: Sequence[RunConfig], digest: str) -> None:
    """Raises ValueError if a folder holds a run of other settings or other data, which must not be overwritten."""
    for run in runs:
        if not (run.directory / "run.json").exists():
            continue
        found = load_run(run.directory)
        differing = _differences(run, found.info["config"])
        if found.info["corpus"]["digest"] != digest:
            differing.append(f"data with digest {found.info['corpus']['digest'][:12]} instead of {digest[:12]}")
        if differing:
            raise ValueError(
                f"{run.directory} holds another run ({'; '.join(differing)}); "
                "give the same options, another --out, or --fresh to start over"
            )


def is_done(run: RunConfig) -> bool:
    """Whether the run has finished; `check_resumable` tells whether it is the same run."""
    return (run.directory / "run.json").exists() and load_run(run.directory).status == "done"


def training_tasks(runs: Sequence[RunConfig], sizes: Mapping[str, Sized]) -> list[Task]:
    """The runs as tasks of a schedule, with their FLOPs as cost."""
    return [
        Task(
            name=run.name,
            kind="train",
            cost=sizes[run.model.preset].flops_per_token * run.train.steps * run.train.batch_size * run.train.seq_len,
        )
        for run in runs
    ]


def train_runs(runs: Sequence[RunConfig], progress: Progress, *, logs: Path) -> dict[str, str]:
    """Trains every run that is not done yet, one after the other.

    Returns:
        For each run that did not finish, its name and the reason.
    """
    failures = {}
    for run in runs:
        if is_done(run):
            progress.skip(run.name, "trained before")
            continue
        progress.begin(run.name)
        reason = _train(run, progress, log=logs / f"{run.name}.log")
        if reason is None:
            score = load_run(run.directory).bits_per_byte
            progress.finish(run.name, f"{score:.3f} bits per byte")
        else:
            failures[run.name] = reason
            progress.finish(run.name, reason)
    return failures


def _train(run: RunConfig, progress: Progress, *, log: Path) -> str | None:
    """Runs one training process to its end and returns why it did not finish, or None."""
    (run.directory / "result.json").unlink(missing_ok=True)  # an earlier attempt's
    log.unlink(missing_ok=True)
    child = start(module_command("crossover.train", *arguments(run)), threads=run.train.threads, log=log)
    metrics = _Tail(run.directory / "metrics.jsonl")
    try:
        while child.poll() is None:
            step, detail = metrics.read()
            progress.update(run.name, step / run.train.steps, f"step {step}/{run.train.steps}{detail}")
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(0.5)
    except KeyboardInterrupt:
        stop(child, grace=_SAVE_SECONDS)  # it saves a checkpoint first
        raise
    if is_done(run):
        return None
    result = run.directory / "result.json"
    recorded = json.loads(result.read_text()) if result.exists() else {}
    if child.returncode == -9:
        return "out of memory (killed by the system)"
    reason = str(recorded.get("status", "failed")).replace("_", " ")
    return f"{reason}: {recorded.get('error') or last_line(log) or f'ended with code {child.returncode}'}"


class _Tail:
    """Reads what is appended to a metrics file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._step = 0
        self._quality = ""

    def read(self) -> tuple[int, str]:
        """The last step recorded and the last validation, as text."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(min(self._offset, self._path.stat().st_size))
                whole, _, _ = file.read().rpartition(b"\n")
                self._offset += len(whole) + 1 if whole else 0
            for line in whole.splitlines():
                self._look(line)
        return self._step, self._quality

    def _look(self, line: bytes) -> None:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            return  # the tail of a line that a resumed run has rewritten
        self._step = record.get("step", self._step)
        if "val/bits_per_byte" in record:
            self._quality = f", {record['val/bits_per_byte']:.2f} bits per byte"
