"""Measures one architecture at one context length, in a process of its own.

Each cell is sent to the parent when its phase ends, so that what was measured is safe if the next one kills this
process.
"""

from __future__ import annotations

import gc
import resource
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...archs import LanguageModel, ModelConfig
from ...archs.mixer import State
from ...kernels.dispatch import KernelFallbackWarning, record_backends
from ...train.config import OptimConfig
from ...train.learner import Learner, Update
from ...train.objectives.next_token import RandomTokens
from ...train.optim import adamw
from ...train.runtime import (
    PeakMemory,
    Precision,
    choose_device,
    choose_precision,
    is_out_of_memory,
    keep_freed_memory,
)
from ...train.verdict import apply_verdict
from ...train.warm_up import warm_up
from ..harness.timing import quantiles, rounds, timed
from .jobs import ContextJob
from .options import MeasureConfig

__all__ = ["Bench", "Measurement", "limit_memory", "measure", "measure_phases"]

_MIN_REPEATS_OF_SLOW_TRAINING = 2


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """Speed and memory of one phase."""

    batch_size: int
    tokens_per_second: float
    """Median over the repeats."""
    spread: tuple[float, float]
    """Tenth and ninetieth percentile over the repeats, in tokens per second; lowest and highest of two."""
    repeats: int
    peak_bytes: int
    """Most memory above what the process used before the model was built."""
    peak_method: str
    state_bytes: int
    """State of one sequence after the context."""
    backend: dict[str, list[str]]


class Bench:
    """One model at one context length; each phase is a method that returns its Measurement."""

    def __init__(
        self,
        config: ModelConfig,
        context_len: int,
        settings: MeasureConfig,
        *,
        device: torch.device,
        precision: Precision,
    ) -> None:
        self.context_len, self.settings, self.device, self.precision = context_len, settings, device, precision
        self.memory = PeakMemory(device)  # what is used from here on belongs to the model
        torch.manual_seed(0)
        self.lm = LanguageModel(config).to(device)
        self.vocab_size = config.vocab_size
        assert settings.tokens_per_batch is not None
        batch_size = max(1, settings.tokens_per_batch // context_len)
        self.batch_size = {"train": batch_size, "prefill": settings.prompts, "decode": settings.prompts}
        # Under autocast the activations that a state keeps are bf16; recurrent states stay in float32.
        self.state_dtype = torch.bfloat16 if precision.name == "bf16" else None
        self.state_bytes = self._declared_bytes(1)

    def train(self) -> Measurement:
        """Forward, backward and optimizer step."""
        batch_size, config = self.batch_size["train"], OptimConfig()
        objective = RandomTokens(vocab_size=self.vocab_size, batch_size=batch_size, seq_len=self.context_len)
        batch = objective.collate(objective.rows(0)).to(self.device)
        update = Update(
            Learner(self.lm, objective),
            objective,
            adamw(self.lm, config),
            precision=self.precision,
            clip=config.clip,
        )
        self.lm.train()
        return self._measure(
            lambda: timed(self.device, lambda: update([batch], 1e-4)),
            batch_size,
            batch_size * self.context_len,
            min_repeats_if_slow=_MIN_REPEATS_OF_SLOW_TRAINING,
        )

    @torch.no_grad()
    def prefill(self) -> Measurement:
        """Reads prompts into an empty state; of the logits only the last position's are needed."""
        batch_size = self.batch_size["prefill"]
        tokens = self._tokens(batch_size, self.context_len)
        self.lm.eval()
        held = 0

        def read() -> None:
            nonlocal held
            held = _n_bytes(self._prefilled(tokens, self.context_len))

        found = self._measure(lambda: timed(self.device, read), batch_size, batch_size * self.context_len)
        declared = self._declared_bytes(batch_size)
        if held != declared:
            raise ValueError(
                f"the state holds {held} bytes after {self.context_len} tokens where init_state says {declared}"
            )
        return found

    @torch.no_grad()
    def decode(self) -> Measurement:
        """Continues prompts one token at a time; every repeat starts from a copy of the state after the prompt."""
        batch_size, n_tokens = self.batch_size["decode"], self.settings.decode_tokens
        tokens = self._tokens(batch_size, n_tokens)
        self.lm.eval()
        snapshot = self._prefilled(self._tokens(batch_size, self.context_len), self.context_len + n_tokens)

        def generate() -> float:
            state: list[State] | None = [layer.clone() for layer in snapshot]

            def go() -> None:
                nonlocal state
                with self.precision.autocast(self.device):
                    for i in range(n_tokens):
                        state = self.lm(tokens[:, i : i + 1], state).state

            return timed(self.device, go)

        return self._measure(generate, batch_size, batch_size * n_tokens, spare_bytes=_n_bytes(snapshot))

    def _prefilled(self, tokens: Tensor, max_len: int) -> list[State]:
        state = self.lm.init_state(tokens.shape[0], max_len, device=self.device, dtype=self.state_dtype)
        with self.precision.autocast(self.device):
            x, after, _ = self.lm.hidden(tokens, state)
            self.lm.logits(x[:, -1:])
        assert after is not None
        return after

    def _declared_bytes(self, batch_size: int) -> int:
        return _n_bytes(self.lm.init_state(batch_size, self.context_len, device="meta", dtype=self.state_dtype))

    def _tokens(self, batch_size: int, n_tokens: int) -> Tensor:
        drawn = np.random.default_rng(n_tokens).integers(0, self.vocab_size, (batch_size, n_tokens))
        return torch.from_numpy(drawn).to(self.device)

    def _measure(
        self,
        run: Callable[[], float],
        batch_size: int,
        n_tokens: int,
        *,
        spare_bytes: int = 0,
        min_repeats_if_slow: int | None = None,
    ) -> Measurement:
        """Warms up and repeats.

        Args:
            run: does the work once and returns the seconds that count.
            batch_size: sequences that `run` works on.
            n_tokens: tokens that `run` works on.
            spare_bytes: held only for the sake of measuring; they do not count as peak.
            min_repeats_if_slow: the fewest repeats where the warm-up alone takes longer than the time box.
        """
        gc.collect()
        PeakMemory(self.device)  # gives back what earlier phases freed, and forgets their peak
        with record_backends() as used:
            warm_up_seconds = run()
        box, least = self.settings.time_box, self.settings.min_repeats
        if min_repeats_if_slow is not None and warm_up_seconds > box:
            least = min(least, min_repeats_if_slow)
        rates = [n_tokens / run() for _ in rounds(box, least=least)]
        low, median, high = quantiles(rates, (0.1, 0.5, 0.9) if len(rates) > 2 else (0, 0.5, 1))
        return Measurement(
            batch_size=batch_size,
            tokens_per_second=median,
            spread=(low, high),
            repeats=len(rates),
            peak_bytes=max(0, self.memory.peak_bytes() - spare_bytes),
            peak_method=self.memory.method,
            state_bytes=self.state_bytes,
            backend={op: list(names) for op, names in sorted(used.items())},
        )


def _n_bytes(state: Sequence[State]) -> int:
    return sum(layer.nbytes for layer in state)


def measure(bench: Bench, phase: str) -> dict[str, Any]:
    """Measures one phase and returns what its cell says of it: status, numbers, reason of a failure."""
    try:
        found = {"decode": bench.decode, "prefill": bench.prefill, "train": bench.train}[phase]()
    except (RuntimeError, MemoryError, ValueError, KernelFallbackWarning) as error:
        # The message only: the exception's traceback keeps the tensors of the failed phase alive.
        message = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        if status == "failed":
            traceback.print_exc()
        known = {"batch_size": bench.batch_size[phase], "state_bytes": bench.state_bytes}
        return {"status": status, "error": message, **known}
    return {"status": "done", **vars(found)}


def limit_memory(limit: int, device: torch.device) -> None:
    """Makes allocations beyond `limit` bytes fail: of this process on the CPU, of this process on the GPU with CUDA.

    RLIMIT_DATA counts private writable memory. RLIMIT_AS would count reserved address space too, of which libraries
    take gigabytes without ever touching it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def measure_phases(job: ContextJob, phases: Sequence[str], parent: Connection) -> None:
    """Measures phases of a job one after the other, and sends the cell of each to the parent."""
    # A measurement must never be of a slower path than the one it names.
    warnings.simplefilter("error", KernelFallbackWarning)
    keep_freed_memory()
    apply_verdict()
    device = choose_device(job.device)
    torch.set_num_threads(job.threads)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # starts the thread pool, whose stacks are not the model's
    assert job.measure.memory_limit is not None
    limit_memory(job.measure.memory_limit, device)
    precision = choose_precision(job.precision, device)
    config = ModelConfig.from_dict(job.model)
    try:
        toy = RandomTokens(vocab_size=config.vocab_size, batch_size=8, seq_len=min(128, config.max_positions or 128))
        warm_up(config, toy, device, precision)  # what its libraries and compilers take for good is not the model's
        bench = Bench(config, job.context_len, job.measure, device=device, precision=precision)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:300]
        for phase in phases:
            parent.send(job.cell(phase, status="out_of_memory", error=reason))
        return
    for phase in phases:
        parent.send(job.cell(phase, **measure(bench, phase)))
