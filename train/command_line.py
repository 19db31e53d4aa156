"""The command line of a run: `[RUN.toml] [--option value ...]`, where the options override the file."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

import tyro

from ..files import read_toml
from .config import RunConfig

__all__ = ["parse", "read_run_file"]


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
        return tyro.cli(
            RunConfig,
            prog=prog,
            description=_DESCRIPTION,
            args=words,
            default=default,
            config=(),
        )
    except ValueError as error:  # of the file, or of RunConfig itself; tyro shows those of its parts
        print(f"{prog}: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


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
