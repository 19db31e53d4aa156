import subprocess
import sys
from collections.abc import Sequence

import pytest
from crossover.benchmarks.report.crossovers import Point, crossover
from crossover.benchmarks.report.words import Span, and_list, span_of

pytestmark = pytest.mark.quick

LENGTHS = (100, 200, 400, 800)
FLAT = (10, 10, 10, 10)


def span(values: Sequence[float | None], noise: float = 0.0, *, against: Sequence[float | None] = FLAT, **at) -> Span:
    """Finds where these speeds at LENGTHS beat the others, each with a spread of `noise`; None ran out of memory,
    or of time where `stopped_after` is given."""
    curves = {
        name: [
            Point(context_len=L, value=v, low=v and v * (1 - noise), high=v and v * (1 + noise), **({} if v else at))
            for L, v in zip(LENGTHS, speeds, strict=True)
        ]
        for name, speeds in (("other", against), ("this", values))
    }
    forth = crossover("speed", "other", "this", curves, "higher")
    return span_of(forth, crossover("speed", "this", "other", curves, "higher"), str.capitalize)


@pytest.mark.parametrize(
    ("found", "text", "cell"),
    [
        (span((5, 8, 20, 40)), "beyond 240 tokens", "> 240"),
        (span((5, 8, 20, 40), 0.05), "beyond 240 tokens (220-260)", "> 240 (220-260)"),
        (span((40, 20, 8, 5)), "up to 340 tokens", "< 340"),
        (span((5, 5, 5, 5), against=(10, 10, None, None)), "from 400 tokens on, where Other no longer runs", "> 400 †"),
        (
            span((5, 5, 5, 5), against=(10, 10, None, None), stopped_after=300.0),
            "from 400 tokens on, where Other was stopped after 300 s",
            "> 400 †",
        ),
        (span((20, 20, None, None)), "below 400 tokens, where This no longer runs", "< 400 †"),
        (span((10.1, 10.1, 20, 40), 0.05), "beyond 220 tokens (before: within the noise)", "> 220, before unclear"),
        (span((40, 20, 10.1, 10.1), 0.05), "up to 370 tokens (beyond: within the noise)", "< 370, beyond unclear"),
        (span((10, 10.1, 9.9, 10), 0.05), "within the noise at every length measured", "unclear"),
        (span((20, 20, 20, 20)), "at every length measured", "always"),
        (span((5, 5, 5, 5)), "at none", "never"),
        (Span(kind="some shorter"), "at some shorter lengths", "some shorter"),
    ],
)
def test_a_span_says_the_same_in_a_sentence_and_in_a_table(found: Span, text: str, cell: str) -> None:
    assert (found.in_text(), found.in_cell()) == (text, cell)


def test_a_difference_within_the_noise_is_told_from_one_beyond_it() -> None:
    assert span((10, 10.1, 9.9, 10), 0.05).is_noise
    assert not span((10.1, 10.1, 20, 40), 0.05).is_noise


@pytest.mark.parametrize(
    ("words", "text"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), (["a", "b", "c"], "a, b and c")]
)
def test_lists_are_written_as_in_a_sentence(words: list[str], text: str) -> None:
    assert and_list(words) == text


def test_writing_a_report_needs_neither_torch_nor_the_parser_of_the_command_line() -> None:
    code = "import crossover.benchmarks.report.write, sys; assert not {'torch', 'tyro'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
