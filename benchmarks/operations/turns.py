"""What a model of ours does in a turn of a race: a training step, perhaps under the profiler, or a token decoded.

Another checkout of this repository takes part by running this very file: `crossover` is then that checkout. Hence the
imports by full name, and of nothing that is new.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from multiprocessing.connection import Connection
from typing import Any, TypeAlias

import torch
from crossover.archs import build
from crossover.train.config import OptimConfig
from crossover.train.optim import adamw
from crossover.train.runtime import choose_precision, keep_freed_memory
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

__all__ = [
    "VOCAB_SIZE",
    "Clock",
    "Task",
    "Work",
    "Works",
    "decoding",
    "model_of",
    "our_step",
    "our_works",
    "profiling",
    "serve",
    "timing",
    "window_of",
]

VOCAB_SIZE = 256

Task: TypeAlias = Mapping[str, Any]
"""A turn: `work`, `length` in tokens, `batch_size`, `threads`, and `burst`, its seconds where one call takes less."""

Clock: TypeAlias = Callable[[], float]

Work: TypeAlias = Callable[[Clock], float]
"""Does it once, and returns the seconds by the clock that count."""

Works: TypeAlias = Callable[[Task], tuple[Work, dict[str, Any]]]
"""Maps a task to what is done again and again, and what is to be said about it."""

_TOKENS = 64
"""Tokens that ours decodes before it begins again at the same place."""
_FIRST = 8
"""Tokens before them that do not count: their state is new memory, and not in any cache."""


def serve(works: Works, parent: Connection) -> None:
    """Takes a turn for each task that comes, and sends its seconds and what is to be said, until nothing more comes."""
    known = functools.lru_cache(maxsize=4)(lambda task: works(dict(task)))
    with contextlib.suppress(EOFError):  # the race is over
        while True:
            task = parent.recv()
            torch.set_num_threads(task["threads"])
            # on one thread other work on the machine does not count
            clock = time.process_time if task["threads"] == 1 else time.perf_counter
            work, facts = known(tuple((name, task[name]) for name in ("work", "length", "batch_size")))
            parent.send({"seconds": _turn(work, clock, task["burst"]), **facts})


def timing(work: Callable[[], object]) -> Work:
    """A work all of whose seconds count."""

    def once(clock: Clock) -> float:
        begin = clock()
        work()
        return clock() - begin

    return once


def profiling(work: Callable[[], object]) -> tuple[Work, dict[str, Any]]:
    """A work under PyTorch's profiler, and as "names" the seconds that each operator took in its last run.

    Those of an operator are without the operators that it calls in turn; outside of all is "step".
    """
    names: dict[str, float] = {}

    def once(clock: Clock) -> float:
        with profile(activities=[ProfilerActivity.CPU]) as found:
            begin = clock()
            with record_function("step"):
                work()
            seconds = clock() - begin
        names.clear()
        names.update((event.key, event.self_cpu_time_total / 1e6) for event in found.key_averages())
        return seconds

    return once, {"names": names}


def _turn(work: Work, clock: Clock, burst: float) -> float:
    """Seconds that count of one call: the median of a burst after a first call that gets the caches back from others.

    A call that fills the burst alone is the turn.
    """
    begin, first = clock(), work(clock)
    if clock() - begin >= burst:
        return first
    begin, found = clock(), [work(clock)]
    while clock() - begin < burst:
        found.append(work(clock))
    return statistics.median(found)


def our_works(arch: str, n_params: int) -> Works:
    """What our models do: "train", "profile", which is a training step under the profiler, and "decode"."""

    def works(task: Task) -> tuple[Work, dict[str, Any]]:
        if task["work"] in ("train", "profile"):
            lm = model_of(arch, n_params, task["length"])
            step = functools.partial(our_step(lm), window_of(task))
            work, facts = (timing(step), {}) if task["work"] == "train" else profiling(step)
            return work, {"n_params": lm.n_params, **facts}
        lm = model_of(arch, n_params, task["length"] + _TOKENS)
        work, facts = decoding(lm, task["length"])
        return work, {"n_params": lm.n_params, **facts}

    return works


def model_of(arch: str, n_params: int, length: int) -> Any:
    """Our model of a size; one with learned positions has at least as many."""
    torch.manual_seed(0)
    lm = build(arch, n_params=n_params, vocab_size=VOCAB_SIZE)
    if lm.config.max_positions is None or lm.config.max_positions >= length:
        return lm
    return build(arch, n_params=n_params, vocab_size=VOCAB_SIZE, max_positions=length)


def window_of(task: Task) -> Tensor:
    """Random tokens, (B, L + 1) int64."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(VOCAB_SIZE, (task["batch_size"], task["length"] + 1), generator=generator)


def our_step(lm: Any) -> Callable[[Tensor], object]:
    """The training step of our model on a window of tokens, (B, L + 1) int64, as the trainer takes it."""
    config, precision = OptimConfig(), choose_precision("fp32", torch.device("cpu"))
    optimizer = adamw(lm, config)
    try:
        from crossover.train.learner import Learner, Update
        from crossover.train.objectives.next_token import RandomTokens
    except ImportError:  # a checkout from before there were objectives
        return _earlier_step(lm, optimizer, precision)
    objective = RandomTokens(vocab_size=lm.config.vocab_size, batch_size=1, seq_len=1)
    update = Update(Learner(lm, objective), objective, optimizer, precision=precision, clip=config.clip)
    return lambda window: update([objective.collate(list(window.numpy()))], 1e-4)


def _earlier_step(lm: Any, optimizer: torch.optim.Optimizer, precision: Any) -> Callable[[Tensor], object]:
    from crossover.train.optim import set_learning_rate
    from crossover.train.step import accumulate_gradients  # pyright: ignore[reportMissingImports]

    set_learning_rate(optimizer, 1e-4)

    def step(window: Tensor) -> None:
        parts = [(window[:, :-1].contiguous(), window[:, 1:].contiguous(), None)]
        accumulate_gradients(lm, parts, precision=precision, clip=OptimConfig().clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(lm: Any, context_len: int) -> tuple[Work, dict[str, Any]]:
    """Decodes a token after so many, and says as "decode" whether the "modules" ran or a "compiled" step.

    Where a step can be compiled it is the mean of some tokens, before which there are so many on the average; what
    comes before them is read, and the step compiled, outside the seconds that count.
    """
    lm.eval()
    prompt = window_of({"batch_size": 1, "length": context_len - 1})  # which has one token more

    def read(n: int) -> Any:
        with torch.inference_mode():
            return lm(prompt[:, :n], state=lm.init_state(1, context_len + _TOKENS)).state

    try:
        from crossover.archs.decoding import Decoder
    except ImportError:  # a checkout from before steps were compiled
        state = read(context_len)

        @torch.inference_mode()
        def step() -> None:
            lm(prompt[:, -1:], state=state)

        return timing(step), {"decode": "modules"}

    before, token = read(max(1, context_len - _TOKENS // 2 - _FIRST)), prompt[:, -1]

    @torch.inference_mode()
    def begun() -> Decoder:
        decode = Decoder(lm, before.clone())
        for _ in range(_FIRST):
            decode(token)
        return decode

    @torch.inference_mode()
    def tokens(clock: Clock) -> float:
        decode = begun()
        begin = clock()
        for _ in range(_TOKENS):
            decode(token)
        return (clock() - begin) / _TOKENS

    decode = begun()
    return tokens, {"decode": decode.how, "why": decode.why}


if __name__ == "__main__":
    line = Connection(int(sys.argv[1]))
    keep_freed_memory()
    serve(our_works(sys.argv[2], int(sys.argv[3])), line)
