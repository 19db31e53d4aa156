"""The sections of a report in their order, as blocks of a document."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ...train.score import Score
from ..harness.format import DASH, count, format_bytes, whole
from .by_length import length_blocks
from .criteria import Criterion
from .crossovers import Crossover
from .document import Block, Details, Figures, Heading, Items, Lead, Paragraph, Preformatted, Table
from .figures import context_figure, learning_figure, quality_figure
from .limits import limits_section
from .methods import methods, references
from .positions import position_figure, profiles_of
from .results import METRICS, Check, Comparison, Metric
from .winner_map import criterion_blocks, winner_map
from .words import (
    and_list,
    batches,
    capital,
    choice_of_rates,
    missing_parts,
    score_meaning,
    shading,
    span_of,
    status_words,
)

__all__ = ["sections"]


def sections(
    comparison: Comparison,
    rows: Sequence[Mapping[str, Any]],
    crossings: Sequence[Crossover],
    checks: Sequence[Check],
    found: Sequence[Criterion],
    lead: Sequence[str],
    statements: Sequence[str],
) -> list[Block]:
    """The page, from what was found in the folder."""
    return [
        Lead(paragraphs=lead),
        *([winner_map(comparison, found)] if found else []),
        *_incomplete_section(comparison),
        *limits_section(comparison, found),
        *criterion_blocks(comparison, found),
        *([Heading(text="In words"), *(Paragraph(text=text) for text in statements)] if statements else []),
        *length_blocks(comparison, found),
        *_quality_section(comparison, rows),
        *_context_section(comparison, crossings),
        *_budget_section(comparison, checks),
        *_sample_section(comparison),
        *_details_section(comparison, crossings),
        _methods_section(comparison, checks),
    ]


def _incomplete_section(comparison: Comparison) -> list[Block]:
    missing = missing_parts(comparison)
    if not missing:
        return []
    return [
        Heading(text="What is missing"),
        Paragraph(text="These parts did not finish. What follows leaves them out."),
        Items(items=missing, warnings=frozenset(range(len(missing)))),
    ]


def _quality_section(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not rows:
        return []
    score = comparison.score
    known = [row[score.key] for row in rows if row[score.key] is not None]
    several = len({row["seq_len"] for row in rows}) > 1
    figures = [quality_figure(comparison, rows)] if known else []
    if any(run.curve() for run in comparison.runs):
        figures += [learning_figure(comparison, "tokens"), learning_figure(comparison, "seconds")]
    position = None if several else position_figure(comparison, profiles_of(comparison))  # several: beside the squares
    figures += [position] if position else []
    little = "differences of a few hundredths" if comparison.predicts_text else "small differences"
    one_seed = max(row["n_seeds"] for row in rows) <= 1
    return [
        Heading(text="Quality"),
        Paragraph(text=score_meaning(comparison)),
        Table(
            columns=[
                "Model",
                *(["Trained at"] if several else []),
                capital(score.unit),
                "Seeds",
                "Tokens",
                "Seconds",
                "Width x layers",
                "Parameters",
                "Active",
                "FLOPs/token",
                "State",
                "Learning rate",
            ],
            rows=[_quality_cells(row, score, several=several) for row in rows],
            caption="FLOPs/token: training, forward and backward, at the trained length. State: what one sequence "
            "carries at the trained length while generating."
            + (f" One seed: {little} mean little." if one_seed else ""),
        ),
        Figures(figures=figures),
    ]


def _quality_cells(row: Mapping[str, Any], score: Score, *, several: bool) -> list[str]:
    mean, spread = row[score.key], row[f"{score.key}_std"]
    value = DASH if mean is None else f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    return [
        row["label"],
        *([f"{row['seq_len']:,}"] if several else []),
        value,
        str(row["n_seeds"]),
        count(row["tokens"]),
        whole(row["train_seconds"]),
        f"{row['d_model']} x {row['n_layers']}",
        f"{row['n_params']:,}",
        f"{row['n_active_params']:,}",
        count(row["flops_per_token"]),
        format_bytes(row["state_bytes"]),
        DASH if row["lr"] is None else f"{row['lr']:g}",
    ]


def _context_section(comparison: Comparison, crossings: Sequence[Crossover]) -> list[Block]:
    if not comparison.cells:
        return []
    settings = comparison.cells[0].settings
    figures = [figure for metric in METRICS if (figure := context_figure(comparison, metric)) is not None]
    blocks: list[Block] = [
        Heading(text="Against context length"),
        Paragraph(
            text=f"Medians of repeats in {settings['time_box']:g} s after a warm-up, at least "
            f"{settings['min_repeats']}, or 2 of training whose warm-up step alone takes longer; each model and length "
            f"in its own process with at most {format_bytes(settings['memory_limit'])} of memory. "
            f"{batches(comparison)}"
            f"{shading(comparison)}"
        ),
        Figures(figures=figures),
    ]
    baseline, others = comparison.baseline, comparison.others
    if others:
        found = {(crossing.metric, crossing.a, crossing.b): crossing for crossing in crossings}
        blocks.append(
            Table(
                columns=["", *map(comparison.label, others)],
                rows=[
                    [metric.name, *(_pair(found, metric, baseline, other) for other in others)]
                    for metric in METRICS
                    if any(crossing.metric == metric.name for crossing in crossings)
                ],
                caption=f"Context lengths in tokens at which each model beats {comparison.label(baseline)}: "
                "always and never mean at every and at no length measured, unclear that the spread of the repeats is "
                "larger than the difference, † that one of the two ran out of memory or time there. "
                "All pairs are listed at the end.",
            )
        )
    return blocks


def _pair(found: Mapping[tuple[str, str, str], Crossover], metric: Metric, a: str, b: str) -> str:
    if (metric.name, a, b) not in found:
        return "not measured"
    return span_of(found[metric.name, a, b], found[metric.name, b, a], str).in_cell()


def _budget_section(comparison: Comparison, checks: Sequence[Check]) -> list[Block]:
    if not checks:
        return []
    budget = "tokens and steps" if comparison.equal == "tokens" else f"{comparison.equal} of training"
    return [
        Heading(text="Equal budgets"),
        Paragraph(
            text="Verified from the files of the runs: every model had the same number of parameters (within 2 %), "
            f"{budget}, the same data in the same order and the same schedule."
            if all(check.equal for check in checks)
            else "The runs did not have equal budgets, so their quality cannot be compared as it stands."
        ),
        Paragraph(text=choice_of_rates(comparison)),
        *_foreign_rates(comparison),
        Items(
            items=[
                f"{capital(check.name)}: {'' if check.equal else 'NOT EQUAL, '}{check.statement}" for check in checks
            ],
            warnings=frozenset(i for i, check in enumerate(checks) if not check.equal),
        ),
    ]


def _foreign_rates(comparison: Comparison) -> list[Block]:
    modules = {
        name
        for run in comparison.runs
        for kind in ("imports", "plugins")
        for name in run.info["provenance"].get(kind) or ()
    }
    if not modules:
        return []
    named = and_list(sorted(modules))
    return [Paragraph(text=f"An architecture that comes from {named} has the learning rate that its author gave it.")]


def _sample_section(comparison: Comparison) -> list[Block]:
    samples: list[Block] = []
    for arch in comparison.archs:
        text = next((run.result["sample"] for run in comparison.runs_of(arch) if run.result.get("sample")), None)
        if text:
            samples.append(Preformatted(title=comparison.label(arch), text=text))
    if not samples:
        return []
    return [
        Heading(text="Samples"),
        Paragraph(text="Text that each model writes after training, from the first seed."),
        *samples,
    ]


def _details_section(comparison: Comparison, crossings: Sequence[Crossover]) -> list[Block]:
    details: list[Block] = [Heading(text="Numbers and provenance")]
    if comparison.cells:
        details.append(Details(summary="Every measurement against context length", blocks=[_cells_table(comparison)]))
    if crossings:
        table = Table(
            columns=["Metric", "Model", "better than", "where", "changes of lead"],
            rows=[
                [
                    c.metric,
                    comparison.label(c.b),
                    comparison.label(c.a),
                    span_of(c, reverse, comparison.label).in_text(),
                    str(c.n_crossings),
                ]
                for c, reverse in _with_reverse(crossings)
                if c.verdict not in ("never", "unknown")
            ],
            caption="Where the lead changes more than once, the length is that of the last change.",
        )
        details.append(Details(summary="Crossovers of every pair", blocks=[table]))
    details.append(Details(summary="Machine, versions, data and command", blocks=[_provenance_items(comparison)]))
    if comparison.runs:
        details.append(Details(summary="Backend of every operation", blocks=[_backend_table(comparison)]))
    return details


def _methods_section(comparison: Comparison, checks: Sequence[Check]) -> Details:
    text = methods(comparison, checks)
    return Details(
        summary="Methods and references, to paste into a paper",
        blocks=[
            Preformatted(title="methods.md", text=text),
            Preformatted(title="references.bib", text=references(text)),
        ],
    )


def _with_reverse(crossings: Sequence[Crossover]) -> Iterable[tuple[Crossover, Crossover]]:
    found = {(c.metric, c.a, c.b): c for c in crossings}
    return ((c, found[c.metric, c.b, c.a]) for c in crossings)


def _cells_table(comparison: Comparison) -> Table:
    rows = []
    for cell in comparison.ordered_cells:
        spread = "{:,.0f}-{:,.0f}".format(*cell.spread) if cell.spread else DASH
        rows.append(
            [
                comparison.label(cell.arch),
                cell.phase,
                f"{cell.context_len:,}",
                whole(cell.batch_size),
                whole(cell.tokens_per_second),
                spread,
                whole(cell.repeats),
                format_bytes(cell.peak_bytes),
                format_bytes(cell.state_bytes),
                status_words(cell.status),
            ]
        )
    methods = sorted({cell.peak_method for cell in comparison.cells if cell.peak_method})
    return Table(
        columns=["Model", "Phase", "Context", "Batch", "Tokens/s", "Spread", "Repeats", "Peak", "State", "Status"],
        rows=rows,
        caption=f"Peak memory: {'; '.join(methods)}." if methods else "",
    )


def _backend_table(comparison: Comparison) -> Table:
    used: dict[str, dict[str, list[str]]] = {
        run.arch: dict(run.result.get("backend") or {}) for run in reversed(comparison.runs)
    }
    return Table(
        columns=["Model", "Operation", "Backend"],
        rows=[
            [comparison.label(arch), operation, ", ".join(names)]
            for arch in comparison.archs
            for operation, names in sorted(used.get(arch, {}).items())
        ],
        caption="What ran in training.",
    )


def _provenance_items(comparison: Comparison) -> Items:
    items = []
    command = comparison.info.get("provenance", {}).get("command")
    if command:
        items.append(f"command: {command}")
    items += [
        f"{key}: {', '.join(value) if isinstance(value, list) else value}"
        for key, value in comparison.provenance.items()
        if key != "command" and value != []
    ]
    corpus = comparison.corpus
    if corpus:
        held = (
            f"{corpus['n_documents']:,} documents ({corpus['n_val_documents']:,} held out), "
            f"{corpus['train_bytes']:,} bytes for training, {corpus['val_bytes']:,} for validation"
        )
        items.append(f"corpus: {corpus['name']}, {corpus.get('made') or held}, digest {corpus['digest']}")
    if comparison.cells:
        items += [f"measurements: {key}: {value}" for key, value in comparison.cells[0].settings.items()]
    return Items(items=items)
