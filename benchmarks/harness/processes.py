"""Child processes: each run and each measurement gets its own, so that one that dies takes nothing with it."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["Fork", "environment", "last_line", "module_command", "start", "stop"]

_FORKSERVER = multiprocessing.get_context("forkserver")


def environment(threads: int | None) -> dict[str, str]:
    """The environment of every child: the same thread count for each library that has its own pool."""
    limits = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TERM": "dumb"}


def module_command(module: str, *words: str) -> list[str]:
    """The command line that runs one of our modules in this Python."""
    return [sys.executable, "-m", module, *words]


def start(command: Sequence[str], *, threads: int | None, log: Path) -> subprocess.Popen:
    """Starts a child whose output and messages go to the file `log`.

    The child leads its own session: a Ctrl-C at the terminal reaches this process alone, which then decides how each
    child ends.
    """
    with log.open("ab") as messages:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages,
            stderr=messages,
            env=environment(threads),
            start_new_session=True,
        )


class Fork:
    """A child that begins with its imports done: forked from a server that has made them once and done nothing else.

    Importing torch takes longer than many a measurement. A fork of this very process would inherit its threads and its
    memory; a fork of the server is as clean as a process of its own. Elsewhere than on Linux, where system libraries do
    not survive a fork, it is one.
    """

    def __init__(
        self, work: Callable[[Any], object], order: Any, *, log: Path, preload: Sequence[str] | None = ()
    ) -> None:
        """Calls work(order) in the child, whose standard output is `output` and whose messages go to the file `log`.

        Its standard input is what `tell` writes, and ends when this process does.

        `preload` names the modules that the server imports, once and for all; with None the child is no fork but a new
        process, as CUDA needs it: asking for a GPU in the server would be enough to lose it in every fork.
        """
        context = multiprocessing.get_context("spawn")
        if preload is not None and sys.platform == "linux":
            context = _FORKSERVER
            _FORKSERVER.set_forkserver_preload(list(preload))
        self._output, output = context.Pipe(duplex=False)
        stdin, self._stdin = context.Pipe(duplex=False)
        self._process = context.Process(target=_in_child, args=(work, order, str(log), stdin, output))
        self._process.start()
        stdin.close()
        output.close()

    @property
    def output(self) -> int:
        """Descriptor from which the child's standard output is read; it ends when the child does."""
        return self._output.fileno()

    def tell(self, line: str) -> None:
        """Writes a line to the child's standard input; nothing happens where the child has ended."""
        with contextlib.suppress(BrokenPipeError):
            os.write(self._stdin.fileno(), f"{line}\n".encode())

    def join(self) -> int:
        """Ends the child's standard input, waits for its end and returns its exit code, negative where a signal ended
        it."""
        self._stdin.close()
        self._process.join()
        self._output.close()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """Ends the child at once."""
        self._process.kill()
        self.join()


def _in_child(work: Callable[[Any], object], order: Any, log: str, stdin: Any, output: Any) -> None:
    os.setsid()  # a Ctrl-C at the terminal reaches the parent alone
    for descriptor, pipe in enumerate((stdin, output)):
        os.dup2(pipe.fileno(), descriptor)
        pipe.close()
    sys.stdin = os.fdopen(0, closefd=False)  # multiprocessing has made it read from nowhere
    messages = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(messages, 2)
    os.close(messages)
    work(order)


def stop(children: Sequence[subprocess.Popen], signum: int = signal.SIGTERM, *, grace: float) -> None:
    """Asks children to end, waits `grace` seconds for them to save what they have, and then kills their sessions.

    All are asked before any is waited for, so that they save side by side; Ctrl-C ends the waiting for all.
    """
    alive = [child for child in children if child.poll() is None]
    if grace > 0:
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
