"""Finds the peak learning rate of each model under one rule, at a fraction of the budget, on text kept for that alone.

The rule is successive halving over rates that are factors of two apart. Every rate of the first round is tried in short
runs, of which each has a whole schedule; the better half of them goes on to the next round, whose runs are twice as
long. In every round a rate twice as high and one half as high as the best are tried too, unless they were: what is
found has a worse neighbour on either side. A trial that did not finish is worse than any that did. Where a comparison
has several trained lengths, trials have the shortest.
"""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...files import read_json, write_json
from ...options import check_table
from ...train.config import ModelSpec, RunConfig, TrainConfig
from ...train.score import Score
from ..harness.progress import Progress, Task
from ..harness.sizes import SizedArch
from ..report.results import Run, load_run
from .options import CompareConfig
from .runs import check_resumable, train_runs, training_tasks

if TYPE_CHECKING:
    from ...train.objective import Objective

__all__ = ["Found", "Search", "next_trials", "rounds_of"]

Found = Mapping[int, float | None]
"""Scores of one round by the power of two by which the rate differs from the first; None of a trial that failed."""

_FIRST = (-2, -1, 0, 1, 2)
_FURTHEST = 8
"""Powers of two beyond which nothing is tried."""
_N_ROUNDS = 3


def rounds_of(config: CompareConfig) -> list[int]:
    """Steps of the trials of each round, the last of which has a share of those of a run."""
    last = config.steps * config.tune_share
    return sorted({max(1, round(last / 2**i)) for i in range(_N_ROUNDS)})


def next_trials(found: Sequence[Found], score: Score) -> tuple[int, list[int]] | int | None:
    """What to try next of one model: a round and the powers of two to try in it.

    Args:
        found: of each round what is known.
        score: by which trials are judged.

    Returns:
        A round and powers, or the best power when there is nothing more to try, or None where no trial finished.
    """
    sign = 1 if score.better == "lower" else -1
    candidates: Sequence[int] = _FIRST
    best = 0
    for number, values in enumerate(found):
        if missing := [power for power in candidates if power not in values]:
            return number, missing
        known = {power: sign * value for power, value in values.items() if value is not None}
        if not known:
            return None
        in_order = sorted(known, key=lambda power: (known[power], abs(power)))
        best = in_order[0]
        beside = [power for power in (best - 1, best + 1) if power not in values and abs(power) <= _FURTHEST]
        if beside:
            return number, beside
        candidates = sorted(in_order[: -(-len(values) // 2)])
    return best


@dataclass(frozen=True, kw_only=True)
class _Trial:
    arch: str
    round: int
    power: int
    run: RunConfig


class Search:
    """The search for the rates of a comparison, in OUT/tuning: a folder for each trial, trials.csv, rates.json."""

    def __init__(
        self,
        config: CompareConfig,
        sizes: Mapping[str, SizedArch],
        objective: Objective[Any, Any],
        *,
        at_once: int,
        threads: int | None,
    ) -> None:
        """Takes what is compared, and the objective on the split that trials are judged on.

        Raises:
            ValueError: if the folder holds a search of another kind.
        """
        self._config, self._sizes, self._objective = config, sizes, objective
        self._at_once, self._threads = at_once, threads
        self._out = config.out / "tuning"
        self._rounds = rounds_of(config)
        self._found: dict[str, list[dict[int, float | None]]] = {arch: [{} for _ in self._rounds] for arch in sizes}
        self.rates = self._concluded()
        """Peak learning rates that are found, by architecture."""

    @property
    def record(self) -> dict[str, Any]:
        """What compare.json says of it."""
        data = self._objective.data
        return {
            "rates": self.rates,
            "rounds": self._rounds,
            "n_trials": sum(run.arch in self.rates for run in self._trials()),
            "n_documents": data.n_val_documents,
            "bytes": data.val_bytes,
            "digest": data.digest,
        }

    def tasks(self) -> list[Task]:
        """What the search takes if the first rate of every model is the best, as tasks of a schedule."""
        return [
            Task(name=name, kind="train", cost=self._sizes[arch].flops_per_token * self._tokens(steps))
            for arch in self._sizes
            if arch not in self.rates
            for number, steps in enumerate(self._rounds)
            for name in self._expected(arch, number)
        ]

    def expected(self) -> list[tuple[RunConfig, int, list[Run]]]:
        """Of each round of a model whose rate is not found: a trial, how many there may be, and which are finished."""
        done = [run for run in self._trials() if run.status == "done"]
        return [
            (
                self._trial(arch, 0, steps),
                max(len(self._expected(arch, number)), len(of_round)),
                of_round,
            )
            for arch in self._sizes
            if arch not in self.rates
            for number, steps in enumerate(self._rounds)
            for of_round in [[r for r in done if (r.arch, r.info["config"]["train"]["steps"]) == (arch, steps)]]
        ]

    def run(self, progress: Progress, *, logs: Path) -> dict[str, float]:
        """Tries rates until all are found, and returns them by architecture. What was tried before is not again.

        Raises:
            ValueError: if no trial of a model finished, or a folder holds a run of other settings.
        """
        failures: dict[str, str] = {}
        while wave := self._wave():
            runs = [trial.run for trial in wave]
            check_resumable(runs, self._objective.data.digest)
            instead = [name for key in {(t.arch, t.round) for t in wave} for name in self._expected(*key)]
            progress.plan(training_tasks(runs, self._sizes), instead_of=instead)
            failures |= train_runs(runs, progress, logs=logs, jobs=self._at_once)
            for trial in wave:
                self._found[trial.arch][trial.round][trial.power] = load_quality(trial.run)
            self._write_trials()
        progress.plan([], instead_of=[task.name for task in self.tasks()])
        for arch, found in self._found.items():
            if arch in self.rates:
                continue
            best = next_trials(found, self._objective.score)
            if not isinstance(best, int):
                raise ValueError(
                    f"no learning rate could be found for {self._sizes[arch].label}, of which no trial finished: "
                    f"{next((why for name, why in failures.items() if name.startswith(f'{arch}-')), '')}"
                )
            self.rates[arch] = self._rate(arch, best)
            progress.say(f"{self._sizes[arch].label}: peak learning rate {self.rates[arch]:g}")
        write_json(self._out / "rates.json", {"settings": self._settings, "rates": self.rates})
        return self.rates

    def _wave(self) -> list[_Trial]:
        trials = []
        for arch, found in self._found.items():
            wanted = None if arch in self.rates else next_trials(found, self._objective.score)
            if isinstance(wanted, tuple):
                number, powers = wanted
                trials += [
                    _Trial(arch=arch, round=number, power=power, run=self._trial(arch, power, self._rounds[number]))
                    for power in powers
                ]
        return trials

    def _expected(self, arch: str, number: int) -> list[str]:
        """Names in a schedule of trials that are not known yet."""
        n = len(_FIRST) if number == 0 else -(-len(_FIRST) // 2)
        label, steps = self._sizes[arch].label, self._rounds[number]
        return [f"{label}, trial {i + 1} of {steps} steps" for i in range(n)]

    def _rate(self, arch: str, power: int) -> float:
        return self._sizes[arch].lr * 2.0**power

    def _tokens(self, steps: int) -> int:
        return steps * self._config.tokens_per_step

    def _trial(self, arch: str, power: int, steps: int) -> RunConfig:
        config, rate = self._config, self._rate(arch, power)
        name = f"{arch}-lr{rate:g}-n{steps}"
        return RunConfig(
            name=name,
            out=self._out,
            model=ModelSpec(preset=arch, n_params=config.params),
            objective=config.objective,
            data=replace(config.data, held_out="tuning"),
            optim=replace(config.optim, lr=rate),
            train=TrainConfig(
                steps=steps,
                batch_size=config.tokens_per_step // config.seq_len[0],
                seq_len=config.seq_len[0],
                carry=config.carry,
                precision=config.precision,
                eval_every=0,
                eval_tokens=8 * config.eval_tokens,
                final_eval_tokens=8 * config.eval_tokens,
                position_len=0,
                sample_tokens=0,
                checkpoint_every=0,
                device=config.device,
                threads=self._threads,
                tensorboard=self._out / "tb" / name,
            ),
        )

    def _trials(self) -> list[Run]:
        """All trials that have begun, also those of an earlier search for other models."""
        runs = [load_run(path.parent) for path in self._out.glob("*/run.json")]
        return sorted(runs, key=lambda run: (run.arch, run.info["config"]["train"]["steps"], run.learning_rate or 0.0))

    def _write_trials(self) -> None:
        self._out.mkdir(exist_ok=True)
        with (self._out / "trials.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["arch", "steps", "lr", self._objective.score.key, "status"])
            for run in self._trials():
                steps = run.info["config"]["train"]["steps"]
                writer.writerow([run.arch, steps, f"{run.learning_rate:g}", run.quality, run.status])

    @property
    def _settings(self) -> dict[str, Any]:
        """By which two searches are the same: all that decides a trial but the model, its rate and its length."""
        return {
            **_deciding(self._trial(next(iter(self._sizes)), 0, 1)),
            "n_params": self._config.params,
            "rounds": self._rounds,
            "digest": self._objective.data.digest,
        }

    def _concluded(self) -> dict[str, float]:
        path = self._out / "rates.json"
        if not path.exists():
            return {}
        held = read_json(path)
        check_table(held, {"settings": Mapping, "rates": dict[str, float]}, path)
        found = held["settings"]
        with contextlib.suppress(ValueError):  # settings that are none of today's are others
            recorded = RunConfig.from_dict({name: found[name] for name in _DECIDING if name in found})
            found = {**found, **_deciding(recorded)}
        if found != self._settings:
            raise ValueError(
                f"{self._out} holds a search for learning rates with other settings; "
                "give the same options, another --out, or --fresh to start over"
            )
        return {arch: rate for arch, rate in held["rates"].items() if arch in self._sizes}


_DECIDING = ("objective", "optim", "train")


def _deciding(run: RunConfig) -> dict[str, Any]:
    """All of these sections but what differs between trials, or decides nothing."""
    kept = {name: table for name, table in run.to_dict().items() if name in _DECIDING}
    for section, name in (("optim", "lr"), ("train", "tensorboard"), ("train", "threads"), ("train", "device")):
        del kept[section][name]
    return kept


def load_quality(run: RunConfig) -> float | None:
    """The final score of a run; None where it has not finished or not begun."""
    return load_run(run.directory).quality if (run.directory / "run.json").exists() else None
