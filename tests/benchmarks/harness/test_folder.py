import errno
import json
import os
from pathlib import Path

import pytest
from crossover.benchmarks.harness.folder import append_jsonl, folder_for
from crossover.files import read_json_lines

pytestmark = pytest.mark.quick


def test_one_command_at_a_time_works_in_a_folder(tmp_path: Path) -> None:
    with folder_for(tmp_path / "out", fresh=False) as logs:
        assert logs.is_dir()
        with pytest.raises(ValueError, match="another command is working in"), folder_for(tmp_path / "out", fresh=True):
            pass
    with folder_for(tmp_path / "out", fresh=False):
        pass


def test_a_fresh_start_moves_what_was_there_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for number in range(3):
        with folder_for(out, fresh=True):
            (out / "result").write_text(str(number))
    assert [(tmp_path / name / "result").read_text() for name in ("out.1", "out.2", "out")] == ["0", "1", "2"]
    assert f"Moved what was in {out} to {out}.2." in capsys.readouterr().out


def test_a_fresh_start_at_a_mount_point_keeps_what_was_there_inside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, original = tmp_path / "out", Path.rename

    def rename(path: Path, target: Path) -> None:
        if out not in target.parents:
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(path), None, str(target))
        original(path, target)

    monkeypatch.setattr(Path, "rename", rename)
    for number in range(3):
        with folder_for(out, fresh=True):
            (out / "result").write_text(str(number))
    assert [(out / name / "result").read_text() for name in ("before.1", "before.2", ".")] == ["0", "1", "2"]
    assert [path.name for path in tmp_path.iterdir() if path.name != "cache"] == ["out"]


@pytest.mark.parametrize("name", ["logs", ".lock"])
def test_what_is_in_the_way_in_a_folder_is_named_in_one_line(name: str, tmp_path: Path) -> None:
    if name == "logs":
        (tmp_path / name).touch()
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=rf"cannot write to .*{name} .*give another --out"):
        folder_for(tmp_path, fresh=False).__enter__()


def test_what_a_killed_writer_left_is_removed_from_a_folder(tmp_path: Path) -> None:
    (tmp_path / ".compare.json.4194309.tmp").write_text("{")
    with folder_for(tmp_path, fresh=False):
        assert not (tmp_path / ".compare.json.4194309.tmp").exists()


def test_a_folder_that_cannot_be_written_is_a_mistake_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with (
        pytest.raises(ValueError, match=r"cannot write to .*; give another --out"),
        folder_for(tmp_path / "file" / "out", fresh=False),
    ):
        pass


def test_lines_are_appended_whole(tmp_path: Path) -> None:
    for number in range(3):
        append_jsonl(tmp_path / "rows.jsonl", {"a": number})
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"a": 0}, {"a": 1}, {"a": 2}]


def test_appending_repairs_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    append_jsonl(path, {"a": 3})
    assert read_json_lines(path) == [{"a": 1}, {"a": 3}]
