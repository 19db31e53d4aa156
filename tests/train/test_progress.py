import contextlib
import os
import sys
from pathlib import Path

import pytest
from crossover.train.config import TrainConfig
from crossover.train.course import Course
from crossover.train.progress import Display, duration, farewell

pytestmark = pytest.mark.quick

BEGUN = Course(train=TrainConfig(steps=10))
TRAINED = {"step": 5, "seconds": 9.0, "train/loss": 1.25, "perf/tokens_per_second": 1234.5}


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0 s"), (59.6, "1:00 min"), (185, "3:05 min"), (3600, "1:00:00 h"), (7800, "2:10:00 h")]
)
def test_durations_read_well(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_without_a_terminal_lines_are_plain(capsys: pytest.CaptureFixture[str]) -> None:
    with Display(BEGUN) as display:
        display.say("[model] 100 %")
        display.trained(TRAINED, seconds_left=65)
        display.validated({"step": 5, "seconds": 9.0, "val/bits_per_byte": 2.0})
    assert capsys.readouterr().out.splitlines() == [
        "[model] 100 %",
        "step 5/10  loss 1.250  1,234 tokens/s  1:05 min left",
        "step 5/10  held out: 2.000 bits per byte",
    ]


@pytest.mark.parametrize("no_color", [False, True])
def test_on_a_terminal_there_is_a_bar(no_color: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "120")
    if no_color:
        monkeypatch.setenv("NO_COLOR", "1")
    else:
        monkeypatch.delenv("NO_COLOR", raising=False)
    outer, inner = os.openpty()
    with os.fdopen(inner, "w") as terminal:
        monkeypatch.setattr(sys, "stdout", terminal)
        with Display(BEGUN) as display:
            display.trained(TRAINED, seconds_left=65)
            display.say("[model] 100 %")
    shown = ""
    with contextlib.suppress(OSError):  # the end of a terminal whose other side is closed
        while chunk := os.read(outer, 65536):
            shown += chunk.decode()
    os.close(outer)
    assert "5/10" in shown
    assert "1:05 min left" in shown
    assert "[model] 100 %" in shown
    assert ("\x1b[38;" in shown or "\x1b[32m" in shown or "\x1b[35m" in shown) is not no_color


def test_the_end_of_a_run_that_did_not_finish_says_why() -> None:
    result = {"status": "out_of_memory", "steps": 3, "error": "can't allocate memory"}
    assert farewell(result, {}, Path("runs/x")) == "out of memory at step 3: can't allocate memory"
    result = {"status": "interrupted", "steps": 3, "error": "stopped by SIGINT"}
    assert farewell(result, {}, Path("runs/x")).endswith("stopped by SIGINT; the same command continues")
