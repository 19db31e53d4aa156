"""What a run can learn, by name. To add an objective: write train/objectives/NAME.py, then add its line here."""

from __future__ import annotations

from typing import Any

from ..config import RunConfig
from ..objective import Objective
from .next_token import NextToken
from .pairs import Pairs

__all__ = ["OBJECTIVES", "open_objective"]

OBJECTIVES: dict[str, type[Objective[Any, Any]]] = {
    "next_token": NextToken,
    "pairs": Pairs,
}


def open_objective(run: RunConfig, *, progress: bool = False) -> Objective[Any, Any]:
    """The objective of a run with its data; `progress` shows bars on a terminal.

    Raises:
        ValueError: if the objective or one of its options does not exist, or the data cannot be used.
    """
    if run.data.rows == "pairs":
        return Pairs.load(run, Pairs.Config(), progress=progress)
    return NextToken.load(run, NextToken.Config(packing=run.data.packing), progress=progress)
