"""Display of a run while it works: a bar with the time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from .course import Course
from .score import BITS_PER_BYTE, Score

__all__ = ["Display", "duration", "farewell", "greeting"]


def duration(seconds: float) -> str:
    """Writes a time span as people read it: 42 s, 3:05 min, 2:10:00 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02d} min"
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d} h"


class Display:
    """Shows a run on standard output."""

    def __init__(self, course: Course, score: Score = BITS_PER_BYTE) -> None:
        self._train, self._score = course.train, score
        self._quality = ""
        self._bar: Progress | None = None
        console = Console(highlight=False)
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.fields[place]}"),
                TextColumn("{task.fields[state]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("training", total=1.0, place=course.words, state="")
            self._bar.update(self._task, completed=course.share)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def say(self, text: str) -> None:
        """Prints one line, above the bar if there is one."""
        if self._bar is not None:
            self._bar.console.print(escape(text), soft_wrap=True)
            return
        print(text, flush=True)

    def doing(self, what: str) -> None:
        """Names the present work at the bar."""
        if self._bar is not None:
            self._bar.update(self._task, description=what)

    def trained(self, record: Mapping[str, Any], *, seconds_left: float) -> None:
        """Shows a line of training metrics."""
        state = f"loss {record['train/loss']:.3f}  {record['perf/tokens_per_second']:,.0f} tokens/s"
        left = f"{duration(seconds_left)} left"
        course = self._course(record)
        if self._bar is not None:
            shown = {"completed": course.share, "place": course.words, "state": f"{state}{self._quality}  {left}"}
            self._bar.update(self._task, **shown)
        else:
            self.say(f"{course.words}  {state}  {left}")

    def validated(self, record: Mapping[str, Any]) -> None:
        """Shows a validation."""
        quality = self._score.text(record[self._score.tag])
        self._quality = f"  {quality}"
        self.say(f"{self._course(record).words}  held out: {quality}")

    def _course(self, record: Mapping[str, Any]) -> Course:
        return Course(train=self._train, step=record["step"], seconds=record["seconds"])


def greeting(record: Mapping[str, Any], directory: Path) -> str:
    """Says what is about to be trained, from run.json."""
    corpus, machine = record["corpus"], record["provenance"]
    held = f"{corpus['train_bytes'] / 1e6:.2f} MB to train on, {corpus['val_bytes'] / 1e6:.2f} MB held out"
    active = "" if record["n_active_params"] == record["n_params"] else f" ({record['n_active_params']:,} active)"
    lines = [
        f"{directory}: {record['arch']}, {record['n_params']:,} parameters{active}, "
        f"{record['flops_per_token'] / 1e6:.1f} MFLOPs per trained token",
        f"{corpus['name']}: {corpus.get('made') or held}{_references(record)}",
        f"{machine['device']}, {machine['threads']} threads, {machine['precision']} ({machine['precision_reason']})",
    ]
    if record["resumed_from_step"]:
        lines.append(f"continuing from step {record['resumed_from_step']}")
    return "\n".join(lines)


def farewell(result: Mapping[str, Any], record: Mapping[str, Any], directory: Path) -> str:
    """Says how it went, from result.json and run.json."""
    if result["status"] != "done":
        hint = "; the same command continues" if result["status"] == "interrupted" and result["steps"] else ""
        return f"{result['status'].replace('_', ' ')} at step {result['steps']}: {result['error']}{hint}"
    speed = f" at {result['tokens_per_second']:,.0f} tokens/s" if result["tokens_per_second"] else ""
    score = Score.from_dict(record["score"])
    return (
        f"{result[score.key]:.3f} {score.words}{_references(record)} after "
        f"{duration(result['train_seconds'])} of training{speed}\n"
        f"results: {directory}    curves: tensorboard --logdir {directory.parent}"
    )


def _references(record: Mapping[str, Any]) -> str:
    """Says what compressors need, where the score is on their scale."""
    score = Score.from_dict(record["score"])
    if score != BITS_PER_BYTE:
        return ""
    parts = (f"{name} needs {value:.3f}" for name, value in record["corpus"]["reference_bits_per_byte"].items())
    return f" ({', '.join(parts)} {score.unit})"
