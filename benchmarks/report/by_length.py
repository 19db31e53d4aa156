"""Quality against context length: by trained length and position, read at other lengths, and with the context cut."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ...train.score import Score
from ..harness.format import DASH
from .criteria import Criterion, crossings_of_quality
from .document import Block, Figures, Heading, Paragraph, Table
from .positions import position_figure, profiles_of, square_figure, square_sentence, square_table
from .results import Comparison
from .words import and_list, span_of, status_words

__all__ = ["length_blocks", "longer_windows_sentence"]


def length_blocks(comparison: Comparison, found: Sequence[Criterion]) -> list[Block]:
    """The section, of what the runs recorded; empty where they tell no more than one trained length does."""
    lengths = sorted({run.seq_len for run in comparison.runs if run.quality is not None})
    blocks: list[Block] = []
    if len(lengths) > 1:
        blocks += [Paragraph(text=_ABOUT_LENGTHS), *_crossings(comparison, found), *_positions(comparison)]
    blocks += _read_at(comparison, lengths)
    blocks += _cut(comparison, lengths)
    blocks += _answered(comparison, lengths)
    return [Heading(text="Quality against context length"), *blocks] if blocks else []


_ABOUT_LENGTHS = (
    "Every length has the same budget, so a step with longer windows holds fewer different documents. What is told by "
    "position and with the context cut, of the same text, shows what context brings."
)


def longer_windows_sentence(comparison: Comparison) -> str:
    """Where longer windows made models worse, says which, and why that may be; empty elsewhere."""
    lengths = sorted({run.seq_len for run in comparison.runs if run.quality is not None})
    if len(lengths) < 2:
        return ""
    shortest, longest = (_means(comparison, length) for length in (lengths[0], lengths[-1]))
    worse = [
        comparison.label(arch)
        for arch in comparison.archs
        if arch in shortest.keys() & longest.keys()
        and comparison.score.best([shortest[arch], longest[arch]]) == shortest[arch] != longest[arch]
    ]
    if not worse:
        return ""
    verb = "predict" if len(worse) > 1 else "predicts"
    return (
        f"Trained at {lengths[-1]:,} tokens {and_list(worse)} {verb} worse than at {lengths[0]:,}, by the means. At an "
        "equal budget a step with longer windows holds fewer different documents, which costs most where the budget is "
        "small: it does not say that context hurts."
    )


def _means(comparison: Comparison, length: int) -> dict[str, float]:
    """The mean score over the seeds of each architecture trained at a length."""
    found: dict[str, list[float]] = {}
    for run in comparison.runs:
        if run.seq_len == length and run.quality is not None:
            found.setdefault(run.arch, []).append(run.quality)
    return {arch: statistics.fmean(values) for arch, values in found.items()}


def _crossings(comparison: Comparison, found: Sequence[Criterion]) -> list[Block]:
    """Where each model predicts better than the baseline, by trained length."""
    quality = next((criterion for criterion in found if criterion.kind == "quality"), None)
    if quality is None or not quality.decided or comparison.baseline not in comparison.archs:
        return []
    crossings = {(crossing.a, crossing.b): crossing for crossing in crossings_of_quality([quality])}
    rows = []
    for arch in comparison.others:
        there = crossings.get((comparison.baseline, arch))
        if there is not None and there.verdict != "unknown":
            back = crossings[arch, comparison.baseline]
            rows.append([comparison.label(arch), span_of(there, back, comparison.label).in_text(), str(there.n_pairs)])
    if not rows:
        return []
    caption = (
        f"Trained lengths at which each model predicts better than {comparison.label(comparison.baseline)}, "
        "interpolated between those that were trained. In brackets, and called noise: where the 95 % interval of the "
        "paired difference includes zero."
    )
    return [Table(columns=["Model", "Better", "Seeds"], rows=rows, caption=caption)]


def _positions(comparison: Comparison) -> list[Block]:
    """Trained length by position of the same text: what it shows, as pictures and in numbers."""
    profiles = profiles_of(comparison)
    said, table = square_sentence(comparison, profiles), square_table(comparison, profiles)
    drawn = [figure for kind in (square_figure, position_figure) if (figure := kind(comparison, profiles)) is not None]
    return [
        *([Paragraph(text=said)] if said else []),
        *([Figures(figures=drawn)] if drawn else []),
        *([table] if table else []),
    ]


def _read_at(comparison: Comparison, lengths: Sequence[int]) -> Sequence[Block]:
    """Held-out documents read at other lengths than the trained one."""
    what = (
        "Bits per byte of held-out documents that are at least as long as the column says, read in windows of that "
        "length; beyond the trained length of its row a model extrapolates. Different columns read different "
        "documents: compare within one."
    )
    return _table(comparison, lengths, "by_length", what)


def _cut(comparison: Comparison, lengths: Sequence[int]) -> Sequence[Block]:
    """The same bytes with less context: what the longer context brought."""
    what = (
        "What context brings: bits per byte of the same held-out bytes along a row, the context cut to the length of "
        "the column. Compare within a row, or models that were trained at one length: other lengths read other "
        "documents."
    )
    return _table(comparison, lengths, "context_cut", what)


def _answered(comparison: Comparison, lengths: Sequence[int]) -> Sequence[Block]:
    """Accuracy of a task at the trained length and beyond, with what guessing reaches."""
    what = (
        "Accuracy of the answers in rows as long as the column says; beyond the trained length a model extrapolates. "
        "Without recall: the best of four guesses, the most frequent answer, the one most frequent after the symbol "
        "that asks, the symbol most frequent in the row, and the last one read."
    )
    answered = [entry for run in comparison.runs for entry in run.result.get("accuracy_by_length") or ()]
    floors = {entry["context_len"]: entry["floor"] for entry in answered}
    guessed = ["Without recall", "", *(f"{floors[at]:.3f}" for at in sorted(floors))]
    tables = _table(comparison, lengths, "accuracy_by_length", what)
    return [dataclasses.replace(table, rows=[*table.rows, guessed]) for table in tables]


def _table(
    comparison: Comparison,
    lengths: Sequence[int],
    key: str,
    caption: str,
) -> Sequence[Table]:
    rows: dict[tuple[str, int], dict[int, list[Mapping[str, Any]]]] = {}
    for arch in comparison.archs:
        for length in lengths:
            for run in comparison.runs_of(arch, length):
                for entry in run.result.get(key) or ():
                    rows.setdefault((arch, length), {}).setdefault(entry["context_len"], []).append(entry)
    columns = sorted({at for found in rows.values() for at in found})
    if not columns:
        return []
    return [
        Table(
            columns=["Model", "Trained at", *(f"{at:,}" for at in columns)],
            rows=[
                [comparison.label(arch), f"{length:,}", *(_entry(read.get(at, []), comparison.score) for at in columns)]
                for (arch, length), read in rows.items()
            ],
            caption=f"{caption} Means over the seeds.",
        )
    ]


def _entry(entries: Sequence[Mapping[str, Any]], score: Score) -> str:
    values = [entry[score.name] for entry in entries if entry.get(score.name) is not None]
    if values or not entries:
        return _value(values)
    return status_words(str(entries[0].get("status") or DASH))


def _value(values: Sequence[float] | None) -> str:
    return f"{statistics.fmean(values):.3f}" if values else DASH
