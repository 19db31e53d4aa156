"""Races of whole models: that they take turns and leave alone, what a row says, and that the peers compute the same."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.benchmarks.harness.processes import Child
from crossover.benchmarks.operations import peers
from crossover.train.runtime import Interrupted, stop_signals

from ..scripts import Script

ORDER = {"arch": "mamba", "n_params": 60_000, "batch_size": 2, "seq_len": 8, "threads": 1}
NAMES = (
    "our mamba",
    "transformers MambaForCausalLM, as it comes",
    "transformers MambaForCausalLM, freed memory kept as in ours",
)
HANG = "time.sleep(60)"


@pytest.fixture(autouse=True)
def _threads_left_as_they_are() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def children(monkeypatch: pytest.MonkeyPatch) -> list[Child]:
    """Every child that a race has started."""
    started: list[Child] = []
    monkeypatch.setattr(
        peers, "Child", lambda *given, **options: started.append(Child(*given, **options)) or started[-1]
    )
    return started


def contestant(*turns: float | str, ready: str = "parent.send(7)") -> Script:
    """A process whose training steps are said to take these seconds, one after the other, or which runs this code."""
    steps = [turn if isinstance(turn, str) else f"parent.send({turn})" for turn in turns]
    return Script(
        ready,
        f"for step in {steps}:",
        "    parent.recv()",
        "    print('turn', time.monotonic_ns(), flush=True)",
        "    exec(step)",
        "parent.recv()",
    )


def race(monkeypatch: pytest.MonkeyPatch, folder: Path, *scripts: Script) -> list[dict[str, Any]]:
    """The rows of a race of three processes that run these scripts."""
    left, child = list(scripts), peers.Child
    with monkeypatch.context() as patch:
        patch.setattr(peers, "Child", lambda work, order, log, preload: child(left.pop(0), order, log=log))
        return peers.race_rows(ORDER, time_box=0.0, logs=folder)


@pytest.mark.quick
def test_the_ratio_is_the_median_over_turns_and_the_first_turn_does_not_count(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    scripts = contestant(9, 1, 2, 4), contestant(9, 3, 4, 20), contestant(0.1, 2, 1, 4)
    ours, theirs, kept = race(monkeypatch, tmp_path, *scripts)
    assert (ours["ratio"], theirs["ratio"], kept["ratio"]) == (None, 3.0, 1.0)
    assert (theirs["ratio_quartiles"], kept["ratio_quartiles"]) == ([2.5, 4.0], [0.75, 1.5])
    assert [row["tokens_per_second"] for row in (ours, theirs, kept)] == [8.0, 4.0, 8.0]
    assert [row["text"] for row in (ours, theirs)] == [
        "our mamba, 7 parameters, B=2 L=8: 8 tokens/s",
        "transformers MambaForCausalLM, as it comes, 7 parameters, B=2 L=8: 4 tokens/s; "
        "ours trains 3.00 times as many (2.50 to 4.00 in the middle half of 3 turns)",
    ]
    assert (kept["model"], kept["who"], kept["keeps_freed_memory"], kept["repeats"]) == ("mamba", "theirs", True, 3)
    assert tuple(row["name"] for row in (ours, theirs, kept)) == NAMES


def test_contestants_take_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    race(monkeypatch, tmp_path, *[contestant(1, 1, 1, 1)] * 3)
    logs = [tmp_path / f"peer-mamba-{name}.log" for name in ("ours-kept", "theirs-default", "theirs-kept")]
    turns = [(int(line.split()[1]), i) for i, log in enumerate(logs) for line in log.read_text().splitlines()]
    assert [i for _, i in sorted(turns)] == [0, 1, 2] * 4


def test_a_slow_contestant_has_one_turn_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    scripts = contestant(50, 2, 1, 1), contestant(40, HANG), contestant(8, 6, 3, 3)
    ours, theirs, kept = race(monkeypatch, tmp_path, *scripts)
    assert (theirs["ratio"], theirs["ratio_quartiles"], theirs["repeats"]) == (20.0, None, 1)
    assert theirs["text"].endswith("ours trains 20.00 times as many (one turn)")
    assert (ours["repeats"], kept["repeats"], kept["ratio"]) == (3, 3, 3.0)


def test_a_contestant_that_is_late_or_dies_leaves_with_its_reason_and_the_others_go_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: list[Child]
) -> None:
    monkeypatch.setattr(peers, "_DEADLINE", 3.0)
    ours, late, dead = race(
        monkeypatch, tmp_path, contestant(1, 1, 1, 1), contestant(1, HANG), contestant(1, 1, "sys.exit('no memory')")
    )
    assert (ours["error"], ours["repeats"]) == (None, 3)
    assert late["error"] == "no training step within 3 s"
    assert dead["error"].startswith("failed with code 1: no memory (log: ")
    assert late["text"] == f"{NAMES[1]}, B=2 L=8: no training step within 3 s"
    assert [child.join() for child in children] == [-signal.SIGKILL, -signal.SIGKILL, 1]


def test_without_a_model_of_ours_theirs_are_measured_and_without_theirs_ours(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fails = contestant(ready="sys.exit('cannot be built')")
    rows = race(monkeypatch, tmp_path, fails, contestant(1, 1, 1, 1), contestant(1, 2, 2, 2))
    assert rows[0]["text"].startswith("our mamba, B=2 L=8: failed with code 1: cannot be built")
    assert [(row["tokens_per_second"], row["ratio"]) for row in rows[1:]] == [(16.0, None), (8.0, None)]
    (ours, *_) = race(monkeypatch, tmp_path, contestant(1, 1, 1, 1), fails, fails)
    assert ours["tokens_per_second"] == 16.0


@pytest.mark.usefixtures("interruptible")
def test_a_race_that_is_stopped_leaves_no_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, children: list[Child]
) -> None:
    interrupts = contestant(1, f"os.kill({os.getpid()}, signal.SIGINT); {HANG}")
    with pytest.raises(Interrupted), stop_signals(at_once=True):
        race(monkeypatch, tmp_path, contestant(1, 1, 1), interrupts, contestant(1, 1, 1))
    assert [child.join() for child in children] == [-signal.SIGKILL] * 3


@pytest.mark.parametrize("arch", peers.PEERS)
def test_the_peer_computes_the_same_without_dropout(arch: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    lm = peers.build(arch, n_params=60_000, vocab_size=256)
    peer = peers.peer_of(lm)
    tokens = torch.randint(256, (2, 13))
    assert type(peer).__name__ == peers.PEERS[arch]
    assert peer.training
    assert sum(p.numel() for p in peer.parameters()) == lm.n_params
    torch.testing.assert_close(peer(input_ids=tokens).logits, lm(tokens).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("who", ["ours", "theirs"])
def test_a_process_trains_once_for_every_time_it_is_told(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    monkeypatch.setattr(peers, "_BURST", 0.0)
    ours, theirs = multiprocessing.Pipe()
    for _ in range(2):
        ours.send("take a turn")
    order = {**ORDER, "arch": "gpt2", "who": who, "keeps_freed_memory": False}
    process = threading.Thread(target=peers.take_turns_when_told, args=(order, theirs))
    process.start()
    n_params, *turns = (ours.recv() for _ in range(3))
    ours.close()
    process.join(60)
    assert not process.is_alive()
    assert n_params == peers.build("gpt2", n_params=60_000, vocab_size=256, device="meta").n_params
    assert all(seconds > 0 for seconds in turns)


@pytest.mark.quick
@pytest.mark.parametrize("step", ["our_step", "their_step"])
def test_a_training_step_changes_every_parameter(step: str) -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    lm = peers.build("transformer", n_params=60_000, vocab_size=256)
    model = lm if step == "our_step" else peers.peer_of(lm)
    before = [p.detach().clone() for p in model.parameters()]
    getattr(peers, step)(model)(torch.arange(256).view(2, 128))
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_contestant_in_a_process_of_its_own_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "_CONTESTANTS", (("ours", True),))
    (row,) = peers.race_rows(ORDER, time_box=0.0, logs=tmp_path)
    assert row["error"] is None
    assert row["repeats"] == peers._MIN_TURNS
    assert row["tokens_per_second"] > 0
