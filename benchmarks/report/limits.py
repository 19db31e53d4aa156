"""What was measured once or little, and might change a verdict if it were measured more: facts of one comparison."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from .criteria import Criterion
from .document import Block, Heading, Items
from .results import Comparison, Run
from .words import and_list

__all__ = ["limits", "limits_section"]

_FEW_SEEDS = 5
_ENOUGH = 20
"""Tokens per parameter at which a Transformer has the lowest loss for its FLOPs (Hoffmann et al., arXiv:2203.15556)."""
_NAMED = 4
"""Differences that are named one by one."""


def limits_section(comparison: Comparison, found: Sequence[Criterion]) -> list[Block]:
    """The section; empty where there is nothing to compare."""
    items = limits(comparison, found) if len(comparison.archs) > 1 else []
    return [Heading(text="What would change this verdict"), Items(items=items)] if items else []


def limits(comparison: Comparison, found: Sequence[Criterion]) -> list[str]:
    """What was measured once or little, a sentence for each."""
    sentences: list[str] = []
    quality = next((criterion for criterion in found if criterion.kind == "quality"), None)
    if quality is not None:
        sentences += [*_seeds(comparison, quality), *_budget(comparison), *_on_the_way(comparison, quality)]
        sentences += [*_rates(comparison), *_data(comparison)]
    sentences += [*_lengths(comparison), *_speeds(comparison, found), *_size(comparison), *_machine(comparison)]
    return sentences


def _seeds(comparison: Comparison, quality: Criterion) -> Iterator[str]:
    if not quality.decided:
        yield "Seeds: one, which tells no difference in quality from noise."
        return
    gaps = {
        (arch, length): gap
        for arch in comparison.others
        for length in quality.lengths
        if (gap := quality.gap(arch, quality.baseline, length)) is not None and math.isfinite(gap.high)
    }
    if not gaps:
        return
    n = min(gap.n for gap in gaps.values())
    small = [f"{comparison.label(arch)} at {length:,}" for (arch, length), gap in gaps.items() if gap.includes_zero]
    if n >= _FEW_SEEDS and not small:
        return
    widths = [(gap.high - gap.low) / 2 for gap in gaps.values()]
    spread = f"± {min(widths):.3f}" + (f" to ± {max(widths):.3f}" if len(widths) > 1 else "")
    named = f" ({and_list(small)})" if 0 < len(small) <= _NAMED else ""
    yield (
        f"Seeds: {n}, with 95 % intervals of {spread} {comparison.score.unit}; of {len(gaps)} differences to "
        f"{comparison.label(quality.baseline)} {len(small) or 'none'} {'is' if len(small) == 1 else 'are'} smaller "
        f"than the interval{named}."
    )


def _budget(comparison: Comparison) -> Iterator[str]:
    ratios = [run.result["tokens"] / run.info["n_params"] for run in comparison.runs if run.status == "done"]
    if not ratios or not comparison.predicts_text or max(ratios) >= _ENOUGH:
        return
    low, high = f"{min(ratios):.2f}", f"{max(ratios):.2f}"
    yield (
        f"Budget: {low if low == high else f'{low} to {high}'} tokens per parameter. About {_ENOUGH} give a "
        "Transformer the lowest loss for its FLOPs (Hoffmann et al. 2022, arXiv:2203.15556): what is ranked is how "
        "fast models begin."
    )


def _on_the_way(comparison: Comparison, quality: Criterion) -> Iterator[str]:
    """Where another model was ahead half-way, which is not level with the best at the end."""
    parts = []
    for length in quality.lengths:
        halfway = {
            arch: statistics.fmean(values)
            for arch in quality.ranked(length)
            if (values := [value for run in comparison.runs_of(arch, length) if (value := _halfway(run)) is not None])
        }
        if len(halfway) < 2:
            continue
        best = comparison.score.best(halfway.values())
        ahead = next(arch for arch, value in halfway.items() if value == best)
        if ahead not in (quality.level(length) if quality.decided else quality.ranked(length)[:1]):
            parts.append(f"{comparison.label(ahead)} at {length:,} tokens")
    if parts:
        yield f"Half-way: {and_list(parts)} led after half of the training, and not at its end."


def _halfway(run: Run) -> float | None:
    """The score that a run had nearest to half of its tokens, by a validation on the way."""
    if run.status != "done":
        return None
    half, curve = run.result["tokens"] / 2, [line for line in run.curve() if line["step"] > 0]
    nearest = min(curve[:-1], key=lambda line: abs(line["tokens"] - half), default=None)
    return None if nearest is None else nearest[run.score.tag]


def _rates(comparison: Comparison) -> Iterator[str]:
    tuning = comparison.info.get("tuning")
    given = (comparison.info.get("config", {}).get("optim") or {}).get("lr")
    lengths = comparison.trained_lengths
    if tuning is not None:
        steps = max((run.result["steps"] for run in comparison.runs if run.status == "done"), default=0)
        longest = max(tuning.get("rounds") or [0])
        few = [f"in runs of {longest:,} of {steps:,} steps"] if longest < steps else []
        short = (
            [f"at {lengths[0]:,} tokens, and used at {and_list([f'{n:,}' for n in lengths[1:]])} too"]
            if len(lengths) > 1
            else []
        )
        if few or short:
            yield f"Learning rates: found {' '.join([*few, *short])}."
    elif given is not None:
        yield f"Learning rates: {given:g} for every model, tuned for none."
    else:
        yield (
            "Learning rates: those of the presets, found at 300,000 parameters in 150 steps of 2,048 tokens; another "
            "size or budget may want others."
        )


def _data(comparison: Comparison) -> Iterator[str]:
    corpus = comparison.corpus or {}
    read = {run.result.get("val_bytes") for run in comparison.runs} - {None}
    part = f", of which {read.pop():,} of {corpus['val_bytes']:,} bytes were read" if len(read) == 1 else ""
    if corpus.get("made"):
        yield f"Data: {corpus['name']} alone, {corpus['made']}."
        return
    yield f"Data: {corpus['name']} alone, judged on {corpus['n_val_documents']:,} documents{part}."


def _lengths(comparison: Comparison) -> Iterator[str]:
    trained = sorted({run.seq_len for run in comparison.runs})
    measured = sorted({cell.context_len for cell in comparison.cells})
    untrained = [length for length in measured if length not in trained]
    if not trained or not untrained:
        return
    read = {
        entry["context_len"]
        for run in comparison.runs
        for entry in run.result.get("by_length") or ()
        if entry.get("bits_per_byte") is not None
    }
    unknown = [f"{length:,}" for length in untrained if length not in read]
    known = [f"{length:,}" for length in untrained if length in read]
    parts = [f"at {and_list(unknown)} speed is measured and no quality"] if unknown else []
    parts += [f"quality at {and_list(known)} is that of models trained at other lengths"] if known else []
    yield f"Lengths: trained at {and_list([f'{length:,}' for length in trained])} tokens; {', and '.join(parts)}."


def _speeds(comparison: Comparison, found: Sequence[Criterion]) -> Iterator[str]:
    speeds = [criterion for criterion in found if criterion.basis in ("rounds", "one process")]
    tried = [
        criterion.shown(arch, length)
        for criterion in speeds
        for arch in comparison.others
        for length in criterion.lengths
        if (gap := criterion.gap(arch, criterion.baseline, length)) is not None and math.isfinite(gap.mean)
    ]
    if not tried:
        return
    parts = []
    if any(criterion.basis == "one process" for criterion in speeds):
        parts.append("each is of one process")
    if hidden := tried.count(False):
        parts.append(f"{hidden} of {len(tried)} differences to {comparison.label(comparison.baseline)} are not shown")
    if disturbed := sum(cell.disturbed for cell in comparison.cells):
        parts.append(f"other work disturbed {disturbed} of {len(comparison.cells)} measurements")
    if parts:
        yield f"Speeds: {and_list(parts)}."


def _size(comparison: Comparison) -> Iterator[str]:
    sizes = [run.info["n_params"] for run in comparison.runs] or [cell.n_params for cell in comparison.cells]
    if max(sizes) <= 1.1 * min(sizes):
        asked = comparison.info.get("config", {}).get("params")
        size = f"{asked:,}" if asked else f"{min(sizes):,} to {max(sizes):,}"
        yield f"Size: {size} parameters alone; at others the order is not measured."


_ARITHMETIC = {"fp32": "float32", "bf16": "bfloat16"}


def _machine(comparison: Comparison) -> Iterator[str]:
    origins = [run.info["provenance"] for run in comparison.runs] + [cell.provenance for cell in comparison.cells]
    names = {str(origin.get("cpu") if origin.get("device") == "cpu" else origin.get("device")) for origin in origins}
    hosts = {str(origin["hostname_hash"]) for origin in origins if origin.get("hostname_hash")}
    if len(names) == 1 and len(hosts) <= 1:
        precisions = {run.info["provenance"].get("precision") for run in comparison.runs}
        precisions |= {cell.dtype for cell in comparison.cells}
        arithmetic = (
            f", in {_ARITHMETIC[name]}" if len(precisions) == 1 and (name := precisions.pop()) in _ARITHMETIC else ""
        )
        yield f"Machine: one, {names.pop()}{arithmetic}."
    if any(origin.get("git_dirty") for origin in origins):
        yield "Code: it had changes that the commit named below does not have."
