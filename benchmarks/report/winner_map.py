"""The first screen of a report: criteria by context length, each cell naming who wins; then a table of each."""

from __future__ import annotations

import math
from collections.abc import Sequence

from ..harness.format import format_bytes, number, whole
from .by_length import longer_windows_sentence
from .criteria import Criterion, undominated
from .document import Block, Heading, Map, MapCell, MapRow, Paragraph, Table
from .results import Comparison
from .words import and_list, capital, status_words

__all__ = [
    "at_lengths",
    "criterion_blocks",
    "entry",
    "how_to_read",
    "is_strong",
    "verdict",
    "winner_map",
]

_CHOICES = (
    ("train tokens_per_second", "nothing both predicts better and trains faster"),
    ("decode tokens_per_second", "nothing both predicts better and generates faster"),
)


def winner_map(comparison: Comparison, found: Sequence[Criterion], lengths: Sequence[int] | None = None) -> Map:
    """The map: a row for each criterion, then those of the models worth choosing.

    Args:
        comparison: what is told.
        found: its criteria.
        lengths: columns; those at which anything was tried when None.
    """
    lengths = lengths or sorted({length for criterion in found for length in criterion.lengths})
    rows = [
        MapRow(
            key=criterion.kind,
            title=criterion.title,
            note=criterion.note,
            cells=[_cell(comparison, criterion, length) for length in lengths],
        )
        for criterion in found
    ]
    by_kind = {criterion.kind: criterion for criterion in found}
    for kind, note in _CHOICES:
        if "quality" in by_kind and kind in by_kind and len(comparison.archs) > 1:
            cells = [_choice(comparison, by_kind["quality"], by_kind[kind], length) for length in lengths]
            rows.append(
                MapRow(key=f"choice {kind}", title="Worth choosing", note=f"best to cheapest: {note}", cells=cells)
            )
    return Map(
        columns=[f"{length:,} tokens" for length in lengths],
        rows=rows,
        caption=_caption(comparison, found),
    )


def _cell(comparison: Comparison, criterion: Criterion, length: int) -> MapCell:
    label, ranked = comparison.label, criterion.ranked(length)
    if not ranked:
        return MapCell(note=_nothing(criterion, length), state="open")
    pens = comparison.archs.index(ranked[0])
    if len(ranked) == 1:
        rest = [arch for arch in comparison.archs if arch not in ranked]
        why = "; ".join(f"{label(arch)} {status_words(criterion.status(arch, length))}" for arch in rest)
        known = any(criterion.status(arch, length) in ("out_of_memory", "timeout") for arch in rest)
        return MapCell(
            text=label(ranked[0]),
            note=why,
            state="won" if known and criterion.decided else "open",
            models=[label(ranked[0])],
            pen=pens,
        )
    if not criterion.decided:
        note = f"one seed: {_distance(comparison, criterion, ranked[0], length)}"
        return MapCell(text=label(ranked[0]), note=note, state="open", models=[label(ranked[0])], pen=pens)
    level = [label(arch) for arch in criterion.level(length)]
    return MapCell(
        text=" ≈ ".join(level),
        models=level,
        note=_distance(comparison, criterion, ranked[0], length),
        state="level" if len(level) > 1 else "won",
        pen=pens,
    )


def _nothing(criterion: Criterion, length: int) -> str:
    """Says why no model has a value."""
    statuses = dict.fromkeys(criterion.status(arch, length) for arch in criterion.archs)
    if list(statuses) == ["not measured"]:
        return "not trained at this length" if criterion.kind == "quality" else "not measured"
    return ", ".join(status_words(status) for status in statuses)


def _distance(comparison: Comparison, criterion: Criterion, best: str, length: int) -> str:
    """The distance of the best model to the baseline, in words."""
    baseline = comparison.baseline
    name = comparison.label(baseline)
    if best == baseline:
        return "the baseline"
    if criterion.value(baseline, length) is None:
        return f"{name}: {status_words(criterion.status(baseline, length))}"
    gap = criterion.gap(best, baseline, length)
    if gap is None:
        return f"no seed in common with {name}"
    text = f"{_size(criterion, gap.mean)} {name}"
    return f"{text}, no difference shown" if criterion.decided and not criterion.shown(best, length) else text


def _size(criterion: Criterion, gain: float) -> str:
    """A gain as words before the name of the baseline."""
    if criterion.scale == "difference":
        return f"{abs(gain):.2f} {'below' if (gain > 0) == (criterion.direction == 'lower') else 'above'}"
    ratio = math.exp(gain if criterion.direction == "higher" else -gain)
    return f"{number(ratio)} x" if ratio > 0.095 else f"1/{number(1 / ratio)} of"


def _choice(comparison: Comparison, quality: Criterion, speed: Criterion, length: int) -> MapCell:
    chosen = undominated(quality, speed, length)
    if not chosen:
        trained = any(quality.value(arch, length) is not None for arch in quality.archs)
        return MapCell(note="speed not measured" if trained else "not trained at this length", state="open")
    cheapest = next(arch for arch in speed.ranked(length) if arch in chosen)
    note = f"{comparison.label(cheapest)} is the fastest of them" if len(chosen) > 1 else "best and fastest"
    if not quality.decided:
        note = f"one seed: {note}"
    names = [comparison.label(arch) for arch in chosen]
    return MapCell(
        text=", ".join(names),
        models=names,
        note=note,
        state="won" if quality.decided else "open",
        pen=comparison.archs.index(chosen[0]),
    )


def _caption(comparison: Comparison, found: Sequence[Criterion]) -> str:
    name = comparison.label(comparison.baseline)
    sentences = [
        f"Each cell names the best model, or with \N{ALMOST EQUAL TO} those level with it, and its distance to the "
        f"baseline, {name}. Level: the 95 % interval of the difference to the best includes zero."
    ]
    bases = {criterion.basis for criterion in found}
    if "one seed" in bases:
        sentences.append("With one seed nothing tells a difference in quality from noise: none is bold.")
    if "one process" in bases:
        sentences.append(
            "Each speed comes from one process, and its interval from the repeats within it, which differ less than "
            "processes do."
        )
    if disturbed := sum(cell.disturbed for cell in comparison.cells):
        sentences.append(
            f"Other work on the machine disturbed {disturbed} of {len(comparison.cells)} measurements: their speeds "
            "say little, and the same command in another folder on an idle machine measures them again."
        )
    if "exact" in bases:
        sentences.append("State is counted and peak memory measured once: they have no interval.")
    return " ".join(sentences)


def criterion_blocks(comparison: Comparison, found: Sequence[Criterion]) -> list[Block]:
    """For each criterion a table of every model at every length, and whether it differs from the baseline."""
    if not found:
        return []
    blocks: list[Block] = [Heading(text="Each criterion")]
    for criterion in found:
        blocks.append(_table(comparison, criterion))
        said = [_shown_sentence(comparison, criterion)]
        said += [longer_windows_sentence(comparison)] if criterion.kind == "quality" else []
        blocks += [Paragraph(text=text) for text in said if text]
    return blocks


def _table(comparison: Comparison, criterion: Criterion) -> Table:
    strong = {
        (row, column)
        for row, arch in enumerate(comparison.archs)
        for column, length in enumerate(criterion.lengths, 1)
        if is_strong(criterion, arch, length)
    }
    return Table(
        columns=["Model", *(f"{length:,}" for length in criterion.lengths)],
        rows=[
            [comparison.label(arch), *(entry(comparison, criterion, arch, length) for length in criterion.lengths)]
            for arch in comparison.archs
        ],
        caption=f"{capital(criterion.name)}, by {'trained' if criterion.kind == 'quality' else 'context'} length. "
        + how_to_read(comparison, criterion),
        strong=frozenset(strong),
    )


def is_strong(criterion: Criterion, arch: str, length: int) -> bool:
    """Whether a model is the best of several or level with it, as far as that is known."""
    return criterion.decided and len(criterion.ranked(length)) > 1 and arch in criterion.level(length)


def how_to_read(comparison: Comparison, criterion: Criterion) -> str:
    """Says what stands in brackets in the table of a criterion, and what is bold."""
    if len(comparison.archs) == 1:
        return ""
    name = comparison.label(comparison.baseline)
    against = f"the difference to {name}" if criterion.scale == "difference" else f"the ratio to {name}"
    bold = "bold: the best and those whose interval of the difference to it includes zero"
    match criterion.basis:
        case "one seed":
            return f"In brackets {against}. One seed does not tell a difference from noise, so none is bold."
        case "seeds":
            return f"In brackets {against}, paired by seed, with the 95 % t interval and its number of pairs; {bold}."
        case "rounds":
            return f"In brackets {against}, paired by round of processes, with the 95 % t interval; {bold}."
        case "one process":
            return f"In brackets {against}, with what the spread of the repeats within one process allows; {bold}."
        case "exact":
            return f"In brackets {against}; bold: the best."


def entry(comparison: Comparison, criterion: Criterion, arch: str, length: int) -> str:
    """The value of a model at a length with its distance to the baseline; where there is none, why."""
    value = criterion.value(arch, length)
    if value is None:
        return status_words(criterion.status(arch, length))
    text = (
        f"{value:.3f}"
        if criterion.scale == "difference"
        else format_bytes(value) if criterion.kind.endswith("bytes") else whole(value) if value > 99 else number(value)
    )  # fmt: skip
    gap = None if arch == comparison.baseline else criterion.gap(arch, comparison.baseline, length)
    if gap is None or not math.isfinite(gap.mean):
        return text
    sign = 1 if criterion.direction == "higher" else -1
    if criterion.scale == "difference":
        change = f"{sign * gap.mean:+.3f}"
        width = (gap.high - gap.low) / 2
        return f"{text} ({change})" if not math.isfinite(width) else f"{text} ({change} ± {width:.3f}, n={gap.n})"
    ratio, *ends = (math.exp(sign * end) for end in (gap.mean, gap.low, gap.high))
    if not criterion.decided or criterion.basis == "exact" or not all(map(math.isfinite, ends)):
        return f"{text} ({number(ratio)}x)"
    low, high = sorted(ends)
    return f"{text} ({number(ratio)}x, {number(low)}-{number(high)})"


def _shown_sentence(comparison: Comparison, criterion: Criterion) -> str:
    """Says of which models a difference to the baseline is shown, and of which none, with the lengths."""
    if not criterion.decided or criterion.basis == "exact":
        return ""
    tried = [
        (arch, length, gap)
        for arch in comparison.others
        for length in criterion.lengths
        if (gap := criterion.gap(arch, comparison.baseline, length)) is not None and math.isfinite(gap.mean)
    ]
    if not tried:
        return ""
    all_lengths = sorted({length for _, length, _ in tried})
    parts = []
    for words, wanted in (("Difference shown", True), ("No difference shown", False)):
        of: dict[tuple[int, ...], list[str]] = {}
        for arch in comparison.others:
            at = tuple(length for a, length, _ in tried if a == arch and criterion.shown(arch, length) is wanted)
            if at:
                of.setdefault(at, []).append(comparison.label(arch))
        if of:
            said = [f"{and_list(names)} {at_lengths(lengths, all_lengths)}" for lengths, names in of.items()]
            parts.append(f"{words}: {', '.join(said)}.")
    paired = any(gap.n for _, _, gap in tried)
    how = "after Holm's correction over the models at a length" if paired else "intervals that do not meet"
    return f"Against {comparison.label(comparison.baseline)} ({how}). {' '.join(parts)}"


def at_lengths(lengths: Sequence[int], all_lengths: Sequence[int]) -> str:
    """Says at which lengths, in few words where it is at all of several."""
    if len(all_lengths) > 1 and list(lengths) == list(all_lengths):
        return "at every length"
    return f"at {and_list([f'{length:,}' for length in lengths])}"


def verdict(comparison: Comparison, found: Sequence[Criterion]) -> str:
    """The sentence on quality: who predicts best, at which trained length, and by how much; empty without a value."""
    quality = next((criterion for criterion in found if criterion.kind == "quality"), None)
    if quality is None:
        return ""
    label, lengths = comparison.label, [length for length in quality.lengths if quality.ranked(length)]
    predicts = "predicts held-out text best" if comparison.predicts_text else f"has the best {comparison.score.words}"
    groups: dict[tuple[str, ...], list[int]] = {}
    for length in lengths:
        level = quality.level(length) if quality.decided else quality.ranked(length)[:1]
        groups.setdefault(tuple(level), []).append(length)
    parts = []
    for level, at in groups.items():
        best = level[0]
        values = [f"{quality.value(best, length):.2f}" for length in at]
        where = f"trained at {and_list([f'{length:,}' for length in at])} tokens"
        reached = f"{and_list(values)} {comparison.score.unit}"
        if len(quality.ranked(at[0])) == 1:
            parts.append(f"{label(best)} {where} reaches {reached}")
        elif len(level) > 1:
            parts.append(f"{and_list([*map(label, level)])} {where} are level ({label(best)}: {reached})")
        else:
            parts.append(f"{label(best)} {where} {predicts}, at {reached}{_margin(comparison, quality, best, at)}")
    among = len({arch for arch, _ in quality.points})
    of = "" if among == len(comparison.asked) else f" of the {among} models that have finished"
    text = "; ".join(parts) + (of if len(comparison.asked) > 1 else "") + "."
    if not quality.decided and any(len(quality.ranked(length)) > 1 for length in lengths):
        text += " One seed: whether that is more than noise is not known."
    return text


def _margin(comparison: Comparison, quality: Criterion, best: str, at: Sequence[int]) -> str:
    """How far the best model is from the baseline at some lengths, with the interval."""
    if best == comparison.baseline:
        return ""
    gaps = [gap for length in at if (gap := quality.gap(best, comparison.baseline, length)) is not None]
    if not gaps:
        return ""
    said = [
        f"{abs(gap.mean):.2f}" + (f" ± {(gap.high - gap.low) / 2:.2f}" if math.isfinite(gap.high) else "")
        for gap in gaps
    ]
    side = "below" if comparison.score.better == "lower" else "above"
    return f" ({and_list(said)} {side} {comparison.label(comparison.baseline)})"
