"""Builds the report of a comparison from its files: report.html, report.md, the tables as CSV, and summary.json."""

import csv
import dataclasses
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...train.files import write_json, write_text
from ..context.cell import Cell
from ..harness.format import DASH, count, format_bytes, whole
from .crossovers import Crossover
from .document import (
    Block,
    Details,
    Figure,
    Figures,
    Heading,
    Items,
    Lead,
    Paragraph,
    Preformatted,
    Table,
    to_html,
    to_markdown,
)
from .results import (
    METRICS,
    Check,
    Comparison,
    Metric,
    budget_checks,
    crossovers_of,
    load_comparison,
    quality,
    tokens_per_step,
)

__all__ = ["headline", "write_report"]

_CELL_COLUMNS = (
    "arch",
    "phase",
    "context_len",
    "batch_size",
    "n_params",
    "n_active_params",
    "tokens_per_second",
    "spread_low",
    "spread_high",
    "repeats",
    "peak_bytes",
    "state_bytes",
    "status",
    "error",
    "backend",
    "dtype",
    "peak_method",
)
_STATUS = {
    "out_of_memory": "out of memory",
    "timeout": "out of time",
    "beyond_positions": "beyond its positions",
    "failed": "failed",
    "interrupted": "interrupted",
    "unfinished": "not finished",
}


def write_report(folder: Path) -> Path:
    """Rebuilds every derived file of a comparison folder and returns the path of report.html.

    The result depends on the files of the folder alone: the same files give the same bytes.

    Raises:
        ValueError: if there is nothing to report or the runs cannot be compared.
    """
    comparison = load_comparison(folder)
    rows, crossings, checks = quality(comparison), crossovers_of(comparison), budget_checks(comparison)
    lead = headline(comparison, rows, crossings)
    blocks = _blocks(comparison, rows, crossings, checks, lead)
    title, subtitle = _title(comparison)
    _write_csv(folder / "quality.csv", list(rows[0]) if rows else ["arch"], rows)
    _write_csv(folder / "context.csv", _CELL_COLUMNS, map(_flat_cell, _sorted_cells(comparison)))
    write_json(folder / "summary.json", _summary(comparison, rows, crossings, checks, lead))
    (folder / "figures").mkdir(exist_ok=True)
    for figure in _figures_in(blocks):
        write_text(folder / "figures" / f"{figure.name}.svg", figure.light.decode())
    write_text(folder / "report.md", to_markdown(title, subtitle, blocks, "figures"))
    page = folder / "report.html"
    write_text(page, to_html(title, subtitle, blocks))
    return page


def _write_csv(path: Path, columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> None:
    table = io.StringIO()
    writer = csv.DictWriter(table, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, table.getvalue())


def _figures_in(blocks: Iterable[Block]) -> Iterable[Figure]:
    for block in blocks:
        if isinstance(block, Figures):
            yield from block.figures


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
        "quality": rows,
        "reference_bits_per_byte": corpus["reference_bits_per_byte"] if corpus else {},
        "corpus_digest": corpus["digest"] if corpus else None,
        "equal_budget": [dataclasses.asdict(check) for check in checks],
    }


# Words


def _and(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _rounded(length: float) -> str:
    """A length with the two digits that interpolation deserves."""
    digits = max(0, int(math.log10(length)) - 1)
    return f"{round(length, -digits):,.0f}"


def _range(crossing: Crossover) -> str:
    """The uncertainty of a crossover in brackets, nothing where it is below the rounding."""
    if crossing.low is not None and crossing.high is not None:
        low, high = _rounded(crossing.low), _rounded(crossing.high)
        return "" if low == high else f" ({low}-{high})"
    if crossing.high is not None:
        return f" (at most {_rounded(crossing.high)})"
    assert crossing.low is not None
    return f" (at least {_rounded(crossing.low)}, within the noise at the longest)"


def _has_ended(crossing: Crossover) -> bool:
    """Whether the lead changes because the model to be overtaken could not be measured any more."""
    return crossing.out_of_memory is not None or crossing.stopped_after is not None


def _end(crossing: Crossover, label: Callable[[str], str]) -> str:
    """What ended the model to be overtaken."""
    if crossing.stopped_after is not None:
        return f"{label(crossing.a)} was stopped after {crossing.stopped_after:g} s"
    return f"{label(crossing.a)} no longer runs"


def _is_noise(crossing: Crossover, reverse: Crossover) -> bool:
    """Whether there is no length at which b is better than a by more than the noise, though it may be."""
    return crossing.verdict == "unclear" and crossing.high is None and reverse.low is None


def _when(crossing: Crossover, reverse: Crossover, label: Callable[[str], str]) -> str:
    """Says for which lengths b is better than a. `reverse` is the crossover of the pair the other way round."""
    match crossing.verdict:
        case "beyond" if _has_ended(crossing) and crossing.context_len is not None:
            return f"from {crossing.context_len:,.0f} tokens on, where {_end(crossing, label)}"
        case "beyond" if crossing.context_len is not None:
            return f"beyond {_rounded(crossing.context_len)} tokens{_range(crossing)}"
        case "only_shorter" if _has_ended(reverse) and reverse.context_len is not None:
            return f"below {reverse.context_len:,.0f} tokens, where {_end(reverse, label)}"
        case "only_shorter" if reverse.context_len is not None:
            return f"up to {_rounded(reverse.context_len)} tokens{_range(reverse)}"
        case "unclear" if crossing.high is not None and _has_ended(crossing):
            return f"from {crossing.high:,.0f} tokens on, where {_end(crossing, label)} (before: within the noise)"
        case "unclear" if crossing.high is not None:
            return f"beyond {_rounded(crossing.high)} tokens (before: within the noise)"
        case "unclear" if reverse.low is not None:
            return f"up to {_rounded(reverse.low)} tokens (beyond: within the noise)"
        case "unclear" if reverse.high is not None:
            return f"within the noise below {_rounded(reverse.high)} tokens"
        case "unclear" if crossing.low is not None:
            return f"within the noise beyond {_rounded(crossing.low)} tokens"
        case "unclear":
            return "within the noise at every length measured"
        case "always":
            return "at every length measured"
        case "only_shorter":
            return "at some shorter lengths"
        case _:
            return "at none"


def _short(crossing: Crossover, reverse: Crossover) -> str:
    """`_when` for the cell of a table."""
    match crossing.verdict:
        case "beyond" if crossing.context_len is not None:
            mark = " †" if _has_ended(crossing) else _range(crossing)
            return f"> {_rounded(crossing.context_len)}{mark}"
        case "only_shorter" if reverse.context_len is not None:
            mark = " †" if _has_ended(reverse) else _range(reverse)
            return f"< {_rounded(reverse.context_len)}{mark}"
        case "only_shorter":
            return "some shorter"
        case "unclear" if crossing.high is not None:
            return f"> {_rounded(crossing.high)}{' †' if _has_ended(crossing) else ''}, before unclear"
        case "unclear" if reverse.low is not None:
            return f"< {_rounded(reverse.low)}, beyond unclear"
        case "unknown":
            return "not measured"
        case verdict:
            return verdict


def _crossover_sentence(
    metric: Metric,
    baseline: str,
    others: Sequence[str],
    found: Mapping[tuple[str, str, str], Crossover],
    label: Callable[[str], str],
) -> str:
    """Which models beat the baseline on one metric, and for which lengths; then those that the noise hides."""
    groups: dict[str, list[str]] = {}
    noise: dict[str, list[str]] = {}
    order = {"beyond": 0, "unclear": 1, "only_shorter": 2, "always": 3, "never": 4}
    known = [
        (found[metric.name, baseline, other], found[metric.name, other, baseline])
        for other in others
        if (metric.name, baseline, other) in found and found[metric.name, baseline, other].verdict in order
    ]
    for crossing, reverse in sorted(known, key=lambda pair: (order[pair[0].verdict], pair[0].context_len or 0)):
        kind = noise if _is_noise(crossing, reverse) else groups
        kind.setdefault(_when(crossing, reverse, label), []).append(label(crossing.b))
    sentences = []
    if list(groups) == ["at none"]:
        least = " by more than the noise" if noise else ""
        better = f"{metric.verbs[0]} {metric.better} than {label(baseline)}"
        sentences.append(f"No other model {better}{least} at any length measured.")
    elif groups:
        (when, names), *rest = groups.items()
        sentence = f"{_and(names)} {metric.verbs[len(names) > 1]} {metric.better} than {label(baseline)} {when}"
        sentence += "".join(f", {_and(several)} {where}" for where, several in rest)
        first, tokens, later = sentence.partition(" tokens")  # the unit once is enough
        sentences.append(_capital(first + tokens + later.replace(" tokens", "")) + ".")
    if noise:
        parts = [f"{_and(names)} {'are' if len(names) > 1 else 'is'} {where}" for where, names in noise.items()]
        sentences.append(f"Against {label(baseline)} in {metric.name}, {', '.join(parts)}.")
    return " ".join(sentences)


def headline(comparison: Comparison, rows: Sequence[Mapping[str, Any]], crossings: Sequence[Crossover]) -> list[str]:
    """The first paragraphs: crossover lengths with their uncertainty, and the best model beside the compressors.

    The first architecture of the comparison is the baseline of the sentences; the tables have every pair.
    """
    found = {(crossing.metric, crossing.a, crossing.b): crossing for crossing in crossings}
    archs = comparison.archs
    sentences = {
        metric.name: sentence
        for metric in METRICS
        if archs and (sentence := _crossover_sentence(metric, archs[0], archs[1:], found, comparison.label))
    }
    speed = [sentence for name, sentence in sentences.items() if name.endswith("tokens/s")]
    memory = [sentence for name, sentence in sentences.items() if not name.endswith("tokens/s")]
    paragraphs = []
    first = " ".join(filter(None, [*speed, _best_sentence(comparison, rows)]))
    if first:
        paragraphs.append(first)
    if memory:
        paragraphs.append(" ".join(memory))
    lengths = sorted({cell.context_len for cell in comparison.cells})
    if lengths and sentences:
        paragraphs.append(
            f"Lengths are in tokens of context, measured on this machine from {lengths[0]:,} to {lengths[-1]:,} and "
            "interpolated in between; ranges come from the spread of the repeats." + _positions_sentence(comparison)
        )
    return paragraphs


def _positions_sentence(comparison: Comparison) -> str:
    """Which models have too few learned positions for the longest lengths; empty where all have enough."""
    limits = {
        comparison.label(cell.arch): cell.model["max_positions"]
        for cell in _sorted_cells(comparison)
        if cell.status == "beyond_positions"
    }
    return "".join(
        f" {label} was built with {n:,} positions, and is not compared beyond." for label, n in limits.items()
    )


def _read(comparison: Comparison) -> str:
    """How much of the held-out text the models were judged on."""
    read = {run.result.get("val_bytes") for run in comparison.runs} - {None}
    if len(read) != 1:
        return ""
    return f"Every model reads the same {count(read.pop())}B of it, in windows spread evenly."


def _best_sentence(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> str:
    scored = [row for row in rows if row["val_bits_per_byte"] is not None]
    if not scored:
        return ""
    best = min(scored, key=lambda row: row["val_bits_per_byte"])
    spread = best["val_bits_per_byte_std"]
    score = f"{best['val_bits_per_byte']:.2f}" + (f" ± {spread:.2f}" if spread else "")
    references = comparison.corpus["reference_bits_per_byte"] if comparison.corpus else {}
    beside = _and([f"{name} {value:.2f}" for name, value in references.items()])
    lead = "predicts held-out text best" if len(scored) > 1 else "reaches"
    return (
        f"After {count(best['tokens'])} training tokens {best['label']} {lead}"
        + (f", at {score} bits per byte" if len(scored) > 1 else f" {score} bits per byte on held-out text")
        + (f"; compressors on the whole held-out text: {beside}." if beside else ".")
    )


def _title(comparison: Comparison) -> tuple[str, str]:
    n = len(comparison.archs)
    numbers = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    models = f"{numbers[n] if n < len(numbers) else n} sequence model{'s' if n != 1 else ''}"
    unequal = any(not check.equal for check in budget_checks(comparison))
    title = models + ("" if n == 1 else ", unequal budgets" if unequal else " at one budget")
    parts = [", ".join(map(comparison.label, comparison.archs))]
    corpus = comparison.corpus
    if corpus:
        parts.append(f"trained on {corpus['name']} ({count(corpus['train_bytes'])}B)")
    provenance = _provenance(comparison)
    if provenance:
        parts.append(f"{provenance.get('cpu') if provenance.get('device') == 'cpu' else provenance.get('device')}")
        parts.append(str(provenance.get("started", ""))[:10])
    return title, " · ".join(filter(None, parts))


def _provenance(comparison: Comparison) -> Mapping[str, Any]:
    if comparison.runs:
        return comparison.runs[0].info["provenance"]
    return comparison.info.get("provenance", {})


# Sections


def _blocks(
    comparison: Comparison,
    rows: Sequence[Mapping[str, Any]],
    crossings: Sequence[Crossover],
    checks: Sequence[Check],
    lead: Sequence[str],
) -> list[Block]:
    return [
        Lead(paragraphs=lead),
        *_incomplete_section(comparison),
        *_quality_section(comparison, rows),
        *_context_section(comparison, crossings),
        *_budget_section(checks),
        *_sample_section(comparison),
        *_details_section(comparison, crossings),
    ]


def _incomplete_section(comparison: Comparison) -> list[Block]:
    missing = [
        f"{run.folder.name}: "
        + comparison.failures.get(
            run.folder.name, _STATUS.get(run.status, run.status) + _reason(run.result.get("error"))
        )
        for run in comparison.runs
        if run.status != "done"
    ]
    known = {run.folder.name for run in comparison.runs}
    missing += [f"{name}: {reason}" for name, reason in comparison.failures.items() if name not in known]
    asked = comparison.info.get("config", {})
    planned = [f"{arch}-s{seed}" for seed in range(asked.get("seeds", 0)) for arch in asked.get("archs", ())]
    missing += [f"{name}: not run yet" for name in planned if name not in known | comparison.failures.keys()]
    missing += [
        f"{comparison.label(cell.arch)}, {cell.phase} at {cell.context_len:,}: failed{_reason(cell.error)}"
        for cell in _sorted_cells(comparison)
        if cell.status == "failed"
    ]
    measured = {(cell.arch, cell.context_len) for cell in comparison.cells}
    lengths = {
        arch: [L for L in asked.get("context", ()) if (arch, L) not in measured] for arch in asked.get("archs", ())
    }
    missing += [
        f"{comparison.label(arch)}: not measured yet at {_and([f'{L:,}' for L in left])} tokens"
        for arch, left in lengths.items()
        if left
    ]
    if not missing:
        return []
    return [
        Heading(text="What is missing"),
        Paragraph(text="These parts did not finish. What follows leaves them out."),
        Items(items=missing, warnings=frozenset(range(len(missing)))),
    ]


def _reason(error: str | None) -> str:
    return f" ({error})" if error else ""


def _quality_section(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> list[Block]:
    if not rows:
        return []
    from .figures import learning_figure, position_figure, quality_figure

    references = comparison.corpus["reference_bits_per_byte"] if comparison.corpus else {}
    figures = []
    if any(row["val_bits_per_byte"] is not None for row in rows):
        figures.append(quality_figure(comparison, rows, references))
    if any(run.curve() for run in comparison.runs):
        figures += [learning_figure(comparison, "tokens"), learning_figure(comparison, "seconds")]
    position = position_figure(comparison, comparison.runs[0].info["config"]["train"]["seq_len"])
    figures += [position] if position else []
    scores = [row["val_bits_per_byte"] for row in rows]
    best = min((score for score in scores if score is not None), default=None)
    corpus = comparison.corpus or {}
    n_seeds = max(row["n_seeds"] for row in rows)
    return [
        Heading(text="Quality"),
        Paragraph(
            text=f"Bits per byte of held-out text, which do not depend on the tokenizer. {_read(comparison)} "
            f"Compressors on all {count(corpus.get('val_bytes'))}B: "
            + ", ".join(f"{name} {value:.2f}" for name, value in references.items())
            + "."
        ),
        Table(
            columns=[
                "Model",
                "Bits per byte",
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
            rows=[_quality_cells(row) for row in rows],
            caption="FLOPs/token: training, forward and backward, at the trained length. State: what one sequence "
            "carries at the trained length while generating."
            + ("" if n_seeds > 1 else " One seed: differences of a few hundredths mean little."),
            strong=frozenset((i, 1) for i, score in enumerate(scores) if score is not None and score == best),
        ),
        Figures(figures=figures),
    ]


def _quality_cells(row: Mapping[str, Any]) -> list[str]:
    mean, spread = row["val_bits_per_byte"], row["val_bits_per_byte_std"]
    score = DASH if mean is None else f"{mean:.3f}" + (f" ± {spread:.3f}" if spread is not None else "")
    return [
        row["label"],
        score,
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
    from .figures import context_figure

    settings = comparison.cells[0].settings
    figures = [figure for metric in METRICS if (figure := context_figure(comparison, metric)) is not None]
    blocks: list[Block] = [
        Heading(text="Against context length"),
        Paragraph(
            text=f"Medians of repeats in {settings['time_box']:g} s after a warm-up, at least "
            f"{settings['min_repeats']}, or 2 of training whose warm-up step alone takes longer; each model and length "
            f"in its own process with at most {format_bytes(settings['memory_limit'])} of memory. "
            f"{_batches(comparison)}"
            "Shaded: tenth to ninetieth percentile of the repeats, lowest to highest of two."
        ),
        Figures(figures=figures),
    ]
    archs = comparison.archs
    if len(archs) > 1:
        found = {(crossing.metric, crossing.a, crossing.b): crossing for crossing in crossings}
        blocks.append(
            Table(
                columns=["", *map(comparison.label, archs[1:])],
                rows=[
                    [metric.name, *(_pair(found, metric, archs[0], other) for other in archs[1:])] for metric in METRICS
                ],
                caption=f"Context lengths in tokens at which each model beats {comparison.label(archs[0])}: "
                "always and never mean at every and at no length measured, unclear that the spread of the repeats is "
                "larger than the difference, † that one of the two ran out of memory or time there. "
                "All pairs are listed at the end.",
            )
        )
    return blocks


def _batches(comparison: Comparison) -> str:
    """Says what one training step, prefill and decode work on, from the cells' own batches."""
    tokens = tokens_per_step(comparison)
    prompts = sorted({cell.batch_size for cell in comparison.cells if cell.phase != "train" and cell.batch_size})
    training = f"Training takes {tokens}. " if tokens else ""
    served = f"{_and(list(map(str, prompts)))} prompt{'s' if prompts != [1] else ''} at once"
    return training + (f"Prefill and decode serve {served}. " if prompts else "")


def _pair(found: Mapping[tuple[str, str, str], Crossover], metric: Metric, a: str, b: str) -> str:
    if (metric.name, a, b) not in found:
        return "not measured"
    return _short(found[metric.name, a, b], found[metric.name, b, a])


def _budget_section(checks: Sequence[Check]) -> list[Block]:
    if not checks:
        return []
    return [
        Heading(text="Equal budgets"),
        Paragraph(
            text="Verified from the files of the runs: every model had the same number of parameters (within 2 %), "
            "tokens and steps, the same data in the same order and the same schedule."
            if all(check.equal for check in checks)
            else "The runs did not have equal budgets, so their quality cannot be compared as it stands."
        ),
        Paragraph(
            text="The peak learning rates of the presets were chosen with crossover bench lr by bits per byte on the "
            "same held-out split that is reported here; no third split was kept."
        ),
        Items(
            items=[
                f"{_capital(check.name)}: {'' if check.equal else 'NOT EQUAL, '}{check.statement}" for check in checks
            ],
            warnings=frozenset(i for i, check in enumerate(checks) if not check.equal),
        ),
    ]


def _sample_section(comparison: Comparison) -> list[Block]:
    samples: list[Block] = []
    for arch in comparison.archs:
        text = next((run.result["sample"] for run in comparison.runs_of(arch) if run.result.get("sample")), None)
        if text:
            samples.append(Preformatted(title=comparison.label(arch), text=_printable(text)))
    if not samples:
        return []
    return [
        Heading(text="Samples"),
        Paragraph(text="Text that each model writes after training, from the first seed."),
        *samples,
    ]


def _printable(text: str) -> str:
    """Shows control characters as the replacement character; HTML has no way to carry them."""
    return "".join(c if c in "\n\t" or (c >= " " and c != "\x7f") else "\N{REPLACEMENT CHARACTER}" for c in text)


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
                    _when(c, reverse, comparison.label),
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


def _with_reverse(crossings: Sequence[Crossover]) -> Iterable[tuple[Crossover, Crossover]]:
    found = {(c.metric, c.a, c.b): c for c in crossings}
    return ((c, found[c.metric, c.b, c.a]) for c in crossings)


def _sorted_cells(comparison: Comparison) -> list[Cell]:
    phases = ("train", "prefill", "decode")
    return [cell for phase in phases for arch in comparison.archs for cell in comparison.cells_of(arch, phase)]


def _cells_table(comparison: Comparison) -> Table:
    rows = []
    for cell in _sorted_cells(comparison):
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
                _STATUS.get(cell.status, cell.status),
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
    items += [f"{key}: {value}" for key, value in _provenance(comparison).items() if key != "command"]
    corpus = comparison.corpus
    if corpus:
        items.append(
            f"corpus: {corpus['name']}, {corpus['n_documents']:,} documents ({corpus['n_val_documents']:,} held out), "
            f"{corpus['train_bytes']:,} bytes for training, {corpus['val_bytes']:,} for validation, "
            f"digest {corpus['digest']}"
        )
    if comparison.cells:
        items += [f"measurements: {key}: {value}" for key, value in comparison.cells[0].settings.items()]
    return Items(items=items)


def _flat_cell(cell: Cell) -> dict[str, Any]:
    low, high = cell.spread or (None, None)
    backend = "; ".join(f"{op}={'+'.join(names)}" for op, names in sorted(cell.backend.items()))
    return {**cell.to_dict(), "spread_low": low, "spread_high": high, "backend": backend}
