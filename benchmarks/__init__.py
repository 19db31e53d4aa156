"""Measurements, the report, and the `crossover` command. For scripts: `measure`, `compare`, `load_results`.

Importing this package loads nothing: torch comes with the names that need it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comparison.script import compare
    from .context.measure import measure
    from .report.rows import load_results

__all__ = ["compare", "load_results", "measure"]


def __getattr__(name: str) -> Any:
    match name:
        case "compare":
            from .comparison.script import compare

            return compare
        case "load_results":
            from .report.rows import load_results

            return load_results
        case "measure":
            from .context.measure import measure

            return measure
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
