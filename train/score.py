"""The number by which runs of one objective are compared. Importing it is cheap: reports need no torch."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

from ..options import from_plain

__all__ = ["BITS_PER_BYTE", "Score", "bits_per_byte"]


@dataclass(frozen=True, kw_only=True)
class Score:
    """A metric of held-out rows: in logs, learning-rate search, report and figures it stands for the quality of a run.

    Raises:
        ValueError: if `better` is neither "lower" nor "higher", or the name cannot be part of a key.
    """

    name: str
    """Key of the metric: `val_NAME` in result.json, `val/NAME` in metrics.jsonl and TensorBoard."""
    unit: str
    """Words after a value in a sentence: "3.68 bits per byte", "0.91 accuracy"."""
    words: str
    """Full name, for titles and axes: "bits per byte of held-out text"."""
    better: Literal["lower", "higher"] = "lower"
    """Direction of the better value."""

    def __post_init__(self) -> None:
        if self.better not in ("lower", "higher"):
            raise ValueError(f"score.better={self.better!r} must be 'lower' or 'higher'")
        if not self.name.isidentifier():
            raise ValueError(f"score.name={self.name!r} must be an identifier, as it is part of keys")

    @property
    def key(self) -> str:
        """Key of the final value in result.json."""
        return f"val_{self.name}"

    @property
    def tag(self) -> str:
        """Key of a validation in metrics.jsonl, and tag in TensorBoard."""
        return f"val/{self.name}"

    def best(self, values: Iterable[float]) -> float:
        """The best of some values; a ValueError where there is none."""
        return min(values) if self.better == "lower" else max(values)

    def reaches(self, value: float, goal: float) -> bool:
        """Whether a value is as good as another one."""
        return value <= goal if self.better == "lower" else value >= goal

    def text(self, value: float, digits: int = 3) -> str:
        """A value with its unit, as a sentence says it."""
        return f"{value:.{digits}f} {self.unit}"

    def to_dict(self) -> dict[str, Any]:
        """Returns what run.json holds under "score"."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Self:
        """Inverse of `to_dict`; None gives bits per byte, the only score of runs that say nothing of it.

        Raises:
            ValueError: if the values are no score.
        """
        return cls(**dataclasses.asdict(BITS_PER_BYTE)) if values is None else from_plain(cls, values, "score.")


BITS_PER_BYTE = Score(name="bits_per_byte", unit="bits per byte", words="bits per byte of held-out text")
"""Score of language models: another tokenizer does not change its scale."""


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Converts the summed nats of a text into bits for each of its UTF-8 bytes."""
    return nats / math.log(2) / n_bytes
