"""Child processes: each run and each measurement gets its own, so that one that dies takes nothing with it.

A measurement is sent its order and sends messages back; a training run leaves files. Either leads its own session, so
that a Ctrl-C at the terminal reaches this process alone, which then decides how each child ends; and either ends when
this process does, however that ends.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Child", "last_line", "module_command", "preloaded", "ready", "stop"]

_FORKSERVER = multiprocessing.get_context("forkserver")
_TICK = 0.5
"""Seconds between two calls of what a caller does while it waits."""

_UNKNOWN = 255
"""Exit code of a child whose server has died, which may itself live on."""

_OF_A_TERMINAL = frozenset({signal.SIGHUP, signal.SIGINT, signal.SIGTERM})
"""Signals that a terminal, or who stops a command, sends to all of its processes at once."""

_PRELOAD = (
    "crossover.benchmarks.cli",
    "crossover.benchmarks.comparison.runs",
    "crossover.benchmarks.context.worker",
    "crossover.kernels.compiled",
    "crossover.train.__main__",
    "crossover.train.objectives",
    "crossover.train.trainer",
    "torch._dynamo",  # by every optimizer
    "torch.utils.tensorboard",
)
"""What runs and measurements import. None of it starts a thread, which a fork would not have."""


def preloaded(device: str) -> Sequence[str] | None:
    """What a `Child` that runs models on a device ("cpu", "cuda:1") finds imported: the same list for all of them.

    On a GPU it begins with nothing: asking for one in the server would be enough to lose it in every fork.
    """
    return _PRELOAD if device == "cpu" else None


class Child:
    """A process that does one piece of work and talks with this one meanwhile, in whole Python objects.

    What it and its libraries print goes to a log file and cannot be mistaken for a message.

    Importing torch takes longer than many a measurement, so a child begins with its imports done: forked from a server
    that has made them once and done nothing else. A fork of this very process would inherit its threads and its memory;
    a fork of the server is as clean as a process of its own. Elsewhere than on Linux, where system libraries do not
    survive a fork, it is one.
    """

    def __init__(
        self,
        work: Callable[[Any, Connection], object],
        order: Any,
        *,
        log: Path,
        preload: Sequence[str] | None = (),
        orphaned: signal.Signals = signal.SIGKILL,
    ) -> None:
        """Starts a process that calls work(order, parent), where `parent` sends to this process and receives from it.

        Args:
            work: a function of a module; when it returns, the child ends.
            order: any value that can be pickled.
            log: file that gets what the child prints.
            preload: modules that the server imports, once and for all; with None the child is no fork but a new
                process.
            orphaned: signal that ends the child when this process has ended; SIGTERM lets it save what it has.
        """
        context = multiprocessing.get_context("spawn")
        if preload is not None and sys.platform == "linux":
            context = _FORKSERVER
            _FORKSERVER.set_forkserver_preload(list(preload))
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_in_child, args=(work, order, str(log), orphaned, theirs))
        _start(self._process)
        theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def send(self, message: Any) -> None:
        """Sends a value that can be pickled; nothing happens where the child has ended."""
        with contextlib.suppress(OSError):
            self._line.send(message)

    def receive(self, *, timeout: float, meanwhile: Callable[[], object] | None = None) -> Any:
        """Returns the child's next message.

        Args:
            timeout: seconds to wait for it.
            meanwhile: called now and then while it does not come.

        Raises:
            EOFError: if the child has ended.
            TimeoutError: if nothing came in time.
        """
        deadline = time.monotonic() + timeout
        while not ready([self], timeout=min(_TICK, deadline - time.monotonic())):
            if time.monotonic() >= deadline:
                raise TimeoutError
            if meanwhile is not None:
                meanwhile()
        if not self._line.poll():  # what it has started may hold the line open after its end
            raise EOFError
        try:
            return self._line.recv()
        except OSError as error:  # it ended in the middle of a message, or without reading ours
            raise EOFError from error

    def join(self) -> int:
        """Ends the line, waits for the end of the child and returns its exit code, negative where a signal ended it."""
        self._line.close()
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def poll(self) -> int | None:
        """The exit code of a child that has ended, negative where a signal did that, and None while it is at work."""
        if self._process.exitcode == _UNKNOWN:
            self.kill()
            return -signal.SIGKILL
        return self._process.exitcode

    def wait(self, timeout: float) -> int | None:
        """As `poll`, at its end or after so many seconds."""
        self._process.join(timeout)
        return self.poll()

    def ask_to_stop(self, signum: int) -> None:
        """Sends a signal to the child, but not to what it has started; nothing happens where it has ended."""
        assert self._process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._process.pid, signum)

    def kill(self) -> None:
        """Ends the child at once, with all that it has started."""
        if self._process.is_alive() or self._process.exitcode == _UNKNOWN:
            assert self._process.pid is not None
            with contextlib.suppress(ProcessLookupError):  # it does not lead its session yet
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.kill()
        self.join()


def ready(children: Sequence[Child], *, timeout: float) -> list[Child]:
    """The children from which there is something to receive, a message or their end; waits until there is one."""
    doors = {door: child for child in children for door in (child._line, child._process.sentinel)}
    return list(dict.fromkeys(doors[door] for door in connection.wait(list(doors), max(0.0, timeout))))  # pyright: ignore[reportArgumentType]


def stop(children: Sequence[Child], signum: int = signal.SIGTERM, *, grace: float) -> None:
    """Asks children to end, waits `grace` seconds for them to save what they have, and then kills their sessions.

    All are asked before any is waited for, so that they save side by side; Ctrl-C ends the waiting for all.
    """
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        child.ask_to_stop(signum)
    deadline = time.monotonic() + grace
    with contextlib.suppress(KeyboardInterrupt):
        for child in alive:
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in alive:
        child.kill()


def _start(process: BaseProcess) -> None:
    """Starts a process, also where the server that should fork it is just being killed, and a new one is needed.

    What stops this process is no signal to the server, which must tell how children end, nor to a child that does not
    lead its session yet: both begin with these signals blocked, and the child lets them through then.
    """
    deadline = time.monotonic() + 10
    resource_tracker.ensure_running()  # which would let them through here
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_A_TERMINAL)
    try:
        while True:
            try:
                process.start()
                return
            except (ConnectionError, EOFError):
                if time.monotonic() > deadline:
                    raise
                time.sleep(_TICK)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _in_child(
    work: Callable[[Any, Connection], object], order: Any, log: str, orphaned: signal.Signals, parent: Connection
) -> None:
    os.setsid()
    messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(messages, descriptor)
    os.close(messages)
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    os.environ |= {"NO_COLOR": "1", "TERM": "dumb"}
    threading.Thread(target=_end_with_parent, args=(orphaned,), daemon=True).start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _OF_A_TERMINAL)
    work(order, parent)


def _end_with_parent(signum: signal.Signals) -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signum)


def module_command(module: str, *words: str) -> list[str]:
    """The command line that runs one of our modules in this Python."""
    return [sys.executable, "-m", module, *words]


def last_line(log: Path, *, after: int = 0) -> str:
    """The last line that a child wrote with something in it: the message of its error, where it ended with one.

    `after` is the size of the log before that child began, where children share it.
    """
    if not log.exists():
        return ""
    text = log.read_bytes()[after:].decode(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
