import subprocess
import sys
import threading
from pathlib import Path

import pytest
from crossover.train.turns import TURN_SECONDS, Turns, folder_of_turns

pytestmark = pytest.mark.quick


def test_runs_take_turns_of_some_seconds_of_training_each() -> None:
    order: list[str] = []
    is_next = {name: threading.Event() for name in "ab"}

    def train(name: str, other: str, folder: Path) -> None:
        with Turns(folder, wait=lambda _: is_next[name].set()) as turns:
            for step in range(8):
                assert order.count(other) == 8 or is_next[other].wait(60)
                turns.pass_on(step * TURN_SECONDS / 2)
                is_next[name].clear()
                order.append(name)

    with folder_of_turns(["a", "b"], at_once=1) as folder:
        threads = [threading.Thread(target=train, args=(*names, folder)) for names in ("ab", "ba")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert Turns(folder).runs == ["a", "b"]
    assert not folder.exists()
    first, second = dict.fromkeys(order)
    assert "".join(order) == 4 * (2 * first + 2 * second)


def test_as_many_work_at_a_time_as_are_allowed_to_and_one_that_dies_makes_room() -> None:
    holding = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print(flush=True); input()"

    class Full(Exception):
        pass

    def full(_: float) -> None:
        raise Full

    with folder_of_turns([], at_once=2) as folder, Turns(folder):
        command = [sys.executable, "-c", holding, str(folder / "slot-1")]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None
            other.stdout.readline()
            for _ in range(2):  # one that is stopped while it waits does not keep the door shut
                with pytest.raises(Full), Turns(folder, wait=full):
                    pass
            other.kill()
        with Turns(folder, wait=full):
            pass


def test_without_others_it_is_always_ones_turn_and_a_folder_must_be_one_of_turns(tmp_path: Path) -> None:
    with Turns(None) as turns:
        turns.pass_on(1e9)
        assert turns.runs == []
    with pytest.raises(ValueError, match="is not the folder of runs that take turns: leave it out"):
        Turns(tmp_path)
