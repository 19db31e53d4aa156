"""Verdict of `crossover doctor` on this machine: stored in the cache folder, heeded by training and measurements.

A verdict is of one set of versions, kernels and processors. With any other it is not found, and nothing is switched
off until the doctor is run again.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..files import read_json, write_json
from ..kernels import dispatch
from .data.cache import DataError, cache_folder
from .record import cpu_model

__all__ = ["apply_verdict", "identity", "store_verdict", "version"]


def version(package: str) -> str | None:
    """The installed version of a package; None where it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def identity() -> dict[str, str | None]:
    """Describes what a verdict holds for: versions, our kernels' sources, the processors."""
    return {
        **{name: version(name) for name in ("torch", "triton", "numba")},
        "interpreter": os.environ.get("TRITON_INTERPRET"),  # what it cannot do a GPU may
        "kernels": _kernels_digest(),
        "cpu": cpu_model(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


@functools.cache
def _kernels_digest() -> str:
    folder = Path(dispatch.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def store_verdict(checked: Sequence[str], failures: Mapping[tuple[str, str], str]) -> Path:
    """Writes down which backends of the checked operations failed; what was known of other operations stays.

    Args:
        checked: names of operations.
        failures: reasons by operation and backend.

    Returns:
        The file.

    Raises:
        DataError: if the cache folder cannot be used.
    """
    before = _read_verdict() or {"switched_off": []}
    others = [entry for entry in before["switched_off"] if entry["op"] not in checked]
    found = [{"op": op, "backend": backend, "reason": reason} for (op, backend), reason in failures.items()]
    path = _path()
    try:
        path.parent.mkdir(exist_ok=True)
        ran = datetime.now(UTC).isoformat(timespec="seconds")
        write_json(path, {"ran": ran, "switched_off": [*others, *found], "identity": identity()})
    except OSError as error:
        raise DataError(
            f"cannot write {path} ({error.strerror}): choose another folder with $CROSSOVER_CACHE"
        ) from error
    return path


def apply_verdict() -> dict[str, Any] | None:
    """Switches off what failed when the doctor was last run here.

    Returns:
        When that was ("ran") and what is off ("switched_off", with op, backend and reason), for run.json; None where it
        was never run with these versions on this machine.
    """
    verdict = _read_verdict()
    if verdict is None:
        return None
    for entry in verdict["switched_off"]:
        dispatch.switch_off(entry["op"], entry["backend"], entry["reason"])
    return {"ran": verdict["ran"], "switched_off": verdict["switched_off"]}


def _path() -> Path:
    digest = hashlib.sha256(json.dumps(identity(), sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder(None) / "doctor" / f"{digest}.json"


def _read_verdict() -> dict[str, Any] | None:
    try:
        path = _path()
        return read_json(path) if path.exists() else None
    except (ValueError, OSError):  # no cache folder, no verdict: training itself may well use another folder
        return None
