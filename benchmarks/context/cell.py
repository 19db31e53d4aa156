"""A measurement against context length: what a line of context.jsonl holds. Importing it is cheap."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ...files import FORMAT, read_json_lines
from ...options import Length, Positive, Range, from_plain

__all__ = ["Cell", "Status", "over_repeats", "read_cells"]

Bytes = Annotated[int, Range(0, 2**60)]
Status = Literal["done", "out_of_memory", "timeout", "beyond_positions", "failed"]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Speed and memory of one architecture in one phase at one context length, or why there is none.

    What was not measured is None: all of it unless the status is "done", but for the state, whose size is known without
    running, and the batch size.
    """

    arch: str
    label: str
    """The architecture's name as written in text."""
    phase: str
    context_len: Length
    n_params: Length
    n_active_params: Length
    batch_size: Length | None = None
    tokens_per_second: Positive | None = None
    """Median over the repeats."""
    spread: Annotated[tuple[float, float], Range(above=0)] | None = None
    """Tenth and ninetieth percentile over the repeats, in tokens per second; lowest and highest of two."""
    repeats: int | None = None
    """Of the timed work, in one process."""
    seconds: Positive | None = None
    """Time on the wall of one of them: median."""
    cpu_seconds: Annotated[float, Range(0)] | None = None
    """Processor time of one of them, all threads together: mean."""
    load: Annotated[float, Range(0)] | None = None
    """Processors that other processes kept busy meanwhile, on average; None where the system does not tell."""
    disturbed: bool = False
    """Whether something else took a share of the machine that makes the speed doubtful (harness/effort.py)."""
    repeat: Annotated[int, Range(0)] = 0
    """Number of the process that measured it, where several measure the same one after the other."""
    peak_bytes: Bytes | None = None
    """Most memory above what the process used before the model was built."""
    peak_method: str | None = None
    state_bytes: Bytes | None = None
    """State of one sequence after the context."""
    backend: Mapping[str, list[str]] = field(default_factory=dict)
    """Backends that ran, by operation."""
    dtype: str
    status: Status = "failed"
    error: str | None = None
    """Reason why there is no measurement; None where there is one."""
    model: Mapping[str, Any]
    """ModelConfig.to_dict()"""
    settings: Mapping[str, Any]
    """Shared by all cells of a comparison: MeasureConfig, precision, device, threads, allocator."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Machine and versions: cpu, device, torch, git_commit."""

    @property
    def key(self) -> tuple[str, str, int, int]:
        """Architecture, phase, length and repeat. Of two cells in a file with the same key the later one counts."""
        return self.arch, self.phase, self.context_len, self.repeat

    @property
    def is_compiled(self) -> bool:
        """Whether tokens were decoded by a compiled step, and not by calling the model's modules."""
        return list(self.backend.get("decode", ())) == ["compiled"]

    @property
    def done(self) -> bool:
        """Whether the cell was measured."""
        return self.status == "done"

    def to_dict(self) -> dict[str, Any]:
        """Returns a line of context.jsonl."""
        values = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        return {"format": FORMAT, **values, "spread": None if self.spread is None else list(self.spread)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a line of context.jsonl, one of an older version too. Keys that no cell has are passed over.

        Raises:
            ValueError: if it lacks what every cell has, or a value is of another type.
        """
        known = {key.name: values[key.name] for key in dataclasses.fields(cls) if key.name in values}
        return from_plain(cls, ({"label": known["arch"]} if "arch" in known else {}) | known)


def read_cells(path: Path) -> list[Cell]:
    """Reads context.jsonl; no cells where there is no file.

    Raises:
        ValueError: naming the file, if a line is no cell or was written by a newer version.
    """
    cells = []
    for number, line in enumerate(read_json_lines(path), 1):
        try:
            cells.append(Cell.from_dict(line))
        except ValueError as error:
            raise ValueError(f"{path}, measurement {number}: {error}") from None
    return cells


def over_repeats(cells: Iterable[Cell]) -> list[Cell]:
    """One cell for each architecture, phase and length: medians over the processes that measured it.

    The spread is that between the processes, lowest to highest, where there are several. Where most of them ended
    without a measurement, so does the cell.
    """
    groups: dict[tuple[str, str, int], dict[int, Cell]] = {}
    for cell in cells:
        groups.setdefault((cell.arch, cell.phase, cell.context_len), {})[cell.repeat] = cell
    return [_median(list(group.values())) for group in groups.values()]


def _median(cells: Sequence[Cell]) -> Cell:
    done = [cell for cell in cells if cell.done]
    if 2 * len(done) <= len(cells):
        return next(cell for cell in cells if not cell.done)
    if len(done) == 1:
        return done[0]
    found = {}
    for name in ("tokens_per_second", "seconds", "cpu_seconds", "load", "peak_bytes"):
        values = [value for cell in done if (value := getattr(cell, name)) is not None]
        found[name] = statistics.median(values) if values else None
    if found["peak_bytes"] is not None:
        found["peak_bytes"] = round(found["peak_bytes"])
    speeds = [cell.tokens_per_second for cell in done if cell.tokens_per_second is not None]
    return dataclasses.replace(
        done[0],
        **found,
        spread=(min(speeds), max(speeds)) if speeds else None,
        repeats=sum(cell.repeats or 0 for cell in done),
        disturbed=any(cell.disturbed for cell in done),
    )
