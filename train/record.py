"""Records of a run: run.json and result.json, metrics.jsonl, and the TensorBoard events derived from it.

metrics.jsonl is the record: one JSON object per line, flushed at once, so that it survives a kill to the last line.
TensorBoard repeats it; where TensorBoard fails (a full disk, say), one warning is given and training goes on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shlex
import subprocess
import time
import warnings
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from ..files import naming, scan_json_lines, write_text
from . import plugins
from .score import BITS_PER_BYTE, Score

__all__ = ["MetricsLog", "cpu_model", "layout", "provenance"]


def layout(score: Score) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars page of a run that is judged by a score."""
    return {
        "Quality": {
            "training loss": ["Multiline", ["train/loss"]],
            f"{score.words} ({score.better} is better)": ["Multiline", [score.tag]],
        },
        "Cost": {
            "speed (tokens per second)": ["Multiline", ["perf/tokens_per_second"]],
            "peak memory (bytes)": ["Multiline", ["perf/peak_bytes"]],
        },
    }


_PLACES = frozenset({"name", "out", "resume", "turns", "data.cache", "train.threads", "train.tensorboard"})
"""Options that TensorBoard's page of hyperparameters leaves out."""


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
    ) -> None:
        """Continues the log of a run after `first_step` steps and `n_records` lines, where their number is known.

        What was recorded beyond is dropped: the run records it again. Lines that are lost are said. TensorBoard's
        events go to the folder `board`, or to tb in the directory, and its page of hyperparameters shows `options`.
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
        self._board = _TensorBoard(board or directory / "tb", score, options or {}, purge_step=first_step + 1)

    def append(self, record: Mapping[str, Any]) -> None:
        """Writes one record, which has a "step"; keys with a slash are scalars, "sample" is text."""
        with naming(self._path):
            self._file.write(_line(record))
            self._file.flush()
        self.n_records += 1
        self._board.append(record)

    def finish(self) -> None:
        """Says that the run has come to its end."""
        self._board.finish()

    def close(self) -> None:
        """Ends the log."""
        with contextlib.suppress(OSError):  # it holds what could not be written, and was said to be so
            self._file.close()
        self._board.close()


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(record, allow_nan=False, ensure_ascii=False) + "\n"


class _TensorBoard:
    """TensorBoard events, as long as they can be written: here and now, as in a thread nobody could catch an error."""

    def __init__(self, directory: Path, score: Score, options: Mapping[str, Any], *, purge_step: int) -> None:
        # Imported here: it takes a second, and the configuration and the tests of other modules do not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._directory, self._summary, self._event = directory, summary, Event
        self._writer = None
        # in the events of the run itself, as SummaryWriter.add_hparams would make a second run of them
        shown = {key: value for key, value in options.items() if value is not None and key not in _PLACES}
        values = {key: value if isinstance(value, int | float | str) else str(value) for key, value in shown.items()}
        metrics = dict.fromkeys((score.tag, "val/loss", "train/loss", "perf/tokens_per_second", "perf/peak_bytes"), 0.0)
        experiment, session, self._end = summary.hparams(values, metrics)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
            self._writer = RecordWriter((directory / name).open("wb"))
            self._add(file_version="brain.Event:2")
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
            for page in (summary.custom_scalars(layout(score)), experiment, session):
                self._add(summary=page)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def append(self, record: Mapping[str, Any]) -> None:
        if self._writer is None:
            return
        step = record["step"]
        try:
            for tag, value in record.items():
                if "/" in tag and value is not None:
                    self._add(step=step, summary=self._summary.scalar(tag, value))
            if "sample" in record:
                # Indented, Markdown shows it as it is.
                text = "    " + record["sample"].replace("\n", "\n    ")
                self._add(step=step, summary=self._summary.text("sample", text))
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def finish(self) -> None:
        if self._writer is None:
            return
        try:
            self._add(summary=self._end)
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        if self._writer is None:
            return
        try:
            self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _add(self, **entries: Any) -> None:
        assert self._writer is not None
        self._writer.write(self._event(wall_time=time.time(), **entries).SerializeToString())

    def _give_up(self, error: OSError) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # it holds what could not be written
                self._writer.close()
        self._writer = None
        warnings.warn(
            f"no more TensorBoard events in {self._directory} ({error.strerror or error}); metrics.jsonl has them all",
            RuntimeWarning,
            stacklevel=3,
        )


def provenance(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Says where numbers come from: code, command, versions, machine, time.

    The host is named by a hash only. `git_commit` and `git_dirty` are None outside a git checkout.
    """
    status = _git("status", "--porcelain")
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
