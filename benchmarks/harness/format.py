"""Numbers as tables, figures and sentences show them. A dash stands for what was not measured."""

import re
import unicodedata

__all__ = ["DASH", "count", "format_bytes", "number", "parse_bytes", "printable", "whole"]

DASH = "-"


def count(value: float | None, *, gap: str = " ") -> str:
    """Writes a count with three digits in powers of 1000: 1.02 M, 512 k, 87. `gap` stands before the unit."""
    if value is None:
        return DASH
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:.3g}{gap}{unit}"
    return f"{value:.3g}"


def number(value: float | None) -> str:
    """Writes a measured number with three digits, a large one with all of its whole part: 0.0123, 4.56, 12,345."""
    if value is None:
        return DASH
    return f"{value:.3g}" if abs(value) < 999.5 else whole(value)


def whole(value: float | None) -> str:
    """Writes a number rounded to a whole one: 12,345."""
    return DASH if value is None else f"{value:,.0f}"


def format_bytes(n_bytes: float | None) -> str:
    """Writes a size with three digits in powers of 1024: 3 GiB, 1.5 MiB, 132 KiB."""
    if n_bytes is None:
        return DASH
    size, units = float(n_bytes), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while abs(size) >= 999.5 and unit != "TiB":
        size, unit = size / 1024, next(units)
    return f"{size:.3g} {unit}"


_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Reads a size such as 3GiB, 512MiB or 2e9 (KiB, MiB, GiB are powers of 1024; kB, MB, GB of 1000)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmgt]i?|)b?", text.strip().lower())
    if match is None or float(match[1]) > 1e18:
        raise ValueError(f"'{text}' is not a size in bytes; write it like 3GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


def printable(text: str) -> str:
    """Shows what is no text, or turns its direction, as the replacement character: anybody's files may hold names."""
    bad = {c for c in {*text} - {"\n", "\t"} if unicodedata.category(c) in ("Cc", "Cs") or c in _TURNING}
    return "".join("\N{REPLACEMENT CHARACTER}" if c in bad else c for c in text) if bad else text


_TURNING = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
