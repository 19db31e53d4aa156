"""Rows of named columns: JSON lines, JSON arrays, CSV, TSV and Parquet, also compressed, and sets of the hub.

Only the columns asked for are read, and each as the string that it is: nothing is guessed from what others hold, so
"2020-01-01" stays as it was written. A file ends in .jsonl, .ndjson, .json, .csv, .tsv or .parquet, and then perhaps in
.gz, .zst, .xz or .bz2.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
import os
import sys
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import IO, Any, cast

from ...files import decode, parse_json
from ...options import nearest
from .cache import DataError

__all__ = ["COMPRESSED", "ROW_SUFFIXES", "kind_of", "open_binary", "read_bytes", "read_hub", "read_rows", "read_text"]

ROW_SUFFIXES = frozenset({".jsonl", ".ndjson", ".csv", ".tsv", ".parquet"})
"""Files that hold rows wherever they are found; .json does where it is the one file given."""

COMPRESSED = frozenset({".gz", ".zst", ".xz", ".bz2"})

_UNREADABLE = (OSError, EOFError, lzma.LZMAError, zlib.error)

Row = tuple[str, ...]


def kind_of(path: Path) -> str:
    """The suffix that says what a file holds, in lower case: that of a.jsonl.gz is .jsonl."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSED:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def open_binary(path: Path) -> IO[bytes]:
    """Opens a file for reading its bytes, decompressed where its last suffix says that it is compressed.

    Raises:
        OSError: if it cannot be opened.
        DataError: if it is a pipe or a device, which can wait for ever, or be without end, and serve one reader only.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise DataError(f"{path} is a pipe or a device: write what comes from it to a file and give that with --data")
    match path.suffix.lower():
        case ".gz":
            return cast("IO[bytes]", gzip.open(path))
        case ".xz":
            return lzma.open(path)
        case ".bz2":
            return cast("IO[bytes]", bz2.open(path))
        case ".zst":
            import pyarrow  # which brings Zstandard along; Python has it from 3.14 on

            return pyarrow.input_stream(str(path), compression="zstd")
        case _:
            return path.open("rb")


def read_bytes(path: Path) -> bytes:
    """The content of a file, decompressed.

    Raises:
        DataError: if it cannot be read.
    """
    try:
        with open_binary(path) as file:
            return file.read()
    except _UNREADABLE as error:
        reason = getattr(error, "strerror", None) or reason_of(error)
        raise DataError(f"cannot read {path} ({reason}): give a readable file or folder with --data") from error


def read_text(raw: bytes, path: Path) -> str:
    """The text of a file without its byte order mark.

    Raises:
        DataError: if it is not UTF-8.
    """
    try:
        return decode(raw, path)
    except ValueError as error:
        raise DataError(f"{error}: convert it, for example with iconv -t utf-8, before giving it to --data") from None


def read_rows(path: Path, columns: Sequence[str], *, option: str) -> list[Row]:
    """The wanted columns of a file, row by row.

    Args:
        path: a file of rows.
        columns: names of the columns.
        option: option with which a user chooses columns, for the messages.

    Raises:
        DataError: if the file cannot be read, lacks a column, or has a row in which one of them is no text.
    """
    kind = kind_of(path)
    if kind == ".parquet":
        return _texts(_parquet(path, columns, option), columns, str(path), option)
    raw = read_bytes(path)
    if not raw.strip():
        raise DataError(f"{path} is empty: give a file with rows to --data")
    text = read_text(raw, path)
    if kind in (".csv", ".tsv"):
        rows = _delimited(path, text, "," if kind == ".csv" else "\t")
    elif text.lstrip().startswith("["):
        rows = _json_array(path, text)
    else:
        rows = _json_lines(path, text)
    return _texts(list(rows), columns, str(path), option)


def read_hub(source: str, columns: Sequence[str], *, option: str, cache: Path, progress: bool = False) -> list[Row]:
    """The wanted columns of the train split of "hf:NAME[:CONFIG]", read by `datasets`.

    Raises:
        DataError: if the set cannot be loaded, lacks a column, or has a row in which one of them is no text.
    """
    name, _, config = source.removeprefix("hf:").partition(":")
    if not name:
        raise DataError(f"--data {source} names no data set: write hf:NAME or hf:NAME:CONFIG")
    datasets = _import_datasets(progress)
    try:
        table = datasets.load_dataset(name, config or None, split="train", cache_dir=str(cache / "datasets"))
    except (datasets.exceptions.DatasetsError, OSError, ValueError) as error:
        raise DataError(
            f"cannot load the hub's data set {name} ({reason_of(error)}): "
            f"check the name and the network, or give a local file or folder with --data"
        ) from error
    _check_columns(table.column_names, columns, source, option)
    values = [table[column][:] for column in columns]
    return _texts([dict(zip(columns, row, strict=True)) for row in zip(*values, strict=True)], columns, source, option)


def reason_of(error: BaseException) -> str:
    """The first line of what went wrong; `datasets` hides it behind a general error."""
    lines = str(error.__cause__ or error).strip().splitlines()
    return lines[0][:200].rstrip(".") if lines else type(error).__name__


def _texts(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], source: str, option: str) -> list[Row]:
    """The columns as text, after checking that every row has it."""
    if not rows:
        raise DataError(f"{source} is empty: give a file with rows to --data")
    known = list(dict.fromkeys(key for row in rows for key in row))
    _check_columns(known, columns, source, option)
    for column in columns:
        bad = [number for number, row in enumerate(rows, 1) if not _is_text(row.get(column))]
        if bad:
            raise DataError(
                f"{source} has {len(bad)} of {len(rows)} rows without text in column '{column}', the first is row "
                f"{bad[0]}: remove those rows or choose another column with {option}"
            )
    return [tuple(row[column] for column in columns) for row in rows]


def _is_text(value: Any) -> bool:
    """Whether a value is text that has a UTF-8 form: JSON can hold half of a surrogate pair, which has none."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _check_columns(known: Sequence[str], columns: Sequence[str], source: str, option: str) -> None:
    for column in columns:
        if column not in known:
            raise DataError(f"{source} has no column {column!r} ({option}){nearest(column, known)}")


def _json_lines(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would cut inside strings, at U+2028 and others
        if line.strip():
            yield _object(_json(line, f"line {number} of {path}"), f"line {number} of {path}")


def _json_array(path: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, value in enumerate(_json(text, path), 1):
        yield _object(value, f"row {number} of {path}")


def _json(text: str, where: Path | str) -> Any:
    """A JSON value of which text alone is wanted: what numbers stand beside it does not matter."""
    try:
        return parse_json(text, where, exact=False)
    except ValueError as error:
        raise DataError(f"{error}: give another file with --data") from None


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(f'{where} is not an object with named columns: write {{"COLUMN": "..."}} in each row')
    return value


def _delimited(path: Path, text: str, delimiter: str) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # a field may hold a whole document
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = list(reader.fieldnames or ())
        if len(set(header)) < len(header):
            raise DataError(f"{path} names a column twice in its header ({', '.join(header)}): rename one of them")
        for row in reader:
            if None in row:
                raise DataError(
                    f"line {reader.line_num} of {path} has more fields than the header: quote fields that hold "
                    f"{delimiter!r}"
                )
            yield row
    except csv.Error as error:
        raise DataError(
            f"line {reader.line_num} of {path} is not CSV ({error}): give another file with --data"
        ) from None


def _parquet(path: Path, columns: Sequence[str], option: str) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with open_binary(path) as file:
            stream: Any = file if path.suffix.lower() == ".parquet" else io.BytesIO(file.read())
            table = pyarrow.parquet.ParquetFile(stream)
            _check_columns(table.schema_arrow.names, columns, str(path), option)
            return table.read(columns=list(columns)).to_pylist()
    except DataError:
        raise
    except (*_UNREADABLE, ValueError, pyarrow.ArrowException) as error:  # ValueError: text that is not UTF-8
        raise DataError(f"cannot read {path} as Parquet ({reason_of(error)}): give another file with --data") from error


def _import_datasets(progress: bool) -> ModuleType:
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    import datasets  # takes 1 to 2 s

    if progress and sys.stderr.isatty():
        datasets.enable_progress_bars()
    else:
        datasets.disable_progress_bars()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs is in the error that we raise
    return datasets
