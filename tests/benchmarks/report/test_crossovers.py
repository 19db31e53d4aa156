import math
from collections.abc import Sequence

import pytest
from crossover.benchmarks.report.crossovers import Crossover, Curve, Point, all_crossovers, crossover
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.quick

LENGTHS = (128, 512, 2048, 8192)


def curve(values: Sequence[float | None], lengths: Sequence[int] = LENGTHS, noise: float = 0.0) -> Curve:
    return [
        Point(
            context_len=L,
            value=v,
            low=None if v is None else v * (1 - noise),
            high=None if v is None else v * (1 + noise),
        )
        for L, v in zip(lengths, values, strict=True)
    ]


def find(a: Curve, b: Curve, direction: str = "higher") -> Crossover:
    return crossover("speed", "a", "b", {"a": a, "b": b}, direction)  # pyright: ignore[reportArgumentType]


exponents = st.floats(-1.5, 1.5)


@given(
    crossing=st.floats(140, 8000),
    slow=exponents,
    gain=st.floats(0.05, 2),
    scale=st.floats(1, 1e6),
    higher=st.booleans(),
)
def test_crossing_of_power_laws_is_found_exactly(
    crossing: float, slow: float, gain: float, scale: float, higher: bool
) -> None:
    fast = slow + gain if higher else slow - gain
    a = curve([scale * (L / crossing) ** slow for L in LENGTHS])
    b = curve([scale * (L / crossing) ** fast for L in LENGTHS])
    found = find(a, b, "higher" if higher else "lower")
    assert found.verdict == "beyond"
    assert found.context_len == pytest.approx(crossing, rel=1e-6)
    assert found.n_crossings == 1
    back = crossover("speed", "b", "a", {"a": a, "b": b}, "higher" if higher else "lower")
    assert (back.verdict, back.context_len) == ("only_shorter", None)


@given(st.floats(200, 6000), st.floats(0.001, 0.3))
def test_range_contains_the_crossing_and_grows_with_the_noise(crossing: float, noise: float) -> None:
    def at(noise: float) -> Crossover:
        a = curve([100.0 * (L / crossing) ** -0.8 for L in LENGTHS], noise=noise)
        return find(a, curve([100.0] * 4, noise=noise))

    def ends(found: Crossover) -> tuple[float, float]:
        return found.low or 0.0, found.high or math.inf

    narrow, wide = at(noise / 2), at(noise)
    assert narrow.context_len is not None
    assert ends(wide)[0] <= ends(narrow)[0] <= narrow.context_len <= ends(narrow)[1] <= ends(wide)[1]


@given(st.lists(st.floats(0.1, 1e6), min_size=4, max_size=4), st.lists(st.floats(0.1, 1e6), min_size=4, max_size=4))
def test_of_two_models_at_most_one_overtakes_the_other_for_good(x: list[float], y: list[float]) -> None:
    both = {"a": curve(x), "b": curve(y)}
    there, back = all_crossovers("speed", both, "higher")
    assert not (there.verdict == "beyond" and back.verdict == "beyond")
    assert (there.verdict == "always") <= (back.verdict == "never")
    for found in (there, back):
        assert (found.context_len is not None) == (found.verdict == "beyond")
        assert found.context_len is None or LENGTHS[0] <= found.context_len <= LENGTHS[-1]


def test_better_everywhere_is_always_and_has_no_length() -> None:
    found = find(curve([1, 1, 1, 1]), curve([2, 2, 2, 2]))
    assert (found.verdict, found.context_len) == ("always", None)
    assert find(curve([2, 2, 2, 2]), curve([1, 1, 1, 1])).verdict == "never"


def test_equal_curves_do_not_cross() -> None:
    assert find(curve([3, 3, 3, 3]), curve([3, 3, 3, 3])).verdict == "never"


def test_of_several_crossings_the_last_one_counts() -> None:
    found = find(curve([2, 1, 2, 1]), curve([1, 2, 1, 2]))
    assert found.n_crossings == 3
    assert found.context_len == pytest.approx(4096)


def test_running_out_of_memory_is_worse_than_any_value() -> None:
    found = find(curve([9, 9, 9, None]), curve([1, 1, 1, 1]))
    assert (found.verdict, found.context_len, found.out_of_memory) == ("beyond", 8192, "a")
    assert (found.low, found.high) == (2048, 8192)
    assert find(curve([1, 1, 1, 1]), curve([9, 9, 9, None])).verdict == "only_shorter"


def test_lengths_after_running_out_of_memory_count_as_out_of_memory() -> None:
    broken = curve([9, None], LENGTHS[:2])
    assert find(broken, curve([1, 1, 1, 1])).context_len == 512
    recovered = curve([9, None, 9, 9])
    assert find(recovered, curve([1, 1, 1, 1])).verdict == "beyond"


def test_lengths_at_which_both_fail_say_nothing() -> None:
    found = find(curve([2, 2, 2, None]), curve([1, 4, 4, None]))
    assert found.verdict == "beyond"
    assert found.out_of_memory is None
    assert 128 < (found.context_len or 0) < 512


def test_models_without_a_common_length_are_unknown() -> None:
    assert find(curve([1], [128]), curve([1], [512])).verdict == "unknown"


def test_uncertainty_that_covers_the_whole_range_has_no_ends() -> None:
    found = find(curve([1.01, 1.0, 0.99, 0.98], noise=0.2), curve([1.0, 1.0, 1.0, 1.0], noise=0.2))
    assert found.verdict == "unclear"
    assert (found.context_len, found.low, found.high) == (None, None, None)


@given(st.floats(0.96, 1.04), st.booleans())
def test_flat_curves_closer_than_their_spread_are_unclear(ratio: float, higher: bool) -> None:
    a, b = curve([1.0] * 4, noise=0.05), curve([ratio] * 4, noise=0.05)
    assert find(a, b, "higher" if higher else "lower").verdict == "unclear"


@given(st.lists(st.floats(0.5, 2), min_size=4, max_size=4), st.floats(0, 0.3))
def test_a_lead_at_every_length_is_claimed_only_where_the_spread_allows_nothing_else(
    ratios: list[float], noise: float
) -> None:
    found = find(curve([1.0] * 4, noise=noise), curve(ratios, noise=noise))
    worst = [ratio * (1 - noise) / (1 + noise) for ratio in ratios]
    best = [ratio * (1 + noise) / (1 - noise) for ratio in ratios]
    if found.verdict == "always":
        assert min(worst) > 1 - 1e-9
    if found.verdict == "never":
        assert max(best) < 1 + 1e-9


def test_a_lead_that_starts_within_the_noise_says_from_where_it_is_clear() -> None:
    found = find(curve([1, 1, 1, 1], noise=0.1), curve([1.05, 2, 4, 8], noise=0.1))
    assert (found.verdict, found.context_len, found.low) == ("unclear", None, None)
    assert 128 < (found.high or 0) < 512


def test_a_lead_that_is_lost_to_the_noise_says_from_where() -> None:
    found = find(curve([1.05, 2, 4, 1.0], noise=0.1), curve([8, 8, 8, 1.01], noise=0.1))
    assert found.verdict == "unclear"
    back = find(curve([8, 8, 8, 1.01], noise=0.1), curve([1.05, 2, 4, 1.0], noise=0.1))
    assert 2048 < (back.low or 0) < 8192


def test_a_timeout_carries_its_seconds_and_is_not_out_of_memory() -> None:
    stopped = [*curve([9, 9], LENGTHS[:2]), Point(context_len=2048, value=None, stopped_after=300.0)]
    found = find(stopped, curve([1, 1, 1, 1]))
    assert (found.context_len, found.stopped_after, found.out_of_memory) == (2048, 300.0, None)


def test_every_ordered_pair_is_listed() -> None:
    three = {name: curve([1, 2, 3, 4]) for name in "abc"}
    assert [(c.a, c.b) for c in all_crossovers("speed", three, "lower")] == [
        ("a", "b"), ("a", "c"), ("b", "a"), ("b", "c"), ("c", "a"), ("c", "b"),
    ]  # fmt: skip
