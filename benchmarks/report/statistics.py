"""What may be said of measurements that are paired: by seed (the same data in the same order), or by round."""

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["LEVEL", "Paired", "holm", "mean_interval", "paired", "t_cdf", "t_quantile"]

LEVEL = 0.95
"""Coverage of every interval of a report; a difference is shown where its corrected p-value is below 1 - LEVEL."""


@dataclass(frozen=True, kw_only=True)
class Paired:
    """The mean of paired differences with its t interval."""

    mean: float
    half_width: float
    """Half of the interval at LEVEL; infinite where there is one pair, which says nothing about the noise."""
    n: int
    """Pairs."""
    p: float
    """Two-sided p-value of a mean of zero; 1 where there is one pair."""

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width

    @property
    def includes_zero(self) -> bool:
        """Whether the interval does not exclude that there is no difference."""
        return self.low <= 0 <= self.high


def paired(a: Mapping[int, float], b: Mapping[int, float]) -> Paired | None:
    """The mean of b - a over the keys that both have, with Student's interval; None where they share none.

    Args:
        a: values by what pairs them: a seed, or a round of repeats.
        b: the same of another model.
    """
    differences = [b[key] - a[key] for key in sorted(a.keys() & b.keys())]
    return mean_interval(differences) if differences else None


def mean_interval(values: Sequence[float]) -> Paired:
    """The mean of independent values with Student's interval and the p-value of a mean of zero."""
    n, mean = len(values), statistics.fmean(values)
    if n == 1:
        return Paired(mean=mean, half_width=math.inf, n=1, p=1.0)
    error = math.sqrt(sum((value - mean) ** 2 for value in values) / ((n - 1) * n))
    if error == 0:
        return Paired(mean=mean, half_width=0.0, n=n, p=0.0 if mean else 1.0)
    p = 2 * t_cdf(-abs(mean) / error, n - 1)
    return Paired(mean=mean, half_width=t_quantile(0.5 + LEVEL / 2, n - 1) * error, n=n, p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number by Holm's step-down method, in the order given.

    Those below a level are wrong altogether with no more than that probability, whatever their dependence (S. Holm,
    A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6, 1979).
    """
    corrected, before = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        before = max(before, min(1.0, (len(p_values) - rank) * p_values[i]))
        corrected[i] = before
    return corrected


def t_cdf(t: float, dof: int) -> float:
    """Probability that Student's t with `dof` degrees of freedom is at most t.

    By the finite series in the angle atan(t / sqrt(dof)) (Abramowitz & Stegun, 26.7.3 and 26.7.4).
    """
    angle = math.atan(t / math.sqrt(dof))
    sine, cosine = math.sin(angle), math.cos(angle)
    term, total = (cosine, 0.0) if dof % 2 else (1.0, 0.0)
    for k in range(1 + dof % 2, dof, 2):  # the powers of the cosine: 1, 3, ... or 0, 2, ...
        total += term
        term *= cosine**2 * k / (k + 1)
    inside = 2 / math.pi * (angle + sine * total) if dof % 2 else sine * total  # P(|T| <= |t|), with the sign of t
    return 0.5 * (1 + inside)


@functools.cache
def t_quantile(probability: float, dof: int) -> float:
    """The t below which Student's distribution with `dof` degrees of freedom has this probability, by bisection.

    Raises:
        ValueError: unless there is a degree of freedom, and the probability is between 0 and 1.
    """
    if dof < 1 or not 0 < probability < 1:
        raise ValueError(f"Student's t has no quantile at {probability} with {dof} degrees of freedom")
    if probability < 0.5:
        return -t_quantile(1 - probability, dof)
    low, high = 0.0, 1.0
    while t_cdf(high, dof) < probability:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if t_cdf(middle, dof) < probability else (low, middle)
    return high
