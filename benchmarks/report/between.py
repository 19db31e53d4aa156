"""Several comparisons in one report: what differs between them, and which verdicts changed from one to the next."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from .criteria import CRITERIA_COLUMNS, Criterion, criteria
from .differences import data_apart, differences, machine_apart
from .document import Block, Heading, Items, Lead, Links, Map, MapCell, MapRow, Paragraph, Table
from .results import Comparison, load_comparison
from .winner_map import at_lengths, entry, how_to_read, is_strong, verdict, winner_map
from .words import and_list, capital, missing_parts

__all__ = ["BETWEEN_COLUMNS", "Change", "Side", "between", "criteria_rows", "load_sides", "summary_between"]

BETWEEN_COLUMNS = ("folder", *CRITERIA_COLUMNS)

Verdict = Literal["better", "worse", "not shown"]


@dataclass(frozen=True, kw_only=True)
class Side:
    """One of the comparisons."""

    name: str
    """The last parts of its folder's path by which it differs from the others."""
    comparison: Comparison
    found: Sequence[Criterion]

    def criterion(self, kind: str) -> Criterion | None:
        """Its criterion of a kind."""
        return next((criterion for criterion in self.found if criterion.kind == kind), None)


@dataclass(frozen=True, kw_only=True)
class Change:
    """Whether a model differs from the baseline at one length, by one criterion, in each comparison."""

    criterion: str
    arch: str
    context_len: int
    verdicts: Sequence[Verdict]

    @property
    def changed(self) -> bool:
        """Whether the comparisons disagree."""
        return len({*self.verdicts}) > 1


def load_sides(folders: Sequence[Path], *, baseline: str | None = None) -> list[Side]:
    """Reads the folders of several comparisons.

    Raises:
        ValueError: if one cannot be reported, is given twice, or their baselines differ.
    """
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise ValueError(f"the same folder is given twice: {' '.join(map(str, folders))}")
    sides = []
    for folder, name in zip(folders, _names(paths), strict=True):
        comparison = load_comparison(folder, baseline=baseline)
        sides.append(Side(name=name, comparison=comparison, found=criteria(comparison)))
    baselines = [side.comparison.baseline for side in sides]
    if len({*baselines}) > 1:
        said = and_list([f"{side.name} with {arch}" for side, arch in zip(sides, baselines, strict=True)])
        shared = set.intersection(*({*side.comparison.archs} for side in sides))
        remedy = f"give one of {', '.join(sorted(shared))} with --baseline" if shared else "they share no model"
        raise ValueError(f"models are compared with unlike baselines ({said}): {remedy}")
    return sides


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ, of one length for all."""
    for n in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-n:]) for path in paths]
        if len({*names}) == len(paths):
            return names
    raise AssertionError("unlike paths have unlike parts")


def between(sides: Sequence[Side], out: Path) -> tuple[str, str, list[Block]]:
    """Title, subtitle and blocks of the report.

    Args:
        sides: the comparisons, at least two.
        out: folder of the page, from which links start.
    """
    comparisons, names = [side.comparison for side in sides], [side.name for side in sides]
    different = differences(comparisons)
    warnings, kinds = _warnings(sides, different), _kinds(sides)
    joint = _map(sides, kinds)
    table = Table(
        columns=["", *names],
        rows=[[name, *values] for name, values in different.items()],
        caption="As the files record it. All else that they record of how they were made is the same.",
    )
    same = Paragraph(text="Nothing that the files record: the same comparison was made again.")
    blocks: list[Block] = [
        Lead(paragraphs=[_counts(sides, joint), *(_verdicts(sides) if "quality" in kinds else [])]),
        Heading(text="What differs"),
        *([Items(items=warnings, warnings=frozenset(range(len(warnings))))] if warnings else []),
        table if different else same,
        Heading(text="Which verdicts changed"),
        *([joint] if joint.rows else [Paragraph(text="They share no criterion.")]),
        Heading(text="Each criterion"),
        *(block for kind in kinds for block in _criterion_blocks(sides, kind)),
        Heading(text="Reports of their own"),
        Links(links=[(side.name, _link(side.comparison.folder, out)) for side in sides]),
    ]
    said = {name for name in different if not name.startswith(("parameters of", "learning rate of"))}
    few = [name for name in different if name in said][:4]
    more = [f"{len(said) - len(few)} more"] if len(said) > len(few) else []
    subtitle = f"They differ in {and_list([*few, *more])}" if few else "Made the same way"
    return f"{and_list(names)} compared", subtitle, blocks


def _link(folder: Path, out: Path) -> str:
    return Path(os.path.relpath(folder.resolve() / "report.html", out.resolve())).as_posix()


def _warnings(sides: Sequence[Side], different: Mapping[str, Sequence[str]]) -> list[str]:
    apart = data_apart([side.comparison for side in sides], [side.name for side in sides])
    read = different.get("held-out bytes read") if "quality" in _kinds(sides) else None
    unlike = f"Unlike amounts of the held-out text were read ({', '.join(read)} bytes)" if read else ""
    warnings = [apart, f"{unlike}: compare differences within a folder, not scores." if unlike else ""]
    warnings.append(machine_apart(different))
    for side in sides:
        cells = side.comparison.cells
        if disturbed := sum(cell.disturbed for cell in cells):
            warnings.append(f"Other work disturbed {disturbed} of {len(cells)} measurements of {side.name}.")
        if missing := len(missing_parts(side.comparison)):
            warnings.append(f"{side.name} is not complete: its own report lists what is missing ({missing}).")
    return [*filter(None, warnings)]


def _kinds(sides: Sequence[Side]) -> list[str]:
    """Criteria that all have; quality only where it is that of the same data."""
    kinds = [criterion.kind for criterion in sides[0].found if all(side.criterion(criterion.kind) for side in sides)]
    apart = data_apart([side.comparison for side in sides], [side.name for side in sides])
    return [kind for kind in kinds if not (apart and kind == "quality")]


def _verdicts(sides: Sequence[Side]) -> list[str]:
    """The sentence on quality of each."""
    said = [(side.name, verdict(side.comparison, side.found)) for side in sides]
    return [f"{name}: {sentence}" for name, sentence in said if sentence]


def _map(sides: Sequence[Side], kinds: Sequence[str]) -> Map:
    """The rows of their winner maps that all have, each cell with what all say."""
    of_each = [[criterion for criterion in side.found if criterion.kind in kinds] for side in sides]
    lengths = sorted({length for found in of_each for criterion in found for length in criterion.lengths})
    maps = [winner_map(side.comparison, found, lengths) for side, found in zip(sides, of_each, strict=True)]
    by_key = [{row.key: row for row in one.rows} for one in maps]
    pens = list(dict.fromkeys(side.comparison.label(arch) for side in sides for arch in side.comparison.archs))
    rows = []
    for key, first in by_key[0].items():
        if all(key in one for one in by_key):
            same = [one[key] for one in by_key]
            cells = [_joined(sides, cells, pens) for cells in zip(*(row.cells for row in same), strict=True)]
            note = " → ".join(dict.fromkeys(row.note for row in same))
            rows.append(MapRow(key=key, title=first.title, note=note, cells=cells))
    order = " → ".join(side.name for side in sides)
    return Map(
        columns=maps[0].columns,
        rows=rows,
        caption=f"Each cell names the best models of {order}: once where they are the same; hatched where only some "
        "are, or where not all decide; framed where none is. Level (\N{ALMOST EQUAL TO}) are those whose 95 % interval "
        "of the difference to the best includes zero.",
    )


def _joined(sides: Sequence[Side], cells: Sequence[MapCell], pens: Sequence[str]) -> MapCell:
    """One cell for what several maps say: in their order where they name others."""
    notes = [cell.note for cell in cells]
    said = [f"{side.name}: {note}" for side, note in zip(sides, notes, strict=True) if note]
    named = [{*cell.models} for cell in cells]
    same = all(models == named[0] for models in named)  # in whatever order
    text = cells[-1].text if same else " → ".join(cell.text or "-" for cell in cells)
    last = next((cell for cell in reversed(cells) if cell.models), None)
    return MapCell(
        text=text,
        note=notes[0] if len({*notes}) == 1 else "; ".join(said),
        state=_state(cells, named),
        models=sorted(set.intersection(*named)),
        pen=pens.index(last.models[0]) if last else 0,
    )


def _state(cells: Sequence[MapCell], named: Sequence[set[str]]) -> Literal["won", "level", "open", "changed"]:
    """won: all name the same; level: some of the same; changed: others; open: not all have decided."""
    if any(cell.state == "open" for cell in cells):
        return "open"
    if all(models == named[0] for models in named):
        return "won"
    return "level" if set.intersection(*named) else "changed"


def _counts(sides: Sequence[Side], found: Map) -> str:
    """How many cells of the map stayed and changed; which ones name others."""
    cells = [(row, column, cell) for row in found.rows for column, cell in zip(found.columns, row.cells, strict=True)]
    n = {state: sum(cell.state == state for *_, cell in cells) for state in ("won", "level", "changed")}
    total = sum(n.values())
    both = "both" if len(sides) == 2 else "all"
    if not total:
        return f"No cell of the map is decided in {both}."
    exact = {criterion.kind for side in sides for criterion in side.found if criterion.basis == "exact"}
    changed = [
        f"{row.title} at {column}: {cell.text}{', without an interval' if row.key in exact else ''}"
        for row, column, cell in cells
        if cell.state == "changed"
    ]
    decided = f"cells of the map that are decided in {both}"
    if n["won"] == total:
        return f"All {total} {decided} name the same models."
    parts = [f"{n['won']} name the same models"]
    parts += [f"{n['level']} some of the same"] if n["level"] else []
    parts += [f"{n['changed']} others ({'; '.join(changed)})"] if changed else []
    return f"Of {total} {decided}, {and_list(parts)}."


def _changes(sides: Sequence[Side], kind: str) -> Iterator[Change]:
    found = [criterion for side in sides if (criterion := side.criterion(kind)) is not None]
    if len(found) < len(sides) or not all(criterion.decided and criterion.basis != "exact" for criterion in found):
        return
    for arch in sides[0].comparison.others:
        for length in found[0].lengths:
            known: list[Verdict] = [shown for each in found if (shown := _shown(each, arch, length)) is not None]
            if len(known) == len(found):
                yield Change(criterion=found[0].name, arch=arch, context_len=length, verdicts=known)


def _shown(criterion: Criterion, arch: str, length: int) -> Verdict | None:
    """Which difference to the baseline is shown; None where one of the two was not measured."""
    gap = criterion.gap(arch, criterion.baseline, length)
    if gap is None or not math.isfinite(gap.mean):
        return None
    if not criterion.shown(arch, length):
        return "not shown"
    return "better" if gap.mean > 0 else "worse"


def _criterion_blocks(sides: Sequence[Side], kind: str) -> list[Block]:
    pairs = [(side, criterion) for side in sides if (criterion := side.criterion(kind)) is not None]
    lengths = sorted({length for _, criterion in pairs for length in criterion.lengths})
    rows, strong = [], set()
    archs = dict.fromkeys(arch for side in sides for arch in side.comparison.archs)
    for arch in archs:
        for side, criterion in pairs:
            if arch not in side.comparison.archs:
                continue
            strong |= {(len(rows), i) for i, length in enumerate(lengths, 1) if is_strong(criterion, arch, length)}
            values = [entry(side.comparison, criterion, arch, length) for length in lengths]
            rows.append([f"{side.comparison.label(arch)}, {side.name}", *values])
    how = [how_to_read(side.comparison, criterion) for side, criterion in pairs]
    said = (
        how[0]
        if len({*how}) == 1
        else " ".join(f"{side.name}: {text}" for (side, _), text in zip(pairs, how, strict=True))
    )
    names = " → ".join(dict.fromkeys(criterion.name for _, criterion in pairs))
    table = Table(
        columns=["Model", *(f"{length:,}" for length in lengths)],
        rows=rows,
        caption=f"{capital(names)}, by {'trained' if kind == 'quality' else 'context'} length. {said}",
        strong=frozenset(strong),
    )
    sentence = _change_sentence(sides, list(_changes(sides, kind)))
    return [table, Paragraph(text=sentence)] if sentence else [table]


def _change_sentence(sides: Sequence[Side], found: Sequence[Change]) -> str:
    """Says which differences to the baseline are shown in all, in none, and in some of the comparisons."""
    if not found:
        return ""
    first = sides[0].comparison
    lengths = sorted({change.context_len for change in found})
    groups: dict[tuple[Verdict, ...], dict[str, list[int]]] = {}
    for change in found:
        groups.setdefault(tuple(change.verdicts), {}).setdefault(change.arch, []).append(change.context_len)
    both, neither = ("both", "neither") if len(sides) == 2 else ("all", "none")
    words = {"better": f"Better in {both}", "worse": f"Worse in {both}", "not shown": f"Shown in {neither}"}
    parts = []
    for verdicts in sorted(groups, key=lambda verdicts: len({*verdicts})):
        of: dict[str, list[str]] = {}
        for arch, at in groups[verdicts].items():
            of.setdefault(at_lengths(at, lengths), []).append(first.label(arch))
        where = ", ".join(f"{and_list(archs)} {place}" for place, archs in of.items())
        how = words[verdicts[0]] if len({*verdicts}) == 1 else f"Changed from {' to '.join(verdicts)}"
        parts.append(f"{how}: {where}.")
    return f"Differences to {first.label(first.baseline)}. {' '.join(parts)}"


def criteria_rows(sides: Sequence[Side]) -> list[dict[str, Any]]:
    """Every criterion of every comparison as rows of a CSV file."""
    return [{"folder": side.name, **row} for side in sides for criterion in side.found for row in criterion.rows()]


def summary_between(sides: Sequence[Side]) -> dict[str, Any]:
    """What differs, and which differences to the baseline are shown in which comparison, for scripts."""
    different = differences([side.comparison for side in sides])
    return {
        "folders": [side.name for side in sides],
        "differences": different,
        "warnings": _warnings(sides, different),
        "difference_shown": [asdict(change) for kind in _kinds(sides) for change in _changes(sides, kind)],
    }
