"""The command line of a run: `[RUN.toml] [--option value ...]`, where the options override the file."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from ..files import read_toml
from .config import RunConfig
from .plugins import HELP

__all__ = ["parse", "read_run_file", "understand"]


_DESCRIPTION = (
    "Trains one model and writes its weights, metrics and result to OUT/NAME. A run file, the first word if there is "
    "one, holds the options below as TOML, in the tables [model], [objective], [data], [optim] and [train]."
)


def parse(argv: Sequence[str], prog: str) -> RunConfig:
    """Reads the words of a command line. A run file is the first of them.

    A mistake prints one message with the nearest valid option and raises SystemExit(2); `--help` shows the defaults,
    which are those of the run file where one is given, and raises SystemExit(0).
    """
    words = list(argv)
    try:
        default = RunConfig()
        if words and not words[0].startswith("-"):
            path = Path(words.pop(0))
            default, prog = read_run_file(path), f"{prog} {path}"
        elif {"-h", "--help"} & set(words):
            prog = f"{prog} [RUN.toml]"
        return understand(RunConfig, words, prog=prog, description=_DESCRIPTION, default=default, config=())
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def understand(options: Any, words: Sequence[str], *, prog: str, **more: Any) -> Any:
    """What the words of a command line say, as tyro reads them; its help ends with what every command takes.

    Raises:
        ValueError: one line that names the option, if the words cannot be understood.
        SystemExit: after help.
    """
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(options, args=list(words), prog=prog, **more)
    except SystemExit as stop:
        if stop.code:
            raise ValueError(_one_line(complaint.getvalue())) from None
        if {"-h", "--help"} & set(words):
            print(textwrap.fill(HELP, 80))
        raise


_PLAINER = (
    (r"^Error parsing (\w+: )?", ""),
    (r"Could not find valid parse for arguments: \[(.*)\]", r"cannot read \1"),
    (r"invalid literal for int\(\) with base 10: (.*)", r"\1 is not a whole number"),
    (r"could not convert string to float: (.*)", r"\1 is not a number"),
)


def _one_line(box: str) -> str:
    """The message in a box of tyro's, with the names of what it proposes and without their explanations."""
    lines = [line[2:].rstrip(" │") for line in box.splitlines() if line.startswith(("│ ", "  "))]  # or in ASCII
    parts: list[list[str]] = [[]]
    for line in lines:
        if set(line) in ({"─"}, {"-"}):
            parts.append([])
        elif not line.startswith(" " * 8):  # an explanation
            parts[-1].append(line.strip())
    said = " ".join(parts[0])
    for theirs, ours in _PLAINER:
        said = re.sub(theirs, ours, said)
    for head, *rest in parts[1:]:
        if head.startswith("Argument helptext") and "cannot read" in said:
            said += f" as {rest[0].partition(' ')[2]}"
        elif head.startswith(("Perhaps", "Available")):
            said += f"; {' '.join([head[:1].lower() + head[1:], *rest])}"
    return said


def read_run_file(path: Path) -> RunConfig:
    """The run that a TOML file describes, called as the file unless it says otherwise.

    Raises:
        ValueError: if the file cannot be read, or describes no run.
    """
    try:
        values = read_toml(path)
    except OSError as error:
        raise ValueError(f"cannot read the run file {path}: {error.strerror or error}") from None
    try:
        run = RunConfig.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return run if run.name else dataclasses.replace(run, name=path.stem)
