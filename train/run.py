"""A run from its configuration to its result."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .config import RunConfig
from .objectives import open_objective
from .trainer import Outcome, Trainer

__all__ = ["train"]


def train(run: RunConfig, *, command: Sequence[str] = ()) -> Outcome:
    """Loads the data, trains and evaluates one model, and writes its run directory.

    Args:
        run: the configuration.
        command: the command line as typed, for run.json.

    Raises:
        ValueError: if the run cannot start as asked for; what the directory holds is left as it is.
    """
    return Trainer(run, open_objective(run, progress=sys.stderr.isatty()), command=command).fit()
