import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from crossover.benchmarks.harness.processes import Fork, environment, last_line, start, stop
from crossover.train.runtime import stop_signals

STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = """
import signal, sys, time
def save(signum, frame):
    time.sleep(0.2)
    print(f'saved on {signum}', flush=True)
    sys.exit()
for signum in (signal.SIGINT, signal.SIGTERM): signal.signal(signum, save)
print('up', flush=True)
time.sleep(60)
"""


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_children_are_asked_to_stop_and_may_save(signum: signal.Signals, tmp_path: Path) -> None:
    logs = [tmp_path / "first", tmp_path / "second"]
    children = [start([sys.executable, "-c", POLITE], threads=None, log=log) for log in logs]
    for log in logs:
        wait_for(log, "up")
    stop(children, signum, grace=20)
    assert [child.returncode for child in children] == [0, 0]
    assert [last_line(log) for log in logs] == [f"saved on {signum.value}"] * 2


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start([sys.executable, "-c", STUBBORN], threads=None, log=log)
    wait_for(log, "up")
    stop([child], grace=0.2)
    assert child.returncode == -signal.SIGKILL


def test_a_second_ctrl_c_kills_all_children_at_once(tmp_path: Path) -> None:
    logs = [tmp_path / "first", tmp_path / "second"]
    children = [start([sys.executable, "-c", STUBBORN], threads=None, log=log) for log in logs]
    for log in logs:
        wait_for(log, "up")
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with stop_signals(at_once=True):
        stop(children, grace=60)
    assert time.monotonic() - begin < 20
    assert [child.returncode for child in children] == [-signal.SIGKILL] * 2


def test_a_child_leads_its_own_session_so_that_ctrl_c_reaches_the_parent_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start([sys.executable, "-c", "import os; print(os.getsid(0), os.getpid())"], threads=1, log=log)
    child.wait(20)
    session, pid = map(int, log.read_text().split())
    assert session == pid
    assert session != os.getsid(0)


def test_every_child_gets_the_same_number_of_threads() -> None:
    assert environment(2)["OMP_NUM_THREADS"] == "2"
    assert environment(None).get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS")


def test_a_fork_writes_output_and_messages_apart_and_leads_its_own_session(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getsid(0) == os.getpid(), flush=True); print('message', file=sys.stderr)"
    child = Fork(exec, code, log=tmp_path / "log")
    with os.fdopen(os.dup(child.output)) as output:
        assert output.read() == "True\n"
    assert child.join() == 0
    assert last_line(tmp_path / "log") == "message"


def test_a_fork_tells_how_it_ended(tmp_path: Path) -> None:
    assert Fork(exec, "import sys; sys.exit(3)", log=tmp_path / "log").join() == 3
    assert Fork(exec, "import os; os.kill(os.getpid(), 9)", log=tmp_path / "log").join() == -signal.SIGKILL
    child = Fork(exec, "import time; time.sleep(60)", log=tmp_path / "log")
    child.kill()


@pytest.mark.parametrize("preload", [(), None])
def test_a_fork_reads_what_it_is_told_until_it_is_joined(tmp_path: Path, preload: tuple[str, ...] | None) -> None:
    echo = "import sys\nfor line in sys.stdin: print(line.upper(), end='', flush=True)\nprint('end', flush=True)"
    child = Fork(exec, echo, log=tmp_path / "log", preload=preload)
    with os.fdopen(os.dup(child.output)) as output:
        for word in ("one", "two"):
            child.tell(word)
            assert output.readline() == f"{word.upper()}\n"
        assert child.join() == 0
        assert output.read() == "end\n"


def test_telling_a_fork_that_has_ended_does_nothing(tmp_path: Path) -> None:
    child = Fork(exec, "", log=tmp_path / "log")
    with os.fdopen(os.dup(child.output)) as output:
        assert output.read() == ""
    child.tell("too late")
    assert child.join() == 0


def test_a_fork_that_waits_to_be_told_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    waiting = "import sys; sys.stderr.write('up '); sys.stderr.flush(); sys.stdin.read(); sys.stderr.write('ended')"
    code = "import pathlib, sys, time; from crossover.benchmarks.harness.processes import Fork; "
    code += f"children = [Fork(exec, {waiting!r}, log=pathlib.Path(name)) for name in sys.argv[1:]]; time.sleep(60)"
    logs = [tmp_path / "first", tmp_path / "second"]
    parent = start([sys.executable, "-c", code, *map(str, logs)], threads=1, log=tmp_path / "log")
    for log in logs:
        wait_for(log, "up")
    parent.kill()
    parent.wait(20)
    for log in logs:
        wait_for(log, "ended")


def test_without_preloading_a_child_is_a_new_process(tmp_path: Path) -> None:
    code = "import os, sys; print(os.getppid(), flush=True)"
    for preload, is_own in (((), False), (None, True)):
        child = Fork(exec, code, log=tmp_path / "log", preload=preload)
        with os.fdopen(os.dup(child.output)) as output:
            assert (int(output.read()) == os.getpid()) is is_own
        child.join()


def test_forks_share_nothing_but_the_preloaded_modules(tmp_path: Path) -> None:
    marked = "import sys, json; print(hasattr(json, 'mark'), flush=True); json.mark = 1"
    for _ in range(2):
        child = Fork(exec, marked, log=tmp_path / "log")
        with os.fdopen(os.dup(child.output)) as output:
            assert output.read() == "False\n"
        child.join()
