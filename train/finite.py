"""Numbers that are none: found where they are first seen, before they are written down."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

__all__ = ["NonFiniteError", "check_finite", "check_weights", "first_bad_weight"]


class NonFiniteError(ArithmeticError):
    """A number that was to be written down, or a weight to be saved, is not finite."""


def check_finite(found: Any, what: str) -> None:
    """Raises NonFiniteError if a number in JSON values, which are known as `what`, is not finite."""
    if isinstance(found, float) and not math.isfinite(found):
        raise NonFiniteError(f"{what} is {found}")
    if isinstance(found, Mapping | list | tuple):
        for key, value in found.items() if isinstance(found, Mapping) else enumerate(found):
            check_finite(value, f"{what} {key}")


def check_weights(model: nn.Module) -> None:
    """Raises NonFiniteError if a parameter is not finite: from there no run can go on."""
    if (name := first_bad_weight(model)) is not None:
        raise NonFiniteError(f"the weights of {name} are not finite")


def first_bad_weight(model: nn.Module) -> str | None:
    """The name of a parameter that is not finite, if there is one."""
    return next((name for name, weight in model.named_parameters() if not weight.detach().isfinite().all()), None)
