"""Child processes: each run and each measurement gets its own, so that one that dies takes nothing with it.

A measurement is a `Child`, which is sent its order and sends messages back; a training run is a command of its own
(`start`), whose results are files. Either leads its own session, so that a Ctrl-C at the terminal reaches this process
alone, which then decides how each child ends; and either ends when this process does, however that ends.
"""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import TracebackType
from typing import Any, Self

__all__ = ["Child", "environment", "last_line", "module_command", "ready", "start", "stop"]

_FORKSERVER = multiprocessing.get_context("forkserver")
_TICK = 0.5
"""Seconds between two calls of what a caller does while it waits."""

_UNKNOWN = 255
"""Exit code of a child whose server has died, which may itself live on."""


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
    ) -> None:
        """Starts a process that calls work(order, parent), where `parent` sends to this process and receives from it.

        Args:
            work: a function of a module; when it returns, the child ends.
            order: any value that can be pickled.
            log: file that gets what the child prints.
            preload: modules that the server imports, once and for all; with None the child is no fork but a new
                process, as CUDA needs it: asking for a GPU in the server would be enough to lose it in every fork.
        """
        context = multiprocessing.get_context("spawn")
        if preload is not None and sys.platform == "linux":
            context = _FORKSERVER
            _FORKSERVER.set_forkserver_preload(list(preload))
        self._line, theirs = context.Pipe()
        self._process = context.Process(target=_in_child, args=(work, order, str(log), theirs))
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


def _start(process: BaseProcess) -> None:
    """Starts a process, also where the server that should fork it is just being killed, and a new one is needed."""
    deadline = time.monotonic() + 10
    while True:
        try:
            process.start()
            return
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_TICK)


def _in_child(work: Callable[[Any, Connection], object], order: Any, log: str, parent: Connection) -> None:
    os.setsid()
    messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(messages, descriptor)
    os.close(messages)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    work(order, parent)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.killpg(0, signal.SIGKILL)


def environment(threads: int | None) -> dict[str, str]:
    """The environment of a command: the same thread count for each library that has its own pool."""
    limits = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TERM": "dumb"}


def module_command(module: str, *words: str) -> list[str]:
    """The command line that runs one of our modules in this Python."""
    return [sys.executable, "-m", module, *words]


def start(module: str, *words: str, threads: int | None, log: Path) -> subprocess.Popen:
    """Starts `python -m module words` as a child whose output and messages go to the file `log`.

    When this process ends without having stopped it, it gets SIGTERM and may save what it has.
    """
    with log.open("ab") as messages:
        return subprocess.Popen(
            module_command("crossover.benchmarks.harness.attached", module, *words),
            stdin=subprocess.PIPE,  # ends with this process
            stdout=messages,
            stderr=messages,
            env=environment(threads),
            start_new_session=True,
        )


def stop(children: Sequence[subprocess.Popen], signum: int = signal.SIGTERM, *, grace: float) -> None:
    """Asks children to end, waits `grace` seconds for them to save what they have, and then kills their sessions.

    All are asked before any is waited for, so that they save side by side; Ctrl-C ends the waiting for all.
    """
    alive = [child for child in children if child.poll() is None]
    for child in alive:
        child.send_signal(signum)
    deadline = time.monotonic() + grace
    with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
        for child in alive:
            child.wait(max(0.0, deadline - time.monotonic()))
    for child in alive:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def last_line(log: Path, *, after: int = 0) -> str:
    """The last line that a child wrote with something in it: the message of its error, where it ended with one.

    `after` is the size of the log before that child began, where children share it.
    """
    if not log.exists():
        return ""
    text = log.read_bytes()[after:].decode(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""
