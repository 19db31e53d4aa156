"""Speed and memory of one model at one context length, in this process: ours, one of transformers', or any module.

Commands measure each cell in a process of its own (`worker.py`); `measure` does it here, for scripts.
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import inspect
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, Self, cast

import numpy as np
import torch
from torch import Tensor, nn

from ...archs import LanguageModel, LMLoss, Seq2Seq
from ...archs.decoding import Decoder
from ...archs.mixer import State
from ...archs.state import States
from ...kernels.dispatch import record_backends
from ...train.config import OptimConfig
from ...train.learner import Learner, Update
from ...train.objectives.next_token import RandomTokens
from ...train.optim import adamw
from ...train.runtime import PeakMemory, Precision, choose_precision, is_out_of_memory, keep_freed_memory
from ...train.verdict import apply_verdict
from ..harness.effort import Effort
from ..harness.timing import quantiles, rounds, timed
from .options import MeasureConfig, Phase

__all__ = ["Bench", "Measurement", "measure"]

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
    seconds: float
    """Time on the wall of one repeat: median."""
    cpu_seconds: float
    """Processor time of one repeat, all threads together: mean."""
    load: float | None
    """Processors that other processes kept busy meanwhile, on average; None where the system does not tell."""
    disturbed: bool
    """Whether something else took a share of the machine that makes the speed doubtful."""
    peak_bytes: int
    """Most memory above what the process used before the model was built."""
    peak_method: str
    state_bytes: int | None
    """State of one sequence after the context; None where the model keeps none."""
    backend: dict[str, list[str]]
    """Backends that ran, by operation of ours."""


def measure(
    model: nn.Module,
    phase: Literal["train", "prefill", "decode"],
    context_len: int,
    *,
    batch_size: int = 1,
    vocab_size: int | None = None,
    precision: Literal["auto", "fp32", "bf16"] = "auto",
    decode_tokens: int = 32,
    time_box: float = 0.5,
    min_repeats: int = 3,
) -> Measurement:
    """Measures a model as `crossover bench context` does, but in this process and where the model is.

        from crossover import build
        from crossover.benchmarks import measure

        print(measure(build("mamba", d_model=64, n_layers=2), "decode", 512).tokens_per_second)

    Args:
        model: any module from tokens (B, L) to logits (B, L, V), or to an output with `.logits`: a language model of
            ours, one of transformers', or your own. It is left as it was; its training step has a learning rate of 0.
        phase: "train", forward, backward and optimizer step; "prefill", reading prompts, of which the last position's
            logits are needed, a model of ours in the chunks of LanguageModel.prefill; "decode", one token at a time
            after a prompt, which needs a model of ours or of transformers', for the state that it carries on.
        context_len: length of the sequences or of the prompt, in tokens.
        batch_size: sequences at once.
        vocab_size: tokens are drawn from as many; that of the model when None.
        precision: arithmetic, as in `crossover train`.
        decode_tokens: tokens of each repeat of "decode".
        time_box: seconds of the repeats, longer where min_repeats take longer.
        min_repeats: fewest repeats after the warm-up.

    Raises:
        ValueError: if the model cannot do the phase, or reads fewer tokens.
    """
    known = ("train", "prefill", "decode")
    if phase not in known:
        raise ValueError(f"phase={phase!r} is none of {', '.join(known)}")
    for name, value in (("context_len", context_len), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    driver = _driver(model, phase)
    held = list({id(t): t for t in (*model.parameters(), *model.buffers())}.values())
    device = held[0].device if held else torch.device("cpu")

    def bench(length: int, box: float, least: int) -> Measurement:
        settings = MeasureConfig(
            tokens_per_batch=batch_size * length,
            prompts=batch_size,
            decode_tokens=decode_tokens,
            time_box=box,
            min_repeats=least,
        )
        found = Bench(
            driver,
            length,
            settings,
            vocab_size=_vocab_size(model) if vocab_size is None else vocab_size,
            device=device,
            precision=choose_precision(precision, device),
            memory=PeakMemory(device),
            held_bytes=sum(tensor.nbytes for tensor in held),
        )
        return getattr(found, phase)()

    keep_freed_memory()
    apply_verdict()
    with _left_as_it_was(model, device):
        try:
            bench(min(context_len, 32), 1e-9, 1)  # libraries and compiled kernels are no memory of the model's
            return bench(context_len, time_box, min_repeats)
        except IndexError as error:
            raise ValueError(f"{type(model).__name__} cannot read {context_len} tokens ({error})") from error


@contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    grads = {parameter: parameter.grad for parameter in model.parameters()}
    try:
        for parameter in grads:
            parameter.grad = None
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, grad in grads.items():
            parameter.grad = grad


def _vocab_size(model: nn.Module) -> int:
    found = getattr(getattr(model, "config", None), "vocab_size", None)
    if found is None:
        found = next((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), None)
    if found is None:
        raise ValueError(f"{type(model).__name__} does not say how many tokens there are: give vocab_size")
    return int(found)


class _Driver:
    """How a model of any kind is trained and reads; what it carries on after a prompt is its state."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @property
    def learns(self) -> nn.Module:
        """The model as objectives call it: with targets, for a loss."""
        return _WithLoss(self.model)

    def read(self, tokens: Tensor, max_len: int, dtype: torch.dtype | None) -> Any:
        """Reads prompts (B, L), up to the logits of the last position; returns the state, if any."""
        _logits(self.model(tokens))

    def stored_in(self, dtype: torch.dtype) -> Self:
        """The same for a copy of the model with its weights in another precision."""
        return type(self)(copy.deepcopy(self.model).to(dtype))

    def decoder(self, state: Any) -> Callable[[Tensor], object]:
        """A function that reads one more token of each, (B, 1), with every call; it takes the state over."""
        raise AssertionError("refused by _driver")

    def first_token(self, tokens: Tensor, max_len: int, dtype: torch.dtype | None) -> Tensor:
        """Reads prompts (B, L) and returns the likeliest token after each, (B,)."""
        return _logits(self.model(tokens))[:, -1].argmax(-1)

    def copied(self, state: Any) -> Any:
        """A state that shares no memory with the given one."""
        return copy.deepcopy(state)

    def selected(self, state: Any, rows: Sequence[int]) -> Any:
        """The state of some of its sequences, with repeats allowed."""
        raise ValueError(f"states of {type(self.model).__name__} cannot be taken apart")

    def n_bytes(self, state: Any) -> int | None:
        """Bytes of a state."""
        return None if state is None else sum(tensor.nbytes for tensor in _tensors(state))

    def declared_bytes(self, batch_size: int, context_len: int, dtype: torch.dtype | None) -> int | None:
        """What the state should hold after a context, where the model says so."""
        return None


class _Ours(_Driver):
    model: LanguageModel

    @property
    def learns(self) -> nn.Module:
        return self.model

    def read(self, tokens: Tensor, max_len: int, dtype: torch.dtype | None) -> list[State]:
        state = self.model.init_state(tokens.shape[0], max_len, device=tokens.device, dtype=dtype)
        _, after = self.model.prefill(tokens, state)
        return after

    def decoder(self, state: list[State]) -> Callable[[Tensor], object]:
        decoder = Decoder(self.model, state)
        decoder.prepare()
        return lambda tokens: decoder(tokens[:, 0])

    def first_token(self, tokens: Tensor, max_len: int, dtype: torch.dtype | None) -> Tensor:
        state = self.model.init_state(tokens.shape[0], max_len, device=tokens.device, dtype=dtype)
        logits, _ = self.model.prefill(tokens, state)
        return logits.argmax(-1)

    def copied(self, state: Sequence[State]) -> list[State]:
        return [layer.clone() for layer in state]

    def selected(self, state: Sequence[State], rows: Sequence[int]) -> list[State]:
        return list(States(state).select(rows))

    def n_bytes(self, state: Sequence[State]) -> int:
        return sum(layer.nbytes for layer in state)

    def declared_bytes(self, batch_size: int, context_len: int, dtype: torch.dtype | None) -> int:
        return self.n_bytes(self.model.init_state(batch_size, context_len, device="meta", dtype=dtype))


class _Transformers(_Driver):
    """One of transformers', whose state is a cache that it makes itself; models differ in what they call it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        options = inspect.signature(model.forward).parameters
        self._cache = next((name for name in ("past_key_values", "cache_params") if name in options), None)
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in options else {}

    @property
    def has_cache(self) -> bool:
        return self._cache is not None

    def read(self, tokens: Tensor, max_len: int, dtype: torch.dtype | None) -> Any:
        return self._call(tokens)

    def decoder(self, state: Any) -> Callable[[Tensor], object]:
        def step(tokens: Tensor) -> None:
            nonlocal state
            assert self._cache is not None
            state = self._call(tokens, **{self._cache: state})
            if state is None:
                raise ValueError(f"{type(self.model).__name__} gives no cache back, without which it cannot decode")

        return step

    def _call(self, tokens: Tensor, **options: Any) -> Any:
        if self._cache is None:
            _logits(self.model(tokens, **self._last))
            return None
        out = self.model(tokens, use_cache=True, **self._last, **options)
        _logits(out)
        return getattr(out, self._cache, None)


class _WithLoss(nn.Module):
    """Gives any model a loss, as ours have it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor, state: None = None, *, targets: Tensor, starts: None = None) -> LMLoss:
        logits = _logits(self.model(tokens))
        loss = nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
        return LMLoss(loss, torch.zeros((), device=loss.device))


def _driver(model: nn.Module, phase: str) -> _Driver:
    """What knows how to drive a model.

    Raises:
        ValueError: if it cannot do the phase.
    """
    name = type(model).__name__
    transformers = sys.modules.get("transformers")  # a model of theirs has imported it
    if isinstance(model, Seq2Seq) or getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{name} has two lengths, of a source and of a target, where one context is measured")
    if isinstance(model, LanguageModel) and model.config.kind == "decoder":
        return _Ours(model)
    if transformers is not None and isinstance(model, transformers.PreTrainedModel):
        driver = _Transformers(model)
        if phase == "decode" and not driver.has_cache:
            raise ValueError(f"{name} takes no cache, without which it cannot decode: measure train or prefill")
        return driver
    if phase == "decode":
        raise ValueError(
            f"decode needs the state that a model carries on, and how {name} does that is not known: "
            "measure train or prefill, or a causal language model of crossover or of transformers"
        )
    if phase == "train" and not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"{name} has no parameters to train")
    return _Driver(model)


def _logits(out: Any) -> Tensor:
    """The logits of whatever a model returns."""
    logits = getattr(out, "logits", out[0] if isinstance(out, tuple) and out else out)
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        shape = f" of shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else ""
        raise ValueError(f"the model returns {type(logits).__name__}{shape} where logits (B, L, V) are needed")
    return logits


def _tensors(value: Any, seen: set[int] | None = None) -> Iterator[Tensor]:
    """The tensors inside a cache, each once."""
    seen = set() if seen is None else seen
    if id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Tensor):
        yield value
        return
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    for part in (*inner, *getattr(value, "__dict__", {}).values()):
        yield from _tensors(part, seen)


def _with_state(found: Measurement, n_bytes: int | None) -> Measurement:
    """Adds the state's bytes, of all sequences, where the model could not say before."""
    if found.state_bytes is not None or n_bytes is None:
        return found
    return dataclasses.replace(found, state_bytes=n_bytes // found.batch_size)


class Bench:
    """One model at one context length; each phase is a method that returns its Measurement."""

    def __init__(
        self,
        driver: _Driver,
        context_len: int,
        settings: MeasureConfig,
        *,
        vocab_size: int,
        device: torch.device,
        precision: Precision,
        memory: PeakMemory,
        held_bytes: int = 0,
    ) -> None:
        """Takes a model on its device.

        Args:
            driver: of the model.
            context_len: length of sequences and prompts.
            settings: how to measure; `tokens_per_batch` is given.
            vocab_size: tokens are drawn from as many.
            device: where the model is.
            precision: arithmetic.
            memory: counts from before the model was built, or from where it had been built.
            held_bytes: what the model holds of its own, where `memory` does not count it.
        """
        self.driver, self.context_len, self.settings = driver, context_len, settings
        self.device, self.precision, self.vocab_size = device, precision, vocab_size
        self.memory, self.held_bytes = memory, held_bytes
        assert settings.tokens_per_batch is not None
        batch_size = max(1, settings.tokens_per_batch // context_len)
        self.batch_size = {"train": batch_size, "prefill": settings.prompts, "decode": settings.prompts}
        # Under autocast the activations that a state keeps are bf16; recurrent states stay in float32.
        self.state_dtype = torch.bfloat16 if precision.name == "bf16" else None
        self.state_bytes = self._declared_bytes(1)
        self._cpu_seconds = 0.0

    @classmethod
    def of(cls, lm: LanguageModel, context_len: int, settings: MeasureConfig, **options: Any) -> Bench:
        """The bench of a language model of ours; options as above."""
        return cls(_Ours(lm), context_len, settings, vocab_size=lm.config.vocab_size, **options)

    def measure(self, phase: str) -> Measurement:
        """Measures the phase of this name."""
        phases: dict[Phase, Callable[[], Measurement]] = {
            "decode": self.decode,
            "first_token": self.first_token,
            "prefill": self.prefill,
            "long_prompt": self.long_prompt,
            "decode_many": self.decode_many,
            "train": self.train,
            "long_answer": self.long_answer,
        }
        return phases[cast(Phase, phase)]()

    def train(self) -> Measurement:
        """Forward, backward and optimizer step."""
        batch_size, config, model = self.batch_size["train"], OptimConfig(), self.driver.learns
        objective = RandomTokens(vocab_size=self.vocab_size, batch_size=batch_size, seq_len=self.context_len)
        batch = objective.collate(objective.rows(0)).to(self.device)
        update = Update(
            Learner(model, objective),
            objective,
            adamw(model, config),
            precision=self.precision,
            clip=config.clip,
        )
        model.train()
        return self._measure(
            lambda: self._timed(lambda: update([batch], 0.0)),
            batch_size,
            batch_size * self.context_len,
            min_repeats_if_slow=_MIN_REPEATS_OF_SLOW_TRAINING,
        )

    @torch.no_grad()
    def prefill(self) -> Measurement:
        """Reads prompts into an empty state; of the logits only the last position's are needed."""
        batch_size = self.batch_size["prefill"]
        tokens = self._tokens(batch_size, self.context_len)
        self.driver.model.eval()
        held: int | None = 0

        def read() -> None:
            nonlocal held
            held = self.driver.n_bytes(self._prefilled(tokens, self.context_len))

        found = self._measure(lambda: self._timed(read), batch_size, batch_size * self.context_len)
        declared = self._declared_bytes(batch_size)
        if declared is not None and held != declared:
            raise ValueError(
                f"the state holds {held} bytes after {self.context_len} tokens where init_state says {declared}"
            )
        return _with_state(found, held)

    @torch.no_grad()
    def decode(self) -> Measurement:
        """Continues prompts one token at a time; every repeat starts from a copy of the state after the prompt."""
        batch_size, n_tokens = self.batch_size["decode"], self.settings.decode_tokens
        driver, spare_bytes = self._in_use()
        prompts = self._tokens(batch_size, self.context_len)
        snapshot = driver.read(prompts, self.context_len + n_tokens, self.state_dtype)
        n_bytes = driver.n_bytes(snapshot)
        if n_bytes is None:
            raise ValueError(f"{type(driver.model).__name__} gives no cache back, without which it cannot decode")
        found = self._measure(
            lambda: self._continued(driver, driver.copied(snapshot), batch_size),
            batch_size,
            batch_size * n_tokens,
            spare_bytes=n_bytes + spare_bytes,
        )
        return _with_state(found, n_bytes)

    @torch.no_grad()
    def decode_many(self) -> Measurement:
        """The same for the largest power of two of sequences that fit into the memory, at most `max_batch`.

        One prompt is read, and every sequence goes on from its state. What does not fit by the size of its states is
        not tried, and what runs out of memory is tried with half as many.
        """
        n_tokens, limit = self.settings.decode_tokens, self.settings.memory_limit
        driver, spare_bytes = self._in_use()
        prompt = self._tokens(1, self.context_len)
        snapshot = driver.read(prompt, self.context_len + n_tokens, self.state_dtype)
        n_bytes = driver.n_bytes(snapshot)
        if n_bytes is None:
            raise ValueError(f"{type(driver.model).__name__} gives no cache back, without which it cannot decode")
        batch_size = 1
        while 2 * batch_size <= self.settings.max_batch and (limit is None or 2 * batch_size * n_bytes <= limit):
            batch_size *= 2
        while True:
            self.batch_size["decode_many"] = batch_size
            rows, n_rows = [0] * batch_size, batch_size
            try:
                found = self._measure(
                    lambda rows=rows, n_rows=n_rows: self._continued(driver, driver.selected(snapshot, rows), n_rows),
                    batch_size,
                    batch_size * n_tokens,
                    spare_bytes=n_bytes + spare_bytes,
                )
                return _with_state(found, batch_size * n_bytes)
            except (RuntimeError, MemoryError) as error:
                if batch_size == 1 or not is_out_of_memory(error):
                    raise
            batch_size //= 2

    @torch.no_grad()
    def first_token(self) -> Measurement:
        """From a prompt to the first token of its answer, the likeliest; `seconds` is what one waits for it."""
        driver, spare_bytes = self._in_use()
        prompt = self._tokens(1, self.context_len)

        def answer() -> None:
            driver.first_token(prompt, self.context_len, self.state_dtype).tolist()

        return self._measure(lambda: self._timed(answer), 1, self.context_len, spare_bytes=spare_bytes)

    def long_prompt(self) -> Measurement:
        """A whole request of the context's length, most of which is its prompt; tokens of both parts count."""
        return self._request(max(1, self.context_len - self._short_part))

    def long_answer(self) -> Measurement:
        """A whole request of the context's length, most of which is its answer; tokens of both parts count."""
        return self._request(self._short_part)

    @property
    def _short_part(self) -> int:
        return max(1, min(self.settings.decode_tokens, self.context_len // 8))

    @torch.no_grad()
    def _request(self, prompt_len: int) -> Measurement:
        """Reads a prompt and writes the rest of the context, of one sequence; slow ones are done once."""
        driver, spare_bytes = self._in_use()
        prompt = self._tokens(1, prompt_len)

        def serve(n_tokens: int) -> float:
            def go() -> None:
                state = driver.read(prompt, prompt_len + n_tokens, self.state_dtype)
                step = driver.decoder(state)
                for i in range(n_tokens):
                    step(prompt[:, i % prompt_len][:, None])

            return self._timed(go)

        n_answer = self.context_len - prompt_len
        return self._measure(
            lambda: serve(n_answer),
            1,
            self.context_len,
            spare_bytes=spare_bytes,
            min_repeats_if_slow=1,
            warm_up=lambda: serve(min(n_answer, 2)) * max(n_answer, 2) / 2,
        )

    def _continued(self, driver: _Driver, state: Any, batch_size: int) -> float:
        """Takes states that nobody else holds further by `decode_tokens` tokens; returns the seconds."""
        tokens = self._tokens(batch_size, self.settings.decode_tokens)
        step = driver.decoder(state)

        def go() -> None:
            for i in range(tokens.shape[1]):
                step(tokens[:, i : i + 1])

        return self._timed(go)

    def _in_use(self) -> tuple[_Driver, int]:
        """The model as it is served, and bytes that are held only because the one that was trained is kept beside it.

        In bf16 the weights are stored so, as those of a model that is in use: autocast would convert all of them for
        every token.
        """
        driver, spare_bytes = self.driver, 0
        if self.precision.name == "bf16":
            driver = driver.stored_in(torch.bfloat16)
            spare_bytes = sum(parameter.nbytes for parameter in self.driver.model.parameters())
        driver.model.eval()
        return driver, spare_bytes

    def _timed(self, work: Callable[[], object]) -> float:
        """Seconds of work on the wall; its processor time is added up beside them."""
        begin = time.process_time()
        seconds = timed(self.device, work)
        self._cpu_seconds += time.process_time() - begin
        return seconds

    def _prefilled(self, tokens: Tensor, max_len: int) -> Any:
        with self.precision.autocast(self.device):
            return self.driver.read(tokens, max_len, self.state_dtype)

    def _declared_bytes(self, batch_size: int) -> int | None:
        return self.driver.declared_bytes(batch_size, self.context_len, self.state_dtype)

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
        warm_up: Callable[[], float] | None = None,
    ) -> Measurement:
        """Warms up and repeats.

        Args:
            run: does the work once and returns the seconds that count.
            batch_size: sequences that `run` works on.
            n_tokens: tokens that `run` works on.
            spare_bytes: held only for the sake of measuring; they do not count as peak.
            min_repeats_if_slow: the fewest repeats where the warm-up alone takes longer than the time box.
            warm_up: does less of the same, and returns about the seconds of `run`; `run` itself when None.
        """
        gc.collect()
        PeakMemory(self.device)  # gives back what earlier phases freed, and forgets their peak
        with record_backends() as used:
            warm_up_seconds = (warm_up or run)()
        box, least = self.settings.time_box, self.settings.min_repeats
        if min_repeats_if_slow is not None and warm_up_seconds > box:
            least = min(least, min_repeats_if_slow)
        self._cpu_seconds = 0.0
        with Effort() as effort:
            rates = [n_tokens / run() for _ in rounds(box, least=least)]
        low, median, high = quantiles(rates, (0.1, 0.5, 0.9) if len(rates) > 2 else (0, 0.5, 1))
        return Measurement(
            batch_size=batch_size,
            tokens_per_second=median,
            spread=(low, high),
            repeats=len(rates),
            seconds=n_tokens / median,
            cpu_seconds=self._cpu_seconds / len(rates),
            load=effort.load,
            disturbed=effort.is_disturbed(torch.get_num_threads(), on_cpu=self.device.type == "cpu"),
            peak_bytes=max(0, self.memory.peak_bytes() - spare_bytes) + self.held_bytes,
            peak_method=self.memory.method,
            state_bytes=self.state_bytes,
            backend={op: list(names) for op, names in sorted(used.items())},
        )
