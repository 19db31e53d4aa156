"""The trainer: the same experiment for every model. It never names an architecture.

The position in the data is the step number, so a run continues exactly from (step, weights, optimiser, generators).
Everything a run leaves is in its directory OUT/NAME; benchmarks read nothing else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from .. import archs
from ..archs.seq2seq import Seq2Seq
from ..kernels.dispatch import record_backends
from . import checkpoint
from .config import CUSTOM, RunConfig, flatten
from .data import Corpus, check_lengths, load_corpus, train_batch, val_windows
from .evaluate import Evaluator, document_inputs
from .files import read_json, write_json
from .health import apply_verdict
from .optim import adamw, learning_rate, set_learning_rate
from .pairs import Pair, PairCorpus, PairEvaluator, pair_inputs, train_pairs, val_pairs
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
from .step import Batch, PairBatch, accumulate_gradients
from .warm_up import warm_up

__all__ = ["NonFiniteError", "Outcome", "ResumeError", "Trainer", "train"]


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is not finite; the update was not made."""


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
    """Loads the corpus, trains and evaluates one model, and writes its run directory.

    Raises:
        ValueError: if the run cannot start as asked for; what the directory holds is left as it is.
    """
    return Trainer(run, load_corpus(run.data, progress=sys.stderr.isatty()), command=command).fit()


class Trainer:
    """One run: a model, a corpus, a directory. Made to be used once."""

    def __init__(
        self,
        run: RunConfig,
        corpus: Corpus,
        *,
        command: Sequence[str] = (),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """Checks everything that can be checked without touching the run directory or much memory.

        Args:
            run: the configuration.
            corpus: what run.data describes.
            command: what the user typed, for run.json.
            clock: seconds, for the throughput figures.

        Raises:
            ValueError: if model, data, device and lengths do not fit together.
        """
        has_pairs = isinstance(corpus, PairCorpus)
        self.model_config = run.model.configure(corpus.tokenizer.vocab_size)
        _check_kind(self.model_config, has_pairs)
        # a model is read as far as its positions go
        position_len = 0 if has_pairs else min(run.train.position_len, self.model_config.max_positions or sys.maxsize)
        if has_pairs:
            corpus.check_lengths(run.train.seq_len)
        else:
            check_lengths(corpus, run.train.seq_len)
        if len(corpus.val) <= position_len:
            raise ValueError(
                f"train.position_len={position_len} is too long for a validation split of {len(corpus.val)} "
                f"tokens: shorten it, set it to 0, or hold out more with --data.val-fraction"
            )
        if run.train.threads is not None:
            torch.set_num_threads(run.train.threads)
        self.run = run
        self.corpus = corpus
        self.device = choose_device(run.train.device)
        self.precision = choose_precision(run.train.precision, self.device)
        self.peak_lr = _peak_learning_rate(run)
        self._command = command
        self._clock = clock
        self._separator = corpus.separator if run.data.packing == "reset" else None
        self._windows, self._final_windows = (
            self._held_out(n) for n in (run.train.eval_tokens, run.train.final_eval_tokens)
        )
        self._long_windows = None
        if position_len:
            self._long_windows = val_windows(corpus, position_len, run.train.final_eval_tokens)

        sketch = archs.build(self.model_config, device="meta")
        state = sketch.init_state(1, run.train.seq_len, device="meta")
        lengths = corpus.mean_lengths() if has_pairs else (run.train.seq_len,)
        self._facts = {
            **_names(run),
            "seed": run.seed,
            "n_params": sketch.n_params,
            "n_active_params": sketch.n_active_params,
            "flops_per_token": sketch.training_flops_per_token(*lengths),
            "state_bytes": sum(part.nbytes for part in state if part is not None),
        }
        self._step = self._first_step = self._tokens = 0
        self._saved_step = -1
        self._validation: dict[str, Any] | None = None
        self._sample: str | None = None
        self._positions: list[dict[str, Any]] | None = None
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
        if self.model_config.kind != "seq2seq":  # its toy speaks of one sequence
            warm_up(self.model_config, self.device)
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
        self.corpus.tokenizer.save(directory / "tokenizer.json")
        torch.manual_seed(run.seed)
        model = archs.build(self.model_config, device=self.device)
        optimizer = adamw(model, run.optim)
        if start is not None:
            checkpoint.restore(start, model=model, optimizer=optimizer)
        options: dict[str, Any] = {
            "model": model,
            "tokenizer": self.corpus.tokenizer,
            "device": self.device,
            "autocast": lambda: self.precision.autocast(self.device),
            "reset": self._separator is not None,
            "max_tokens": run.train.batch_size * run.train.seq_len // run.train.grad_accumulation,
            "poll": poll,
        }
        evaluator = Evaluator(**options)
        if isinstance(self.corpus, PairCorpus):
            evaluator = PairEvaluator(**options, example=self.corpus.val_pairs[0][0])
        with contextlib.closing(MetricsLog(directory, first_step=self._step)) as log:
            try:
                while True:
                    if self._due(run.train.eval_every) and (self._validation or {}).get("step") != self._step:
                        self._validate(evaluator, log, display)
                    if self._due(run.train.checkpoint_every):
                        self._save(model, optimizer)
                    if self._step == run.train.steps:
                        break
                    poll()
                    values = self._update(model, optimizer)
                    self._peak_bytes = max(self._peak_bytes or 0, memory.peak_bytes())
                    if self._step == self._first_step + 1:
                        record = read_json(directory / "run.json")
                        write_json(directory / "run.json", record | {"backends": _lists(backends)})
                    if self._step == 1 or self._due(run.train.log_every):
                        self._log(values, log, display)
                if self._long_windows is not None:
                    display.doing("loss by position")
                    self._positions = evaluator.by_position(self._long_windows)
            except Interrupted:
                self._save(model, optimizer)
                raise

    def _update(self, model: archs.LanguageModel | Seq2Seq, optimizer: torch.optim.Optimizer) -> dict[str, float]:
        """Makes one update and returns its metrics.

        Raises:
            NonFiniteError: before the update, if the loss or the gradient is not finite.
        """
        run = self.run
        lr = learning_rate(self._step, peak=self.peak_lr, steps=run.train.steps, config=run.optim)
        set_learning_rate(optimizer, lr)
        n_tokens = self._n_targets(self._step)
        with self._watch.step(n_tokens):
            parts = self._pair_parts() if isinstance(self.corpus, PairCorpus) else self._window_parts()
            loss, aux, norm = accumulate_gradients(model, parts, precision=self.precision, clip=run.optim.clip)
            # All: a NaN weight can leave the gradients finite, and a finite loss can have an infinite gradient.
            if not (math.isfinite(loss) and math.isfinite(aux) and math.isfinite(norm)):
                raise NonFiniteError(
                    f"step {self._step + 1}: the loss is {loss:.4g} and the gradient norm {norm:.4g} "
                    f"at learning rate {lr:.3g}; this update was not made: try a lower --optim.lr or a longer "
                    f"--optim.warmup"
                )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
        self._step += 1
        self._tokens += n_tokens
        return {"train/loss": loss, "train/aux_loss": aux, "train/lr": lr, "train/grad_norm": norm}

    def _held_out(self, max_tokens: int) -> Any:
        """What the evaluator validates on."""
        if isinstance(self.corpus, PairCorpus):
            return val_pairs(self.corpus, max_tokens)
        return val_windows(self.corpus, self.run.train.seq_len, max_tokens)

    def _window_parts(self) -> list[Batch]:
        size = {"batch_size": self.run.train.batch_size, "seq_len": self.run.train.seq_len}
        batch = train_batch(self.corpus, seed=self.run.seed, step=self._step, **size)
        parts = np.split(batch, self.run.train.grad_accumulation)
        return [document_inputs(part, self.device, separator=self._separator) for part in parts]

    def _pair_parts(self) -> list[PairBatch]:
        pairs, rows = self._drawn_pairs(self._step), self.run.train.batch_size // self.run.train.grad_accumulation
        parts = (pairs[i : i + rows] for i in range(0, len(pairs), rows))
        return [pair_inputs(part, self.device, separator=self.corpus.separator) for part in parts]

    def _drawn_pairs(self, step: int) -> list[Pair]:
        assert isinstance(self.corpus, PairCorpus)
        return train_pairs(self.corpus, seed=self.run.seed, step=step, batch_size=self.run.train.batch_size)

    def _n_targets(self, step: int) -> int:
        """Tokens that the update of a step predicts."""
        if isinstance(self.corpus, PairCorpus):
            return sum(len(target) for _, target in self._drawn_pairs(step))
        return self.run.train.batch_size * self.run.train.seq_len

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

    def _validate(self, evaluator: Evaluator, log: MetricsLog, display: Display) -> None:
        display.doing("validating")
        found = evaluator.validate(self._final_windows if self._step == self.run.train.steps else self._windows)
        record = {**self._position(), "val/loss": found.loss, "val/bits_per_byte": found.bits_per_byte}
        log.append(record)
        display.validated(record)
        self._validation = {
            "step": self._step,
            "loss": found.loss,
            "bits_per_byte": found.bits_per_byte,
            "n_bytes": found.n_bytes,
        }
        if self.run.train.sample_tokens:
            self._sample = evaluator.sample(self.run.train.sample_tokens)
            log.append({"step": self._step, "sample": self._sample})
        display.doing("training")

    def _save(self, model: archs.LanguageModel, optimizer: torch.optim.Optimizer) -> None:
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
            "data": {"digest": self.corpus.digest, "packing": run.data.packing},
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
        self._tokens = sum(map(self._n_targets, range(self._step)))

    def _run_record(self, peak_memory_method: str) -> dict[str, Any]:
        run = self.run
        return {
            "name": run.directory.name,
            **self._facts,
            "config": run.to_dict() | {"optim": run.to_dict()["optim"] | {"lr": self.peak_lr}},
            "model": self.model_config.to_dict(),
            "corpus": self.corpus.summary(),
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
            "val_bits_per_byte": validation.get("bits_per_byte"),
            "val_loss": validation.get("loss"),
            "val_bytes": validation.get("n_bytes"),
            "tokens": position["tokens"],
            "steps": position["step"],
            "train_seconds": position["seconds"],
            "tokens_per_second": self._watch.tokens_per_second,
            "peak_bytes": self._peak_bytes,
            "precision": self.precision.name,
            "device": self.device.type,
            "backend": _lists(backends),
            "corpus_digest": self.corpus.digest,
            "position_bits_per_byte": self._positions,
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


def _check_kind(config: archs.ModelConfig, has_pairs: bool) -> None:
    """Raises ValueError unless a model of this kind can learn from such data by predicting the next token."""
    takes_source = config.kind == "seq2seq"
    if takes_source and not has_pairs:
        raise ValueError("this model reads a source and writes a target: give pairs with --data.rows pairs")
    if has_pairs and not takes_source:
        raise ValueError("data.rows=pairs are for models that read a source, which this one does not: give documents")
    if config.kind == "encoder":
        raise ValueError(
            "this model is an encoder, in which a token sees those to come, the answers to predicting the next one: "
            "train a causal model"
        )


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
