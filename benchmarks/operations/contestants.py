"""Models that take turns, each in a process of its own: one that is late or dies leaves the race, and no other with it.

All of them are alive at once and sleep until they are told to take a turn, so that whatever else the machine does slows
all alike; and all run with the allocator setting that ours run with: glibc otherwise returns large blocks to the system
in every step, which costs some models most of their time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Self

from ...train import plugins
from ...train.runtime import keep_freed_memory
from ...train.verdict import apply_verdict
from ..harness.processes import Child, last_line
from ..harness.timing import quantiles, rounds
from . import turns
from .turns import Task, serve

__all__ = [
    "BEFORE",
    "OURS",
    "Checkout",
    "Contestant",
    "Race",
    "contestant",
    "contestant_of",
    "race",
    "take_turns_when_told",
]

OURS, BEFORE = "ours", "before"
"""Names of our model, and of our model as another checkout has it."""

_MIN_TURNS = 3
_SLOW = 2.0
"""One whose first turn takes more seconds than this has one more alone, so that nobody waits for it; ours have all."""
_START = 300.0
"""Seconds that it may take to begin: a busy machine compiles for long."""
_PRELOAD = ("crossover.benchmarks.operations.contestants", "torch._dynamo", "numba")


class Contestant:
    """A process that takes turns, until it fails or is late; as a context it ends with it."""

    def __init__(self, name: str, process: Child | Checkout, *, log: Path, patience: float) -> None:
        """Takes a process that runs `turns.serve`, and the seconds after which a turn is given up."""
        self.name = name
        self.error: str | None = None
        self._process, self._log, self._patience = process, log, patience

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._process.kill()

    def warm_up(self, task: Task) -> None:
        """Waits as long as it takes, within reason, for a turn that loads libraries and compiles kernels."""
        self._answer(task, patience=max(_START, self._patience))

    def turn(self, task: Task) -> dict[str, Any] | None:
        """What `turns.serve` answers; None where there is no answer any more, and `error` says why."""
        return self._answer(task, patience=self._patience)

    def _answer(self, task: Task, *, patience: float) -> dict[str, Any] | None:
        if self.error is not None:
            return None
        self._process.send(dict(task))
        try:
            return self._process.receive(timeout=patience)
        except TimeoutError:
            self._process.kill()
            self.error = f"no answer within {patience:.0f} s at {task['length']} tokens"
        except EOFError:
            self.error = f"failed with code {self._process.join()}: {last_line(self._log)} (log: {self._log})"
        return None


def take_turns_when_told(order: tuple[Mapping[str, Any], Sequence[str]], parent: Connection) -> None:
    """The process of a contestant of this checkout.

    Args:
        order: architecture, size and whose model it is, as `peers.works_of` takes them, and modules to be imported.
        parent: gets what `turns.serve` sends.
    """
    from .peers import works_of

    model, modules = order
    plugins.load(modules)
    keep_freed_memory()
    apply_verdict()
    serve(works_of(**model), parent)


def contestant(order: Mapping[str, Any], *, logs: Path, patience: float) -> Contestant:
    """Starts a model of this checkout: ours, for which all wait, or a peer's."""
    patience = max(_START, patience) if order["who"] == OURS else patience
    log = _log(logs, order["who"], order["arch"])
    child = Child(take_turns_when_told, (dict(order), plugins.imported()), log=log, preload=_PRELOAD)
    return Contestant(order["who"], child, log=log, patience=patience)


def contestant_of(folder: Path, order: Mapping[str, Any], *, logs: Path, patience: float) -> Contestant:
    """Starts our model as another checkout of this repository has it, for which all wait: it may have to compile."""
    log = _log(logs, BEFORE, order["arch"])
    checkout = Checkout(folder, order["arch"], order["n_params"], log=log)
    return Contestant(BEFORE, checkout, log=log, patience=max(_START, patience))


def _log(logs: Path, who: str, arch: str) -> Path:
    words = "".join(c if c.isalnum() else "-" for c in who.lower())
    path = logs / f"{arch}-{words}.log"
    path.unlink(missing_ok=True)
    return path


class Checkout:
    """A process that runs turns.py with another checkout as `crossover`; see harness.processes.Child for its methods.

    It ends when the line does, and so with this process.
    """

    def __init__(self, folder: Path, arch: str, n_params: int, *, log: Path) -> None:
        """Starts it; `folder` holds the checkout, which needs no environment of its own."""
        self._path = tempfile.TemporaryDirectory()
        (Path(self._path.name) / "crossover").symlink_to(folder.resolve(), target_is_directory=True)
        self._line, theirs = multiprocessing.Pipe()
        words = [turns.__file__, str(theirs.fileno()), arch, str(n_params)]
        with log.open("ab") as messages:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *words],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=messages,
                stderr=messages,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([self._path.name, os.environ.get("PYTHONPATH", "")])},
                start_new_session=True,
            )
        theirs.close()

    def send(self, message: Any) -> None:
        """Sends a value; nothing happens where the process has ended."""
        with contextlib.suppress(OSError):
            self._line.send(message)

    def receive(self, *, timeout: float) -> Any:
        """Returns the next message; EOFError if the process has ended, TimeoutError if nothing came in time."""
        if not self._line.poll(timeout):
            raise TimeoutError
        try:
            return self._line.recv()
        except OSError as error:
            raise EOFError from error

    def join(self) -> int:
        """Ends the line, waits for the end and returns the exit code."""
        self._line.close()
        code = self._process.wait()
        self._path.cleanup()
        return code

    def kill(self) -> None:
        """Ends the process at once, with all that it has started."""
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self.join()


@dataclass(frozen=True, kw_only=True)
class Race:
    """What came of a race."""

    turns: dict[str, list[float]] = field(default_factory=dict)
    """Seconds of each turn of those who had any, by name; `OURS` is among them unless ours failed."""
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What else they said in their last turn."""

    def row(self, against: str = OURS) -> dict[str, Any]:
        """Medians, and how many times as long each takes as `against`: the median over turns, and its quartiles."""
        base = self.turns.get(against, [])
        pairs = {
            name: [theirs / ours for theirs, ours in zip(seconds, base, strict=False)]
            for name, seconds in self.turns.items()
            if name != against
        }
        ratios = {name: of_turns for name, of_turns in pairs.items() if of_turns}
        return {
            "seconds": {name: statistics.median(seconds) for name, seconds in self.turns.items()},
            "repeats": {name: len(seconds) for name, seconds in self.turns.items()},
            "ratios": {name: statistics.median(of_turns) for name, of_turns in ratios.items()},
            "quartiles": {name: quantiles(r, (0.25, 0.75)) for name, r in ratios.items() if len(r) > 1},
        }


def race(racing: Mapping[str, Callable[[], dict[str, Any] | None]], *, time_box: float) -> Race:
    """Lets works take turns, each at least `_MIN_TURNS` times, until every one has had `time_box` seconds.

    The first turn loads what long sequences need, and does not count. The slow have one more alone. One that fails
    leaves without a result.
    """
    found = Race()

    def take_turns(names: Sequence[str]) -> dict[str, float]:
        seconds: dict[str, float] = {}
        for name in names:
            if (answer := racing[name]()) is None:
                found.turns.pop(name, None)
            else:
                seconds[name] = answer.pop("seconds")
                found.facts[name] = answer
        return seconds

    first = take_turns(list(racing))
    slow = {name for name, seconds in first.items() if seconds > _SLOW and name not in (OURS, BEFORE)}
    left = list(first)
    for _ in rounds(time_box * len(left), least=_MIN_TURNS):
        for name, seconds in take_turns(left).items():
            found.turns.setdefault(name, []).append(seconds)
        left = [name for name in left if name in found.turns and name not in slow]
        if not left:
            break
    return found
