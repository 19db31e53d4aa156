import json
import os
import warnings
from pathlib import Path

import pytest
from crossover.files import read_json, read_json_lines, read_toml, remove_drafts, scan_json_lines, write_json
from hypothesis import given
from hypothesis import strategies as st

pytestmark = pytest.mark.quick

DEEP = 100_000


def test_a_reader_never_sees_half_a_json_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": object()})
    assert read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_on_the_disk_before_its_name_appears(tmp_path: Path, renamed: list[str]) -> None:
    write_json(tmp_path / "run.json", {"a": 1})
    assert renamed == ["run.json"]


def test_drafts_of_processes_that_are_gone_are_removed_and_no_others(tmp_path: Path) -> None:
    gone = [".run.json.4194309.tmp", f".result.json.{os.getpid()}.tmp"]
    kept = [f".run.json.{os.getppid()}.tmp", ".a.99999999999999999999.tmp", ".hidden.tmp", "run.json.4194309.tmp"]
    for name in gone + kept:
        (tmp_path / name).touch()
    remove_drafts(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "run.json").mkdir()
    with pytest.raises(IsADirectoryError):
        write_json(tmp_path / "run.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_no_file_takes_the_place_of_a_pipe(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_json(pipe, {"a": 1})
    assert b'"a": 1' in os.read(reader, 1000)
    os.close(reader)
    assert pipe.is_fifo()


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"\0\0\0", "is not JSON"),
        (b'{"a": 1} {"b": 2}', "is not JSON"),
        (b"[1]", "holds a list where a JSON object"),
        (b"7", "holds a number where a JSON object"),
        (b"null", "holds nothing where a JSON object"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1e400}', "'1e400' is too large"),
        (b'{"a": ' + b"9" * 5000 + b"}", "9 ...' is too large|9 ... is too large"),
        (b'{"a": 1, "b": 2, "a": 3}', "the key 'a' twice"),
        (b'{"a": "x\\ud83d"}', "half of a surrogate pair"),
        (b'{"a": "\xff"}', "is not UTF-8 (byte 0xff at offset 7)"),
        (b'{"a": ' + b"[" * DEEP + b"]" * DEEP + b"}", "nested too deeply"),
        (b'{"a": ' + b'{"a":' * 500 + b"1" + b"}" * 500 + b"}", "nested too deeply"),
        (b'{"format": 0}', '"format" is 0'),
        (b'{"format": "one"}', "\"format\" is 'one'"),
    ],
)
def test_what_is_no_json_object_is_refused_in_one_line_that_names_the_file(
    tmp_path: Path, raw: bytes, reason: str
) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=r"run\.json") as refused:
        read_json(path)
    message = str(refused.value)
    assert any(words in message for words in reason.split("|")), message
    assert "\n" not in message
    assert len(message) < 200 + len(str(path))


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        (b"a = " + b"[" * DEEP + b"]" * DEEP, "nested too deeply"),
        (b"a = " + b"[" * 300 + b"]" * 300, "nested too deeply"),
        (b"a = " + b"9" * 5000, "4300"),
        (b'a = "\xff"', "not UTF-8"),
        (b"a == 1", "is not valid TOML"),
    ],
)
def test_what_is_no_toml_is_refused_in_one_line_that_names_the_file(tmp_path: Path, raw: bytes, reason: str) -> None:
    path = tmp_path / "run.toml"
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=rf"run\.toml.*{reason}"):
        read_toml(path)


def test_a_byte_order_mark_is_no_part_of_a_file(tmp_path: Path) -> None:
    for name, read, text in (("a.json", read_json, '{"a": 1}'), ("a.toml", read_toml, "a = 1")):
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert read(tmp_path / name) == {"a": 1}
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n', encoding="utf-8-sig")
    assert read_json_lines(tmp_path / "a.jsonl") == [{"a": 1}]


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4), st.booleans())
def test_lines_end_at_line_feeds_alone(tmp_path_factory: pytest.TempPathFactory, texts: list[str], plain: bool) -> None:
    path = tmp_path_factory.getbasetemp() / "lines.jsonl"
    records = [{"text": text + "\u2028 \x85 \u2029 \x7f"} for text in texts]
    lines = [json.dumps(record, ensure_ascii=plain) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8", newline="")
    assert read_json_lines(path) == records


def test_whole_lines_are_read_and_lost_ones_said_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [
        b'{"step": 1}',
        b'{"st',
        b"",
        b"\0" * 40,
        b"3",
        b'{"step": 2}',
        b'{"step": "\xff"}',
        b'{"step": 3, "train/lo',
    ]
    path.write_bytes(b"\n".join(lines))
    found = scan_json_lines(path)
    assert found.records == [{"step": 1}, {"step": 2}]
    assert (found.lost, found.is_torn) == ([2, 4, 5, 7], True)
    with pytest.warns(
        RuntimeWarning, match=r"metrics\.jsonl: 4 lines are \(the first is line 2\) damaged and left out"
    ):
        assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_torn_last_line_is_passed_over_and_a_whole_one_without_an_end_is_not(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3, "train/lo')
        assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
        path.write_text('{"step": 1}\n{"step": 2}')
        assert read_json_lines(path) == [{"step": 1}, {"step": 2}]


def test_a_file_that_is_not_there_has_no_lines(tmp_path: Path) -> None:
    assert read_json_lines(tmp_path / "metrics.jsonl") == []
