"""The cache folder: derived files under content digests, published by rename so that processes can share it."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ...files import sync

__all__ = ["DataError", "cache_folder", "publish"]


class DataError(ValueError):
    """The data cannot be used: one sentence with the file, the reason and the option that helps."""


def cache_folder(configured: Path | None) -> Path:
    """Returns the cache folder, created: `configured`, else $CROSSOVER_CACHE, else ~/.cache/crossover.

    Raises:
        DataError: if it cannot be created, read or written.
    """
    folder = (configured or Path(os.environ.get("CROSSOVER_CACHE") or "~/.cache/crossover")).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(folder, error.strerror) from error
    if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
        raise _unusable(folder, "Permission denied")
    return folder


@contextmanager
def publish(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target` and renames it to `target` when the block succeeds.

    A reader sees all of `target` or nothing. Of several processes the first to finish wins and the others drop their
    copy, which is equal because `target` is named by a digest of its content.

    Raises:
        DataError: if the folder cannot be written (read-only, disk full).
    """
    draft = target.with_name(f".{target.name}.{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        draft.mkdir(parents=True)
        yield draft
        for path in (*draft.iterdir(), draft):
            sync(path)
        try:
            draft.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    except OSError as error:
        raise _unusable(target.parent, error.strerror) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _unusable(folder: Path, reason: str | None) -> DataError:
    return DataError(
        f"cannot use the cache folder {folder} ({reason or 'I/O error'}): "
        f"choose another with --data.cache or $CROSSOVER_CACHE"
    )
