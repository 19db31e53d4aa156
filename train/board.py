"""TensorBoard events of a run, derived from the lines of its metrics.jsonl.

A scalar has the tag that it has there. Training loss and score are also given against tokens, FLOPs and seconds, so
that runs can be read at equal budgets: TensorBoard knows no axis but the step, so these have tags of their own.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..files import naming, remove_drafts
from .score import Score

__all__ = ["Board", "layout", "write_images"]

_BUDGETS = {"tokens": "tokens", "gflops": "GFLOPs of training", "seconds": "seconds of training"}
"""What `vs_NAME/...` has as its step, in words."""


def _versus(budget: str, tag: str) -> str:
    return f"vs_{budget}/{tag.replace('/', '_')}"


def layout(score: Score) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars page of a run that is judged by a score."""
    quality = f"{score.words} ({score.better} is better)"
    curves = {"training loss": "train/loss", quality: score.tag}
    return {
        "Quality": {title: ["Multiline", [tag]] for title, tag in curves.items()},
        "Quality at equal budgets": {
            f"{title} by {words}": ["Multiline", [_versus(budget, tag)]]
            for budget, words in _BUDGETS.items()
            for title, tag in curves.items()
        },
        "Cost": {
            "speed (tokens per second)": ["Multiline", ["perf/tokens_per_second"]],
            "peak memory (bytes)": ["Multiline", ["perf/peak_bytes"]],
        },
    }


_FINAL = {
    "perf/mean_tokens_per_second": "tokens_per_second",
    "perf/train_seconds": "train_seconds",
    "perf/train_flops": "train_flops",
}
"""Tags of what result.json has and no line of metrics.jsonl."""

_LEADING = ("arch", "n_params", "optim.lr", "seed", "train.seq_len")
"""Hyperparameters that TensorBoard shows unasked: the first five by name, of those said to differ if there are any."""

_HIDDEN = frozenset(
    {"name", "out", "resume", "turns", "model.preset", "data.cache", "data.column"}
    | {f"train.{name}" for name in ("threads", "device", "tensorboard", "profile", "log_every", "layer_stats_every")}
    | {
        f"train.{name}"
        for name in ("checkpoint_every", "keep_checkpoints", "eval_every", "eval_tokens", "final_eval_tokens")
    }
    | {f"train.{name}" for name in ("position_len", "lengths", "length_tokens", "sample_tokens")}
)
"""Options that the page of hyperparameters leaves out: no model is another one for them."""


class Board:
    """TensorBoard events, as long as they can be written: here and now, as in a thread nobody could catch an error."""

    def __init__(
        self,
        directory: Path,
        score: Score,
        options: Mapping[str, Any],
        *,
        flops_per_token: float | None = None,
        first_step: int = 0,
    ) -> None:
        """Begins a file of events after `first_step` steps; whatever the others have at a later step is dropped."""
        # Imported here: it takes a second, and the configuration and the tests of other modules do not need it.
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
        from tensorboard.summary.writer.record_writer import RecordWriter
        from torch.utils.tensorboard import summary

        self._directory, self._summary, self._event = directory, summary, Event
        self._score, self._flops_per_token, self._step = score, flops_per_token, first_step
        self._writer = None
        page, row, self._end = _hparams(score, options)
        try:
            directory.mkdir(parents=True, exist_ok=True)
            name = f"events.out.tfevents.{time.time():017.6f}.{os.getpid()}"
            self._writer = RecordWriter((directory / name).open("wb"))
        except OSError as error:
            self._give_up(error)
        start = {"step": first_step + 1, "session_log": SessionLog(status=SessionLog.START)}
        pages = ({"summary": each} for each in (summary.custom_scalars(layout(score)), page, row))
        self._write([{"file_version": "brain.Event:2"}, start, *pages])

    def repeat(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Gives again what was dropped of earlier records, as tokens are more than steps."""
        entries = (entry for record in records for entry in self._versus_budgets(record))
        self._write(entry for entry in entries if entry["step"] > self._step)

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line of metrics."""
        self._step = record["step"]
        self._write([*self._entries(record), *self._versus_budgets(record)])

    def finish(self, result: Mapping[str, Any]) -> None:
        """Says that the run has come to its end, with the content of result.json."""
        final = {tag: result[name] for tag, name in _FINAL.items() if result.get(name) is not None}
        scalars = [self._scalar(tag, value, self._step) for tag, value in final.items()]
        self._write([*scalars, {"summary": self._end}])

    def close(self) -> None:
        """Ends the file."""
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _scalar(self, tag: str, value: float, step: int) -> dict[str, Any]:
        return {"step": step, "summary": self._summary.scalar(tag, value)}

    def _entries(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        for tag, value in record.items():
            if "/" in tag and value is not None:
                yield self._scalar(tag, value, record["step"])
        if "sample" in record:
            # Indented, Markdown shows it as it is.
            text = "    " + record["sample"].replace("\n", "\n    ")
            yield {"step": record["step"], "summary": self._summary.text("sample", text)}

    def _versus_budgets(self, record: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Training loss and score against what had been spent by then, as far as that is known."""
        spent = {budget: record.get(budget) for budget in ("tokens", "seconds")}
        if spent["tokens"] is not None and self._flops_per_token is not None:
            spent["gflops"] = spent["tokens"] * self._flops_per_token / 1e9
        for tag in ("train/loss", self._score.tag):
            for budget, amount in spent.items() if record.get(tag) is not None else ():
                if amount is not None:
                    yield self._scalar(_versus(budget, tag), record[tag], round(amount))

    def _write(self, entries: Iterable[Mapping[str, Any]]) -> None:
        if self._writer is None:
            return
        try:
            for entry in entries:
                self._writer.write(self._event(wall_time=time.time(), **entry).SerializeToString())
            self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        if self._writer is not None:
            with contextlib.suppress(OSError):  # it holds what could not be written
                self._writer.close()
        self._writer = None
        warnings.warn(
            f"no more TensorBoard events in {self._directory} ({error.strerror or error}); metrics.jsonl has them all",
            RuntimeWarning,
            stacklevel=4,
        )


def write_images(directory: Path, images: Mapping[str, bytes]) -> None:
    """Writes PNG images by tag as all of TensorBoard's events of a folder, in the place of those of an earlier call."""
    from tensorboard.compat.proto.event_pb2 import Event  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
    from tensorboard.summary.writer.record_writer import RecordWriter

    directory.mkdir(exist_ok=True)
    remove_drafts(directory)
    path = directory / "events.out.tfevents.0000000000.report"
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with contextlib.closing(RecordWriter(draft.open("wb"))) as writer:
                for tag, png in images.items():
                    width, height = (int.from_bytes(png[i : i + 4]) for i in (16, 20))  # of its first chunk, IHDR
                    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
                    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
                    writer.write(Event(wall_time=time.time(), step=0, summary=summary).SerializeToString())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)


def _hparams(score: Score, options: Mapping[str, Any]) -> tuple[Any, Any, Any]:
    """The page of hyperparameters, its row, and its end.

    They go to the events of the run itself, as SummaryWriter.add_hparams would make a second run of them.
    """
    from tensorboard.plugins.hparams.plugin_data_pb2 import (
        HParamsPluginData,  # pyright: ignore[reportAttributeAccessIssue]
    )
    from torch.utils.tensorboard import summary

    shown = {key: value for key, value in options.items() if value not in (None, [], "") and key not in _HIDDEN}
    # a seed is a name: as a number it would be shown with decimals
    values = {
        key: value if isinstance(value, int | float) and key != "seed" else str(value) for key, value in shown.items()
    }
    metrics = (score.tag, "train/loss", *_FINAL, "perf/peak_bytes")
    page, row, end = summary.hparams(values, dict.fromkeys(metrics, 0.0))
    content = HParamsPluginData.FromString(page.value[0].metadata.plugin_data.content)
    for info in content.experiment.hparam_infos:
        info.differs = info.name in _LEADING
    page.value[0].metadata.plugin_data.content = content.SerializeToString()
    return page, row, end
