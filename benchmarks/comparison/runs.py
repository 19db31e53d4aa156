"""Trains a list of runs, each in a process of its own, some at once, and leaves out those that are done."""

import itertools
import json
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...files import read_json, read_record
from ...options import check_table
from ...train.config import RunConfig, flatten
from ...train.course import Course
from ...train.plugins import words
from ...train.runtime import Interrupted, MemoryKills, choose_device, signals_held
from ...train.score import Score
from ...train.turns import folder_of_turns
from ..harness.processes import Child, last_line, preloaded, stop
from ..harness.progress import Progress, Task
from ..harness.sizes import SizedArch
from ..report.results import load_run

__all__ = [
    "MetricsTail",
    "TrainingProcess",
    "arguments",
    "check_resumable",
    "differences",
    "is_done",
    "share_threads",
    "train_in_turns",
    "train_runs",
    "training_tasks",
]

_SAVE_SECONDS = 60.0  # given to a stopped run for its checkpoint


def arguments(run: RunConfig) -> list[str]:
    """The command line of `python -m crossover.train` for a run: every option that is not the default."""
    words, default = [], flatten(RunConfig().to_dict())
    for path, value in flatten(run.to_dict()).items():
        option = f"--{path.replace('_', '-')}"
        if value == default.get(path):
            continue
        section, _, key = path.partition(".options.")
        if key:  # of the run file's table, which the command line gives one by one
            words += [f"--{section}.set", f"{key}={json.dumps(value)}"]
        elif isinstance(value, bool):
            words.append(option if value else option.replace("--", "--no-", 1))
        elif path.endswith(".set"):
            words += [word for entry in value for word in (option, entry)]
        else:
            words += [option, *map(str, value if isinstance(value, list) else [value])]
    return words


_NOT_THE_EXPERIMENT = frozenset(
    {"out", "resume", "turns", "data.cache"}
    | {f"train.{name}" for name in ("threads", "checkpoint_every", "keep_checkpoints")}
    | {f"train.{name}" for name in ("tensorboard", "layer_stats_every", "profile")}
)


def differences(run: RunConfig, found: Mapping[str, Any]) -> list[str]:
    """Settings in which a recorded run is another experiment. None and 'auto' agree with what they were resolved to."""
    recorded, wanted = _settings(RunConfig.from_dict(found)), _settings(run)
    return [
        f"{path} {recorded.get(path)} instead of {wanted.get(path)}"
        for path in {**wanted, **recorded}
        if path not in _NOT_THE_EXPERIMENT and wanted.get(path) not in ("auto", recorded.get(path))
        if wanted.get(path) is not None or ".options." in path
    ]


def _settings(run: RunConfig) -> dict[str, Any]:
    """The settings of a run by dotted path, however its options were given."""
    tables = run.to_dict()
    for section, spec in (("model", run.model), ("objective", run.objective)):
        tables[section] |= {"set": None, "options": spec.all_options()}
    return flatten(tables)


def check_resumable(runs: Sequence[RunConfig], digest: str) -> None:
    """Raises ValueError if a folder holds a run of other settings or other data, which must not be overwritten."""
    for run in runs:
        if not (run.directory / "run.json").exists():
            continue
        found = load_run(run.directory)
        check_table(found.info, {"config": Mapping, "corpus.digest": str}, run.directory / "run.json")
        config, train = found.info["config"], found.info["config"].get("train")
        resolved = found.info.get("provenance", {}).get("precision")
        if isinstance(train, Mapping) and train.get("precision") == "auto" and resolved is not None:
            config = {**config, "train": {**train, "precision": resolved}}
        differing = differences(run, config)
        if found.info["corpus"]["digest"] != digest:
            differing.append(f"data with digest {found.info['corpus']['digest'][:12]} instead of {digest[:12]}")
        if differing:
            raise ValueError(
                f"{run.directory} holds another run ({'; '.join(differing)}); "
                "give the same options, another --out, or --fresh to start over"
            )


def is_done(run: RunConfig) -> bool:
    """Whether the run has finished; `check_resumable` tells whether it is the same run."""
    return (run.directory / "run.json").exists() and load_run(run.directory).status == "done"


def training_tasks(runs: Sequence[RunConfig], sizes: Mapping[str, SizedArch]) -> list[Task]:
    """The runs as tasks of a schedule, with their FLOPs as cost, or their time where that is given."""
    flops = [sizes[run.model.preset].flops_at[run.train.seq_len] * run.train.n_tokens for run in runs]
    return [
        Task(
            name=run.name,
            kind="timed train" if run.train.seconds else "train",
            cost=run.train.seconds or n_flops,
        )
        for run, n_flops in zip(runs, flops, strict=True)
    ]


def share_threads(jobs: int | None, threads: int | None, *, device: str, n_runs: int) -> tuple[int, int]:
    """How many runs train at once, and with how many CPU threads each."""
    import torch

    cores = threads or torch.get_num_threads()
    at_once = jobs or (1 if choose_device(device).type == "cuda" else cores)
    at_once = min(at_once, n_runs)
    return at_once, max(1, cores // at_once)


def train_runs(runs: Sequence[RunConfig], progress: Progress, *, logs: Path, jobs: int = 1) -> dict[str, str]:
    """Trains every run that is not done yet, `jobs` at once.

    Returns:
        For each run that did not finish, its name and the reason.
    """
    failures: dict[str, str] = {}
    running: list[TrainingProcess] = []
    waiting = list(runs)
    kills = MemoryKills()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                if is_done(run):
                    progress.skip(run.name, "trained before")
                else:
                    progress.begin(run.name)
                    with signals_held():
                        running.append(TrainingProcess(run, logs / f"{run.name}.log", kills))
            for training in list(running):
                name = training.run.name
                if training.child.poll() is None:
                    progress.update(name, *training.progress())
                    continue
                running.remove(training)
                reason = training.failure()
                if reason is None:
                    progress.finish(name, training.quality())
                else:
                    failures[name] = reason
                    progress.finish(name, reason)
            if running:
                time.sleep(0.25)
    except BaseException as error:  # whatever ends this process must not leave runs behind
        signum = error.signum if isinstance(error, Interrupted) else signal.SIGTERM
        stop([training.child for training in running], signum, grace=_SAVE_SECONDS)
        raise
    return failures


def train_in_turns(runs: Sequence[RunConfig], progress: Progress, *, logs: Path, jobs: int = 1) -> dict[str, str]:
    """Trains them as `train_runs` does, but all models of a seed and length together, `jobs` of them at a time.

    They take turns, in which what happens to the machine happens to all of them alike.
    """
    failures: dict[str, str] = {}
    for _, same in itertools.groupby(runs, key=lambda run: (run.seed, run.train.seq_len)):
        group = list(same)
        with folder_of_turns([run.name for run in group if not is_done(run)], at_once=jobs) as folder:
            group = [replace(run, turns=folder) for run in group]
            failures |= train_runs(group, progress, logs=logs, jobs=len(group))
    return failures


class TrainingProcess:
    """A run in a process of its own."""

    def __init__(self, run: RunConfig, log: Path, kills: MemoryKills) -> None:
        (run.directory / "result.json").unlink(missing_ok=True)  # an earlier attempt's
        log.unlink(missing_ok=True)
        self.run, self._log, self._kills = run, log, kills
        device = str(choose_device(run.train.device))
        order = [*words(), *arguments(run)]
        self.child = Child(_train, order, log=log, preload=preloaded(device), orphaned=signal.SIGTERM)
        self._metrics = MetricsTail(run.directory / "metrics.jsonl")

    def progress(self) -> tuple[float, str]:
        """The fraction done, and the same in words."""
        step, seconds, detail = self._metrics.read()
        if step == 0:
            return 0.0, "warms up, which compiles kernels the first time"
        course = Course(train=self.run.train, step=step, seconds=seconds)
        return min(1.0, course.share), f"{course.words}{detail}"

    def quality(self) -> str:
        """The final score of a run that has finished, in words."""
        run = load_run(self.run.directory)
        return "" if run.quality is None else run.score.text(run.quality)

    def failure(self) -> str | None:
        """Why the ended process did not finish its run, or None if it did."""
        if is_done(self.run):
            return None
        result = self.run.directory / "result.json"
        recorded = read_json(result) if result.exists() else {}
        code = self.child.poll()
        if code == -signal.SIGKILL:
            killed = "out of memory (killed by the system)"
            return killed if self._kills.explain_one() else "killed from outside (SIGKILL); the same command goes on"
        reason = str(recorded.get("status", "failed")).replace("_", " ")
        ended = f"ended with code {code}"
        return f"{reason}: {recorded.get('error') or last_line(self._log) or ended}"


def _train(words: Sequence[str], parent: Connection) -> None:
    """Main function of a run's process, which is `python -m crossover.train` with these words."""
    from ...train.__main__ import main

    sys.exit(main(words))


class MetricsTail:
    """Reads what is appended to the metrics of a run, beside its run.json."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._step, self._seconds = 0, 0.0
        self._quality = ""
        self._score: Score | None = None

    def read(self) -> tuple[int, float, str]:
        """The last step recorded with its seconds of training, and the last validation as text."""
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(min(self._offset, self._path.stat().st_size))
                whole, _, _ = file.read().rpartition(b"\n")
                self._offset += len(whole) + 1 if whole else 0
            for line in whole.split(b"\n"):
                self._look(line)
        return self._step, self._seconds, self._quality

    def _look(self, line: bytes) -> None:
        record = read_record(line, self._path)
        if record is None:
            return  # the tail of a line that a resumed run has rewritten
        self._step, self._seconds = record.get("step", self._step), record.get("seconds", self._seconds)
        if self._score is None and any(key.startswith("val/") for key in record):
            self._score = load_run(self._path.parent).score
        if self._score is not None and self._score.tag in record:
            self._quality = f", {self._score.text(record[self._score.tag], 2)}"
