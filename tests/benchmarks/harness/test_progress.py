import io

import pytest
from crossover.benchmarks.harness.progress import Progress, Schedule, Task


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


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(stream: io.StringIO) -> str:
    now = iter(range(0, 1000, 10))
    progress = Progress(
        Schedule(tasks(), known=frozenset({"cell"})), stream=stream, clock=lambda: float(next(now)), every=25
    )
    progress.begin("a")
    for i in range(1, 5):
        progress.update("a", i / 5, f"step {i}/5")
    progress.finish("a", "2.100 bits per byte")
    return stream.getvalue()


def test_plain_output_has_few_lines_and_no_control_characters() -> None:
    text = shown(io.StringIO())
    assert "\x1b" not in text
    assert "\r" not in text
    assert 2 <= text.count("\n") <= 4
    assert "a: 2.100 bits per byte" in text
    assert "left]" in text


def test_a_terminal_sees_one_line_that_renews_itself() -> None:
    text = shown(_Terminal())
    assert text.count("\n") == 1
    assert "step 4/5" in text
    assert text.count("\r\x1b[2K") >= 5
