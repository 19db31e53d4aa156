"""Small files of a run: written by rename, read with errors that name the file. Importing it is cheap.

Our JSON objects carry "format", a number that grows when older versions could no longer read them; without one they are
of format 1.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "FormatError", "check_format", "read_json", "read_json_lines", "sync", "write_json", "write_text"]

FORMAT = 1
"""The newest format that this version reads, and the one that it writes."""


class FormatError(ValueError):
    """A file was written by a newer version."""


def check_format(values: Mapping[str, Any], path: Path) -> None:
    """Raises FormatError if a JSON object of a file is of a newer format than FORMAT."""
    found = values.get("format", 1)
    if not isinstance(found, int) or found > FORMAT:
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
    """Writes one file by rename, so that a reader finds the old file or the new one and never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        sync(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object with its format, as `write_text` does."""
    value = {"format": FORMAT, **value}
    write_text(path, json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object, and leaves its format out.

    Raises:
        ValueError: naming the file, if it is not one.
        FormatError: if a newer version wrote it.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not valid JSON ({error.msg} in line {error.lineno})") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__} where a JSON object was expected")
    check_format(value, path)
    return {key: entry for key, entry in value.items() if key != "format"}


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Reads one JSON object per line; none where there is no file.

    A torn last line, which a killed writer may leave, is passed over.

    Raises:
        ValueError: if any other line is not JSON.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            if number < len(lines):
                raise ValueError(f"{path}, line {number}, is not valid JSON ({error.msg})") from error
    return records
