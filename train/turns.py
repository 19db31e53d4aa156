"""Turns of runs that train at the same time, so that whatever slows the machine down slows all of them alike.

They meet in a folder that has one file for each run that may work at a time. Who holds the lock of such a file works;
who waits for one holds that of the door, and the others queue before it. Locks end with their process, however it ends.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

__all__ = ["TURN_SECONDS", "Turns", "folder_of_turns"]

TURN_SECONDS = 2.0
"""Seconds of training after which a run lets another one work: some steps, and less than most drift takes."""


class Turns:
    """A run's place among those that take turns: `with Turns(folder)` waits for a turn, and gives back what it has."""

    def __init__(self, folder: Path | None, *, wait: Callable[[float], object] = time.sleep) -> None:
        """Takes a `folder_of_turns`; without one it is always this run's turn.

        Raises:
            ValueError: if the folder is none.
        """
        if folder is not None and not (folder / "door").exists():
            raise ValueError(f"turns={folder} is not the folder of runs that take turns: leave it out to train alone")
        self._folder, self._wait = folder, wait
        self._slot: int | None = None
        self._began = 0.0

    @property
    def runs(self) -> list[str]:
        """Names of the runs that take turns."""
        return [] if self._folder is None else (self._folder / "runs").read_text(encoding="utf-8").splitlines()

    def __enter__(self) -> Self:
        if self._slot is None:
            self._take(0.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._give_back()

    def pass_on(self, seconds: float) -> None:
        """Ends a turn that has lasted long enough, and waits for the next one.

        Args:
            seconds: how long this run has trained until now, in all its turns.
        """
        if self._slot is not None and seconds - self._began >= TURN_SECONDS:
            self._give_back()
            self._take(seconds)

    def _take(self, seconds: float) -> None:
        self._began = seconds
        if self._folder is None:
            return
        slots = sorted(self._folder.glob("slot-*"))
        door = _locked(self._folder / "door")
        assert door is not None
        try:
            while (taken := next(filter(None, (_locked(slot, wait=False) for slot in slots)), None)) is None:
                self._wait(0.01)
        finally:
            os.close(door)
        self._slot = taken

    def _give_back(self) -> None:
        if self._slot is not None:
            os.close(self._slot)
            self._slot = None


def _locked(path: Path, *, wait: bool = True) -> int | None:
    """A descriptor that holds the lock of a file; None where another one does and is not waited for."""
    descriptor = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


@contextlib.contextmanager
def folder_of_turns(runs: Sequence[str], *, at_once: int) -> Iterator[Path]:
    """Makes the folder in which runs of these names meet, of which so many work at a time.

    It lies where temporary files do, as locks do not work in every folder of a network.
    """
    with tempfile.TemporaryDirectory(prefix="crossover-turns-") as name:
        folder = Path(name)
        (folder / "runs").write_text("".join(f"{run}\n" for run in runs), encoding="utf-8")
        for file in ("door", *(f"slot-{i}" for i in range(at_once))):
            (folder / file).touch()
        yield folder
