"""Progress over a list of tasks of different kinds: how much is done, and when the rest will be."""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from ...train.progress import duration

__all__ = ["Progress", "Schedule", "StatusLine", "Task"]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A piece of work whose cost is known up to a factor that all tasks of its kind share."""

    name: str
    kind: str
    cost: float
    """Expected seconds, or anything proportional to them."""


class Schedule:
    """Estimates the remaining seconds of a list of tasks from those that have run."""

    def __init__(
        self, tasks: Sequence[Task], *, known: frozenset[str] = frozenset(), at_once: Mapping[str, int] | None = None
    ) -> None:
        """Takes the tasks in their order.

        Args:
            tasks: what is to be done.
            known: kinds whose cost is already in seconds; others wait for the first measurement.
            at_once: number of tasks of a kind that run side by side, where it is more than one.
        """
        self._at_once = at_once or {}
        self._left = {task.name: task for task in tasks}
        self._total = len(tasks)
        self._known = known
        self._spent: dict[str, float] = {}
        self._paid: dict[str, float] = {}
        self._running: dict[str, tuple[Task, float, float]] = {}

    @property
    def done(self) -> str:
        """Number of finished tasks, of all, as text."""
        return f"{self._total - len(self._left)}/{self._total}"

    def skip(self, name: str) -> None:
        """Takes out a task that needs no time."""
        self._left.pop(name)

    def plan(self, tasks: Sequence[Task], *, instead_of: Sequence[str]) -> None:
        """Puts tasks in the place of others that stood for them; of these, unknown names are those gone before."""
        for name in instead_of:
            if self._left.pop(name, None) is not None:
                self._total -= 1
        self._left |= {task.name: task for task in tasks}
        self._total += len(tasks)

    def update(self, name: str, seconds: float, fraction: float) -> None:
        """Says that a task has run for `seconds` and that `fraction` of it is done."""
        self._running[name] = (self._left[name], seconds, fraction)

    def finish(self, name: str, seconds: float) -> None:
        """Says that a task ended after `seconds`."""
        task = self._left.pop(name)
        self._running.pop(name, None)
        self._spent[task.kind] = self._spent.get(task.kind, 0.0) + seconds
        self._paid[task.kind] = self._paid.get(task.kind, 0.0) + task.cost

    def remaining(self) -> float | None:
        """Seconds until everything is done; None while some kind of task has never been seen."""
        spent, paid = dict(self._spent), dict(self._paid)
        open_cost: dict[str, float] = {}
        for task in self._left.values():
            open_cost[task.kind] = open_cost.get(task.kind, 0.0) + task.cost
        for task, seconds, fraction in self._running.values():
            spent[task.kind] = spent.get(task.kind, 0.0) + seconds
            paid[task.kind] = paid.get(task.kind, 0.0) + task.cost * fraction
            open_cost[task.kind] -= task.cost * fraction
        total = 0.0
        for kind, cost in open_cost.items():
            if paid.get(kind):
                total += cost * spent[kind] / paid[kind] / self._at_once.get(kind, 1)
            elif kind in self._known:
                total += cost / self._at_once.get(kind, 1)
            else:
                return None
        return total


class StatusLine:
    """The last line of a terminal, which renews itself while it is entered; elsewhere nothing is shown in it.

    Only what is shown renews it: no thread of its own disturbs what is being measured.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        """Takes the stream that is written to, standard error when not given."""
        self._stream = sys.stderr if stream is None else stream
        console = Console(file=self._stream, force_terminal=self._stream.isatty(), highlight=False)
        self.is_live = console.is_terminal and not console.is_dumb_terminal
        self._live = Live(console=console, auto_refresh=False, transient=True, redirect_stdout=False)

    def __enter__(self) -> Self:
        if self.is_live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.is_live:
            self._live.stop()

    def show(self, text: str) -> None:
        """Shows a text until the next one; an empty one makes room for what others print."""
        if self.is_live:
            self._live.update(Text(text, no_wrap=True, overflow="ellipsis"), refresh=True)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        if self.is_live:
            self._live.console.print(Text(text), soft_wrap=True)
        else:
            print(text, file=self._stream, flush=True)


class Progress:
    """Shows a schedule: one line that renews itself on a terminal, plain lines now and then elsewhere.

    It must be entered, and gives the terminal's last line back when it is left.
    """

    def __init__(
        self,
        schedule: Schedule,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        every: float = 30.0,
    ) -> None:
        self.schedule = schedule
        self._line = StatusLine(stream)
        self._clock = clock
        self._every = every
        self._begin = self._last = clock()
        self._begins: dict[str, float] = {}

    def __enter__(self) -> Self:
        self._line.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._line.__exit__(kind, error, trace)

    def say(self, text: str) -> None:
        """Writes a line that stays."""
        self._line.say(text)

    def plan(self, tasks: Sequence[Task], *, instead_of: Sequence[str]) -> None:
        """Puts tasks in the place of others that stood for them."""
        self.schedule.plan(tasks, instead_of=instead_of)

    def skip(self, name: str, why: str) -> None:
        """Takes a task out of the schedule and says so."""
        self.schedule.skip(name)
        self.say(f"{self.schedule.done:>7}  {name}: {why}")

    def begin(self, name: str) -> None:
        """Starts the clock of one task."""
        self._begins[name] = self._clock()
        self.update(name, 0.0, "")

    def update(self, name: str, fraction: float, detail: str) -> None:
        """Renews the line; away from a terminal, writes one every `every` seconds."""
        now = self._clock()
        self.schedule.update(name, now - self._begins[name], fraction)
        text = f"{self.schedule.done:>7}  {name} {detail}  {self._times(now)}"
        if self._line.is_live:
            self._line.show(text)
        elif now - self._last >= self._every:
            self._last = now
            self.say(text)

    def finish(self, name: str, result: str) -> None:
        """Ends a task with a line that stays."""
        now = self._clock()
        self.schedule.finish(name, now - self._begins.pop(name))
        self._last = now
        self._line.show("")
        self.say(f"{self.schedule.done:>7}  {name}: {result}  {self._times(now)}")

    def _times(self, now: float) -> str:
        left = self.schedule.remaining()
        ahead = "" if left is None else f", about {duration(left)} left" if left >= 0.5 else ""
        return f"[{duration(now - self._begin)}{ahead}]"
