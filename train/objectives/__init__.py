"""Objectives of a run, by name. To add an objective: write train/objectives/NAME.py, then add its line here."""

from __future__ import annotations

from typing import Any

from ...archs.registry import UnknownName, check_class, register
from ...options import from_plain, nearest
from ..config import RunConfig
from ..objective import Objective
from .next_token import NextToken
from .pairs import Pairs
from .recall import TASKS

__all__ = ["OBJECTIVES", "open_objective", "register_objective"]

OBJECTIVES: dict[str, type[Objective[Any, Any]]] = {
    "next_token": NextToken,
    "pairs": Pairs,
    **TASKS,
}


def register_objective(name: str, objective: type[Objective[Any, Any]]) -> None:
    """Makes an objective available to `--objective` under `name`, from outside the package.

    Raises:
        ValueError: if the name is taken by another one, or is no identifier, or `objective` is no class of an objective
            with a Config that is a dataclass.
    """
    check_class("objective", objective, Objective)
    register(OBJECTIVES, "objective", name, objective, objective)


def open_objective(run: RunConfig, *, progress: bool = False) -> Objective[Any, Any]:
    """The objective of a run with its data; `progress` shows bars on a terminal.

    Raises:
        UnknownName: if there is no such objective.
        ValueError: if one of its options does not exist, or the data cannot be used.
    """
    if run.objective.kind not in OBJECTIVES:
        raise UnknownName(f"unknown objective {run.objective.kind!r}{nearest(run.objective.kind, OBJECTIVES)}")
    cls = OBJECTIVES[run.objective.kind]
    options = from_plain(cls.Config, run.objective.all_options(), "objective.")
    return cls.load(run, options, progress=progress)
