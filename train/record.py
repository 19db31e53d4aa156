"""Records of a run: metrics.jsonl, from which TensorBoard's events are derived, and where its numbers come from.

metrics.jsonl is the record: one JSON object per line, flushed at once, so that it survives a kill to the last line.
TensorBoard repeats it; where TensorBoard fails (a full disk, say), one warning is given and training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import shlex
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..files import naming, scan_json_lines, write_text
from . import plugins
from .board import Board
from .score import BITS_PER_BYTE, Score

__all__ = ["MetricsLog", "cpu_model", "provenance"]


class MetricsLog:
    """The metrics of one run: metrics.jsonl, and TensorBoard events of the same values under the same tags."""

    def __init__(
        self,
        directory: Path,
        score: Score = BITS_PER_BYTE,
        *,
        first_step: int = 0,
        n_records: int | None = None,
        board: Path | None = None,
        options: Mapping[str, Any] | None = None,
        flops_per_token: float | None = None,
    ) -> None:
        """Continues the log of a run after `first_step` steps and `n_records` lines, where their number is known.

        What was recorded beyond is dropped: the run records it again. Lines that are lost are said. TensorBoard's
        events go to the folder `board`, or to tb in the directory; its page of hyperparameters shows `options`, and
        quality by FLOPs needs those that a trained token takes.
        """
        path = self._path = directory / "metrics.jsonl"
        found = scan_json_lines(path).records if first_step else []
        kept = [record for record in found if type(step := record.get("step")) is int and step <= first_step]
        kept = kept[:n_records]
        if n_records is not None and len(kept) < n_records:
            warnings.warn(
                f"{path} has {len(kept)} of the {n_records} lines written up to step {first_step}: the others are lost",
                RuntimeWarning,
                stacklevel=2,
            )
        self.n_records = len(kept)
        write_text(path, "".join(map(_line, kept)))
        self._file = path.open("a", encoding="utf-8")
        self._board = Board(
            board or directory / "tb", score, options or {}, flops_per_token=flops_per_token, first_step=first_step
        )
        self._board.repeat(kept)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record, which has a "step"; keys with a slash are scalars, "sample" is text."""
        with naming(self._path):
            self._file.write(_line(record))
            self._file.flush()
        self.n_records += 1
        self._board.append(record)

    def finish(self, result: Mapping[str, Any]) -> None:
        """Says that the run has come to its end, with what is to be in result.json."""
        self._board.finish(result)

    def close(self) -> None:
        """Ends the log."""
        with contextlib.suppress(OSError):  # it holds what could not be written, and was said to be so
            self._file.close()
        self._board.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


def provenance(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Says where numbers come from: code, command, versions, machine, time.

    The host is named by a hash only. `git_commit` and `git_dirty`, whether code is not as in that commit, are None
    outside a git checkout.
    """
    status = _git("status", "--porcelain", "--", *_CODE)
    is_cuda = device.type == "cuda"
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": None if status is None else bool(status),
        "command": shlex.join(command),
        **plugins.record(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if is_cuda else None,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "threads": torch.get_num_threads(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "hostname_hash": hashlib.sha256(platform.node().encode()).hexdigest()[:12],
    }


_CODE = (":/*.py", ":/*.toml", ":/constraints.txt")
"""What decides results, among all that git may find changed: not those of an earlier run."""


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """Name of the processor, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
