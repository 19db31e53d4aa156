"""What differs between comparisons, by their files: settings, rates, data, code, machine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

from ..harness.format import DASH
from .results import Comparison
from .words import and_list

__all__ = ["data_apart", "differences", "machine_apart"]

_NOT_SETTINGS = ("out", "fresh", "data cache", "objective options", "baseline")
"""What a comparison is told and its numbers do not depend on."""

_PROVENANCE = {
    "git_commit": "commit",
    "git_dirty": "uncommitted changes",
    "cpu": "processor",
    "device": "device",
    "threads": "threads",
    "hostname_hash": "machine, as a hash of its name",
    "platform": "system",
    "python": "Python",
    "torch": "PyTorch",
    "cuda": "CUDA",
    "imports": "imports",
    "plugins": "plugins",
}
_MEASURED = " of the measurements"
_MACHINE = ("processor", "device", "threads", "machine, as a hash of its name", "system", "Python", "PyTorch", "CUDA")
"""What speeds depend on beside the models and the code."""


def differences(comparisons: Sequence[Comparison]) -> dict[str, list[str]]:
    """What the files of comparisons record differently, by name: how it is in each, in their order."""
    shared = set.intersection(*({*comparison.archs} for comparison in comparisons))
    all_facts = [_facts(comparison, _settings(comparison, comparisons), shared) for comparison in comparisons]
    names = dict.fromkeys(name for facts in all_facts for name in facts)
    found = {name: [_shown(facts.get(name)) for facts in all_facts] for name in names}
    different = {name: values for name, values in found.items() if len({*values}) > 1}
    return {
        name: values
        for name, values in different.items()
        if not (name.endswith(_MEASURED) and different.get(name.removesuffix(_MEASURED)) == values)
    }


def data_apart(comparisons: Sequence[Comparison], names: Sequence[str]) -> str:
    """Says why quality cannot be compared between comparisons; empty where it can, or where there is none."""
    trained = [(name, comparison) for name, comparison in zip(names, comparisons, strict=True) if comparison.runs]
    if len(trained) < len(comparisons):
        return ""
    scores = [(name, comparison.score.words) for name, comparison in trained]
    if len({words for _, words in scores}) > 1:
        return f"Quality is not compared: its scores are {_each(scores)}."
    digests = [(name, _documents(comparison)[:12]) for name, comparison in trained]
    if len({digest for _, digest in digests}) > 1:
        return (
            f"Quality is not compared: the data differ (digests {_each(digests)}), and of two texts one is easier to "
            "predict, whatever the model."
        )
    return ""


def machine_apart(different: Mapping[str, Sequence[str]]) -> str:
    """Warns of speeds that were measured on unlike machines or with unlike software; empty where they were not."""
    names = [name for name in _MACHINE if name in different or name + _MEASURED in different]
    if not names:
        return ""
    return (
        f"Speeds were measured under unlike conditions ({and_list(names)}): a speed in one folder says nothing of that "
        "in another, and a verdict that changed may have changed with the machine. Compare the ratios to the baseline."
    )


def _each(values: Iterable[tuple[str, str]]) -> str:
    return and_list([f"{value} in {name}" for name, value in values])


def _documents(comparison: Comparison) -> str:
    """Digest of texts and split, which do not depend on the tokenizer; of all data in files of older versions."""
    corpus = comparison.corpus or {}
    return str(corpus.get("documents_digest") or corpus["digest"])


def _settings(comparison: Comparison, among: Sequence[Comparison]) -> Mapping[str, Any]:
    """Settings of the command; where a folder has none, of all of them those of the first run."""
    if all(other.info.get("config") for other in among):
        return comparison.info["config"]
    config = comparison.runs[0].info["config"] if comparison.runs else {}
    return {key: config[key] for key in ("data", "optim", "train") if key in config}


def _facts(comparison: Comparison, settings: Mapping[str, Any], archs: Set[str]) -> dict[str, Any]:
    facts = {name: value for name, value in _flat(settings).items() if name not in _NOT_SETTINGS}
    if comparison.cells:
        facts |= {f"measure {name}": value for name, value in _flat(comparison.cells[0].settings).items()}
    for name in ("device", "threads"):  # as they were resolved, below
        facts.pop(name, None)
        facts.pop(f"measure {name}", None)
    done = next((run for run in comparison.runs if run.status == "done"), None)
    if done is not None:
        facts["tokens of a run"] = f"{done.result['tokens']:,}"
        facts["held-out bytes read"] = done.result.get("val_bytes")
    for arch in (arch for arch in comparison.archs if arch in archs):
        for run in comparison.runs_of(arch)[:1]:
            facts[f"parameters of {comparison.label(arch)}"] = f"{run.info['n_params']:,}"
            facts[f"learning rate of {comparison.label(arch)}"] = run.learning_rate
    if corpus := comparison.corpus:
        facts |= {"data": corpus["name"], "digest of the data": str(corpus["digest"])[:12]}
    facts |= _origin([run.info["provenance"] for run in comparison.runs], "")
    return facts | _origin(
        [{**cell.provenance, "threads": cell.settings.get("threads")} for cell in comparison.cells], _MEASURED
    )


def _origin(provenances: Sequence[Mapping[str, Any]], of_what: str) -> dict[str, Any]:
    """Code, machine and versions that made something; several where it was not made at once."""
    if not provenances:
        return {}
    found = {}
    for key, words in _PROVENANCE.items():
        values = dict.fromkeys(_shown(provenance.get(key)) for provenance in provenances)
        found[words + of_what] = [value[:12] if key == "git_commit" else value for value in values]
    return found


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings with names of words."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = key.replace("_", " ")
        inner = {f"{name} {rest}": entry for rest, entry in _flat(value).items()} if isinstance(value, Mapping) else {}
        found |= inner or ({} if isinstance(value, Mapping) else {name: value})
    return found


def _shown(value: Any) -> str:
    if value is None or value == []:
        return DASH
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
