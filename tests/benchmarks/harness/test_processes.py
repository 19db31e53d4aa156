import os
import signal
import sys
import time
from pathlib import Path

import pytest
from crossover.benchmarks.harness.processes import Fork, Stopped, environment, last_line, start, stop, stop_on_signals

STUBBORN = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
POLITE = """
import time
print('up', flush=True)
try: time.sleep(60)
except KeyboardInterrupt: print('saved', flush=True)
"""


def wait_for(log: Path, text: str) -> None:
    deadline = time.monotonic() + 20
    while text not in (log.read_text() if log.exists() else ""):
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.usefixtures("interruptible")
def test_a_child_is_asked_to_stop_and_may_save(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start([sys.executable, "-c", POLITE], threads=None, log=log)
    wait_for(log, "up")
    stop(child, grace=20)
    assert child.returncode == 0
    assert last_line(log) == "saved"


def test_a_child_that_does_not_stop_is_killed(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start([sys.executable, "-c", STUBBORN], threads=None, log=log)
    wait_for(log, "up")
    stop(child, grace=0.2)
    assert child.returncode == -signal.SIGKILL


def test_a_child_leads_its_own_session_so_that_ctrl_c_reaches_the_parent_alone(tmp_path: Path) -> None:
    log = tmp_path / "log"
    child = start([sys.executable, "-c", "import os; print(os.getsid(0), os.getpid())"], threads=1, log=log)
    child.wait(20)
    session, pid = map(int, log.read_text().split())
    assert session == pid
    assert session != os.getsid(0)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_become_one_exception_with_the_exit_code(signum: int, code: int) -> None:
    def be_stopped() -> None:
        os.kill(os.getpid(), signum)
        time.sleep(5)

    before = signal.getsignal(signum)
    with pytest.raises(Stopped) as stopped, stop_on_signals():
        be_stopped()
    assert stopped.value.exit_code == code
    assert signal.getsignal(signum) is before


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
