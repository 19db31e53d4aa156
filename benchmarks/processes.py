"""Child processes: each run and each measurement gets its own, so that one that dies takes nothing with it."""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

__all__ = ["Stopped", "environment", "last_line", "module_command", "start", "stop", "stop_on_signals"]


class Stopped(KeyboardInterrupt):
    """The user (SIGINT) or the system (SIGTERM) asked this command to stop."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.exit_code = 128 + signum


@contextlib.contextmanager
def stop_on_signals() -> Iterator[None]:
    """Raises `Stopped` inside the block when SIGINT or SIGTERM arrives."""

    def handler(signum: int, frame: FrameType | None) -> None:
        raise Stopped(signum)

    previous = {signum: signal.signal(signum, handler) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for signum, old in previous.items():
            signal.signal(signum, old)


def environment(threads: int | None) -> dict[str, str]:
    """The environment of every child: the same thread count for each library that has its own pool."""
    limits = {} if threads is None else dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    return {**os.environ, **limits, "PYTHONUNBUFFERED": "1", "NO_COLOR": "1", "TERM": "dumb"}


def module_command(module: str, *words: str) -> list[str]:
    """The command line that runs one of our modules in this Python."""
    return [sys.executable, "-m", module, *words]


def start(command: Sequence[str], *, threads: int | None, log: Path, output: int | None = None) -> subprocess.Popen:
    """Starts a child whose messages go to the file `log`; its output goes there too, or to `output`.

    The child leads its own session: a Ctrl-C at the terminal reaches this process alone, which then decides how each
    child ends.
    """
    with log.open("ab") as messages:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=messages if output is None else output,
            stderr=messages,
            env=environment(threads),
            start_new_session=True,
        )


def stop(child: subprocess.Popen, *, grace: float) -> None:
    """Asks a child to end (SIGINT), waits `grace` seconds for it to save what it has, and then kills its session."""
    if child.poll() is None and grace > 0:
        child.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired, Stopped):  # a second Ctrl-C ends the waiting
            child.wait(grace)
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
