import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from crossover.benchmarks.harness.processes import Child, last_line, ready, stop
from crossover.train.runtime import stop_signals

from ..scripts import Script

pytestmark = pytest.mark.quick

STUBBORN = Script("signal.signal(signal.SIGTERM, signal.SIG_IGN)", "print('up')", "time.sleep(60)")
POLITE = Script(
    "def save(signum, frame): time.sleep(0.2); print(f'saved on {signum}'); sys.exit()",
    "for signum in (signal.SIGINT, signal.SIGTERM): signal.signal(signum, save)",
    "print('up', os.getpid())",
    "time.sleep(60)",
)


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end(pid: int) -> None:
    deadline = time.monotonic() + 20
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    # one that nobody waits for stays as a zombie
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Callable[[Script], list[Child]]]:
    """Starts two children, with logs that are called first and second, and waits until they are up."""
    with contextlib.ExitStack() as alive:

        def start(work: Script) -> list[Child]:
            logs = [tmp_path / "first", tmp_path / "second"]
            children = [alive.enter_context(Child(work, None, log=log)) for log in logs]
            for log in logs:
                wait_for(log, "up")
            return children

        yield start


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_children_are_asked_to_stop_and_may_save(
    signum: signal.Signals, pair: Callable[[Script], list[Child]], tmp_path: Path
) -> None:
    children = pair(POLITE)
    assert [child.poll() for child in children] == [None, None]
    stop(children, signum, grace=20)
    assert [child.poll() for child in children] == [0, 0]
    assert [last_line(tmp_path / log) for log in ("first", "second")] == [f"saved on {signum.value}"] * 2


def test_a_child_that_does_not_stop_is_killed(pair: Callable[[Script], list[Child]]) -> None:
    children = pair(STUBBORN)
    stop(children, grace=0.2)
    assert [child.poll() for child in children] == [-signal.SIGKILL] * 2


@pytest.mark.usefixtures("interruptible")
def test_a_second_ctrl_c_kills_all_children_at_once(pair: Callable[[Script], list[Child]]) -> None:
    children = pair(STUBBORN)
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    begin = time.monotonic()
    with stop_signals(at_once=True):
        stop(children, grace=60)
    assert time.monotonic() - begin < 20
    assert [child.poll() for child in children] == [-signal.SIGKILL] * 2


PARENT = f"""
import pathlib, signal, sys, time
sys.path.append({str(Path(__file__).parents[1])!r})
from crossover.benchmarks.harness.processes import Child, stop
from crossover.train.runtime import stop_signals
from scripts import Script
def start(*lines, **options):
    return Child(Script(*lines), None, log=pathlib.Path(sys.argv[1]), **options)
"""
"""What a process begins with that starts a child, whose log is its first argument."""


@pytest.mark.parametrize("signum", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_of_a_command_leaves_it_to_the_command_how_children_end(
    signum: signal.Signals, tmp_path: Path
) -> None:
    code = f"""{PARENT}
child = start("def save(*_): time.sleep(0.5); print('saved'); sys.exit(7)",
    "signal.signal({signum.value}, save)", "print('up')", "time.sleep(60)")
signal.signal(signal.SIGINT, signal.default_int_handler)
try:
    with stop_signals(at_once=True):
        time.sleep(60)
except KeyboardInterrupt as asked:
    stop([child], asked.signum, grace=20)
    sys.exit(child.poll())
"""
    log = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)], start_new_session=True)
    wait_for(log, "up")
    os.killpg(parent.pid, signum)
    assert parent.wait(20) == 7
    assert last_line(log) == "saved"


@pytest.mark.parametrize("preload", ["()", "None"])
def test_a_child_may_save_when_its_parent_is_killed(preload: str, tmp_path: Path) -> None:
    code = f"{PARENT}\nchild = start(*{POLITE.lines}, preload={preload}, orphaned=signal.SIGTERM)\ntime.sleep(60)"
    log = tmp_path / "child"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)])
    wait_for(log, "up")
    parent.kill()
    parent.wait(20)
    wait_for(log, f"saved on {signal.SIGTERM.value}")


@pytest.mark.parametrize("preload", [(), None])
def test_a_child_is_told_and_answers_in_whole_objects(tmp_path: Path, preload: tuple[str, ...] | None) -> None:
    echo = Script("parent.send(order)", "while True: parent.send([parent.recv()])")
    order = {"path": tmp_path, "number": 0.1}
    with Child(echo, order, log=tmp_path / "log", preload=preload) as child:
        assert child.receive(timeout=20) == order
        for word in ("one", "two"):
            child.send(word)
            assert child.receive(timeout=20) == [word]
        assert child.join() == 1  # the line has ended: EOFError
    assert last_line(tmp_path / "log") == "EOFError"


def test_what_a_child_prints_is_no_message(tmp_path: Path) -> None:
    prints = Script("print('hello')", "os.system('echo from a program')", "os.write(2, b'from C')", "parent.send(1)")
    with Child(prints, None, log=tmp_path / "log") as child:
        assert child.receive(timeout=20) == 1
        with pytest.raises(EOFError):
            child.receive(timeout=20)
        assert child.join() == 0
    assert {"hello", "from a program", "from C"} <= set((tmp_path / "log").read_text().replace("C", "C\n").splitlines())


def test_a_child_that_has_ended_is_told_apart_from_one_that_is_silent(tmp_path: Path) -> None:
    with Child(Script("time.sleep(60)"), None, log=tmp_path / "log") as child:
        begin, calls = time.monotonic(), []
        with pytest.raises(TimeoutError):
            child.receive(timeout=1.2, meanwhile=lambda: calls.append(time.monotonic()))
        assert 1.2 <= time.monotonic() - begin < 20
        assert len(calls) >= 2
        child.kill()
        assert child.join() == -signal.SIGKILL


@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("sys.exit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV),
        ("raise ValueError('no')", 1),
        ("", 0),
    ],
)
def test_a_child_says_what_it_has_to_say_and_how_it_ended(end: str, code: int, tmp_path: Path) -> None:
    with Child(Script("parent.send('last words')", end), None, log=tmp_path / "log") as child:
        assert child.receive(timeout=20) == "last words"
        with pytest.raises(EOFError):
            child.receive(timeout=20)
        child.send("too late")  # and nothing happens
        assert child.join() == code


def test_a_child_that_dies_in_the_middle_of_a_message_has_ended(tmp_path: Path) -> None:
    torn = Script("os.write(parent.fileno(), (100).to_bytes(4, 'big') + b'torn')")
    with Child(torn, None, log=tmp_path / "log") as child, pytest.raises(EOFError):
        child.receive(timeout=20)


def test_what_a_child_has_started_does_not_outlive_its_end_or_hold_the_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    forks = "if os.fork() == 0: print('up', os.getpid(), flush=True); time.sleep(60)"
    with Child(Script(forks, "os._exit(4)"), None, log=log) as child:
        begin = time.monotonic()
        with pytest.raises(EOFError):
            child.receive(timeout=60)
        assert time.monotonic() - begin < 30
        assert child.join() == 4
    log.unlink()
    with Child(Script(forks, "time.sleep(60)"), None, log=log):
        wait_for(log, "up")
    wait_for_end(int(log.read_text().split()[1]))


@pytest.mark.skipif(sys.platform != "linux", reason="children are forked on Linux only")
def test_a_child_whose_server_is_killed_has_ended_and_the_next_one_is_none_the_worse(tmp_path: Path) -> None:
    with Child(
        Script("parent.send((os.getpid(), os.getppid()))", "time.sleep(60)"), None, log=tmp_path / "log"
    ) as child:
        pid, server = child.receive(timeout=20)
        os.kill(server, signal.SIGKILL)
        with pytest.raises(EOFError):
            child.receive(timeout=20)
        assert child.wait(20) == -signal.SIGKILL
        wait_for_end(pid)
    with Child(Script("parent.send(1)"), None, log=tmp_path / "log") as child:
        assert child.receive(timeout=20) == 1


def test_of_several_children_those_that_speak_or_end_are_ready(tmp_path: Path) -> None:
    scripts = (Script("parent.send('word')", "time.sleep(60)"), Script(), Script("time.sleep(60)"))
    with contextlib.ExitStack() as alive:
        speaks, ends, sleeps = (alive.enter_context(Child(script, None, log=tmp_path / "log")) for script in scripts)
        found: set[Child] = set()
        while found != {speaks, ends}:
            found |= set(ready([speaks, ends, sleeps], timeout=20))
        assert ready([sleeps], timeout=0) == []


@pytest.mark.parametrize("work", ["parent.recv()", "time.sleep(60)"])
@pytest.mark.parametrize("preload", ["()", "None"])
def test_a_child_ends_when_its_parent_is_killed_whatever_it_does(work: str, preload: str, tmp_path: Path) -> None:
    code = f"""{PARENT}
child = start("print('up', os.getpid())", {work!r}, preload={preload})
time.sleep(60)
"""
    log = tmp_path / "log"
    parent = subprocess.Popen([sys.executable, "-c", code, str(log)])
    wait_for(log, "up")
    parent.kill()
    parent.wait(20)
    wait_for_end(int(log.read_text().split()[1]))


def test_without_preloading_a_child_is_a_new_process(tmp_path: Path) -> None:
    for preload, is_own in (((), sys.platform != "linux"), (None, True)):
        with Child(Script("parent.send(os.getppid())"), None, log=tmp_path / "log", preload=preload) as child:
            assert (child.receive(timeout=20) == os.getpid()) is is_own


def test_forks_share_nothing_but_the_preloaded_modules(tmp_path: Path) -> None:
    marked = Script("import json", "parent.send(hasattr(json, 'mark'))", "json.mark = 1")
    for _ in range(2):
        with Child(marked, None, log=tmp_path / "log") as child:
            assert child.receive(timeout=20) is False
