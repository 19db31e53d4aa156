"""A measurement against context length: what a line of context.jsonl holds. Importing it is cheap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from ...files import FORMAT, read_json_lines
from ...options import Length, Positive, Range, from_plain

__all__ = ["Cell", "Status", "read_cells"]

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
    def key(self) -> tuple[str, str, int]:
        """Architecture, phase and length. Of two cells in a file with the same key the later one counts."""
        return self.arch, self.phase, self.context_len

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
