import pytest
from crossover.benchmarks.harness.format import count, format_bytes, number, parse_bytes, whole

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("value", "text"),
    [(87, "87"), (999, "999"), (999.6, "1 k"), (512_000, "512 k"), (1_017_400, "1.02 M"), (3e12, "3 T"), (None, "-")],
)
def test_counts_have_three_digits(value: float | None, text: str) -> None:
    assert count(value) == text
    assert count(value, gap="") == text.replace(" ", "")


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (4.559, "4.56"), (999.4, "999"), (999.5, "1,000"), (12_345, "12,345")]
)
def test_numbers_have_three_digits_or_a_whole_part(value: float, text: str) -> None:
    assert number(value) == text


def test_what_was_not_measured_is_a_dash() -> None:
    assert {write(None) for write in (count, number, whole, format_bytes)} == {"-"}


@pytest.mark.parametrize("n_bytes", [1, 999, 1023, 132 * 1024, 3 * 2**30, 5 * 2**40])
def test_written_sizes_read_back(n_bytes: int) -> None:
    assert parse_bytes(format_bytes(n_bytes)) == pytest.approx(n_bytes, rel=0.01)


def test_written_sizes_never_have_four_digits() -> None:
    assert format_bytes(1000) == "0.977 KiB"
    assert format_bytes(1020 * 1024) == "0.996 MiB"
