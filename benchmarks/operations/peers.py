"""Training steps of small models against Hugging Face's of the same sizes and weights, each in a process of its own.

Theirs run as they come, and once more with the allocator setting that ours run with, which holds for a whole process:
glibc otherwise returns large blocks to the system in every step, which costs some models most of their time. All models
of a race are alive at once and take turns, so that whatever else the machine does slows all of them alike.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...archs import LanguageModel, build
from ...archs.hf import to_hf
from ...train.config import OptimConfig
from ...train.learner import Learner, Update
from ...train.objectives.next_token import RandomTokens
from ...train.optim import adamw
from ...train.runtime import choose_precision, keep_freed_memory
from ...train.verdict import apply_verdict
from ..harness.processes import Child, last_line
from ..harness.timing import quantiles, rounds, timed

__all__ = ["PEERS", "model_rows", "our_step", "peer_of", "race_rows", "take_turns_when_told", "their_step"]

_CPU = torch.device("cpu")
_BURST = 0.3
"""Seconds of a turn, unless one training step takes longer."""
_MIN_TURNS = 3
_SLOW = 10.0
"""A Hugging Face model whose first turn takes more seconds than this gets no other, so that nobody waits for it."""
_DEADLINE = 60.0
"""Seconds without an answer after which a model leaves the race."""
PEERS = {
    "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM",
    "transformer": "LlamaForCausalLM",
    "gpt2": "GPT2LMHeadModel",
}
"""Hugging Face's class for each architecture."""
_SEQ_LEN = 512
# more of Hugging Face's Mamba would not end within the deadline
_BATCH_SIZE = {"mamba": 1, "mamba2": 1, "transformer": 8, "gpt2": 8}
_CONTESTANTS = (("ours", True), ("theirs", False), ("theirs", True))
"""Contestants: whose model it is, and whether it keeps freed memory."""
_PRELOAD = ("crossover.benchmarks.operations.peers", "torch._dynamo", "numba")


def model_rows(*, threads: int, time_box: float, logs: Path, n_params: int = 1_000_000) -> Iterator[dict[str, Any]]:
    """Measures our models and theirs, a row each; one row with the reason where transformers is not installed.

    A row takes `time_box` seconds and the start of its process.
    """
    if importlib.util.find_spec("transformers") is None:
        yield {"model": None, "text": "whole models: transformers is not installed (pip install 'crossover[hf]')"}
        return
    for arch in PEERS:
        order = {
            "arch": arch,
            "n_params": n_params,
            "batch_size": _BATCH_SIZE[arch],
            "seq_len": _SEQ_LEN,
            "threads": threads,
        }
        yield from race_rows(order, time_box=time_box, logs=logs)


def race_rows(order: Mapping[str, Any], *, time_box: float, logs: Path) -> list[dict[str, Any]]:
    """The race of one architecture, a row for each contestant; no process outlives it."""
    with contextlib.ExitStack() as alive:
        racing = [
            alive.enter_context(_Contestant({**order, "who": who, "keeps_freed_memory": keeps}, logs=logs))
            for who, keeps in _CONTESTANTS
        ]
        _race(racing, time_box=time_box)
    return [contestant.row(racing[0].seconds) for contestant in racing]


def _race(contestants: Sequence[_Contestant], *, time_box: float) -> None:
    """Lets them take turns, each at least `_MIN_TURNS` times, until every one has had `time_box` seconds.

    The first turn loads what long sequences need, and counts for none but the slow of theirs, who get no other.
    """
    for contestant in contestants:
        contestant.get_ready()
    _take_turns(contestants)
    racing = [contestant for contestant in contestants if contestant.error is None and not contestant.is_slow]
    for contestant in racing:
        contestant.seconds.clear()
    for _ in rounds(time_box * len(racing), least=_MIN_TURNS):
        _take_turns(racing)


def _take_turns(racing: Sequence[_Contestant]) -> None:
    for contestant in racing:
        if contestant.error is None:
            contestant.take_turn()


class _Contestant:
    """A model in a process of its own, which sleeps until it is told to take a turn."""

    def __init__(self, order: Mapping[str, Any], *, logs: Path) -> None:
        self.order = order
        kept = "kept" if order["keeps_freed_memory"] else "default"
        self._log = logs / f"peer-{order['arch']}-{order['who']}-{kept}.log"
        self._log.unlink(missing_ok=True)
        self.seconds: list[float] = []  # of one training step, for each turn
        self.error: str | None = None
        self._n_params: int | None = None
        self._child = Child(take_turns_when_told, dict(order), log=self._log, preload=_PRELOAD)

    def __enter__(self) -> _Contestant:
        return self

    def __exit__(self, *exception: object) -> None:
        self._child.kill()

    @property
    def is_slow(self) -> bool:
        """Whether its first turn is its only one; never true for ours, which all others are compared with."""
        return self.order["who"] == "theirs" and self.seconds[0] > _SLOW

    def get_ready(self) -> None:
        """Waits until the model is built and warm, or sets `error`."""
        self._n_params = self._answer()

    def take_turn(self) -> None:
        """Appends to `seconds`, or sets `error`."""
        self._child.send("take a turn")
        if (seconds := self._answer()) is not None:
            self.seconds.append(seconds)

    def _answer(self) -> Any:
        try:
            return self._child.receive(timeout=_DEADLINE)
        except TimeoutError:
            self._child.kill()
            self.error = f"no training step within {_DEADLINE:.0f} s"
        except EOFError:
            self.error = f"failed with code {self._child.join()}: {last_line(self._log)} (log: {self._log})"
        return None

    def row(self, ours: Sequence[float]) -> dict[str, Any]:
        """Makes the row of this contestant; `ours` are the seconds of our model, turn by turn."""
        found: dict[str, Any] = {"n_params": self._n_params, "repeats": len(self.seconds), "error": self.error}
        found |= dict.fromkeys(("tokens_per_second", "ratio", "ratio_quartiles"))
        if self.error is None:
            n_tokens = self.order["batch_size"] * self.order["seq_len"]
            found["tokens_per_second"] = n_tokens / statistics.median(self.seconds)
            if self.order["who"] == "theirs":
                found |= _ratio([theirs / our for theirs, our in zip(self.seconds, ours, strict=False)])
        row = {"model": self.order["arch"], "name": _name(self.order), **self.order, **found}
        return {**row, "text": _text(row)}


def _ratio(of_turns: Sequence[float]) -> dict[str, Any]:
    """Says how many times longer theirs takes than ours: the median over turns, and quartiles if there are several."""
    if not of_turns:
        return {}
    spread = quantiles(of_turns, (0.25, 0.75)) if len(of_turns) > 1 else None
    return {"ratio": statistics.median(of_turns), "ratio_quartiles": spread}


def _name(order: Mapping[str, Any]) -> str:
    if order["who"] == "ours":
        return f"our {order['arch']}"
    how = "freed memory kept as in ours" if order["keeps_freed_memory"] else "as it comes"
    return f"transformers {PEERS[order['arch']]}, {how}"


def _text(row: Mapping[str, Any]) -> str:
    size = f"B={row['batch_size']} L={row['seq_len']}"
    if row["error"] is not None:
        return f"{row['name']}, {size}: {row['error']}"
    text = f"{row['name']}, {row['n_params']:,} parameters, {size}: {row['tokens_per_second']:,.0f} tokens/s"
    if row["ratio"] is None:
        return text
    turns = "one turn"
    if row["ratio_quartiles"] is not None:
        low, high = row["ratio_quartiles"]
        turns = f"{low:.2f} to {high:.2f} in the middle half of {row['repeats']} turns"
    return f"{text}; ours trains {row['ratio']:.2f} times as many ({turns})"


def take_turns_when_told(order: Mapping[str, Any], parent: Connection) -> None:
    """The process of a contestant: sends the size of its model when it is warm, and then the seconds of each turn."""
    if order["keeps_freed_memory"]:
        keep_freed_memory()
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    window = torch.randint(256, (order["batch_size"], order["seq_len"] + 1))
    lm = build(order["arch"], n_params=order["n_params"], vocab_size=256)
    if order["who"] == "ours":
        apply_verdict()
        step, model = our_step(lm), lm
    else:
        model = peer_of(lm)
        step = their_step(model)
    step(window[:, :17])  # loads libraries and kernels
    parent.send(sum(p.numel() for p in model.parameters()))
    with contextlib.suppress(EOFError):  # the race is over
        while parent.recv():
            parent.send(_turn(lambda: step(window)))


def _turn(step: Callable[[], object]) -> float:
    """Seconds of one step: the median of a burst after a first step that gets the caches back from the others.

    A step that fills the burst alone is the turn.
    """
    seconds = timed(_CPU, step)
    if seconds >= _BURST:
        return seconds
    return statistics.median(timed(_CPU, step) for _ in rounds(_BURST))


def our_step(lm: LanguageModel) -> Callable[[Tensor], object]:
    """Returns the training step of our model on a window of tokens."""
    config, precision = OptimConfig(), choose_precision("fp32", torch.device("cpu"))
    objective = RandomTokens(vocab_size=lm.config.vocab_size, batch_size=1, seq_len=1)
    update = Update(Learner(lm, objective), objective, adamw(lm, config), precision=precision, clip=config.clip)
    return lambda window: update([objective.collate(list(window.numpy()))], 1e-4)


def their_step(model: Any) -> Callable[[Tensor], None]:
    """Returns the training step of Hugging Face's model on a window of tokens."""
    config = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(window: Tensor) -> None:
        tokens = window[:, :-1].contiguous()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def peer_of(lm: LanguageModel) -> Any:
    """Hugging Face's model that computes what ours does, with the same weights and, as in ours, without dropout."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be fetched
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        to_hf(lm, folder)
        transformers.utils.logging.disable_progress_bar()
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()
