"""Small files of JSON and TOML: written by rename, read with errors that name the file. Importing it is cheap.

It stands below the four folders, which all may import it. Our JSON objects carry "format", a number that grows when
older versions could no longer read them; without one they are of format 1. Lines of a file end at "\\n" and nowhere
else: what Python's `splitlines` takes for an end may stand in a text.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import tomllib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "FORMAT",
    "FormatError",
    "JsonLines",
    "cache_home",
    "check_format",
    "decode",
    "give_usual_mode",
    "naming",
    "parse_json",
    "parse_toml",
    "read_json",
    "read_json_lines",
    "read_record",
    "read_toml",
    "remove_drafts",
    "scan_json_lines",
    "sync",
    "write_json",
    "write_text",
]

FORMAT = 1
"""The newest format that this version reads, and the one that it writes."""

_MAX_DIGITS = 300
"""Digits of an integer: more may have no finite float."""
_MAX_DEPTH = 100
"""Tables and lists inside each other: what walks over values recursively has room to spare."""


def cache_home() -> Path:
    """The user's folder for what can be made again: $CROSSOVER_CACHE, else crossover in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("CROSSOVER_CACHE"):
        return Path(chosen)
    caches = os.environ.get("XDG_CACHE_HOME", "")
    return Path(caches if os.path.isabs(caches) else "~/.cache") / "crossover"


class FormatError(ValueError):
    """A file was written by a newer version."""


def check_format(values: Mapping[str, Any], path: Path | str) -> None:
    """Raises FormatError if a JSON object of a file is of a newer format than FORMAT."""
    found = values.get("format", 1)
    if type(found) is not int or found < 1:
        raise ValueError(f'{path} is damaged: "format" is {_short(found)}')
    if found > FORMAT:
        raise FormatError(f"{path} has format {found}, newer than the {FORMAT} that is read here: update crossover")


def sync(path: Path) -> None:
    """Flushes a file, or the list of files of a folder, to the disk.

    What is renamed without it can be empty after a power failure, under its new name.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Writes one file by rename, so that a reader finds the old file or the new one and never a part.

    A pipe or a device, such as /dev/stdout, is written into: a file must not take its place.

    Raises:
        OSError: naming the file, if it cannot be written; the old one is as it was.
    """
    if path.exists() and not path.is_file():
        with naming(path):
            path.write_text(text, encoding="utf-8")
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError of writing name the file that was to be written, which one of a full disk does not."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def give_usual_mode(path: Path) -> None:
    """Gives a file the mode of any new one, by the umask: some libraries write files that only their owner reads."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    draft.touch()
    path.chmod(draft.stat().st_mode)
    draft.unlink()


def remove_drafts(folder: Path) -> None:
    """Removes what writers that were killed have left in a folder; those of processes that live are left alone."""
    for draft in folder.glob(".*.tmp"):
        writer = draft.name.split(".")[-2]
        if writer.isdecimal() and not _is_another_process(int(writer)):
            draft.unlink(missing_ok=True)


def _is_another_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # of another user, or no number of a process
        pass
    return pid != os.getpid()


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object with its format, as `write_text` does."""
    value = {"format": FORMAT, **value}
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def decode(raw: bytes, where: Path | str) -> str:
    """UTF-8, with or without a byte order mark, as text.

    Raises:
        ValueError: if it is not UTF-8, with the first byte that is not.
    """
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} is not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start})") from None


def parse_json(raw: bytes | str, where: Path | str, *, exact: bool = True) -> Any:
    """The value of a JSON text.

    Args:
        raw: the text, or its bytes.
        where: names it in messages: a file, or a line of one.
        exact: refuse what is no JSON by the standard or has no exact value: NaN, infinities, integers of more than
            300 digits and half of a surrogate pair. Otherwise such numbers are what a float makes of them.

    Raises:
        ValueError: with the reason in one line: it is no JSON, names a key twice, or is nested too deeply.
    """
    text = decode(raw, where) if isinstance(raw, bytes) else raw
    numbers: dict[str, Any] = (
        {"parse_constant": _no_constant, "parse_float": _finite, "parse_int": _integer}
        if exact
        else {"parse_int": _some_number}
    )
    try:
        value = json.loads(text, object_pairs_hook=_object, **numbers)
    except json.JSONDecodeError as error:
        place = f" in line {error.lineno}" if "\n" in text.strip("\n") else ""
        raise ValueError(f"{where} is not JSON ({error.msg}{place})") from None
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # of the functions below
        raise ValueError(f"{where} is not JSON that can be read ({error})") from None
    if text.count("[") + text.count("{") > _MAX_DEPTH and _depth(value) > _MAX_DEPTH:
        raise _too_deep(where)
    if exact and "\\u" in text and not _is_unicode(value):
        raise ValueError(f"{where} is not JSON that can be read (it holds half of a surrogate pair)")
    return value


def parse_toml(text: str, where: Path | str) -> dict[str, Any]:
    """The table of a TOML text.

    Raises:
        ValueError: with the reason in one line.
    """
    try:
        table = tomllib.loads(text)
    except RecursionError:
        raise _too_deep(where) from None
    except ValueError as error:  # a TOMLDecodeError, or an integer of thousands of digits
        raise ValueError(f"{where} is not valid TOML: {error}") from None
    if _depth(table) > _MAX_DEPTH:
        raise _too_deep(where)
    return table


def read_toml(path: Path) -> dict[str, Any]:
    """Reads a TOML file.

    Raises:
        OSError: if it cannot be read.
        ValueError: naming the file, if it is not TOML.
    """
    return parse_toml(decode(path.read_bytes(), path), path)


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, and leaves its format out.

    Raises:
        OSError: if the file cannot be read.
        ValueError: naming the file, if it is not one.
        FormatError: if a newer version wrote it.
    """
    value = parse_json(path.read_bytes(), path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {_kind(value)} where a JSON object was expected")
    check_format(value, path)
    return {key: entry for key, entry in value.items() if key != "format"}


@dataclass(frozen=True, kw_only=True)
class JsonLines:
    """What is whole in a file of JSON objects, one in each line, and what is lost."""

    records: list[dict[str, Any]]
    lost: list[int]
    """Numbers of the lines, from 1, that are no JSON object."""
    is_torn: bool
    """Whether the last line has no end, as a killed writer may leave it; it is not among the lost ones."""


def scan_json_lines(path: Path) -> JsonLines:
    """Reads one JSON object per line, without its format; none where there is no file. Empty lines are nothing.

    Raises:
        OSError: if the file cannot be read.
        FormatError: if a newer version wrote a line.
    """
    try:
        *lines, last = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except FileNotFoundError:
        return JsonLines(records=[], lost=[], is_torn=False)
    records, lost = [], []
    whole = read_record(last, path)
    for number, line in enumerate([*lines, last] if whole else lines, 1):
        record = read_record(line, path)
        if record is not None:
            records.append(record)
        elif line.strip():
            lost.append(number)
    return JsonLines(records=records, lost=lost, is_torn=bool(last.strip()) and whole is None)


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of `scan_json_lines`, after one warning if lines are lost. A torn last line is passed over."""
    found = scan_json_lines(path)
    if found.lost:
        n, first = len(found.lost), found.lost[0]
        lines = f"line {first} is" if n == 1 else f"{n} lines are (the first is line {first})"
        warnings.warn(f"{path}: {lines} damaged and left out", RuntimeWarning, stacklevel=2)
    return found.records


def read_record(line: bytes, where: Path | str) -> dict[str, Any] | None:
    """The JSON object of one line of a file, without its format; None where it is none, or damaged.

    Raises:
        FormatError: if a newer version wrote it.
    """
    try:
        value = parse_json(line, where)
        if not isinstance(value, dict):
            return None
        check_format(value, where)
    except FormatError:
        raise
    except ValueError:
        return None
    return {key: entry for key, entry in value.items() if key != "format"}


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names the key {_short(twice)} twice")
    return value


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"the number {_short(digits)} is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"the number {_short(digits)} is too large")
    return int(digits)


def _some_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _depth(value: Any) -> int:
    """Tables and lists inside each other."""
    depth, layer = 0, [value]
    while layer := [entry for entry in layer if isinstance(entry, dict | list)]:
        depth += 1
        layer = [inner for entry in layer for inner in (entry.values() if isinstance(entry, dict) else entry)]
    return depth


def _too_deep(where: Path | str) -> ValueError:
    return ValueError(f"{where} cannot be read: it is nested too deeply")


def _is_unicode(value: Any) -> bool:
    """Whether all text in a value has a UTF-8 form: JSON can hold half of a surrogate pair, which has none."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    return (
        "nothing"
        if value is None
        else {"str": "text", "bool": "a truth value"}.get(type(value).__name__)
        or ("a list" if isinstance(value, list) else "a number")
    )


def _short(value: Any) -> str:
    """A value for a message, at most some thirty characters."""
    text = repr(value)
    return text if len(text) <= 32 else f"{text[:28]} ..."
