import math
import random
from itertools import pairwise

import pytest
from crossover.benchmarks.report.crossovers import Crossover, Point, crossover
from crossover.benchmarks.report.statistics import holm, mean_interval, paired, t_cdf, t_quantile

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(("dof", "value"), [(1, 12.7062), (2, 4.30265), (4, 2.77645), (9, 2.26216), (30, 2.04227)])
def test_quantiles_are_those_of_the_printed_tables(dof: int, value: float) -> None:
    assert t_quantile(0.975, dof) == pytest.approx(value, abs=1e-5)
    assert t_quantile(0.025, dof) == -t_quantile(0.975, dof)


@pytest.mark.parametrize("dof", [1, 2, 3, 6, 17])
def test_the_distribution_is_the_integral_of_its_density(dof: int) -> None:
    norm = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    places = [-3 + i / 500 for i in range(2501)]
    density = [norm * (1 + t * t / dof) ** (-(dof + 1) / 2) for t in places]
    area = sum((a + b) / 1000 for a, b in pairwise(density))
    assert t_cdf(2, dof) - t_cdf(-3, dof) == pytest.approx(area, abs=1e-6)


def test_a_quantile_that_does_not_exist_is_refused() -> None:
    for probability, dof in ((0.975, 0), (1.0, 3), (0.0, 3)):
        with pytest.raises(ValueError, match="no quantile"):
            t_quantile(probability, dof)


def test_differences_are_paired_by_what_both_have() -> None:
    found = paired({0: 1.0, 1: 2.0, 5: 100.0}, {1: 2.5, 0: 1.1, 7: -9.0})
    assert found is not None
    assert (found.n, found.mean) == (2, pytest.approx(0.3))
    assert found.half_width == pytest.approx(12.7062 * 0.2, rel=1e-5)  # of 0.1 and 0.5
    assert found.includes_zero
    assert paired({0: 1.0}, {1: 1.0}) is None


def test_one_pair_excludes_nothing_and_equal_pairs_all_but_their_difference() -> None:
    one, same = mean_interval([0.4]), mean_interval([0.4, 0.4])
    assert (one.includes_zero, one.p) == (True, 1.0)
    assert (same.low, same.high, same.p) == (0.4, 0.4, 0.0)


def test_the_p_value_is_below_a_level_where_the_interval_excludes_zero() -> None:
    rng = random.Random(3)
    found = [mean_interval([rng.gauss(0.7, 1) for _ in range(5)]) for _ in range(300)]
    assert 20 < sum(one.includes_zero for one in found) < 280
    assert all((one.p < 0.05) != one.includes_zero for one in found)


def test_corrected_p_values_step_down_in_order() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, 2 x 0.03, and no less than that
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@pytest.mark.parametrize("n", [3, 5, 10])
def test_an_interval_holds_the_truth_95_times_in_100(n: int) -> None:
    rng = random.Random(n)
    truth = 0.3
    held = 0
    for _ in range(4000):
        shared = [rng.gauss(0, 5) for _ in range(n)]  # what a seed does to both models
        a = {i: shared[i] + rng.gauss(0, 1) for i in range(n)}
        found = paired(a, {i: shared[i] + truth + rng.gauss(0, 0.5) for i in range(n)})
        assert found is not None
        held += found.low <= truth <= found.high
    assert held / 4000 == pytest.approx(0.95, abs=0.02)


def holds(found: Crossover, length: float) -> bool:
    """Whether a crossing at this length is compatible with what was found."""
    if found.verdict in ("beyond", "unclear"):
        return (found.low or 0) <= length <= (found.high or math.inf)
    return False


@pytest.mark.parametrize("n", [3, 5, 10])
def test_the_range_of_a_crossing_holds_the_truth_95_times_in_100(n: int) -> None:
    rng = random.Random(n)
    lengths, true = (128, 512, 2048), 700.0
    held = 0
    for _ in range(1500):
        curves: dict[str, list[Point]] = {"a": [], "b": []}
        for length in lengths:
            shared = [rng.gauss(2, 0.3) for _ in range(n)]
            gain = 0.2 * math.log2(length / true)
            for name, at in (("a", 0.0), ("b", gain)):
                pairs = {i: shared[i] - at + rng.gauss(0, 0.05) for i in range(n)}
                curves[name].append(Point(context_len=length, value=sum(pairs.values()) / n, pairs=pairs))
        held += holds(crossover("bits per byte", "a", "b", curves, "lower", "difference"), true)
    assert held / 1500 == pytest.approx(0.95, abs=0.02)
