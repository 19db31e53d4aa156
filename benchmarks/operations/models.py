"""Training steps and decoded tokens of whole models, raced against peers, another checkout and the floor, and profiles.

A training step is of 4,096 tokens, or of one sequence that is longer. A token is decoded after 64 others, of one
sequence.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...archs import available
from ..harness.progress import StatusLine
from .contestants import OURS, Contestant, Race, contestant, contestant_of, race
from .peers import PEERS
from .profiles import shares, shares_by_kind
from .turns import Task

if TYPE_CHECKING:
    from .options import KernelsConfig

__all__ = ["FLOOR", "PRODUCTS", "absent_rows", "decoding_rows", "profile_rows", "training_rows"]

TOKENS = 4096
"""Tokens of a training step, unless one sequence has more."""
CONTEXT_LEN = 64
"""Tokens before the one that is decoded."""
FLOOR = "floor"
"""The contestant that reads as many bytes as a token must."""
PRODUCTS = "torch.mv"
"""The contestant that multiplies by the matrices of a token and does nothing else."""

_BURSTS = {"train": 0.3, "profile": 0.0, "decode": 0.05}
"""Seconds of a turn, unless one step or token takes longer: a token's is over soon."""
_PROFILES = 3
"""Steps that are profiled."""

_Turn = Callable[[], dict[str, Any] | None]


def absent_rows(config: KernelsConfig) -> Iterator[dict[str, Any]]:
    """A row for each way to install peers that are not here."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    for peer in PEERS.values():
        if peer.missing and peer.arch in _archs(config):
            lacking.setdefault(tuple(peer.missing), []).append(peer.name)
    for commands, names in lacking.items():
        yield {"kind": "absent", "peers": names, "install": list(commands)}


def training_rows(
    config: KernelsConfig, *, threads: Sequence[int], logs: Path, status: StatusLine
) -> Iterator[dict[str, Any]]:
    """Races training steps of every size: a row for each architecture with a peer, length and number of threads."""
    for n_params in config.params:
        for arch in _archs(config):
            names = [peer.name for peer in PEERS.values() if peer.arch == arch and not peer.missing]
            if not names and config.against is None:
                continue
            with _started(config, arch, n_params, names, work="train", logs=logs) as racing:
                for length in config.model_lengths:
                    for n in threads:
                        status.show(f"training {arch}, {n_params:,} parameters, {length} tokens, {n} threads ...")
                        task = _task("train", length, max(1, TOKENS // length), threads=n)
                        turns = {c.name: functools.partial(c.turn, task) for c in racing}
                        row = _row(arch, task, racing, turns, config)
                        yield {"kind": "training", **row, "seq_len": length, "batch_size": task["batch_size"]}


def profile_rows(
    config: KernelsConfig, *, threads: Sequence[int], logs: Path, status: StatusLine
) -> Iterator[dict[str, Any]]:
    """Profiles training steps of every size on one thread, whatever `threads` are: a row for each decoder and length.

    Shares are by name of the operator and by kind, of ours and of the other checkout, whose steps take turns.
    """
    for n_params in config.params:
        for arch in _archs(config):
            with _started(config, arch, n_params, [], work="profile", logs=logs) as racing:
                for length in config.model_lengths:
                    status.show(f"profiling {arch}, {n_params:,} parameters, {length} tokens ...")
                    task = _task("profile", length, max(1, TOKENS // length), threads=1)
                    found: dict[str, list[dict[str, Any]]] = {}
                    for i in range(1 + _PROFILES):
                        for one in racing:
                            answer = one.turn(task)
                            if answer is not None and i:  # the first step loads what long sequences need
                                found.setdefault(one.name, []).append(answer)
                    yield _profile_row(arch, task, found, {c.name: c.error for c in racing if c.error is not None})


def _profile_row(
    arch: str, task: Task, found: Mapping[str, Sequence[Mapping[str, Any]]], errors: Mapping[str, str]
) -> dict[str, Any]:
    steps = {name: answers for name, answers in found.items() if name not in errors}
    names = {name: shares([answer["names"] for answer in answers]) for name, answers in steps.items()}
    turns = {name: [answer["seconds"] for answer in answers] for name, answers in steps.items()}
    return {
        "kind": "profile",
        "arch": arch,
        "n_params": steps[OURS][-1]["n_params"] if OURS in steps else None,
        "seq_len": task["length"],
        "batch_size": task["batch_size"],
        "threads": 1,
        "clock": "cpu",
        "dtype": "float32",
        **Race(turns=turns).row(),
        "kinds": {name: shares_by_kind(arch, by_name) for name, by_name in names.items()},
        "names": names,
        "errors": dict(errors),
    }


def decoding_rows(
    config: KernelsConfig, *, threads: Sequence[int], logs: Path, status: StatusLine
) -> Iterator[dict[str, Any]]:
    """Races decoding of every size: a row for each decoder and number of threads."""
    for n_params in config.decode_params:
        for arch in _archs(config):
            names = [p.name for p in PEERS.values() if p.arch == arch and p.decodes and not p.missing]
            with _started(config, arch, n_params, names, work="decode", logs=logs) as racing:
                for n in threads:
                    status.show(f"decoding {arch}, {n_params:,} parameters, {n} threads ...")
                    task = _task("decode", CONTEXT_LEN, 1, threads=n)
                    turns: dict[str, _Turn] = {c.name: functools.partial(c.turn, task) for c in racing}
                    turns[PRODUCTS] = functools.partial(racing[0].turn, {**task, "work": "products"})
                    turns[FLOOR] = functools.partial(racing[0].turn, {**task, "work": "read"})
                    row = _row(arch, task, racing, turns, config)
                    floor = row["ratios"].get(FLOOR)
                    times = None if floor is None else 1 / floor
                    yield {"kind": "decoding", **row, "context_len": CONTEXT_LEN, "times_floor": times}


def _task(work: str, length: int, batch_size: int, *, threads: int) -> Task:
    return {"work": work, "length": length, "batch_size": batch_size, "threads": threads, "burst": _BURSTS[work]}


def _archs(config: KernelsConfig) -> Sequence[str]:
    return config.archs or available()


@contextlib.contextmanager
def _started(
    config: KernelsConfig, arch: str, n_params: int, names: Sequence[str], *, work: str, logs: Path
) -> Iterator[list[Contestant]]:
    """Contestants of one architecture at one size, ours first, ready for their work; no process outlives it."""
    order = {"arch": arch, "n_params": n_params}
    with contextlib.ExitStack() as alive:
        racing = [
            alive.enter_context(contestant({**order, "who": who}, logs=logs, patience=config.patience))
            for who in (OURS, *names)
        ]
        if config.against is not None:
            before = contestant_of(config.against, order, logs=logs, patience=config.patience)
            racing.insert(1, alive.enter_context(before))
        for one in racing:
            one.warm_up(_task(work, 16, 1, threads=1))
        yield racing


def _row(
    arch: str, task: Task, racing: Sequence[Contestant], turns: Mapping[str, _Turn], config: KernelsConfig
) -> dict[str, Any]:
    found = race(turns, time_box=config.time_box * _BURSTS[task["work"]])
    facts = {name: said for name, said in found.facts.items() if name in found.turns}
    return {
        "arch": arch,
        "n_params": facts.get(OURS, {}).get("n_params"),
        "threads": task["threads"],
        "clock": "cpu" if task["threads"] == 1 else "wall",
        "dtype": "float32",
        **found.row(),
        "facts": facts,
        "errors": {c.name: c.error for c in racing if c.error is not None},
    }
