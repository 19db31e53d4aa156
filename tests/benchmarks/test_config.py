import pytest
from crossover.benchmarks.comparison.options import CompareConfig
from crossover.benchmarks.context.options import MeasureConfig
from crossover.benchmarks.harness.format import parse_bytes
from crossover.benchmarks.harness.options import ARCHS

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [("3GiB", 3 * 2**30), ("512MiB", 2**29), ("2e9", 2 * 10**9), ("1.5 GB", 15 * 10**8), ("100", 100)],
)
def test_sizes_are_read_as_people_write_them(text: str, n_bytes: int) -> None:
    assert parse_bytes(text) == n_bytes


def test_a_size_that_is_none_is_quoted_with_an_example() -> None:
    with pytest.raises(ValueError, match="'lots' is not a size in bytes; write it like 3GiB"):
        parse_bytes("lots")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"archs": ()}, "names no architecture"),
        ({"archs": ("mamba", "mamba")}, "twice"),
        ({"context": (512, 128)}, "increasing"),
        ({"context": (0, 128)}, "positive"),
        ({"steps": 0}, "--steps=0 must be at least 1"),
        ({"seq_len": (512,), "position_len": 256}, "shorter than --seq-len 512"),
        ({"threads": -1}, "--threads=-1 must be at least 1"),
        (
            {"context": (128, 512), "measure": MeasureConfig(tokens_per_batch=511)},
            "--tokens-per-batch 511 is less than the longest --context, 512",
        ),
    ],
)
def test_impossible_comparisons_are_refused_with_the_option(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CompareConfig(**options)


def test_help_lists_the_architectures_that_exist() -> None:
    from crossover.archs import available

    assert set(ARCHS) <= set(available())


def test_a_limit_below_the_program_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="--memory-limit 10 MiB is too little"):
        MeasureConfig(memory_limit=10 * 2**20)


def test_a_time_box_must_be_a_number() -> None:
    with pytest.raises(ValueError, match="time-box"):
        MeasureConfig(time_box=float("nan"))
