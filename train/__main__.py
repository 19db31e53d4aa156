"""python -m crossover.train [RUN.toml] [--model.preset mamba --params 1M ...], also known as `crossover train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .command_line import parse
from .config import RunConfig
from .plugins import explaining, take, words
from .streams import lasting_streams, one_line_warnings
from .turns import Turns

__all__ = ["main"]


def main(argv: Sequence[str] | None = None, prog: str = "python -m crossover.train") -> int:
    """Trains one model as the command line says and returns the exit code.

    0 done, 1 failed, 2 a request that cannot be met (one line on stderr), 3 out of memory, 129, 130 or 143 stopped.
    """
    lasting_streams()
    try:
        argv = take(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        return _refuse(prog, error)
    run = parse(argv, prog)
    try:
        with one_line_warnings():
            return _train(run, argv, prog)
    except KeyboardInterrupt:  # before the run has begun, or the second one
        return 130


def _train(run: RunConfig, argv: Sequence[str], prog: str) -> int:
    try:
        turns = Turns(run.turns)
    except ValueError as error:
        return _refuse(prog, error)
    with turns:  # from here on: to start up is work too
        return _train_in_turn(run, argv, prog, turns)


def _train_in_turn(run: RunConfig, argv: Sequence[str], prog: str, turns: Turns) -> int:
    # These import torch, which --help and a mistyped option need not wait for.
    from .checkpoint import CheckpointError
    from .objectives import open_objective
    from .trainer import ResumeError, Trainer

    try:
        with explaining(run.directory):
            objective = open_objective(run, progress=sys.stderr.isatty())
            trainer = Trainer(run, objective, command=[*prog.split(), *words(), *argv], turns=turns)
    except (ValueError, OSError) as error:
        return _refuse(prog, error)
    try:
        return trainer.fit().exit_code
    except (ResumeError, CheckpointError) as error:  # any other ValueError from here on is a mistake of ours
        return _refuse(prog, error)
    except OSError as error:  # the result could not be written
        _refuse(prog, error)
        return 1


def _refuse(prog: str, error: ValueError | OSError) -> int:
    print(f"{prog}: error: {error}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
