"""Rows of named columns, whatever the file."""

import bz2
import csv
import gzip
import json
import lzma
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from crossover.train.data import DataError
from crossover.train.data.records import kind_of, read_rows

pytestmark = pytest.mark.quick

ROWS: list[dict[str, Any]] = [
    {"text": "2020-01-01", "n": 1, "other": [1, 2]},
    {"text": "1e5", "n": None, "other": []},
    {"text": 'a "quoted", text\nof two lines\u2028é', "n": 2, "other": [3]},
]
TEXTS = [(row["text"],) for row in ROWS]


def write(path: Path) -> Path:
    """The rows in the form that the file's name asks for."""
    kind = kind_of(path)
    if kind == ".parquet":
        table = pa.table({name: [row[name] for row in ROWS] for name in ROWS[0]})
        plain = path.with_name("plain")
        pyarrow.parquet.write_table(table, plain)
        raw = plain.read_bytes()
    elif kind in (".csv", ".tsv"):
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["n", "text", "other"], delimiter="," if kind == ".csv" else "\t")
            writer.writeheader()
            writer.writerows(ROWS)
        raw = path.read_bytes()
    elif kind == ".json":
        raw = json.dumps(ROWS, indent=1).encode()
    else:
        raw = "".join(json.dumps(row, ensure_ascii=False) + "\n\n" for row in ROWS).encode()
    match path.suffix:
        case ".gz":
            raw = gzip.compress(raw)
        case ".xz":
            raw = lzma.compress(raw)
        case ".bz2":
            raw = bz2.compress(raw)
        case ".zst":
            with pa.output_stream(str(path), compression="zstd") as file:
                file.write(raw)
            return path
    path.write_bytes(raw)
    return path


@pytest.mark.parametrize("compressed", ["", ".gz", ".xz", ".bz2", ".zst"])
@pytest.mark.parametrize("kind", [".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet"])
def test_a_column_is_read_as_the_strings_that_were_written(kind: str, compressed: str, tmp_path: Path) -> None:
    path = write(tmp_path / f"rows{kind}{compressed}")
    assert read_rows(path, ["text"], option="--data.column") == TEXTS


def test_a_byte_order_mark_and_odd_numbers_beside_the_text_are_no_part_of_it(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(f'{{"text": "x", "n": NaN, "m": {"9" * 5000}, "o": 1e400, "p": "\\ud800"}}\n', encoding="utf-8-sig")
    assert read_rows(path, ["text"], option="") == [("x",)]


def test_columns_come_in_the_order_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": "1", "b": "2"}\n{"b": "4", "a": "3"}\n')
    assert read_rows(path, ["b", "a"], option="") == [("2", "1"), ("4", "3")]


def test_a_parquet_file_with_an_odd_column_beside_is_read(tmp_path: Path) -> None:
    odd = pa.array([b"\xff", None], type=pa.binary())
    pyarrow.parquet.write_table(pa.table({"text": ["x", "y"], "odd": odd}), tmp_path / "a.parquet")
    assert read_rows(tmp_path / "a.parquet", ["text"], option="") == [("x",), ("y",)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"text\nx,y\n", r"line 2 of .*a\.csv has more fields than the header"),
        ("a.csv", b'text\n"x\n', r"line \d of .*a\.csv is not CSV"),
        ("a.csv", b"title\nx\n", r"a\.csv has no column 'text' \(--data\.column\); known are title"),
        ("a.jsonl", b'{"text": "x"}\n\n7\n', r"line 3 of .*a\.jsonl is not an object with named columns"),
        ("a.json", b'[{"text": "x"},', r"a\.json is not JSON \(Expecting value\)"),
        ("a.json", b'[{"text": "x"}, 3]', r"row 2 of .*a\.json is not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": 1}\n', r"1 of 2 rows without text in column 'text', the first is row 2"),
        ("a.csv", b"text,n,text\na,1,b\n", r"a\.csv names a column twice in its header \(text, n, text\)"),
        ("a.json", b"[" * 100_000, r"a\.json cannot be read: it is nested too deeply"),
        ("a.jsonl", b'{"text": ' + b"1" * 5000 + b"}", r"1 of 1 rows without text in column 'text'"),
        (
            "a.jsonl",
            b'{"text": "x"}\n{"text": "y", "text": "z"}',
            r"line 2 of .*a\.jsonl .* the key 'text' twice",
        ),
        ("a.jsonl", b'{"texts": "x"}', r"a\.jsonl has no column 'text' \(--data\.column\); did you mean 'texts'\?"),
        ("a.jsonl", b'{"text": "\\ud800"}', r"1 of 1 rows without text in column 'text'"),
        ("a.jsonl.gz", b"not compressed", r"cannot read .*a\.jsonl\.gz \(Not a gzipped file"),
        ("a.jsonl.xz", b"not compressed", r"cannot read .*a\.jsonl\.xz \(Input format not supported"),
        ("a.jsonl.zst", b"not compressed", r"cannot read .*a\.jsonl\.zst \("),
        ("a.parquet", b"not at all", r"cannot read .*a\.parquet as Parquet"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message) as error:
        read_rows(tmp_path / name, ["text"], option="--data.column")
    assert "\n" not in str(error.value)
