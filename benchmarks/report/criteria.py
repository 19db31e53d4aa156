"""What models are compared by: each criterion with every model at every length, and who is best or level with it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .crossovers import Crossover, Direction, Gap, Point, Scale, all_crossovers, gap_between
from .results import METRICS, Comparison, Metric, curve
from .statistics import LEVEL, holm

__all__ = ["CRITERIA_COLUMNS", "Criterion", "criteria", "crossings_of_quality", "undominated"]

CRITERIA_COLUMNS = (
    "criterion",
    "context_len",
    "arch",
    "value",
    "status",
    "baseline",
    "scale",
    "gain",
    "gain_low",
    "gain_high",
    "pairs",
    "p",
    "difference_shown",
    "best_or_level",
)

Basis = Literal["seeds", "rounds", "one seed", "one process", "exact"]


@dataclass(frozen=True, kw_only=True)
class Criterion:
    """One criterion: the points of every model by length, and why a model has none."""

    name: str
    """In tables and sentences: "bits per byte at equal tokens"."""
    title: str
    """What the best one does: "Trains fastest"."""
    note: str
    """What was measured, in few words."""
    kind: str
    """quality, or the phase and key of its cells."""
    direction: Direction
    scale: Scale
    archs: Sequence[str]
    baseline: str
    lengths: Sequence[int]
    """Lengths at which anything was tried."""
    points: Mapping[tuple[str, int], Point]
    """Points by architecture and length."""
    why: Mapping[tuple[str, int], str] = field(default_factory=dict)
    """Status of what was tried and has no value, by architecture and length."""
    basis: Basis

    def value(self, arch: str, length: int) -> float | None:
        """Mean over seeds, or median over repeats."""
        point = self.points.get((arch, length))
        return None if point is None else point.value

    def ranked(self, length: int) -> list[str]:
        """Models that have a value at a length, best first; of equal ones in the order of the comparison."""
        sign = -1 if self.direction == "higher" else 1
        values = {arch: value for arch in self.archs if (value := self.value(arch, length)) is not None}
        return sorted(values, key=lambda arch: sign * values[arch])

    def gap(self, arch: str, other: str, length: int) -> Gap | None:
        """How much better a model is than another at a length; None where one has no point, or they share no pair."""
        a, b = self.points.get((other, length)), self.points.get((arch, length))
        return None if a is None or b is None else gap_between(a, b, self.direction, self.scale)

    def level(self, length: int) -> list[str]:
        """The best model at a length, and every one whose interval of the difference to it includes zero."""
        ranked = self.ranked(length)
        gaps = [(arch, self.gap(ranked[0], arch, length)) for arch in ranked[1:]]
        return [*ranked[:1], *(arch for arch, gap in gaps if gap is None or gap.includes_zero)]

    @property
    def decided(self) -> bool:
        """Whether there are repeats enough to tell a difference from noise."""
        return self.basis != "one seed"

    @functools.cached_property
    def _shown(self) -> dict[int, dict[str, bool]]:
        found = {}
        for length in self.lengths:
            gaps = {
                arch: gap for arch in self.archs
                if arch != self.baseline and (gap := self.gap(arch, self.baseline, length)) is not None
            }  # fmt: skip
            tested = {arch: gap.p for arch, gap in gaps.items() if gap.p is not None}
            corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
            found[length] = {
                arch: corrected[arch] < 1 - LEVEL if arch in corrected else not gap.includes_zero
                for arch, gap in gaps.items()
            }
        return found

    def shown(self, arch: str, length: int) -> bool:
        """Whether a difference to the baseline is shown: after Holm's correction over the models at the length where
        there are pairs, by intervals that do not meet where there are none."""
        return self._shown.get(length, {}).get(arch, False)

    def rows(self) -> list[dict[str, Any]]:
        """The criterion as rows of a CSV file."""
        rows = []
        for length in self.lengths:
            level = self.level(length)
            for arch in self.archs:
                gap = self.gap(arch, self.baseline, length) if arch != self.baseline else None
                row: dict[str, Any] = dict.fromkeys(CRITERIA_COLUMNS)
                row |= {"criterion": self.name, "context_len": length, "arch": arch, "value": self.value(arch, length)}
                row |= {"status": self.status(arch, length), "baseline": self.baseline, "scale": self.scale}
                if gap is not None and math.isfinite(gap.mean):
                    row |= {"gain": gap.mean, "pairs": gap.n, "p": gap.p}
                    if math.isfinite(gap.high):
                        row |= {"gain_low": gap.low, "gain_high": gap.high}
                    if self.decided:
                        row["difference_shown"] = self.shown(arch, length)
                if self.decided and row["value"] is not None:
                    row["best_or_level"] = arch in level
                rows.append(row)
        return rows

    def status(self, arch: str, length: int) -> str:
        """done, or why there is no value: a status, or "not measured"."""
        if self.value(arch, length) is not None:
            return "done"
        return self.why.get((arch, length), "not measured")


def criteria(comparison: Comparison) -> list[Criterion]:
    """Every criterion by which anything was measured, quality first."""
    found = [quality_criterion(comparison), *(_of_cells(comparison, metric) for metric in METRICS)]
    return [criterion for criterion in found if criterion.points]


def crossings_of_quality(found: Sequence[Criterion]) -> list[Crossover]:
    """Crossovers of the score by trained length, of every ordered pair of models; none without runs."""
    crossings: list[Crossover] = []
    for quality in (criterion for criterion in found if criterion.kind == "quality"):
        curves = {
            arch: [point for (name, _), point in quality.points.items() if name == arch] for arch in quality.archs
        }
        crossings += all_crossovers(
            quality.name, {arch: some for arch, some in curves.items() if some}, quality.direction, quality.scale
        )
    return crossings


def quality_criterion(comparison: Comparison) -> Criterion:
    """The score by trained length, paired by seed."""
    score, points, why = comparison.score, {}, {}
    for arch in comparison.archs:
        for length in comparison.trained_lengths:
            runs = comparison.runs_of(arch, length)
            pairs = {run.seed: run.quality for run in runs if run.quality is not None}
            if pairs:
                value = math.fsum(pairs.values()) / len(pairs)
                points[arch, length] = Point(context_len=length, value=value, pairs=pairs)
            elif runs:
                why[arch, length] = runs[0].status
    most = max((len(point.pairs) for point in points.values()), default=0)
    unit = "bits per byte" if comparison.predicts_text else score.unit
    equal = f"at equal {comparison.equal}"
    return Criterion(
        name=f"{unit} {equal}",
        title="Predicts best" if comparison.predicts_text else "Scores best",
        note=f"{unit} {equal}, {most} seed{'s' if most != 1 else ''}",
        kind="quality",
        direction=score.better,
        scale="difference",
        archs=comparison.archs,
        baseline=comparison.baseline,
        lengths=comparison.trained_lengths,
        points=points,
        why=why,
        basis="seeds" if most > 1 else "one seed",
    )


def _of_cells(comparison: Comparison, metric: Metric) -> Criterion:
    points, why = {}, {}
    for arch in comparison.archs:
        points |= {(arch, point.context_len): point for point in curve(comparison, arch, metric)}
        cells = comparison.ranked_cells(arch, metric)
        why |= {(arch, cell.context_len): cell.status for cell in cells if not cell.done}
        if len(cells) < len(others := comparison.cells_of(arch, metric.phase)):
            why |= {(arch, cell.context_len): "not compared" for cell in others if cell not in cells}
    is_bytes = metric.key.endswith("bytes")
    rounds = any(point.pairs for point in points.values())
    return Criterion(
        name=metric.name,
        title=metric.title,
        note=metric.note,
        kind=f"{metric.phase} {metric.key}",
        direction=metric.direction,
        scale="ratio",
        archs=comparison.archs,
        baseline=comparison.baseline,
        lengths=sorted({length for _, length in (*points, *why)}),
        points=points,
        why=why,
        basis="rounds" if rounds else "exact" if is_bytes else "one process",
    )


def undominated(quality: Criterion, speed: Criterion, length: int) -> list[str]:
    """Models that none beats both in quality and in speed, by more than the intervals; best to cheapest.

    Empty unless at least two models have both at this length. Where there is one seed, the values themselves decide.
    """
    both = [arch for arch in quality.ranked(length) if speed.value(arch, length) is not None]

    def better(criterion: Criterion, arch: str, other: str) -> bool:
        gap = criterion.gap(arch, other, length)
        return gap is not None and (gap.low if criterion.decided else gap.mean) > 0

    if len(both) < 2:
        return []
    beaten = {a for a in both for b in both if better(quality, b, a) and better(speed, b, a)}
    return [arch for arch in both if arch not in beaten]
