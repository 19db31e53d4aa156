"""The papers that a report cites: of the architectures those in archs/references.bib, others in references.bib here."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from pathlib import Path

__all__ = ["entries", "papers_of"]

# Read as text: importing the architectures would load torch, which a report does without.
_FILES = (Path(__file__).parents[2] / "archs" / "references.bib", Path(__file__).with_name("references.bib"))
_ENTRY = re.compile(r"^@\w+\{(\w+),\n.*?^\}$", re.MULTILINE | re.DOTALL)
_PRESETS = re.compile(r"^  presets = \{(.*)\},\n", re.MULTILINE)


@functools.cache
def _table() -> dict[str, str]:
    """Entries of BibTeX by key."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in _FILES)
    return {match[1]: match[0] for match in _ENTRY.finditer(text)}


def papers_of(arch: str) -> list[str]:
    """Keys of the papers of an architecture; none of one that a module of the user's registered."""
    named = ((key, _PRESETS.search(entry)) for key, entry in _table().items())
    return [key for key, presets in named if presets and arch.split("-")[0] in presets[1].split()]


def entries(keys: Iterable[str]) -> str:
    """The entries of some keys as a BibTeX file, each once, in the order of the table."""
    wanted = {*keys}
    return "\n\n".join(_PRESETS.sub("", entry) for key, entry in _table().items() if key in wanted) + "\n"
