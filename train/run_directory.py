"""What a run leaves in its directory, and how it is taken up again: lock, run.json, result.json, checkpoints."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import filelock
import torch
from torch import nn

from ..files import FormatError, read_json, remove_drafts, write_json
from . import checkpoint
from .carry import Carried
from .config import RunConfig, flatten
from .course import Course
from .objective import Objective
from .record import MetricsLog

__all__ = ["ResumeError", "RunDirectory", "RunState"]


class ResumeError(ValueError):
    """The run directory does not allow what --resume asks for."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """How far a run has come: all that survives a resume besides weights, optimizer and generators."""

    step: int = 0
    """Updates made, which is the position in the data."""
    tokens: int | None = 0
    """Tokens trained on; None where a checkpoint of before December 2026 does not say."""
    stopwatch: Mapping[str, Any] = field(default_factory=dict)
    """What `Stopwatch` continues from."""
    peak_bytes: int | None = None
    """Most memory used so far."""
    validation: Mapping[str, Any] | None = None
    """Metrics of the last validation, with its "step"."""
    sample: str | None = None
    """Text written at the last validation."""
    n_records: int | None = None
    """Lines of metrics.jsonl that belong to it; None where a checkpoint of before December 2026 does not say."""
    backends: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Backends that ran so far, by operation."""
    stretches: Sequence[Mapping[str, Any]] = field(default_factory=list)
    """For each start that it was made by: its first step, and the conditions from there on."""

    def to_dict(self) -> dict[str, Any]:
        """Returns what trainer.json holds of it, as JSON values."""
        return {item.name: getattr(self, item.name) for item in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads trainer.json, which holds more than this."""
        fields = {item.name for item in dataclasses.fields(cls)}
        known: dict[str, Any] = {"tokens": None} | {key: value for key, value in values.items() if key in fields}
        validation = known.get("validation")
        if validation and "n_bytes" in validation:  # its name until December 2026
            known["validation"] = {"bytes" if key == "n_bytes" else key: value for key, value in validation.items()}
        return cls(**known)


class RunDirectory:
    """The directory OUT/NAME of one run."""

    def __init__(self, run: RunConfig) -> None:
        self.path = run.directory
        self._resume, self._train = run.resume, run.train
        self._checkpoints = self.path / "checkpoints"
        self._board = run.train.tensorboard or self.path / "tb"
        self._keep = run.train.keep_checkpoints
        self._saved_step: int | None = None
        self._record: dict[str, Any] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the directory and holds its lock.

        Raises:
            ResumeError: if another process holds it, or nothing can be written there.
        """
        lock = filelock.FileLock(self.path / ".lock", timeout=0)
        try:
            with self._refusing_what_cannot_be_written():
                self.path.mkdir(parents=True, exist_ok=True)
                try:
                    lock.acquire()
                except filelock.Timeout:
                    message = f"another process is training in {self.path}: wait for it, or choose another --name"
                    raise ResumeError(message) from None
                remove_drafts(self.path)
                self._checkpoints.mkdir(exist_ok=True)
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _refusing_what_cannot_be_written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            path = error.filename2 or error.filename or self.path
            raise ResumeError(f"cannot write to {path} ({error.strerror}): choose another --out or --name") from None

    def resume_point(self) -> Path | None:
        """The checkpoint to continue from, or None to start.

        Raises:
            ResumeError, CheckpointError: if --resume does not fit what the directory holds.
        """
        if self._resume == "never":
            if (self.path / "run.json").exists():
                raise ResumeError(
                    f"{self.path} already holds a run: choose another --name, remove it, or continue with --resume auto"
                )
            return None
        with _refusing_newer_formats():
            path = checkpoint.newest(self._checkpoints)
        if path is None and self._resume == "must":
            raise ResumeError(f"{self.path} has no checkpoint to continue from: leave --resume must out to start")
        return path

    def state_at(self, start: Path, experiment: Mapping[str, Any]) -> RunState:
        """The state of a checkpoint of this experiment.

        Raises:
            ResumeError: if it is of another experiment, or beyond the end of this run already.
        """
        with _refusing_newer_formats():
            stored = checkpoint.read_state(start)
        before, now = flatten(_of_today(stored["experiment"])), flatten(experiment)
        changed = [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ResumeError(
                f"the run in {self.path} was made with other settings ({', '.join(changed)}): "
                f"give the same ones to continue it, or another --name to start a new run"
            )
        state = RunState.from_dict(stored)
        times = {key: state.stopwatch.get(key, 0.0) for key in ("seconds", "before")}
        if Course(train=self._train, step=state.step, **times).is_beyond:
            kind = "seconds" if self._train.seconds else "steps"
            raise ResumeError(
                f"the run in {self.path} is at step {state.step} already, "
                f"beyond train.{kind}={getattr(self._train, kind)}: give more {kind}, or another --name"
            )
        self._saved_step = state.step
        return state

    def save(
        self,
        state: RunState,
        *,
        experiment: Mapping[str, Any],
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        carried: Carried | None = None,
    ) -> None:
        """Publishes a checkpoint, unless nothing was trained since the last one."""
        if state.step in (0, self._saved_step):
            return
        content = {"experiment": experiment, **state.to_dict()}
        parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "carried": carried}
        checkpoint.save(self._checkpoints, state.step, state=content, keep=self._keep, **parts)
        self._saved_step = state.step

    def result(self) -> dict[str, Any] | None:
        """What result.json holds; None where the run has not ended yet."""
        path = self.path / "result.json"
        try:
            return read_json(path) if path.exists() else None
        except FormatError as error:
            raise ResumeError(str(error)) from None
        except (OSError, ValueError) as error:
            reason = f"{path} cannot be read ({error.strerror})" if isinstance(error, OSError) else error
            raise ResumeError(f"{reason}: remove it, or choose another --out or --name") from None

    def begin(self, record: Mapping[str, Any], state: RunState, objective: Objective[Any, Any]) -> MetricsLog:
        """Writes run.json, removes the result of an earlier attempt, and opens the log where a state ends.

        Raises:
            ResumeError: before any work is done, if something cannot be written.
        """
        with self._refusing_what_cannot_be_written(), _refusing_newer_formats():
            (self.path / "result.json").unlink(missing_ok=True)
            checkpoint.prune(self._checkpoints, self._keep)
            objective.data.tokenizer.save(self.path / "tokenizer.json")
            self.add(**record)
            return MetricsLog(
                self.path,
                objective.score,
                first_step=state.step,
                n_records=state.n_records,
                board=self._board,
                options={key: record[key] for key in ("arch", "n_params")} | flatten(record["config"]),
                flops_per_token=record["flops_per_token"],
            )

    def add(self, **entries: Any) -> None:
        """Writes what is known by now into run.json."""
        self._record |= entries
        write_json(self.path / "run.json", self._record)

    def end(self, result: Mapping[str, Any], **entries: Any) -> None:
        """Writes result.json, and into run.json what is known only now."""
        self.add(**entries)
        write_json(self.path / "result.json", result)


@contextlib.contextmanager
def _refusing_newer_formats() -> Iterator[None]:
    try:
        yield
    except FormatError as error:
        raise ResumeError(str(error)) from None


def _of_today(experiment: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint compares, in the words of today: until December 2026 [data] said what was learned."""
    if "objective" in experiment:
        return dict(experiment)
    data = dict(experiment["data"])
    packing = data.pop("packing", "concat")
    reads_pairs = "source" in experiment["model"]
    columns = {"source": "source", "target": "target"}
    objective = {"kind": "pairs", **columns} if reads_pairs else {"kind": "next_token", "packing": packing}
    return {**experiment, "data": data, "objective": objective}
