"""What a stretch of work took beside its time on the wall, and whether something else disturbed it."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["MAX_FOREIGN_SHARE", "MAX_WAITING", "Effort"]

MAX_WAITING = 1.1
"""Time on the wall for each second that the busy threads had a processor, beyond which work was disturbed."""

MAX_FOREIGN_SHARE = 0.25
"""Share of the machine's processors that others keep busy, beyond which work was disturbed: by what they take from
caches and memory, if not from its processors."""


@dataclass(frozen=True)
class _Times:
    wall: float
    process: float
    thread: float
    machine: float | None
    """Processor time that all processes have had, and what a hypervisor took; None where the system does not tell."""

    @classmethod
    def now(cls) -> Self:
        return cls(time.perf_counter(), time.process_time(), time.thread_time(), _machine_seconds())


class Effort:
    """Measures what happens while it is entered.

    A processor's clock does not tell waiting for memory that others keep busy; their load does.
    """

    def __enter__(self) -> Self:
        self._begin = self._end = _Times.now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end = _Times.now()

    @property
    def seconds(self) -> float:
        """Time on the wall."""
        return self._end.wall - self._begin.wall

    @property
    def cpu_seconds(self) -> float:
        """Processor time of this process, all threads together."""
        return self._end.process - self._begin.process

    @property
    def load(self) -> float | None:
        """Processors that others kept busy, on average; None where the system does not tell."""
        if self._begin.machine is None or self._end.machine is None or self.seconds <= 0:
            return None
        return max(0.0, self._end.machine - self._begin.machine - self.cpu_seconds) / self.seconds

    def is_disturbed(self, n_threads: int, *, on_cpu: bool = True) -> bool:
        """Whether work on so many threads waited for a processor, or the machine was busy with something else.

        The calling thread may sleep while others work for it: the busier of itself and the mean of all counts.
        `on_cpu` says that the work was this machine's, and waiting therefore no part of it.
        """
        busy = max(self._end.thread - self._begin.thread, self.cpu_seconds / n_threads)
        waited = on_cpu and self.seconds > MAX_WAITING * busy
        return waited or (self.load or 0.0) > MAX_FOREIGN_SHARE * (os.cpu_count() or 1)


def _machine_seconds(path: Path = Path("/proc/stat")) -> float | None:
    try:
        fields = path.read_text().split("\n", 1)[0].split()
    except OSError:
        return None
    user, nice, system, _idle, _waiting, interrupts, soft, *stolen = map(int, fields[1:9])  # guests are part of user
    ticks = user + nice + system + interrupts + soft + sum(stolen)
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None
