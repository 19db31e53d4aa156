"""Quality against context length: by trained length and position, read at other lengths, and with the context cut."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from ..harness.format import DASH
from .criteria import Criterion
from .crossovers import crossover
from .document import Block, Heading, Paragraph, Table
from .results import Comparison, Run
from .words import and_list, span_of, status_words

__all__ = ["length_blocks"]


def length_blocks(comparison: Comparison, found: Sequence[Criterion]) -> list[Block]:
    """The section, of what the runs recorded; empty where they tell no more than one trained length does."""
    lengths = sorted({run.seq_len for run in comparison.runs if run.quality is not None})
    blocks: list[Block] = []
    if len(lengths) > 1:
        blocks += [
            Paragraph(text=_about_lengths(comparison, lengths)),
            *_crossings(comparison, found),
            *_squares(comparison, lengths),
        ]
    blocks += _read_at(comparison, lengths)
    blocks += _cut(comparison, lengths)
    return [Heading(text="Quality against context length"), *blocks] if blocks else []


def _about_lengths(comparison: Comparison, lengths: Sequence[int]) -> str:
    """How to read quality by trained length; where longer windows made models worse, why that may be."""
    shortest, longest = (_means(comparison, length) for length in (lengths[0], lengths[-1]))
    worse = [
        comparison.label(arch)
        for arch in shortest.keys() & longest.keys()
        if comparison.score.best([shortest[arch], longest[arch]]) == shortest[arch] != longest[arch]
    ]
    said = "Every length has the same budget, so a step with longer windows holds fewer different documents."
    if worse:
        verb = "predict" if len(worse) > 1 else "predicts"
        said += (
            f" Trained at {lengths[-1]:,} tokens {and_list(sorted(worse))} {verb} worse than at {lengths[0]:,}: fewer "
            "documents do that where the budget is small, and it does not say that context hurts."
        )
    return f"{said} The tables by position and with the context cut, of the same text, tell what context brings."


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
    curves = {arch: [point for (name, _), point in quality.points.items() if name == arch] for arch in comparison.archs}
    rows = []
    for arch in comparison.others:
        there, back = (
            crossover(quality.name, a, b, curves, quality.direction, quality.scale)
            for a, b in ((comparison.baseline, arch), (arch, comparison.baseline))
        )
        if there.verdict != "unknown":
            rows.append([comparison.label(arch), span_of(there, back, comparison.label).in_text(), str(there.n_pairs)])
    if not rows:
        return []
    caption = (
        f"Trained lengths at which each model predicts better than {comparison.label(comparison.baseline)}, "
        "interpolated between those that were trained. In brackets, and called noise: where the 95 % interval of the "
        "paired difference includes zero."
    )
    return [Table(columns=["Model", "Better", "Seeds"], rows=rows, caption=caption)]


def _squares(comparison: Comparison, lengths: Sequence[int]) -> list[Block]:
    """Trained length by position of the same text, a table for each model."""
    blocks: list[Block] = []
    for arch in comparison.archs:
        by_length = {length: _positions(comparison.runs_of(arch, length)) for length in lengths}
        spans = sorted({span for values in by_length.values() for span in values})
        if spans:
            rows = [
                [f"{length:,}", *(_value(values.get(span)) for span in spans)] for length, values in by_length.items()
            ]
            caption = (
                f"{comparison.label(arch)}: bits per byte by position, the same text for every trained length. Compare "
                "within a column: positions differ in difficulty."
            )
            blocks.append(
                Table(
                    columns=["Trained at", *(f"{start:,} to {stop:,}" for start, stop in spans)],
                    rows=rows,
                    caption=caption,
                )
            )
    return blocks


def _positions(runs: Sequence[Run]) -> dict[tuple[int, int], list[float]]:
    """Bits per byte of each seed by span, from 64 tokens on, where a span holds enough to be compared."""
    found: dict[tuple[int, int], list[float]] = {}
    for run in runs:
        for span in run.result.get("position_bits_per_byte") or ():
            if span.get("bits_per_byte") is not None and span["stop"] > _SHORTEST:
                found.setdefault((span["start"], span["stop"]), []).append(span["bits_per_byte"])
    return found


_SHORTEST = 64


def _read_at(comparison: Comparison, lengths: Sequence[int]) -> list[Block]:
    """Held-out documents read at other lengths than the trained one."""
    what = (
        "Bits per byte of held-out documents read from their start at the length of the column, the models trained at "
        "that of the row. Different columns read different documents: compare within one."
    )
    return _table(comparison, lengths, "by_length", what)


def _cut(comparison: Comparison, lengths: Sequence[int]) -> list[Block]:
    """The same bytes with less context: what the longer context brought."""
    what = (
        "What context brings: bits per byte of the same held-out bytes, the context of each model cut to the length of "
        "the column."
    )
    return _table(comparison, lengths, "context_cut", what)


def _table(
    comparison: Comparison,
    lengths: Sequence[int],
    key: str,
    caption: str,
) -> list[Block]:
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
                [comparison.label(arch), f"{length:,}", *(_entry(found.get(at, [])) for at in columns)]
                for (arch, length), found in rows.items()
            ],
            caption=f"{caption} Means over the seeds.",
        )
    ]


def _entry(entries: Sequence[Mapping[str, Any]]) -> str:
    values = [entry["bits_per_byte"] for entry in entries if entry.get("bits_per_byte") is not None]
    if values or not entries:
        return _value(values)
    return status_words(str(entries[0].get("status") or DASH))


def _value(values: Sequence[float] | None) -> str:
    return f"{statistics.fmean(values):.3f}" if values else DASH
