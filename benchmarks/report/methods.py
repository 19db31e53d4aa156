"""The methods of a comparison as text to paste into a paper, and the papers that it cites, from the files alone."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from ..harness.format import count, format_bytes
from .references import entries, papers_of
from .results import Check, Comparison
from .words import and_list, batches, choice_of_rates

__all__ = ["methods", "references"]

Quote = Callable[[str], str]
"""What is done to a text that comes from the files, so that it is read as text."""

_ARITHMETIC = {"fp32": "in float32", "bf16": "with products in bfloat16"}


def methods(comparison: Comparison, checks: Sequence[Check], quote: Quote = str) -> str:
    """What was compared and how, in paragraphs, with Pandoc's citations ([@key]).

    Args:
        comparison: whose files tell.
        checks: whether its budgets were equal.
        quote: makes text of the files text of the format written; nothing when not given.
    """
    paragraphs = [_models(comparison, checks, quote)]
    if comparison.runs:
        paragraphs += [_training(comparison, quote), _quality(comparison, checks, quote)]
    if comparison.cells:
        paragraphs.append(_speed(comparison))
    return "\n\n".join([*paragraphs, _machine(comparison, quote)]) + "\n"


def references(text: str) -> str:
    """What a text cites, as BibTeX."""
    return entries(key for cited in re.findall(r"\[(@[^\]]*)\]", text) for key in re.findall(r"@(\w+)", cited))


def _cite(*keys: str) -> str:
    return f" [{'; '.join(f'@{key}' for key in keys)}]" if keys else ""


def _plural(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' if n != 1 else ''}"


def _percent(share: float) -> str:
    return f"{100 * share:g} %"


def _models(comparison: Comparison, checks: Sequence[Check], quote: Quote) -> str:
    """Which models, of which sizes."""
    within = any(check.name == "parameters" and check.equal for check in checks)
    target = comparison.info.get("config", {}).get("params")
    size = f" of {target:,} parameters (within 2 %, embeddings included)" if target and within else ""
    described = []
    for arch in comparison.archs:
        runs = comparison.runs_of(arch)
        cell = next((cell for cell in comparison.cells if cell.arch == arch), None)
        facts = runs[0].info if runs else cell.to_dict() if cell else {}
        model, n, active = facts["model"], facts["n_params"], facts["n_active_params"]
        parts = [f"width {model['d_model']}"] if isinstance(model.get("d_model"), int) else []
        parts += [_plural(model["n_layers"], "layer")] if isinstance(model.get("n_layers"), int) else []
        parts.append(f"{n:,} parameters" + (f", of which {active:,} are active" if active != n else ""))
        described.append(f"{quote(comparison.label(arch))}{_cite(*papers_of(arch))} ({', '.join(parts)})")
    subject = "We compare these sequence models" if len(described) > 1 else "We measure one sequence model"
    return f"{subject}{size}: {and_list(described)}."


def _training(comparison: Comparison, quote: Quote) -> str:
    return " ".join(
        [*_data(comparison, quote), *_budget(comparison), *_optimizer(comparison, quote), *_rates(comparison, quote)]
    )


def _data(comparison: Comparison, quote: Quote) -> Iterator[str]:
    first, corpus = comparison.runs[0].info, comparison.corpus or {}
    objective = (first.get("objective") or {}).get("kind", "next_token")
    does = "to predict the next token of" if objective == "next_token" else f"by the objective {quote(objective)} from"
    tokenizer = (corpus.get("tokenizer") or {}).get("name")
    how = f", tokenized as {quote(tokenizer)}" if tokenizer else ""
    if corpus.get("made"):
        made_by = f"(SHA-256 of what they are made by: {quote(corpus['digest'][:16])})"
        yield f"They were trained on the task {quote(corpus['name'])}: {corpus['made']} {made_by}."
        return
    yield f"They were trained {does} {quote(corpus['name'])}{how}."
    yield (
        f"Of {corpus['n_documents']:,} documents {corpus['n_val_documents']:,} were held out: "
        f"{count(corpus['train_bytes'])}B for training and {count(corpus['val_bytes'])}B to judge by (SHA-256 of the "
        f"data: {quote(corpus['digest'][:16])})."
    )


def _budget(comparison: Comparison) -> Iterator[str]:
    done = [run for run in comparison.runs if run.status == "done"]
    if not done:
        return
    shapes = sorted({(run.seq_len, run.info["config"]["train"]["batch_size"]) for run in done})
    batch = and_list([f"{_plural(size, 'sequence')} of {length:,} tokens" for length, size in shapes])
    steps, tokens = ([run.result[key] for run in done] for key in ("steps", "tokens"))
    ratio = [run.result["tokens"] / run.info["n_params"] for run in done]
    each = " (by trained length)" if len(shapes) > 1 else ""
    equal = "" if comparison.equal == "tokens" else f", with as many {comparison.equal} for all"
    yield (
        f"A run took {_span(steps)} steps of {batch}{each}, {_span(tokens)} tokens in all{equal}: "
        f"{_span([round(value, 2) for value in ratio])} tokens per parameter."
    )
    if all(run.info["config"]["train"].get("carry") for run in done):
        yield "A sequence went on from the state that the one before it in the text had left, without its gradient."


def _span(values: Sequence[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def _optimizer(comparison: Comparison, quote: Quote) -> Iterator[str]:
    optim: Mapping[str, Any] = comparison.runs[0].info["config"]["optim"]
    parts = []
    if optim.get("betas"):
        parts.append(f"betas {and_list([f'{beta:g}' for beta in optim['betas']])}")
    parts += [f"epsilon {optim['eps']:g}"] if optim.get("eps") else []
    parts += [f"weight decay {optim['weight_decay']:g}"] if optim.get("weight_decay") is not None else []
    parts += [f"gradients clipped at a norm of {optim['clip']:g}"] if optim.get("clip") else []
    parts += [f"a warm-up of {_percent(optim['warmup'])}"] if optim.get("warmup") else []
    if schedule := optim.get("schedule"):
        cosine = schedule == "cosine"
        end = f" down to {_percent(optim['min_lr_ratio'])} of the peak" if cosine and optim.get("min_lr_ratio") else ""
        parts.append(f"a {quote(schedule)} schedule{_cite('loshchilov2017sgdr') if cosine else ''}{end}")
    precisions = {run.info["provenance"].get("precision") for run in comparison.runs}
    arithmetic = and_list(sorted(_ARITHMETIC[name] for name in precisions if name in _ARITHMETIC))
    yield f"We used AdamW{_cite('loshchilov2019adamw')} with {and_list(parts)}" + (
        f", {arithmetic}." if arithmetic else "."
    )


def _rates(comparison: Comparison, quote: Quote) -> Iterator[str]:
    """Peak rates, and how they were found."""
    of: dict[float, list[str]] = {}
    for arch in comparison.archs:
        for run in comparison.runs_of(arch)[:1]:
            if run.learning_rate is not None:
                of.setdefault(run.learning_rate, []).append(quote(comparison.label(arch)))
    if not of:
        return
    yield f"Peak learning rates: {', '.join(f'{rate:g} ({and_list(names)})' for rate, names in of.items())}."
    if comparison.info.get("tuning"):
        lengths = comparison.trained_lengths
        at = f", with sequences of {lengths[0]:,} tokens" if len(lengths) > 1 else ""
        yield f"{choice_of_rates(comparison)} The search is successive halving{_cite('jamieson2016halving')}{at}."
    elif (comparison.info.get("config", {}).get("optim") or {}).get("lr") is None:
        yield "They are those of the presets, found at 300,000 parameters in 150 steps of 2,048 tokens."


def _quality(comparison: Comparison, checks: Sequence[Check], quote: Quote) -> str:
    """Seeds, score, intervals."""
    seeds = sorted({run.seed for run in comparison.runs})
    score = comparison.score
    one = len(seeds) == 1
    same = any(check.name == "data and its order" and check.equal for check in checks)
    far = "" if comparison.equal == "tokens" else ", as far as they came"
    order = f"the order of the data, which is a function of seed and step alone{_cite('salmon2011philox')}"
    sentences = [
        f"{_plural(len(seeds), 'seed')} ({', '.join(map(str, seeds))}) set{'s' if one else ''} weights and {order}"
        + (f": all models read the same tokens in the same order{far}." if same else ".")
    ]
    read = {run.result.get("val_bytes") for run in comparison.runs} - {None}
    where = f", read on {read.pop():,} bytes" if comparison.predicts_text and len(read) == 1 else ""
    sentences.append(f"Quality is {quote(score.words)}{where}.")
    if not one:
        sentences.append(
            f"Differences to {quote(comparison.label(comparison.baseline))} are paired by seed, with 95 % intervals of "
            "Student's t; one counts as shown where its p-value is below 0.05 after Holm's correction over the models "
            f"at a length{_cite('holm1979simple')}."
        )
    return " ".join(sentences)


def _speed(comparison: Comparison) -> str:
    settings = comparison.cells[0].settings
    lengths = and_list([f"{length:,}" for length in sorted({cell.context_len for cell in comparison.cells})])
    rounds = max(len({cell.repeat for cell in comparison.processes}), 1)
    phases = ", ".join(dict.fromkeys(cell.phase.replace("_", " ") for cell in comparison.ordered_cells))
    over = f", over {rounds} processes in rounds of all models" if rounds > 1 else ""
    limit = f" with at most {format_bytes(settings['memory_limit'])} of memory" if settings["memory_limit"] else ""
    return (
        f"Speed ({phases}) and memory were measured at {lengths} tokens of context, each model and length in a process "
        f"of its own{limit}, as medians of repeats in {settings['time_box']:g} s after a warm-up{over}. "
        f"{batches(comparison)}"
    ).strip()


def _machine(comparison: Comparison, quote: Quote) -> str:
    """Where it ran, with which versions and which code."""
    origins = [run.info["provenance"] for run in comparison.runs] + [cell.provenance for cell in comparison.cells]

    def all_of(key: str) -> str:
        length = 12 if key == "git_commit" else None
        values = dict.fromkeys(str(origin[key])[:length] for origin in origins if origin.get(key) is not None)
        return and_list([*map(quote, values)])

    threads = {f"{run.info['provenance'].get('threads')} in training" for run in comparison.runs}
    threads |= {f"{cell.settings.get('threads')} in measurements" for cell in comparison.cells}
    parts = [all_of("cpu"), "" if all_of("device") == "cpu" else all_of("device")]
    parts.append(f"threads: {and_list(sorted(threads))}")
    versions = [f"PyTorch {all_of('torch')}{_cite('paszke2019pytorch')}" if all_of("torch") else ""]
    versions += [f"Python {all_of('python')}" if all_of("python") else "", all_of("platform")]
    dirty = any(origin.get("git_dirty") for origin in origins)
    commit = f" Code: crossover at commit {all_of('git_commit')}" if all_of("git_commit") else ""
    changed = " with uncommitted changes" if dirty else ""
    ran = ", ".join(filter(None, [*parts, *versions]))
    return f"Machine: {ran}.{commit}{changed}{'.' if commit else ''}"
