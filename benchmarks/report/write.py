"""Builds reports from files: report.html, report.md, the tables as CSV, and summary.json. That of a comparison lies in
its folder, that of several in another."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...files import remove_drafts, write_json, write_text
from ...train.board import write_images
from .between import BETWEEN_COLUMNS, between, criteria_rows, load_sides, summary_between
from .criteria import CRITERIA_COLUMNS, criteria, crossings_of_quality
from .crossovers import Crossover
from .document import Block, Figure, Figures, Map, plain, to_csv, to_html, to_markdown
from .methods import methods, references
from .results import Check, Comparison, budget_checks, crossovers_of, load_comparison, quality
from .rows import CONTEXT_COLUMNS, context_rows
from .sections import sections
from .winner_map import verdict
from .words import headline, title, training_sentence

__all__ = ["write_between", "write_page", "write_report"]


def write_report(folder: Path, *, baseline: str | None = None) -> Path:
    """Rebuilds every derived file of a comparison folder and returns the path of report.html.

    The result depends on the files of the folder and the baseline alone: the same files give the same bytes. Where the
    runs have TensorBoard's events in tb, the figures go to tb/report, with the time.

    Args:
        folder: of a comparison, or of runs.
        baseline: the model that the others are compared with; None leaves it to the files.

    Raises:
        ValueError: if there is nothing to report, the runs cannot be compared, or the baseline is not among the models.
    """
    comparison = load_comparison(folder, baseline=baseline)
    rows, crossings, checks = quality(comparison), crossovers_of(comparison), budget_checks(comparison)
    found, statements = criteria(comparison), headline(comparison, rows, crossings)
    lead = list(filter(None, (verdict(comparison, found), training_sentence(comparison, crossings))))
    blocks = sections(comparison, rows, crossings, checks, found, lead, statements)
    heading, subtitle = title(comparison, checks)
    columns = [key for key in rows[0] if key != "score"] if rows else ["arch"]
    write_text(folder / "quality.csv", to_csv(rows, columns))
    write_text(folder / "context.csv", to_csv(context_rows(comparison), CONTEXT_COLUMNS))
    write_json(
        folder / "summary.json",
        _summary(
            comparison,
            rows,
            [*crossings, *crossings_of_quality(found)],
            checks,
            [*filter(None, [verdict(comparison, found)]), *statements],
        ),
    )
    write_text(
        folder / "criteria.csv", to_csv([row for criterion in found for row in criterion.rows()], CRITERIA_COLUMNS)
    )
    write_text(folder / "methods.md", methods(comparison, checks, quote=plain))
    write_text(folder / "references.bib", references(methods(comparison, checks)))
    return write_page(folder, heading, subtitle, blocks)


def write_between(folders: Sequence[Path], out: Path, *, baseline: str | None = None) -> Path:
    """Writes one report of several comparisons and returns the path of its report.html.

    Args:
        folders: of the comparisons; nothing in them is changed.
        out: where to write; made where there is none.
        baseline: the model that the others are compared with; None leaves it to the files.

    Raises:
        ValueError: if a folder cannot be reported, `out` has a comparison of its own, or the baselines differ.
    """
    if any(any(out.glob(pattern)) for pattern in ("compare.json", "context.jsonl", "run.json", "*/run.json")):
        raise ValueError(f"--out {out} holds results, whose own report would be replaced; give another folder")
    sides = load_sides(folders, baseline=baseline)
    heading, subtitle, blocks = between(sides, out)
    out.mkdir(parents=True, exist_ok=True)
    write_text(out / "criteria.csv", to_csv(criteria_rows(sides), BETWEEN_COLUMNS))
    write_json(out / "summary.json", summary_between(sides))
    return write_page(out, heading, subtitle, blocks)


def write_page(folder: Path, heading: str, subtitle: str, blocks: Sequence[Block]) -> Path:
    """Writes a document as report.html, whose path it returns, and report.md, and its map and figures beside them."""
    (folder / "figures").mkdir(exist_ok=True)
    for place in (folder, folder / "figures"):
        remove_drafts(place)
    for figure in _figures_in(blocks):
        if isinstance(figure, Figure):
            write_text(folder / "figures" / f"{figure.name}.svg", figure.light.decode())
        write_text(folder / "figures" / f"{figure.name}.csv", to_csv(figure.data))
    if (folder / "tb").is_dir():
        drawn = [figure for figure in _figures_in(blocks) if isinstance(figure, Figure)]
        pictures = {f"report/{figure.name}": figure.png() for figure in drawn if figure.png is not None}
        write_images(folder / "tb" / "report", pictures)
    write_text(folder / "report.md", to_markdown(heading, subtitle, blocks, "figures"))
    page = folder / "report.html"
    write_text(page, to_html(heading, subtitle, blocks))
    return page


def _figures_in(blocks: Iterable[Block]) -> Iterable[Figure | Map]:
    for block in blocks:
        if isinstance(block, Figures):
            yield from block.figures
        elif isinstance(block, Map):
            yield block


def _summary(
    comparison: Comparison,
    rows: Sequence[Mapping[str, Any]],
    crossings: Sequence[Crossover],
    checks: Sequence[Check],
    lead: Sequence[str],
) -> dict[str, Any]:
    corpus = comparison.corpus
    return {
        "headline": lead,
        "crossovers": [dataclasses.asdict(crossing) for crossing in crossings],
        "score": comparison.score.to_dict(),
        "quality": rows,
        "reference_bits_per_byte": comparison.references,
        "corpus_digest": corpus["digest"] if corpus else None,
        "equal_budget": [dataclasses.asdict(check) for check in checks],
    }
