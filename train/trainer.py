"""The trainer: the same experiment for every model. It never names an architecture.

The position in the data is the step number, so a run continues exactly from (step, weights, optimiser, generators).
Everything a run leaves is in its directory OUT/NAME; benchmarks read nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import torch

from .. import archs
from ..kernels.dispatch import record_backends
from . import checkpoint
from .config import CUSTOM, RunConfig, flatten
from .evaluate import evaluate, evaluating
from .files import read_json, write_json
from .health import apply_verdict
from .learner import Learner, NonFiniteError, Update, split_rows
from .objective import Objective
from .objectives import open_objective
from .optim import adamw, learning_rate
from .progress import Display, farewell, greeting
from .record import MetricsLog, provenance
from .runtime import (
    Interrupted,
    PeakMemory,
    Stopwatch,
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
    stop_signals,
)
from .warm_up import warm_up

__all__ = ["NonFiniteError", "Outcome", "ResumeError", "Trainer", "train"]


class ResumeError(ValueError):
    """The run directory does not allow what --resume asks for."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    result: dict[str, Any]
    """Content of result.json."""
    exit_code: int
    """0 done, 1 failed, 3 out of memory, 130 or 143 stopped by SIGINT or SIGTERM."""


def train(run: RunConfig, *, command: Sequence[str] = ()) -> Outcome:
    """Loads the data, trains and evaluates one model, and writes its run directory.

    Raises:
        ValueError: if the run cannot start as asked for; what the directory holds is left as it is.
    """
    return Trainer(run, open_objective(run, progress=sys.stderr.isatty()), command=command).fit()


class Trainer:
    """One run: a model, an objective, a directory. Made to be used once."""

    def __init__(
        self,
        run: RunConfig,
        objective: Objective[Any, Any],
        *,
        command: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Checks everything that can be checked without touching the run directory or much memory.

        Args:
            run: the configuration.
            objective: what it learns, with its data.
            command: what the user typed, for run.json.
            clock: seconds, for the throughput figures.

        Raises:
            ValueError: if model, data, device and lengths do not fit together.
        """
        self.model_config = run.model.configure(objective.data.tokenizer.vocab_size)
        objective.check(self.model_config)
        if run.train.threads is not None:
            torch.set_num_threads(run.train.threads)
        self.run = run
        self.objective = objective
        self.device = choose_device(run.train.device)
        self.precision = choose_precision(run.train.precision, self.device)
        self.peak_lr = _peak_learning_rate(run)
        self._command = command
        self._clock = clock

        sketch = archs.build(self.model_config, device="meta")
        state = sketch.init_state(1, run.train.seq_len, device="meta")
        self._facts = {
            **_names(run),
            "seed": run.seed,
            "n_params": sketch.n_params,
            "n_active_params": sketch.n_active_params,
            "flops_per_token": objective.flops_per_token(sketch),
            "state_bytes": sum(part.nbytes for part in state if part is not None),
        }
        self._step = self._first_step = self._tokens = 0
        self._saved_step = -1
        self._validation: dict[str, Any] | None = None
        self._sample: str | None = None
        self._found: dict[str, Any] = {}
        self._peak_bytes: int | None = None
        self._doctor: dict[str, Any] | None = None
        self._watch = Stopwatch(clock=clock)

    def fit(self) -> Outcome:
        """Trains to the last step, evaluates, and leaves result.json, whatever happens.

        A run that is done already is left as it is.

        Raises:
            ResumeError, CheckpointError: if the directory is in use, or --resume does not fit what it holds.
        """
        directory = self.run.directory
        with _locked(directory):
            start = self._resume_point()
            if start is not None:
                self._continue_from(checkpoint.read_state(start))
            with Display(self.run.train.steps, done=self._step) as display:
                if self._step == self.run.train.steps and (directory / "result.json").exists():
                    result = read_json(directory / "result.json")
                    if result["status"] == "done":
                        display.say(f"{directory} is trained already, to step {self._step}")
                        return Outcome(result=result, exit_code=0)
                return self._fit(start, display)

    def _fit(self, start: Path | None, display: Display) -> Outcome:
        directory = self.run.directory
        (directory / "result.json").unlink(missing_ok=True)
        keep_freed_memory()
        self._doctor = apply_verdict()
        warm_up(self.model_config, self.objective, self.device)
        memory = PeakMemory(self.device)
        record = self._run_record(memory.method)
        write_json(directory / "run.json", record)
        display.say(greeting(record, directory))

        status, error, exit_code = "failed", None, 1
        with record_backends() as backends:
            try:
                with stop_signals() as poll:
                    self._work(start, memory, backends, display, poll)
                status, exit_code = "done", 0
            except Interrupted as stop:
                status, error, exit_code = "interrupted", str(stop), 128 + stop.signum
            except (NonFiniteError, OSError) as failure:
                error = str(failure)
            except (RuntimeError, MemoryError) as failure:
                if not is_out_of_memory(failure):
                    raise
                status, error, exit_code = "out_of_memory", str(failure).partition("\n")[0] or "MemoryError", 3
            finally:
                unexpected = sys.exception()
                if unexpected is not None and error is None:
                    status = "interrupted" if isinstance(unexpected, KeyboardInterrupt) else "failed"
                    error = f"{type(unexpected).__name__}: {unexpected}"
                result = self._result(status, error, backends)
                write_json(directory / "result.json", result)
        display.say(farewell(result, record, directory))
        return Outcome(result=result, exit_code=exit_code)

    def _work(
        self,
        start: Path | None,
        memory: PeakMemory,
        backends: Mapping[str, Sequence[str]],
        display: Display,
        poll: Callable[[], None],
    ) -> None:
        run, directory = self.run, self.run.directory
        self.objective.data.tokenizer.save(directory / "tokenizer.json")
        torch.manual_seed(run.seed)
        model = self.objective.prepare(archs.build(self.model_config, device=self.device))
        learner = Learner(model, self.objective)
        optimizer = adamw(model, run.optim)
        if start is not None:
            checkpoint.restore(start, model=model, optimizer=optimizer)
        update = Update(learner, self.objective, optimizer, precision=self.precision, clip=run.optim.clip)
        with contextlib.closing(MetricsLog(directory, first_step=self._step)) as log:
            try:
                while True:
                    if self._due(run.train.eval_every) and (self._validation or {}).get("step") != self._step:
                        self._validate(learner, log, display, poll)
                    if self._due(run.train.checkpoint_every):
                        self._save(model, optimizer)
                    if self._step == run.train.steps:
                        break
                    poll()
                    values = self._update(update)
                    self._peak_bytes = max(self._peak_bytes or 0, memory.peak_bytes())
                    if self._step == self._first_step + 1:
                        record = read_json(directory / "run.json")
                        write_json(directory / "run.json", record | {"backends": _lists(backends)})
                    if self._step == 1 or self._due(run.train.log_every):
                        self._log(values, log, display)
                display.doing("examining")
                with evaluating(model, self.precision):
                    self._found = self.objective.examine(model, poll=poll)
            except Interrupted:
                self._save(model, optimizer)
                raise

    def _update(self, update: Update) -> dict[str, float]:
        """Makes one update and returns its metrics.

        Raises:
            NonFiniteError: before the update, if the loss or the gradient is not finite.
        """
        run = self.run
        lr = learning_rate(self._step, peak=self.peak_lr, steps=run.train.steps, config=run.optim)
        with self._watch.step() as count:
            rows = self.objective.rows(self._step)
            n_tokens = self.objective.n_tokens(rows)
            count(n_tokens)
            parts = split_rows(rows, run.train.grad_accumulation)
            try:
                values = update([self.objective.collate(part) for part in parts], lr)
            except NonFiniteError as error:
                raise NonFiniteError(
                    f"step {self._step + 1}: {error} at learning rate {lr:.3g}; this update was not made: "
                    f"try a lower --optim.lr or a longer --optim.warmup"
                ) from None
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._step += 1
        self._tokens += n_tokens
        return {"train/lr": lr, **{f"train/{name}": value for name, value in values.items()}}

    def _log(self, values: Mapping[str, float], log: MetricsLog, display: Display) -> None:
        rate = self._watch.lap()
        record = {
            **self._position(),
            **values,
            "perf/tokens_per_second": rate,
            "perf/peak_bytes": self._peak_bytes,
        }
        log.append(record)
        tokens_left = (self.run.train.steps - self._step) * self._tokens / self._step
        display.trained(record, seconds_left=tokens_left / rate if rate else 0.0)

    def _validate(self, learner: Learner, log: MetricsLog, display: Display, poll: Callable[[], None]) -> None:
        run, objective = self.run.train, self.objective
        display.doing("validating")
        rows = objective.held_out(run.final_eval_tokens if self._step == run.steps else run.eval_tokens)
        rows_at_once = run.batch_size // run.grad_accumulation
        found = evaluate(learner, objective, rows, precision=self.precision, rows_at_once=rows_at_once, poll=poll)
        # whole numbers, such as bytes read, are facts of the result and no curves
        curves = {f"val/{name}": value for name, value in found.items() if isinstance(value, float)}
        record = self._position() | curves
        log.append(record)
        display.validated(record)
        self._validation = {"step": self._step, **found}
        if run.sample_tokens:
            with evaluating(learner, self.precision):
                self._sample = objective.sample(learner.model)
            log.append({"step": self._step, "sample": self._sample})
        display.doing("training")

    def _save(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        if self._step == 0 or self._step == self._saved_step:
            return
        state = {
            "experiment": self._experiment(),
            "validation": self._validation,
            "sample": self._sample,
            "peak_bytes": self._peak_bytes,
            "stopwatch": self._watch.state,
        }
        root, keep = self.run.directory / "checkpoints", self.run.train.keep_checkpoints
        checkpoint.save(root, self._step, model=model, optimizer=optimizer, state=state, keep=keep)
        self._saved_step = self._step

    def _due(self, every: int) -> bool:
        """Whether something that happens each `every` steps (0: at the end only) happens now."""
        return self._step == self.run.train.steps or bool(self._step and every and self._step % every == 0)

    def _position(self) -> dict[str, Any]:
        return {"step": self._step, "tokens": self._tokens, "seconds": self._watch.seconds}

    def _resume_point(self) -> Path | None:
        run, directory = self.run, self.run.directory
        if run.resume == "never":
            if (directory / "run.json").exists():
                raise ResumeError(
                    f"{directory} already holds a run: choose another --name, remove it, or continue with --resume auto"
                )
            return None
        path = checkpoint.newest(directory / "checkpoints")
        if path is None and run.resume == "must":
            raise ResumeError(f"{directory} has no checkpoint to continue from: leave --resume must out to start")
        return path

    def _experiment(self) -> dict[str, Any]:
        """What must be the same before and after a resume; logging, device and the like may change."""
        run = self.run
        # a schedule that falls knows where it ends: with more steps it would have been another run from the start
        length = {} if run.optim.schedule == "constant" else {"schedule_steps": run.train.steps}
        experiment = {
            "seed": run.seed,
            "data": {"digest": self.objective.data.digest, "packing": run.data.packing},
            "train": {"batch_size": run.train.batch_size, "seq_len": run.train.seq_len},
            "optim": dataclasses.asdict(run.optim) | {"lr": self.peak_lr} | length,
            "model": self.model_config.to_dict(),
        }
        return json.loads(json.dumps(experiment))  # as a checkpoint gives it back: lists for tuples

    def _continue_from(self, state: Mapping[str, Any]) -> None:
        """Takes up a checkpoint's trainer.json, or refuses to where it is of another experiment."""
        before, now = flatten(state["experiment"]), flatten(self._experiment())
        changed = [
            f"{key} {before.get(key)} -> {now.get(key)}"
            for key in sorted({*before, *now})
            if before.get(key) != now.get(key)
        ]
        if changed:
            raise ResumeError(
                f"the run in {self.run.directory} was made with other settings ({', '.join(changed)}): "
                f"give the same ones to continue it, or another --name to start a new run"
            )
        if state["step"] > self.run.train.steps:
            raise ResumeError(
                f"the run in {self.run.directory} is at step {state['step']} already, "
                f"beyond train.steps={self.run.train.steps}: give more steps, or another --name"
            )
        self._step = self._first_step = self._saved_step = state["step"]
        self._validation, self._sample, self._peak_bytes = state["validation"], state["sample"], state["peak_bytes"]
        self._watch = Stopwatch(**state["stopwatch"], clock=self._clock)
        self._tokens = sum(self.objective.n_tokens(self.objective.rows(step)) for step in range(self._step))

    def _run_record(self, peak_memory_method: str) -> dict[str, Any]:
        run = self.run
        return {
            "name": run.directory.name,
            **self._facts,
            "config": run.to_dict() | {"optim": run.to_dict()["optim"] | {"lr": self.peak_lr}},
            "model": self.model_config.to_dict(),
            "corpus": self.objective.data.summary(),
            "resumed_from_step": self._first_step or None,
            "backends": None,
            "doctor": self._doctor,
            "provenance": {
                **provenance(self.device, self._command),
                "precision": self.precision.name,
                "precision_reason": self.precision.reason,
                "peak_memory_method": peak_memory_method,
            },
        }

    def _result(self, status: str, error: str | None, backends: Mapping[str, Sequence[str]]) -> dict[str, Any]:
        validation = self._validation or {}
        position = self._position()
        return {
            **self._facts,
            "status": status,
            "error": error,
            **{f"val_{name}": validation.get(name) for name in ("bits_per_byte", "loss", "bytes")},
            "tokens": position["tokens"],
            "steps": position["step"],
            "train_seconds": position["seconds"],
            "tokens_per_second": self._watch.tokens_per_second,
            "peak_bytes": self._peak_bytes,
            "precision": self.precision.name,
            "device": self.device.type,
            "backend": _lists(backends),
            "corpus_digest": self.objective.data.digest,
            "position_bits_per_byte": None,
            **self._found,
            "sample": self._sample,
        }


def _names(run: RunConfig) -> dict[str, str]:
    """The architecture's name and how text writes it; a model of its own pattern goes by the name of its run."""
    if run.model.preset == CUSTOM:
        return {"arch": run.directory.name, "label": run.directory.name}
    return {"arch": run.model.preset, "label": archs.presets.find(run.model.preset).label}


def _peak_learning_rate(run: RunConfig) -> float:
    if run.optim.lr is not None:
        return run.optim.lr
    if run.model.preset == CUSTOM:
        raise ValueError("optim.lr must be given: a model described by its pattern has no tuned learning rate")
    return archs.presets.learning_rate(run.model.preset)


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    lock = filelock.FileLock(directory / ".lock", timeout=0)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except filelock.Timeout:
        message = f"another process is training in {directory}: wait for it, or choose another --name"
        raise ResumeError(message) from None
    except OSError as error:
        raise ResumeError(f"cannot write to {directory} ({error.strerror}): choose another --out") from None
    try:
        yield
    finally:
        lock.release()


def _lists(backends: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    return {op: list(names) for op, names in sorted(backends.items())}
