"""At which context length does one model overtake another? Pure functions on measured curves.

A curve is a quantity measured at several context lengths. Between measured lengths the gain of one model on another
(the logarithm of their ratio, or their difference) is taken to be linear in the logarithm of the length, for ratios
exact for power laws; outside them nothing is said. Where values are paired, by seed or by round, so are the gains: the
interval at a length between two measured ones is that of the gains interpolated pair by pair, and the models may cross
where it includes zero (the confidence set that inverts the test of no difference, as Fieller's does).
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise, permutations
from typing import Literal

from .statistics import mean_interval

__all__ = ["Crossover", "Curve", "Direction", "Gap", "Point", "Scale", "all_crossovers", "crossover", "gap_between"]

Direction = Literal["higher", "lower"]
Scale = Literal["ratio", "difference"]
Verdict = Literal["beyond", "always", "never", "only_shorter", "unclear", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured value, positive where ratios are compared; None where the model could not run (worse than any)."""

    context_len: int
    value: float | None
    pairs: Mapping[int, float] = field(default_factory=dict)
    """Values of independent measurements by what pairs them with those of another model: a seed, or a round of repeats
    in processes of their own. Empty where there is none: then the spread of one process says how sure the value is."""
    low: float | None = None
    """Low end of the spread of the repeats; the value itself when None."""
    high: float | None = None
    """High end of the spread of the repeats; the value itself when None."""
    stopped_after: float | None = None
    """Seconds after which the measurement was stopped, where that is why there is no value."""


Curve = Sequence[Point]


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """The context length beyond which b is better than a."""

    metric: str
    a: str
    b: str
    verdict: Verdict
    """beyond: b is better from context_len on; always / never: at every measured length; only_shorter: b is better
    somewhere, but not at the longest length; unclear: the spread of the repeats allows several of these, and low and
    high tell what is left; unknown: no length was measured for both."""
    context_len: float | None
    """Length in tokens from which b stays better; None unless the verdict is 'beyond'."""
    low: float | None
    """Shortest length compatible with the spread of the repeats; None if b may be better at all measured lengths, or
    cannot be at the longest."""
    high: float | None
    """Longest length compatible with the spread of the repeats; None if b may never get ahead in the measured range."""
    n_crossings: int
    """Number of changes of the better model within the measured lengths."""
    out_of_memory: str | None
    """Name of the model that no longer runs, where that is the crossover."""
    stopped_after: float | None
    """Seconds after which a was stopped, where the crossover is that it took too long."""
    n_pairs: int = 0
    """Fewest pairs at any length, by seed or by round; 0 where the range is that of the repeats within one process."""


@dataclass(frozen=True, kw_only=True)
class Gap:
    """How much better one model is than another at one length, with the interval of it."""

    mean: float
    """The gain: a difference, or the logarithm of a ratio; positive where the model is better, infinite where the other
    could not run."""
    low: float
    high: float
    gains: Mapping[int, float] = field(default_factory=dict)
    """Of each pair; empty where the interval is that of the repeats within one process."""
    p: float | None = None
    """Two-sided p-value of no difference; None where there are no pairs."""

    @property
    def n(self) -> int:
        """Pairs."""
        return len(self.gains)

    @property
    def includes_zero(self) -> bool:
        """Whether the interval does not exclude that there is no difference."""
        return self.low <= 0 <= self.high


def _gain(a: float, b: float, direction: Direction, scale: Scale) -> float:
    gain = b - a if scale == "difference" else math.log(b) - math.log(a)
    return gain if direction == "higher" else -gain


def gap_between(a: Point, b: Point, direction: Direction, scale: Scale) -> Gap | None:
    """How much better b is than a at the length of both; None where neither has a value, or they share no pair."""
    if a.value is None and b.value is None:
        return None
    if a.value is None or b.value is None:
        end = math.inf if a.value is None else -math.inf
        return Gap(mean=end, low=end, high=end)
    if a.pairs or b.pairs:
        shared = sorted(a.pairs.keys() & b.pairs.keys())
        return _paired({key: _gain(a.pairs[key], b.pairs[key], direction, scale) for key in shared}) if shared else None
    best, worst = ("high", "low") if direction == "higher" else ("low", "high")
    return Gap(
        mean=_gain(a.value, b.value, direction, scale),
        low=_gain(_end(a, best, a.value), _end(b, worst, b.value), direction, scale),
        high=_gain(_end(a, worst, a.value), _end(b, best, b.value), direction, scale),
    )


def _paired(gains: Mapping[int, float]) -> Gap:
    found = mean_interval(list(gains.values()))
    return Gap(mean=found.mean, low=found.low, high=found.high, gains=gains, p=found.p)


_STEPS = 16
"""Parts of the way between two measured lengths at whose ends the interval of paired gains is computed: it bends little
within one."""


def _band(lengths: Sequence[int], gaps: Sequence[Gap]) -> Iterator[tuple[float, Gap]]:
    """The gaps at the measured lengths and, where they are paired, between them."""
    for (start, before), (stop, after) in pairwise(zip(lengths, gaps, strict=True)):
        yield start, before
        shared = before.gains.keys() & after.gains.keys()
        for i in range(1, _STEPS if len(shared) > 1 else 0):
            share = i / _STEPS
            gains = {key: (1 - share) * before.gains[key] + share * after.gains[key] for key in shared}
            yield start * (stop / start) ** share, _paired(gains)
    if gaps:
        yield lengths[-1], gaps[-1]


def _last_rise(lengths: Sequence[float], ratios: Sequence[float]) -> float | None:
    """Finds where the ratio last turns positive and stays so; None unless it is positive at the end and not everywhere.

    Where it rises because the other model has no value any more, the ratio is infinite, and the answer is the first
    length measured with a positive ratio: the change lies somewhere before it.
    """
    if ratios[-1] <= 0 or min(ratios) > 0:
        return None
    i = max(i for i, ratio in enumerate(ratios) if ratio <= 0)
    below, above = ratios[i], ratios[i + 1]
    if math.isinf(above):
        return float(lengths[i + 1])
    fraction = -below / (above - below)
    return min(lengths[i] * (lengths[i + 1] / lengths[i]) ** fraction, float(lengths[i + 1]))


def _worse_beyond_first_failure(curve: Curve) -> dict[int, Point]:
    """Points by length, where every length after one without a value has none either: memory only grows."""
    points, failure = {}, None
    for point in sorted(curve, key=lambda point: point.context_len):
        failure = failure or (point if point.value is None else None)
        points[point.context_len] = replace(failure, context_len=point.context_len) if failure else point
    return points


def _kind(ratios: Sequence[float]) -> Verdict:
    if ratios[-1] > 0:
        return "always" if min(ratios) > 0 else "beyond"
    return "only_shorter" if max(ratios) > 0 else "never"


def _verdict(central: Sequence[float], optimistic: Sequence[float], pessimistic: Sequence[float]) -> Verdict:
    """The verdict on the central ratios, or 'unclear' where the spread leaves nothing of it."""
    verdict, best, worst = _kind(central), _kind(optimistic), _kind(pessimistic)
    match verdict:
        case "beyond":
            unclear = best == "always" and worst != "beyond"
        case "only_shorter":  # the same seen from the other model
            unclear = worst == "never" and best != "only_shorter"
        case _:
            unclear = best != worst
    return "unclear" if unclear else verdict


def crossover(
    metric: str, a: str, b: str, curves: Mapping[str, Curve], direction: Direction, scale: Scale = "ratio"
) -> Crossover:
    """Finds the context length beyond which b is better than a.

    With several crossings it is the last one (n_crossings tells). The range is where the interval of the gain includes
    zero; without pairs it comes from comparing the low end of one with the high end of the other. A model without a
    value at some length is worse there and at every longer length.

    Args:
        metric: name carried into the answer.
        a: name of the model to be overtaken.
        b: name of the model that overtakes.
        curves: measured points of each model.
        direction: whether higher or lower values are better.
        scale: whether ratios are compared, of positive values, or differences.
    """
    points_a, points_b = _worse_beyond_first_failure(curves[a]), _worse_beyond_first_failure(curves[b])
    longest_a, longest_b = max(points_a, default=0), max(points_b, default=0)
    for points, longest, other in ((points_a, longest_a, points_b), (points_b, longest_b, points_a)):
        if points and points[longest].value is None:  # lengths not tried after a failure fail too
            points.update({L: replace(points[longest], context_len=L) for L in other if longest < L})
    measured = {
        context_len: gap
        for context_len in sorted(points_a.keys() & points_b.keys())
        if (gap := gap_between(points_a[context_len], points_b[context_len], direction, scale)) is not None
    }
    band = list(_band(list(measured), list(measured.values())))
    lengths = [length for length, _ in band]
    central, optimistic, pessimistic = ([getattr(gap, end) for _, gap in band] for end in ("mean", "high", "low"))
    verdict, context_len, low, high, failure = "unknown", None, None, None, None
    if lengths:
        verdict = _verdict(central, optimistic, pessimistic)
        if verdict in ("beyond", "unclear"):
            low, high = _last_rise(lengths, optimistic), _last_rise(lengths, pessimistic)
        if verdict == "beyond":
            context_len = _last_rise(lengths, central)
        clear = context_len if verdict == "beyond" else high
        if clear is not None:
            first_better = next(i for i, length in enumerate(lengths) if length >= clear)
            if math.isinf(central[first_better]):
                failure = points_a[int(lengths[first_better])]
                low = float(lengths[first_better - 1]) if verdict == "beyond" else low
    return Crossover(
        metric=metric,
        a=a,
        b=b,
        verdict=verdict,
        context_len=context_len,
        low=low,
        high=high,
        n_crossings=sum((x > 0) != (y > 0) for x, y in pairwise(central)),
        out_of_memory=a if failure is not None and failure.stopped_after is None else None,
        stopped_after=None if failure is None else failure.stopped_after,
        n_pairs=min((gap.n for gap in measured.values() if math.isfinite(gap.mean)), default=0),
    )


def _end(point: Point, end: str, value: float) -> float:
    bound = getattr(point, end)
    return value if bound is None else bound


def all_crossovers(
    metric: str, curves: Mapping[str, Curve], direction: Direction, scale: Scale = "ratio"
) -> Iterable[Crossover]:
    """Yields the crossover of every ordered pair of models, in the order of the curves."""
    for a, b in permutations(curves, 2):
        yield crossover(metric, a, b, curves, direction, scale)
