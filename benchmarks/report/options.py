"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

__all__ = ["ReportConfig"]


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild the report of a folder from its files: report.html, report.md, the tables as CSV, summary.json. Of
    several folders (two budgets, two machines, two commits) one report of what differs between them, and which verdicts
    changed from one to the next."""

    folders: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="DIR [DIR ...]")]
    """Folder of a comparison, or of runs; of several of them, in the order in which to tell them."""

    out: Path | None = None
    """Folder of the report of several; that of one lies in its own."""

    baseline: str | None = None
    """Architecture that the others are compared with; when not given, that of the comparison, the Transformer if it is
    among the models, or else the first."""

    def __post_init__(self) -> None:
        if not self.folders:
            raise ValueError("crossover report needs the folder of a comparison, or several")
        if len(self.folders) > 1 and self.out is None:
            raise ValueError("say with --out DIR where the report of several folders goes")
        if len(self.folders) == 1 and self.out is not None:
            raise ValueError(f"the report of one folder goes into it: leave --out {self.out} out, or give two folders")
