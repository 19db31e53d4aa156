import io
import re

import pytest
from crossover.benchmarks.harness.progress import Progress, Schedule, StatusLine, Task

pytestmark = pytest.mark.quick


def tasks() -> list[Task]:
    return [
        Task(name="a", kind="train", cost=100),
        Task(name="b", kind="train", cost=300),
        Task(name="c", kind="cell", cost=10),
    ]


def test_time_left_is_unknown_until_something_of_each_kind_has_run() -> None:
    schedule = Schedule(tasks(), known=frozenset({"cell"}))
    assert schedule.remaining() is None
    schedule.update("a", seconds=5, fraction=0.5)  # 10 s per 100 units
    assert schedule.remaining() == pytest.approx(5 + 30 + 10)


def test_finished_tasks_correct_the_estimate_of_their_kind() -> None:
    schedule = Schedule(tasks(), known=frozenset({"cell"}))
    schedule.finish("a", seconds=50)
    assert schedule.remaining() == pytest.approx(150 + 10)
    schedule.finish("c", seconds=40)
    assert schedule.remaining() == pytest.approx(150)
    assert schedule.done == "2/3"


def test_skipped_tasks_cost_nothing() -> None:
    schedule = Schedule(tasks(), known=frozenset({"cell"}))
    schedule.skip("a")
    schedule.skip("b")
    assert schedule.remaining() == pytest.approx(10)


def test_nothing_is_left_at_the_end() -> None:
    schedule = Schedule(tasks())
    for task in tasks():
        schedule.finish(task.name, 1.0)
    assert schedule.remaining() == 0


class Terminal(io.StringIO):
    """A terminal: `screen` is what its reader sees of what was written, wherever the cursor went meanwhile."""

    def isatty(self) -> bool:
        return True

    @property
    def screen(self) -> list[str]:
        rows, row, column = [""], 0, 0
        for code, character in re.findall(r"\x1b\[([?\d;]*[A-Za-z])|(.)", self.getvalue(), re.DOTALL):
            if code == "2K":
                rows[row] = ""
            elif code.endswith("A"):
                row -= int(code[:-1] or 1)
            elif character == "\r":
                column = 0
            elif character == "\n":
                row, column = row + 1, 0
                rows += [""] * (row == len(rows))
            elif character:
                rows[row] = rows[row][:column].ljust(column) + character + rows[row][column + 1 :]
                column += 1
        return [line.rstrip() for line in rows]


@pytest.fixture(autouse=True)
def _usual_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "60")


def work(stream: io.StringIO) -> None:
    now = iter(range(0, 1000, 10))
    schedule = Schedule(tasks(), known=frozenset({"cell"}))
    with Progress(schedule, stream=stream, clock=lambda: float(next(now)), every=25) as progress:
        progress.say("[not] markup")
        progress.begin("a")
        for i in range(1, 5):
            progress.update("a", i / 5, f"step {i}/5")
        progress.finish("a", "2.100 bits per byte")


def test_plain_output_has_few_lines_and_no_control_characters() -> None:
    stream = io.StringIO()
    work(stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert "\r" not in text
    assert text.splitlines() == [
        "[not] markup",
        "    0/3  a step 1/5  [30 s, about 6:30 min left]",
        "    0/3  a step 4/5  [1:00 min, about 3:30 min left]",
        "    1/3  a: 2.100 bits per byte  [1:10 min, about 3:10 min left]",
    ]


def test_a_terminal_that_knows_no_control_characters_gets_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    stream = Terminal()
    work(stream)
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 4


def test_a_terminal_sees_one_line_that_renews_itself() -> None:
    stream = Terminal()
    work(stream)
    shown = stream.getvalue()
    assert all(f"step {i}/5" in shown for i in range(1, 5))
    assert [line for line in stream.screen if line] == [
        "[not] markup", "    1/3  a: 2.100 bits per byte  [1:10 min, about 3:10 min left]"
    ]  # fmt: skip


def test_the_line_is_as_wide_as_the_terminal_and_goes_at_the_end() -> None:
    stream = Terminal()
    with StatusLine(stream) as line:
        line.say("stays")
        line.show("x" * 100)
        assert [len(row) for row in stream.screen] == [5, 60]
        line.say("stays, too")
        line.show("short")
        assert stream.screen == ["stays", "stays, too", "short"]
    assert [row for row in stream.screen if row] == ["stays", "stays, too"]


def test_a_command_that_is_stopped_leaves_the_cursor_as_it_was() -> None:
    stream = Terminal()

    def be_stopped() -> None:
        with StatusLine(stream) as line:
            line.show("at work")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        be_stopped()
    assert stream.getvalue().rfind("?25h") > stream.getvalue().rfind("?25l")
    assert not any(stream.screen)
