"""The folder that a command writes to: one command at a time, logs of its children, lines that survive a crash."""

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from ...files import naming, remove_drafts

__all__ = ["append_jsonl", "folder_for", "nowhere"]


@contextlib.contextmanager
def folder_for(out: Path, *, fresh: bool) -> Iterator[Path]:
    """Makes the output folder and holds its lock; yields the folder for logs. `fresh` moves old content aside first.

    Raises:
        ValueError: if another command is at work in the folder, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(out / ".lock", timeout=0)
    try:
        try:
            out.mkdir(parents=True, exist_ok=True)
            lock.acquire()
            remove_drafts(out)
            if fresh:
                _move_aside(out)
            logs = out / "logs"
            logs.mkdir(exist_ok=True)
        except Timeout:
            raise ValueError(f"another command is working in {out}; wait for it or give another --out") from None
        except OSError as error:
            path = error.filename2 or error.filename or out
            raise ValueError(f"cannot write to {path} ({error.strerror}); give another --out") from None
        yield logs
    finally:
        lock.release()


@contextlib.contextmanager
def nowhere() -> Iterator[Path]:
    """A folder for logs in the place of that of `folder_for`, for who only looks at the output folder."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def _move_aside(out: Path) -> None:
    """Moves the content to OUT.1, OUT.2, ..., or into the folder itself where nothing leaves it: at a mount point."""
    content = [path for path in out.iterdir() if path.name != ".lock" and not path.name.startswith("before.")]
    if not content:
        return
    out = out.resolve()
    for folder, stem in ((out.parent, out.name), (out, "before")):
        aside = next(path for n in itertools.count(1) if not (path := folder / f"{stem}.{n}").exists())
        try:
            aside.mkdir()
            for path in content:
                path.rename(aside / path.name)
            break
        except OSError:
            if folder == out:
                raise
            with contextlib.suppress(OSError):
                aside.rmdir()
    print(f"Moved what was in {out} to {aside}.")


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line and flushes it. A torn last line, left by a killed writer, is taken off first."""
    with naming(path), path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                _drop_torn_line(file)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()


def _drop_torn_line(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
