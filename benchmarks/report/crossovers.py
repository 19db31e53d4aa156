"""At which context length does one model overtake another? Pure functions on measured curves.

A curve is a quantity measured at several context lengths. Between measured lengths the logarithm of the ratio of two
curves is taken to be linear in the logarithm of the length, exact for power laws; outside them nothing is said.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise, permutations
from typing import Literal

__all__ = ["Crossover", "Curve", "Direction", "Point", "all_crossovers", "crossover"]

Direction = Literal["higher", "lower"]
Verdict = Literal["beyond", "always", "never", "only_shorter", "unclear", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Point:
    """A measured positive value; None where there is no value because the model could not run (worse than any)."""

    context_len: int
    value: float | None
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


def _log_ratio(a: float | None, b: float | None, direction: Direction) -> float | None:
    """log(how much better b is than a): positive where b is better; None where neither has a value."""
    if a is None and b is None:
        return None
    if a is None:
        return math.inf
    if b is None:
        return -math.inf
    ratio = math.log(b) - math.log(a)
    return ratio if direction == "higher" else -ratio


def _last_rise(lengths: Sequence[int], ratios: Sequence[float]) -> float | None:
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


def crossover(metric: str, a: str, b: str, curves: Mapping[str, Curve], direction: Direction) -> Crossover:
    """Finds the context length beyond which b is better than a.

    With several crossings it is the last one (n_crossings tells). The range comes from comparing the low end of one
    with the high end of the other. A model without a value at some length is worse there and at every longer length.

    Args:
        metric: name carried into the answer.
        a: name of the model to be overtaken.
        b: name of the model that overtakes.
        curves: measured points of each model; values must be positive.
        direction: whether higher or lower values are better.
    """
    points_a, points_b = _worse_beyond_first_failure(curves[a]), _worse_beyond_first_failure(curves[b])
    longest_a, longest_b = max(points_a, default=0), max(points_b, default=0)
    for points, longest, other in ((points_a, longest_a, points_b), (points_b, longest_b, points_a)):
        if points and points[longest].value is None:  # lengths not tried after a failure fail too
            points.update({L: replace(points[longest], context_len=L) for L in other if longest < L})
    lengths, central, optimistic, pessimistic = [], [], [], []
    for context_len in sorted(points_a.keys() & points_b.keys()):
        p, q = points_a[context_len], points_b[context_len]
        ratio = _log_ratio(p.value, q.value, direction)
        if ratio is None:
            continue
        best, worst = ("high", "low") if direction == "higher" else ("low", "high")
        lengths.append(context_len)
        central.append(ratio)
        optimistic.append(_log_ratio(_end(p, worst), _end(q, best), direction))
        pessimistic.append(_log_ratio(_end(p, best), _end(q, worst), direction))
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
                failure = points_a[lengths[first_better]]
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
    )


def _end(point: Point, end: str) -> float | None:
    bound = getattr(point, end)
    return point.value if bound is None else bound


def all_crossovers(metric: str, curves: Mapping[str, Curve], direction: Direction) -> Iterable[Crossover]:
    """Yields the crossover of every ordered pair of models, in the order of the curves."""
    for a, b in permutations(curves, 2):
        yield crossover(metric, a, b, curves, direction)
