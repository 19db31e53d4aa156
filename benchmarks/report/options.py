"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["ReportConfig"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild the report of a folder from its files: report.html, report.md, the tables as CSV, summary.json."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a comparison, or of runs."""

    baseline: str | None = None
    """Architecture that the others are compared with; when not given, that of the comparison, the Transformer if it is
    among the models, or else the first."""
