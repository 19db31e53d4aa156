"""A small comparison in one process, which counts the points at which it writes and can be stopped at any of them.

Training runs are made in this process, one after the other, and measurements are made up: each would otherwise be a
process of its own, and what it writes could not be counted. All else is what `crossover compare` does.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from crossover.benchmarks import cli
from crossover.benchmarks.comparison import runs
from crossover.benchmarks.context import cells
from crossover.benchmarks.report import drawing
from crossover.train.__main__ import main as train
from crossover.train.objectives.next_token import NextToken
from crossover.train.record import MetricsLog

EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Points:
    """Counts what is written below a folder. At one point the process dies, perhaps in the middle of a line.

    With a `fault` it lives, and from that point on nothing can be written.
    """

    def __init__(self, folder: Path, fatal: int | None, fault: int | None) -> None:
        self.seen, self._folder, self._fatal, self._fault = 0, str(folder), fatal, fault
        sys.addaudithook(self._look)

    def _look(self, event: str, told: tuple[Any, ...]) -> None:
        path = str(told[0]) if told and isinstance(told[0], str | os.PathLike) else ""
        if not path.startswith(self._folder):
            return
        if event == "open" and isinstance(told[2], int) and told[2] & WRITING and not path.endswith(".lock"):
            self.reached(path)
            if ".tmp" not in path:  # a draft counts only when it is whole
                self.reached(path, torn=True)
        elif event in (EVENTS if self._fault is None else ("os.rename", "os.mkdir")):
            self.reached(path)

    def reached(self, path: str, *, torn: bool = False) -> None:
        """Dies if this is the point; `torn` leaves a part of what was to be written."""
        self.seen += 1
        if self._fault is not None and self._fatal is not None and self.seen >= self._fatal:
            raise OSError(self._fault, os.strerror(self._fault), path)
        if self.seen != self._fatal:
            return
        if torn:
            file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.write(file, b'{"step": 1, "train/lo')
        os.kill(os.getpid(), signal.SIGKILL)


class Trained:
    """A process that has ended, whose run was made in this one."""

    def __init__(self, work: object, words: list[str], **_: object) -> None:
        self._code = train(words)

    def poll(self) -> int:
        return self._code


class Measured:
    """A worker whose measurements depend on nothing but the cell."""

    def __init__(self, work: object, order: tuple[Any, ...], **_: object) -> None:
        self._job, self._left = order[0], list(order[1])

    def __enter__(self) -> "Measured":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def receive(self, **_: object) -> object:
        speed = 1000.0 + self._job.context_len
        return self._job.cell(
            self._left.pop(0), status="done", tokens_per_second=speed, spread=(speed, speed), repeats=2, batch_size=1,
            peak_bytes=1000, peak_method="made up", state_bytes=100,
        )  # fmt: skip


def main(words: list[str], folder: str, fatal: int | None, fault: int | None) -> tuple[int, int]:
    """Compares; returns the exit code and the number of points."""
    points = Points(Path(folder), fatal, fault)
    append = MetricsLog.append

    def appended(log: MetricsLog, record: Any) -> None:
        path = log._file.name
        points.reached(path)
        points.reached(path, torn=True)
        append(log, record)

    MetricsLog.append = appended  # pyright: ignore[reportAttributeAccessIssue]
    runs.Child = Trained  # pyright: ignore[reportAttributeAccessIssue]
    cells.Child = Measured  # pyright: ignore[reportAttributeAccessIssue]
    # what takes most of the time and writes nothing itself
    drawing._drawn = lambda *_, **__: b"<svg></svg>"  # pyright: ignore[reportPrivateUsage]
    NextToken.sample_len = lambda *_: 3  # pyright: ignore[reportAttributeAccessIssue]
    return cli.main(words), points.seen
