"""The trainer: the same experiment for every model and every objective. It names neither.

The position in the data is the step number, so a run continues exactly from (step, weights, optimizer, generators).
Everything a run leaves is in its directory OUT/NAME; benchmarks read nothing else.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..archs import build
from ..kernels.dispatch import record_backends
from . import checkpoint
from .carry import Carried, check_carry
from .config import RunConfig
from .course import Course
from .evaluate import evaluate, evaluating, origin
from .finite import NonFiniteError, check_finite, check_weights
from .layers import MeasuredUpdate
from .learner import Learner, Update, split_rows
from .objective import Objective
from .optim import adamw, learning_rate
from .progress import Display, farewell, greeting
from .record import MetricsLog, provenance
from .run_directory import ResumeError, RunDirectory, RunState
from .runtime import (
    Interrupted,
    PeakMemory,
    Precision,
    Stopwatch,
    check_memory,
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
    stop_signals,
)
from .trace import Trace
from .turns import Turns
from .verdict import apply_verdict
from .warm_up import warm_up

__all__ = ["NonFiniteError", "Outcome", "ResumeError", "Trainer"]

_CONDITIONS = {key: key for key in ("precision", "threads", "torch", "cuda", "python", "cpu", "device")} | {
    "git_commit": "commit", "hostname_hash": "machine",
}  # fmt: skip
"""What a continued run may change, of provenance and arithmetic, and by which its numbers may differ; with its name."""

_REMEDY = "try a lower --optim.lr or a longer --optim.warmup"

_VALIDATIONS, _CHECKPOINTS = 5, 10
"""Equal parts of the time of a run that ends by time, after each of which it is judged and saved."""

_BYTES_PER_PARAMETER = 16
"""A weight, its gradient and the two moments of AdamW, in float32."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a run ended."""

    result: dict[str, Any]
    """Content of result.json."""
    exit_code: int
    """0 done, 1 failed, 3 out of memory, 128 + N stopped by signal N: SIGHUP (1), SIGINT (2) or SIGTERM (15)."""


class Trainer:
    """One run: a model, an objective, a directory. Made to be used once."""

    def __init__(
        self,
        run: RunConfig,
        objective: Objective[Any, Any],
        *,
        command: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
        turns: Turns | None = None,
    ) -> None:
        """Checks everything that can be checked without touching the run directory or much memory.

        Args:
            run: the configuration.
            objective: what it learns, with its data.
            command: what the user typed, for run.json.
            clock: seconds, of which those of training are counted.
            turns: those of `run.turns`, where they are being taken already.

        Raises:
            ValueError: if model, data, device and lengths do not fit together.
        """
        self.model_config = run.model.configure(objective.data.tokenizer.vocab_size)
        objective.check(self.model_config)
        check_carry(objective, self.model_config)
        if run.train.threads is not None:
            torch.set_num_threads(run.train.threads)
        self.run = run
        self.objective = objective
        self.peak_lr = run.peak_learning_rate()
        self.device = choose_device(run.train.device)
        self._directory = RunDirectory(run)
        self._command, self._clock = command, clock
        self._turns = Turns(run.turns) if turns is None else turns
        self._state, self._watch, self._first_step = RunState(), Stopwatch(clock=clock), 0
        self._found: dict[str, Any] = {}
        self._backends: Mapping[str, Sequence[str]] = {}
        sketch: Any = objective.prepare(build(self.model_config, device="meta"))
        takes_no_state = self.model_config.kind == "encoder"
        states = [] if takes_no_state else sketch.init_state(1, run.train.seq_len, device="meta")
        self._facts = {
            "arch": run.arch,
            "label": run.label,
            "seed": run.seed,
            "n_params": sketch.n_params,
            "n_active_params": sketch.n_active_params,
            "flops_per_token": objective.flops_per_token(sketch),
            "state_bytes": sum(state.nbytes for state in states if state is not None),
        }

    @functools.cached_property
    def precision(self) -> Precision:
        """What is asked for, or "auto" as this run has decided it at its start; nothing is measured anew."""
        setting, stretches = self.run.train.precision, self._state.stretches
        if setting == "auto" and stretches and stretches[-1].get("precision"):
            return Precision(stretches[-1]["precision"], "as this run began")
        return choose_precision(setting, self.device, d_model=self.model_config.d_model)

    def fit(self) -> Outcome:
        """Trains to the end, evaluates, and leaves result.json, whatever happens.

        A run that is done already is left as it is.

        Raises:
            ResumeError, CheckpointError: if the directory is in use, or --resume does not fit what it holds.
        """
        with self._turns, self._directory.locked():
            start = self._directory.resume_point()
            if start is not None:
                self._take_up(self._directory.state_at(start, self._experiment()))
            with Display(self._course, self.objective.score) as display:
                result = self._directory.result()
                if result is not None and result["status"] == "done" and self._course.is_over:
                    display.say(f"{self._directory.path} is trained already, to step {self._first_step}")
                    return Outcome(result=result, exit_code=0)
                return self._fit(start, display)

    def _take_up(self, state: RunState) -> None:
        if state.tokens is None:
            rows = map(self.objective.rows, range(state.step))
            state = replace(state, tokens=sum(map(self.objective.n_tokens, rows)))
        self._state, self._first_step = state, state.step
        self._watch = Stopwatch(**state.stopwatch, clock=self._clock)

    def _fit(self, start: Path | None, display: Display) -> Outcome:
        """Puts run.json before the work and result.json behind it."""
        keep_freed_memory()
        verdict = apply_verdict()
        record = self._run_record(verdict)
        log = self._directory.begin(record, self._state, self.objective)
        display.say(greeting(record, self._directory.path))
        self._say_what_changed()

        status, error, exit_code = "failed", None, 1
        try:
            with contextlib.closing(log), stop_signals() as poll:
                display.doing("warming up, which compiles kernels the first time")
                warm_up(self.model_config, self.objective, self.device, self.precision)
                display.doing("training")
                memory = PeakMemory(self.device)
                with record_backends() as self._backends:
                    self._train(start, memory, log, display, poll)
            status, exit_code = "done", 0
        except Interrupted as stop:
            status, error, exit_code = "interrupted", str(stop), stop.exit_code
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
            result = self._result(status, error)
            self._directory.end(result, backends=self._backends_run())
        display.say(farewell(result, record, self._directory.path))
        return Outcome(result=result, exit_code=exit_code)

    def _train(
        self, start: Path | None, memory: PeakMemory, log: MetricsLog, display: Display, poll: Callable[[], None]
    ) -> None:
        """Trains from a checkpoint, or from nothing, to the end."""
        run, objective = self.run, self.objective
        torch.manual_seed(run.seed)
        check_memory(_BYTES_PER_PARAMETER * self._facts["n_params"], self.device)
        model = objective.prepare(build(self.model_config, device=self.device))
        learner = Learner(model, objective)
        optimizer = adamw(model, run.optim)
        carried = Carried(model, run.train.batch_size, run.train.grad_accumulation) if run.train.carry else None
        if start is not None:
            checkpoint.restore(start, model=model, optimizer=optimizer, carried=carried)
        update = Update(learner, objective, optimizer, precision=self.precision, clip=run.optim.clip)

        def save() -> None:
            with self._naming_the_step():
                check_weights(model)
            self._state = replace(
                self._state, stopwatch=self._watch.state, n_records=log.n_records, backends=self._backends_run()
            )
            parts: dict[str, Any] = {"model": model, "optimizer": optimizer, "carried": carried}
            self._directory.save(self._state, experiment=self._experiment(), **parts)

        trace = Trace(self._directory.path, model, is_on=run.train.profile, done=self._first_step, say=display.say)
        try:
            while True:
                if self._course.is_due(run.train.eval_every, parts=_VALIDATIONS) and not self._is_validated():
                    with _losing_no_step(save):
                        self._validate(learner, log, display, poll)
                        if self._has_arrived and run.train.final_eval_tokens > run.train.eval_tokens:
                            self._validate(learner, log, display, poll)  # the last one reads more, and may disagree
                if self._course.is_due(run.train.checkpoint_every, parts=_CHECKPOINTS):
                    save()
                if self._course.is_over:
                    break
                self._turns.pass_on(self._watch.seconds)
                poll()
                values = self._update(learner, update, carried)
                self._state = replace(self._state, peak_bytes=max(self._state.peak_bytes or 0, memory.peak_bytes()))
                if self._state.step == self._first_step + 1:
                    self._directory.add(backends=self._backends_run())
                trace.step()
                if self._is_logged():
                    self._log(values, log, display)
            display.doing("examining")

            def judge(rows: Sequence[Any], *, rows_at_once: int, what: str) -> dict[str, float]:
                display.doing(what)
                options: dict[str, Any] = {"precision": self.precision, "rows_at_once": rows_at_once, "poll": poll}
                return evaluate(learner, objective, rows, **options)

            with _losing_no_step(save), self._naming_the_step(), evaluating(model, self.precision):
                found = objective.examine(model, judge=judge, poll=poll)
                check_finite(found, "held-out")
                self._found = found
            log.finish(self._result("done", None))
        except Interrupted:
            save()
            raise
        finally:
            trace.stop()

    @property
    def _course(self) -> Course:
        watch, train = self._watch, self.run.train
        return Course(
            train=train,
            step=self._state.step,
            seconds=watch.seconds,
            before=watch.before,
            has_arrived=self._has_arrived,
        )

    @property
    def _has_arrived(self) -> bool:
        """Whether this step has been found as good as it is to become."""
        score, goal = self.objective.score, self.run.train.stop_at
        found = self._state.validation if self._is_validated() else None
        return goal is not None and found is not None and score.reaches(found[score.name], goal)

    def _is_logged(self) -> bool:
        step = self._state.step
        return step == 1 or self._course.is_due(self.run.train.log_every) or self._looks_at(step)

    def _looks_at(self, step: int) -> bool:
        """Whether the update that makes this step looks into the layers."""
        every = self.run.train.layer_stats_every
        return every > 0 and step % every == 0

    def _is_validated(self) -> bool:
        """Whether the last validation is of this step."""
        return self._state.validation is not None and self._state.validation["step"] == self._state.step

    def _update(self, learner: Learner, update: Update, carried: Carried | None) -> dict[str, float]:
        """Makes one update and returns its metrics.

        Raises:
            NonFiniteError: before the update, if the loss or the gradient is not finite.
        """
        run, step = self.run, self._state.step
        tick, ticks = self._course.ticks
        lr = learning_rate(tick, peak=self.peak_lr, steps=ticks, config=run.optim)
        with self._watch.step() as count:
            rows = self.objective.rows(step)
            n_tokens = self.objective.n_tokens(rows)
            count(n_tokens)
            batches = [self.objective.collate(part) for part in split_rows(rows, run.train.grad_accumulation)]
            states = None if carried is None else carried.before(self.objective.begins(step))
            before = [None] * len(batches) if states is None else [*states]
            layers: dict[str, float] = {}
            try:
                if self._looks_at(step + 1):
                    values, layers = MeasuredUpdate(learner.model, update)(batches, lr, states)
                else:
                    values = update(batches, lr, states)
            except NonFiniteError as error:
                parts = zip(batches, before, strict=True)
                found = (origin(learner, batch, self.precision, state) for batch, state in parts)
                where = next(filter(None, found), "")
                raise NonFiniteError(
                    f"step {step + 1}: {error} at learning rate {lr:.3g}{where}; this update was not made: {_REMEDY}"
                ) from None
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._state = replace(self._state, step=step + 1, tokens=(self._state.tokens or 0) + n_tokens)
        return {"train/lr": lr, **{f"train/{name}": value for name, value in values.items()}, **layers}

    def _log(self, values: Mapping[str, float], log: MetricsLog, display: Display) -> None:
        rate, state = self._watch.lap(), self._state
        record = {
            **self._position(),
            **values,
            "perf/tokens_per_second": rate,
            "perf/peak_bytes": state.peak_bytes,
        }
        log.append(record)
        seconds_per_step = (state.tokens or 0) / state.step / rate if rate else 0.0
        display.trained(record, seconds_left=self._course.seconds_left(seconds_per_step))

    def _validate(self, learner: Learner, log: MetricsLog, display: Display, poll: Callable[[], None]) -> None:
        """Judges the model by held-out rows, and lets it write something."""
        settings, objective, step = self.run.train, self.objective, self._state.step
        display.doing("validating")
        rows = objective.held_out(settings.final_eval_tokens if self._course.is_over else settings.eval_tokens)
        rows_at_once = settings.batch_size // settings.grad_accumulation
        with self._naming_the_step():
            found = evaluate(learner, objective, rows, precision=self.precision, rows_at_once=rows_at_once, poll=poll)
        curves = {f"val/{name}": float(value) for name, value in found.items() if name not in objective.facts}
        record = self._position() | curves
        log.append(record)
        display.validated(record)
        self._state = replace(self._state, validation={"step": step, **found})
        if settings.sample_tokens:
            with self._naming_the_step(), evaluating(learner, self.precision):
                sample = objective.sample(learner.model)
            if sample is not None:
                self._state = replace(self._state, sample=sample)
                log.append({"step": step, "sample": sample})
        display.doing("training")

    @contextlib.contextmanager
    def _naming_the_step(self) -> Iterator[None]:
        try:
            yield
        except ArithmeticError as error:  # NonFiniteError, or that of generation
            raise NonFiniteError(f"step {self._state.step}: after this update {error}: {_REMEDY}") from None

    def _say_what_changed(self) -> None:
        """Names what of machine and software is not as it was when the run was last at work."""
        if len(self._state.stretches) < 2:
            return
        before, now = self._state.stretches[-2:]
        changed = [
            f"{_CONDITIONS[key]} {before.get(key)} -> {now.get(key)}"
            for key in _CONDITIONS
            if before.get(key) != now.get(key)
        ]
        if changed:
            warnings.warn(
                f"this run goes on under other conditions ({', '.join(changed)}); run.json lists them",
                RuntimeWarning,
                stacklevel=2,
            )

    def _position(self) -> dict[str, Any]:
        """What every line of metrics begins with."""
        return {"step": self._state.step, "tokens": self._state.tokens, "seconds": self._watch.seconds}

    def _experiment(self) -> dict[str, Any]:
        """What must be the same before and after a resume; logging, device and the like may change."""
        run = self.run.to_dict()
        # a schedule that falls knows where it ends: if that were later, it would have been another run from the start
        kind = "seconds" if self.run.train.seconds else "steps"
        length = {} if self.run.optim.schedule == "constant" else {f"schedule_{kind}": run["train"][kind]}
        return {
            "seed": self.run.seed,
            "objective": self.objective.experiment(),
            "data": {"digest": self.objective.data.digest},
            "train": {key: run["train"][key] for key in ("batch_size", "seq_len")},
            "optim": run["optim"] | {"lr": self.peak_lr} | length,
            "model": self.model_config.to_dict(),
        }

    def _run_record(self, verdict: Mapping[str, Any] | None) -> dict[str, Any]:
        run = self.run.to_dict()
        origin = {
            **provenance(self.device, self._command),
            "precision": self.precision.name,
            "precision_reason": self.precision.reason,
            "bf16_speedup": self.precision.speedup,
            "peak_memory_method": PeakMemory.method_on(self.device),
        }
        stretch = {"from_step": self._first_step, **{key: origin[key] for key in ("started", "command", *_CONDITIONS)}}
        if self._turns.runs:
            stretch["in_turns_with"] = self._turns.runs
        self._state = replace(self._state, stretches=[*self._state.stretches, stretch])
        return {
            "name": self._directory.path.name,
            **self._facts,
            "objective": self.objective.experiment(),
            "score": self.objective.score.to_dict(),
            "config": run | {"optim": run["optim"] | {"lr": self.peak_lr}},
            "model": self.model_config.to_dict(),
            "corpus": self.objective.data.summary(),
            "resumed_from_step": self._first_step or None,
            "stretches": self._state.stretches,
            "backends": self._backends_run() or None,
            "doctor": verdict,
            "provenance": origin,
        }

    def _result(self, status: str, error: str | None) -> dict[str, Any]:
        state, score = self._state, self.objective.score
        metrics = {"loss": None, score.name: None, **(state.validation or {})}
        return {
            **self._facts,
            "status": status,
            "error": error,
            "score": score.name,
            **{f"val_{name}": value for name, value in metrics.items() if name != "step"},
            "tokens": state.tokens,
            "steps": state.step,
            "train_flops": None if state.tokens is None else self._facts["flops_per_token"] * state.tokens,
            "train_seconds": self._watch.seconds,
            "tokens_per_second": self._watch.tokens_per_second,
            "peak_bytes": state.peak_bytes,
            "precision": self.precision.name,
            "device": self.device.type,
            "backend": self._backends_run(),
            "corpus_digest": self.objective.data.digest,
            "sample": state.sample,
            **self._found,
        }

    def _backends_run(self) -> dict[str, list[str]]:
        """The backends that ran so far, by operation, before a resume too."""
        before, now = self._state.backends, self._backends
        ops = sorted({*before, *now})
        return {op: list(dict.fromkeys([*before.get(op, ()), *now.get(op, ())])) for op in ops}


@contextlib.contextmanager
def _losing_no_step(save: Callable[[], None]) -> Iterator[None]:
    """An evaluation that fails costs no training: the next start goes on from where it was."""
    try:
        yield
    except NonFiniteError:  # from such weights no run can go on
        raise
    except Exception:
        save()
        raise
