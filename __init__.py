"""Sequence models as one experiment: `from crossover import build; lm = build("mamba", n_params=1_000_000)`.

Importing it loads nothing: torch comes with the names that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .archs import Backbone, LanguageModel, build

__all__ = ["Backbone", "LanguageModel", "__version__", "build"]

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in __all__:
        from . import archs

        return getattr(archs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
