"""The cache folder: derived files under content digests, published by rename so that processes can share it.

Each entry is a folder with the SHA-256 of its files, which are checked whenever it is opened: what is damaged is made
again. The entries are small beside the texts that they are made of, which are read and hashed in any case.
"""

import hashlib
import json
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from ...files import cache_home, read_json, sync

__all__ = ["DataError", "cache_folder", "expanded", "is_whole", "locked", "publish"]

_DIGESTS = "digests.json"


class DataError(ValueError):
    """The data cannot be used: one sentence with the file, the reason and the option that helps."""


def cache_folder(configured: Path | None) -> Path:
    """Returns the cache folder, created: `configured`, else that of all that is made again (`files.cache_home`).

    Raises:
        DataError: if it cannot be created or read. One that cannot be written serves what it holds.
    """
    folder = expanded(configured or cache_home())
    if str(folder).startswith("~"):
        raise _unusable(folder, "there is no home folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error
    if not os.access(folder, os.R_OK | os.X_OK):
        raise _unusable(folder, "Permission denied")
    return folder


def expanded(path: Path) -> Path:
    """A path with ~ as the home folder; as it is where there is none."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


@contextmanager
def locked(target: Path, kind: str) -> Iterator[None]:
    """Holds the lock of a cache entry while it is made, and removes what killed processes left of it.

    `kind` is what messages call it. Who has to wait is told so.

    Raises:
        DataError: if the folder cannot be written.
    """
    path = target.parent.parent / f"{kind}-{target.name}.lock"
    lock = FileLock(path)
    try:
        try:
            lock.acquire(timeout=0)
        except Timeout:
            print(f"waiting for another process that makes the same {kind} (it holds {path})", file=sys.stderr)
            lock.acquire()
    except OSError as error:
        raise _unusable(path.parent, error.strerror) from error
    try:
        for leftover in target.parent.glob(f".{target.name}.*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield
    finally:
        lock.release()


def is_whole(target: Path, *names: str) -> bool:
    """Whether a cache entry is there with the files of these names as they were published."""
    try:
        digests = read_json(target / _DIGESTS)
        return all(_sha256(target / name) == digests.get(name) for name in names)
    except (OSError, ValueError):
        return False


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` and renames it to `target` when the block succeeds.

    A reader sees all of `target` or nothing; a damaged one is replaced. Of several processes the first to finish wins
    and the others drop their copy, which is equal because `target` is named by a digest of its content.

    Raises:
        DataError: if the folder cannot be written (read-only, disk full).
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        yield draft
        names = sorted(path.name for path in draft.iterdir())
        digests = {name: _sha256(draft / name) for name in names}
        (draft / _DIGESTS).write_text(json.dumps(digests, indent=2) + "\n", encoding="utf-8")
        for path in (*draft.iterdir(), draft):
            sync(path)
        if target.exists() and not is_whole(target, *names):
            shutil.rmtree(target)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise _unusable(target.parent, error.strerror) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _unusable(folder: Path, reason: str | None) -> DataError:
    return DataError(
        f"cannot use the cache folder {folder} ({reason or 'I/O error'}): "
        f"choose another with --data.cache or $CROSSOVER_CACHE"
    )
