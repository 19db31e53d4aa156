"""The sentences of a report: where a model is better than another, which one is best, what is compared."""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ..harness.effort import MAX_FOREIGN_SHARE, MAX_WAITING
from ..harness.format import count, format_bytes, number
from .crossovers import Crossover
from .results import METRICS, Check, Comparison, Metric, tokens_per_step

__all__ = [
    "Span",
    "and_list",
    "batches",
    "capital",
    "choice_of_rates",
    "headline",
    "missing_parts",
    "score_meaning",
    "shading",
    "span_of",
    "status_words",
    "title",
    "training_sentence",
]

_STATUS = {
    "out_of_memory": "out of memory",
    "timeout": "out of time",
    "beyond_positions": "beyond its positions",
    "unfinished": "not finished",
    "too_little_text": "too little text",
}


def status_words(status: str) -> str:
    """Says how a run or a cell ended."""
    return _STATUS.get(status, status)


def and_list(words: Sequence[str]) -> str:
    """Writes "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1]))) if words else ""


def capital(text: str) -> str:
    """Writes the first letter large."""
    return text[:1].upper() + text[1:]


def _rounded(length: float) -> str:
    """A length with the two digits that interpolation deserves."""
    digits = max(0, int(math.log10(length)) - 1)
    return f"{round(length, -digits):,.0f}"


_Kind = Literal[
    "beyond",
    "up to",
    "clear beyond",
    "clear up to",
    "noise beyond",
    "noise below",
    "noise",
    "always",
    "some shorter",
    "never",
    "unknown",
]
_IN_TEXT = {
    "noise": "within the noise at every length measured",
    "always": "at every length measured",
    "some shorter": "at some shorter lengths",
    "never": "at none",
    "unknown": "at none",
}
_IN_CELL = {"unknown": "not measured", "noise": "unclear", "noise beyond": "unclear", "noise below": "unclear"}


@dataclass(frozen=True, kw_only=True)
class Span:
    """The context lengths at which one model is better than another."""

    kind: _Kind
    """beyond, up to: better on this side of `length` alone; clear beyond, clear up to: better on this side, and on the
    other one the noise is larger than the difference; noise beyond, noise below: never clearly better, and the noise is
    larger than the difference on this side; noise: it is so at every length; the rest: no length to tell."""
    length: float | None = None
    low: float | None = None
    """Shortest length that the spread of the repeats allows; None if there is none."""
    high: float | None = None
    """Longest length that the spread of the repeats allows; None if there is none."""
    ended: str | None = None
    """The end of a model that could not be measured any more, where the lead changes for it."""

    @property
    def is_noise(self) -> bool:
        """Whether there is no length at which the model is better by more than the noise, though it may be."""
        return self.kind in ("noise", "noise beyond", "noise below")

    def in_text(self) -> str:
        """The span within a sentence."""
        match self.kind, self.length:
            case (("beyond" | "clear beyond"), float(length)):
                place = f"beyond {_rounded(length)} tokens"
                if self.ended:
                    place = f"from {length:,.0f} tokens on, where {self.ended}"
                return place + (self._range() if self.kind == "beyond" else " (before: within the noise)")
            case (("up to" | "clear up to"), float(length)):
                place = f"up to {_rounded(length)} tokens"
                if self.ended:
                    place = f"below {length:,.0f} tokens, where {self.ended}"
                return place + (self._range() if self.kind == "up to" else " (beyond: within the noise)")
            case (("noise beyond" | "noise below"), float(length)):
                return f"within the {self.kind} {_rounded(length)} tokens"
            case kind, _:
                return _IN_TEXT[kind]

    def in_cell(self) -> str:
        """The span in the cell of a table."""
        mark = " †" if self.ended else ""
        match self.kind, self.length:
            case "beyond", float(length):
                return f"> {_rounded(length)}{mark}{self._range()}"
            case "up to", float(length):
                return f"< {_rounded(length)}{mark}{self._range()}"
            case "clear beyond", float(length):
                return f"> {_rounded(length)}{mark}, before unclear"
            case "clear up to", float(length):
                return f"< {_rounded(length)}{mark}, beyond unclear"
            case kind, _:
                return _IN_CELL.get(kind, kind)

    def _range(self) -> str:
        """The uncertainty of the length in brackets, nothing where it is below the rounding or the end of a model."""
        if self.ended:
            return ""
        if self.low is not None and self.high is not None:
            low, high = _rounded(self.low), _rounded(self.high)
            return "" if low == high else f" ({low}-{high})"
        if self.high is not None:
            return f" (at most {_rounded(self.high)})"
        assert self.low is not None
        return f" (at least {_rounded(self.low)}, within the noise at the longest)"


def span_of(crossing: Crossover, reverse: Crossover, label: Callable[[str], str]) -> Span:
    """Tells where b is better than a. `reverse` is the crossover of the pair the other way round."""
    match crossing.verdict:
        case "beyond":
            return _at("beyond", crossing, crossing.context_len, label)
        case "only_shorter" if reverse.context_len is not None:
            return _at("up to", reverse, reverse.context_len, label)
        case "only_shorter":
            return Span(kind="some shorter")
        case "unclear" if crossing.high is not None:
            return _at("clear beyond", crossing, crossing.high, label)
        case "unclear" if reverse.low is not None:
            return Span(kind="clear up to", length=reverse.low)
        case "unclear" if reverse.high is not None:
            return Span(kind="noise below", length=reverse.high)
        case "unclear" if crossing.low is not None:
            return Span(kind="noise beyond", length=crossing.low)
        case "unclear":
            return Span(kind="noise")
        case verdict:
            return Span(kind=verdict)


def _at(kind: _Kind, crossing: Crossover, length: float | None, label: Callable[[str], str]) -> Span:
    ended = None
    if crossing.stopped_after is not None:
        ended = f"{label(crossing.a)} was stopped after {crossing.stopped_after:g} s"
    elif crossing.out_of_memory is not None:
        ended = f"{label(crossing.a)} no longer runs"
    return Span(kind=kind, length=length, low=crossing.low, high=crossing.high, ended=ended)


def _crossover_sentence(
    comparison: Comparison,
    metric: Metric,
    baseline: str,
    others: Sequence[str],
    found: Mapping[tuple[str, str, str], Crossover],
) -> str:
    """Says which models beat the baseline on a metric, and for which lengths; then which ones the noise hides."""
    label = comparison.label
    groups: dict[str, list[str]] = {}
    noise: dict[str, list[str]] = {}
    order = {"beyond": 0, "unclear": 1, "only_shorter": 2, "always": 3, "never": 4}
    known = [
        (found[metric.name, baseline, other], found[metric.name, other, baseline])
        for other in others
        if (metric.name, baseline, other) in found and found[metric.name, baseline, other].verdict in order
    ]
    for crossing, reverse in sorted(known, key=lambda pair: (order[pair[0].verdict], pair[0].context_len or 0)):
        span = span_of(crossing, reverse, label)
        place = _place(span, _lengths_of(comparison, metric, baseline, crossing.b), comparison.context)
        (noise if span.is_noise else groups).setdefault(place, []).append(label(crossing.b))
    sentences = []
    if groups and all(place.startswith(("at none", "not at")) for place in groups):
        better = f"{metric.better} than {label(baseline)}" + (" by more than the noise" if noise else "")
        for place, names in groups.items():
            where = place.removeprefix("not ").replace("at none", "at any length measured", 1)
            do = f"{and_list(names)} {'do' if len(names) > 1 else 'does'} not {metric.verbs[1]}"
            subject = f"No other model {metric.verbs[0]}" if len(names) == len(others) else do
            sentences.append(f"{subject} {better} {where}.")
    elif groups:
        (when, names), *rest = groups.items()
        sentence = f"{and_list(names)} {metric.verbs[len(names) > 1]} {metric.better} than {label(baseline)} {when}"
        sentence += "".join(f", {and_list(several)} {where}" for where, several in rest)
        first, tokens, later = sentence.partition(" tokens")  # the unit once is enough
        sentences.append(capital(first + tokens + later.replace(" tokens", "")) + ".")
    if noise:
        parts = [f"{and_list(names)} {'are' if len(names) > 1 else 'is'} {where}" for where, names in noise.items()]
        sentences.append(f"Against {label(baseline)} in {metric.name}, {', '.join(parts)}.")
    return " ".join(sentences)


def _lengths_of(comparison: Comparison, metric: Metric, a: str, b: str) -> list[int]:
    """Lengths at which both were measured, if only to run out of memory or time."""
    of_each = (
        {cell.context_len for cell in comparison.ranked_cells(arch, metric) if cell.status != "failed"}
        for arch in (a, b)
    )
    return sorted(set.intersection(*of_each))


def _place(span: Span, measured: Sequence[int], asked: Sequence[int]) -> str:
    """Where a model is better, and of which lengths that is known, where it is not of all."""
    place = span.in_text()
    if len(measured) == 1:
        at = f"at {measured[0]:,} tokens"
        place = place.replace("at every length measured", at).replace("at none", f"not {at}")
        return place if len(asked) == 1 else f"{place}, the only length measured of both"
    if list(measured) == list(asked):
        return place
    known = (
        f"up to {measured[-1]:,}"
        if list(measured) == list(asked[: len(measured)])
        else f"at {and_list([f'{length:,}' for length in measured])}"
    )
    return f"{place} (both measured {known} tokens only)"


def headline(comparison: Comparison, rows: Sequence[Mapping[str, Any]], crossings: Sequence[Crossover]) -> list[str]:
    """The first paragraphs: crossover lengths with their uncertainty, and the best model beside the compressors.

    The sentences are about the baseline; the tables have every pair.
    """
    found = {(crossing.metric, crossing.a, crossing.b): crossing for crossing in crossings}
    archs = comparison.archs
    others = [arch for arch in comparison.asked if arch != comparison.baseline]
    sentences = {
        metric.name: sentence
        for metric in METRICS
        if archs and (sentence := _crossover_sentence(comparison, metric, comparison.baseline, others, found))
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
        measured = (
            f"Lengths are in tokens of context, measured on this machine from {lengths[0]:,} to {lengths[-1]:,} and "
            "interpolated in between; ranges come from the spread of the repeats."
            if len(lengths) > 1
            else f"One length was measured, {lengths[0]:,} tokens of context on this machine; others are unknown."
        )
        decoding = _python_sentence(comparison)
        decoding += _compiled_sentence(comparison) + _compiled_sentence(comparison, "decode_many")
        paragraphs.append(measured + _positions_sentence(comparison) + decoding)
    if reading := _prompt_sentence(comparison):
        paragraphs.append(reading)
    if missing := missing_parts(comparison):
        more = f" and {len(missing) - _MOST_MISSING} more" if len(missing) > _MOST_MISSING else ""
        paragraphs.append(f"Not in these statements: {'; '.join(missing[:_MOST_MISSING])}{more}.")
    return paragraphs


def training_sentence(comparison: Comparison, crossings: Sequence[Crossover]) -> str:
    """Says from which context length on each model trains faster than the baseline; empty where none was measured."""
    found = {(crossing.metric, crossing.a, crossing.b): crossing for crossing in crossings}
    others = [arch for arch in comparison.asked if arch != comparison.baseline]
    return _crossover_sentence(comparison, METRICS[0], comparison.baseline, others, found) if comparison.archs else ""


_MOST_MISSING = 6


def missing_parts(comparison: Comparison) -> list[str]:
    """What was asked for and did not finish, with the reason."""
    missing = [
        f"{run.folder.name}: "
        + comparison.failures.get(run.folder.name, status_words(run.status) + _reason(run.result.get("error")))
        for run in comparison.runs
        if run.status != "done"
    ]
    known = {run.folder.name for run in comparison.runs}
    missing += [f"{name}: {reason}" for name, reason in comparison.failures.items() if name not in known]
    n_seeds = comparison.info.get("config", {}).get("seeds", 0)
    lengths = comparison.trained_lengths
    planned = [
        f"{arch}-l{length}-s{seed}" if len(lengths) > 1 else f"{arch}-s{seed}"
        for seed in range(n_seeds)
        for length in lengths or [0]
        for arch in comparison.asked
    ]
    missing += [f"{name}: not run yet" for name in planned if name not in known | comparison.failures.keys()]
    missing += [
        f"{comparison.label(cell.arch)}, {cell.phase} at {cell.context_len:,}: failed{_reason(cell.error)}"
        for cell in comparison.ordered_cells
        if cell.status == "failed"
    ]
    measured = {(cell.arch, cell.context_len) for cell in comparison.cells}
    for arch in comparison.asked:
        left = [f"{length:,}" for length in comparison.context if (arch, length) not in measured]
        if left:
            missing.append(f"{comparison.label(arch)}: not measured yet at {and_list(left)} tokens")
    return missing


def _reason(error: str | None) -> str:
    return f" ({error})" if error else ""


def _compiled_sentence(comparison: Comparison, phase: str = "decode") -> str:
    """Says which models a compiled step decoded where not all were; empty elsewhere."""
    cells = [cell for cell in comparison.cells if cell.phase == phase and cell.done]
    others = [arch for arch in comparison.archs if any(c.arch == arch and not c.is_compiled for c in cells)]
    if not comparison.decodes_compiled(phase) or not others:
        return ""
    names = and_list([comparison.label(arch) for arch in others])
    how = "" if phase == "decode" else ", many sequences at once,"
    return (
        f" {names} {'were' if len(others) > 1 else 'was'} decoded{how} by calling modules and the others by a compiled "
        "step: their decode speeds are not compared."
    )


_READING = 5e9
"""Bytes per second that any machine reads from memory: fewer than most do."""
_EXPLAINED = 1 / 3
"""A step of which arithmetic and reading explain less is mostly the calling of operations."""


def _python_sentence(comparison: Comparison) -> str:
    """Says that decode measures Python, where it does; empty elsewhere.

    A step must do its arithmetic, which takes no longer than prefill took for a token, and read weights and state once.
    """
    shares: dict[str, list[tuple[float, float]]] = {}
    for arch in comparison.archs:
        prefill = {cell.context_len: cell for cell in comparison.cells_of(arch, "prefill") if cell.done}
        for cell in comparison.cells_of(arch, "decode"):
            reading = prefill.get(cell.context_len)
            if not cell.done or reading is None or not cell.tokens_per_second or not reading.tokens_per_second:
                continue
            rows = cell.batch_size or 1
            step = rows / cell.tokens_per_second
            n_bytes = 4 * cell.n_active_params + rows * (cell.state_bytes or 0)  # parameters are float32
            needed = rows / reading.tokens_per_second + n_bytes / _READING
            if needed < _EXPLAINED * step:
                shares.setdefault(arch, []).append((needed / step, step))
    if not shares:
        return ""
    steps = [1e3 * step for several in shares.values() for _, step in several]
    most = max(share for several in shares.values() for share, _ in several)
    shortest, longest = number(min(steps)), number(max(steps))
    span = shortest if shortest == longest else f"{shortest} to {longest}"
    return (
        f" Decode speeds of {and_list([comparison.label(arch) for arch in shares])} measure Python more than the "
        "architecture: arithmetic (as fast as in prefill) and reading weights and state explain at most "
        f"{100 * most:.0f} % of a step of {span} ms, and the rest is the calling of one small operation after another."
    )


_LONG = 1024
"""Tokens from which on a prompt's time is that of its tokens, and not of calling the model."""


def prefill_exponents(comparison: Comparison) -> dict[str, float]:
    """The power of its length with which the time of reading a prompt grows, 1 where a token's is constant.

    Fitted by least squares in logarithms, where at least three long prompts were read.
    """
    found = {}
    for arch in comparison.archs:
        cells = [cell for cell in comparison.cells_of(arch, "prefill") if cell.done and cell.context_len >= _LONG]
        lengths = [math.log(cell.context_len) for cell in cells]
        seconds = [math.log(cell.context_len / cell.tokens_per_second) for cell in cells if cell.tokens_per_second]
        if len(seconds) == len(lengths) >= 3:
            found[arch] = statistics.linear_regression(lengths, seconds).slope
    return found


def _prompt_sentence(comparison: Comparison) -> str:
    """Says how time and memory of reading a prompt grow with its length; empty where too few lengths were measured."""
    powers, memory = [], []
    for arch, exponent in prefill_exponents(comparison).items():
        cells = [cell for cell in comparison.cells_of(arch, "prefill") if cell.done and cell.context_len >= _LONG]
        first, last = cells[0], cells[-1]
        lengths = f"{first.context_len:,} to {last.context_len:,} tokens"
        powers.append(f"{exponent:.2f} ({comparison.label(arch)}, {lengths})")
        if first.peak_bytes is not None and last.peak_bytes is not None:
            grown = f"{format_bytes(first.peak_bytes)} to {format_bytes(last.peak_bytes)}"
            memory.append(f"from {grown} ({comparison.label(arch)})")
    if not powers:
        return ""
    peaks = f", and the peak memory, weights included, goes {and_list(memory)}" if memory else ""
    return f"The time of reading a prompt grows as its length to the power {and_list(powers)}{peaks}."


def _positions_sentence(comparison: Comparison) -> str:
    """Says which models have too few learned positions for the longest lengths; empty where all have enough."""
    limits = {
        comparison.label(cell.arch): n
        for cell in comparison.ordered_cells
        if cell.status == "beyond_positions" and isinstance(n := cell.model.get("max_positions"), int)
    }
    return "".join(
        f" {label} was built with {n:,} positions, and is not compared beyond." for label, n in limits.items()
    )


def _text_read(comparison: Comparison) -> str:
    """Says how much of the held-out text the models were judged on; empty where it differs."""
    read = {run.result.get("val_bytes") for run in comparison.runs} - {None}
    if len(read) != 1:
        return ""
    return f"Every model reads the same {count(read.pop())}B of it, in windows spread evenly."


def _best_sentence(comparison: Comparison, rows: Sequence[Mapping[str, Any]]) -> str:
    """Says which model is best, beside the compressors; empty where no run has finished."""
    score = comparison.score
    scored = [row for row in rows if row[score.key] is not None]
    if not scored:
        return ""
    value = score.best(row[score.key] for row in scored)
    best = next(row for row in scored if row[score.key] == value)
    n_models = len({row["arch"] for row in scored})
    spread = best[f"{score.key}_std"]
    reached = f"{value:.2f}{f' ± {spread:.2f}' if spread else ''} {score.unit}"
    among = "" if n_models == len(comparison.asked) else f" of the {n_models} that have finished"
    if n_models == 1:
        found = f"reaches {reached} on {comparison.held_out}"
    elif comparison.predicts_text:
        found = f"predicts held-out text best{among}, at {reached}"
    else:
        found = f"has the {'lowest' if score.better == 'lower' else 'highest'} {score.words}{among}, at {reached}"
    beside = and_list([f"{name} {value:.2f}" for name, value in comparison.references.items()])
    compressors = f"; compressors on the whole held-out text: {beside}" if beside else ""
    several = len({row["seq_len"] for row in scored}) > 1
    trained = f", trained at {best['seq_len']:,}," if several else ""
    spent = f"{count(best['tokens'])} training tokens"
    if comparison.equal == "seconds":
        spent = f"{best['train_seconds']:,.0f} seconds of training, {count(best['tokens'])} tokens,"
    return f"After {spent} {best['label']}{trained} {found}{compressors}."


def score_meaning(comparison: Comparison) -> str:
    """Says what the score is, and what it may be held against."""
    score = comparison.score
    if not comparison.predicts_text:
        return f"{capital(score.words)}, of which {'less' if score.better == 'lower' else 'more'} is better."
    sentences = ["Bits per byte of held-out text, which do not depend on the tokenizer.", _text_read(comparison)]
    if comparison.references:
        held_out = (comparison.corpus or {}).get("val_bytes")
        values = ", ".join(f"{name} {value:.2f}" for name, value in comparison.references.items())
        sentences.append(f"Compressors on all {count(held_out)}B: {values}.")
    return " ".join(filter(None, sentences))


def title(comparison: Comparison, checks: Sequence[Check]) -> tuple[str, str]:
    """Title and subtitle of the page."""
    n = len(comparison.archs)
    numbers = ("No", "One", "Two", "Three", "Four", "Five", "Six", "Seven", "Eight", "Nine")
    models = f"{numbers[n] if n < len(numbers) else n} sequence model{'s' if n != 1 else ''}"
    unequal = any(not check.equal for check in checks)
    heading = models + ("" if n == 1 else ", unequal budgets" if unequal else " at one budget")
    parts = [", ".join(map(comparison.label, comparison.archs))]
    corpus = comparison.corpus
    if corpus:
        size = "" if corpus.get("made") else f" ({count(corpus['train_bytes'])}B)"
        parts.append(f"trained on {corpus['name']}{size}")
    precisions = {run.info["provenance"].get("precision") for run in comparison.runs}
    if "bf16" in precisions | {cell.dtype for cell in comparison.cells}:
        parts.append("products in bfloat16")
    provenance = comparison.provenance
    if provenance:
        parts.append(f"{provenance.get('cpu') if provenance.get('device') == 'cpu' else provenance.get('device')}")
        parts.append(str(provenance.get("started", ""))[:10])
    return heading, " · ".join(filter(None, parts))


def batches(comparison: Comparison) -> str:
    """Says what one training step, prefill and decode work on, from the cells' own batches."""
    tokens = tokens_per_step(comparison)
    prompts = sorted(
        {cell.batch_size for cell in comparison.cells if cell.phase in ("prefill", "decode") and cell.batch_size}
    )
    training = f"Training takes {tokens}. " if tokens else ""
    at_once = f"{and_list(list(map(str, prompts)))} prompt{'s' if prompts != [1] else ''} at once"
    return training + (f"Prefill and decode serve {at_once}. " if prompts else "")


def shading(comparison: Comparison) -> str:
    """Says what the bands of figures against the context length are, and how many measurements were disturbed."""
    n = comparison.info.get("config", {}).get("repeats", 1)
    band = (
        "Shaded: tenth to ninetieth percentile of the repeats, lowest to highest of two."
        if n == 1
        else f"Medians over {n} processes, each begun after all models had had the one before. Shaded: lowest to "
        "highest of the processes."
    )
    disturbed = sum(cell.disturbed for cell in comparison.cells)
    if not disturbed:
        return band
    return (
        f"{band} Disturbed: {disturbed} of {len(comparison.cells)} measurements, in which the work waited more than "
        f"{MAX_WAITING - 1:.0%} of its time for a processor, or others kept more than {MAX_FOREIGN_SHARE:.0%} of the "
        "machine busy, at the second attempt too."
    )


def choice_of_rates(comparison: Comparison) -> str:
    """Says how the peak learning rates were chosen."""
    tuning = comparison.info.get("tuning")
    if tuning is None and comparison.predicts_text:
        return (
            "The peak learning rates of the presets were chosen at the size of the demo by bits per byte on the same "
            "held-out split that is reported here; crossover compare --tune-lr chooses them on a third one."
        )
    if tuning is None:
        return "The peak learning rates of the presets were chosen for predicting text, not for this score."
    steps = and_list([f"{steps:,}" for steps in tuning["rounds"]])
    n_documents = tuning["n_documents"]
    judged_on = (
        f"{n_documents:,} documents that were held out from their training for that"
        if n_documents
        else "rows that were made for that"
    )
    return (
        f"The peak learning rate of each model was found by this comparison in {tuning['n_trials']} trials of {steps} "
        "steps, at rates a factor of two apart, of which the better half went on to the longer ones, and the best has "
        f"a worse neighbour on either side. Trials were judged on {judged_on}, and that no number here comes from; "
        "every one is in tuning/trials.csv."
    )
