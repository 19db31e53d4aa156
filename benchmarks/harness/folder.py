"""The folder that a command writes to: one command at a time, logs of its children, lines that survive a crash."""

import contextlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["append_jsonl", "folder_for"]


@contextlib.contextmanager
def folder_for(out: Path, *, fresh: bool) -> Iterator[Path]:
    """Makes the output folder and holds its lock; yields the folder for logs. `fresh` moves old content aside first.

    Raises:
        ValueError: if another command is at work in the folder, or it cannot be written.
    """
    from filelock import FileLock, Timeout

    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another command is working in {out}; wait for it or give another --out") from None
    except OSError as error:
        raise ValueError(f"cannot write to {out} ({error.strerror}); give another --out") from error
    try:
        if fresh:
            _move_aside(out)
        logs = out / "logs"
        logs.mkdir(exist_ok=True)
        yield logs
    finally:
        lock.release()


def _move_aside(out: Path) -> None:
    content = [path for path in out.iterdir() if path.name != ".lock"]
    if not content:
        return
    number = next(n for n in range(1, 10_000) if not out.with_name(f"{out.name}.{n}").exists())
    aside = out.with_name(f"{out.name}.{number}")
    aside.mkdir()
    for path in content:
        path.rename(aside / path.name)
    print(f"Moved what was in {out} to {aside}.")


def append_jsonl(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one line and flushes it. A torn last line, left by a killed writer, is taken off first."""
    with path.open("ab+") as file:
        if file.tell() > 0:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                _drop_torn_line(file)
        file.write(json.dumps(record, allow_nan=False).encode() + b"\n")
        file.flush()


def _drop_torn_line(file: BinaryIO) -> None:
    file.seek(0)
    file.truncate(file.read().rfind(b"\n") + 1)
