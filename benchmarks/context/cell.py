"""A measurement against context length: what a line of context.jsonl holds. Importing it is cheap."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from ...files import FORMAT, read_json_lines

__all__ = ["Cell", "Status", "read_cells"]

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
    context_len: int
    n_params: int
    n_active_params: int
    batch_size: int | None = None
    tokens_per_second: float | None = None
    """Median over the repeats."""
    spread: tuple[float, float] | None = None
    """Tenth and ninetieth percentile over the repeats, in tokens per second; lowest and highest of two."""
    repeats: int | None = None
    peak_bytes: int | None = None
    """Most memory above what the process used before the model was built."""
    peak_method: str | None = None
    state_bytes: int | None = None
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
    def done(self) -> bool:
        """Whether the cell was measured."""
        return self.status == "done"

    def to_dict(self) -> dict[str, Any]:
        """Returns a line of context.jsonl."""
        values = {key.name: getattr(self, key.name) for key in dataclasses.fields(self)}
        return {"format": FORMAT, **values, "spread": None if self.spread is None else list(self.spread)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Reads a line of context.jsonl, one of an older version too. Keys that no cell has are passed over."""
        known = {key.name: values[key.name] for key in dataclasses.fields(cls) if key.name in values}
        spread = known.get("spread")
        return cls(**{**known, "label": values.get("label", values["arch"]), "spread": spread and tuple(spread)})


def read_cells(path: Path) -> list[Cell]:
    """Reads context.jsonl; no cells where there is no file.

    Raises:
        ValueError: naming the file, if it cannot be read or was written by a newer version.
    """
    return [Cell.from_dict(line) for line in read_json_lines(path)]
