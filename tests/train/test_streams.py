"""What is printed never ends the work that prints it."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.quick

WORK = """
import sys
from crossover.train.streams import lasting_streams
lasting_streams()
lasting_streams()  # twice is as good as once
for _ in range(3):
    print('\\u2192 \\u00fcber', flush=True)
print('at the end')
sys.stderr.write('said\\n')
open(sys.argv[1], 'w').write('done')
"""
GIVEN_UP = "warning: standard output is given up ({}); the work goes on\nsaid\n"


def work(tmp_path: Path, redirections: str = "", encoding: str = "utf-8", **streams: Any) -> tuple[bytes, bytes]:
    """Standard output and error of a process that works under a shell's redirections."""
    file = tmp_path / "file"
    command = ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-c", WORK, str(file)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    done = subprocess.run(command, check=True, env={**os.environ, "PYTHONIOENCODING": encoding}, **streams)
    assert file.read_text() == "done"
    return done.stdout, done.stderr


@pytest.mark.parametrize(
    ("redirections", "said"),
    [
        ("> /dev/full", GIVEN_UP.format("No space left on device")),
        (">&-", GIVEN_UP.format("it is closed")),
        ("2>&-", ""),
        ("2> /dev/full", ""),
        (">&- 2>&- <&-", ""),
    ],
)
def test_output_that_nobody_takes_is_given_up_with_one_warning(redirections: str, said: str, tmp_path: Path) -> None:
    assert work(tmp_path, redirections)[1].decode() == said


def test_output_whose_reader_has_gone_is_given_up_with_one_warning(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert work(tmp_path, stdout=writer)[1].decode() == GIVEN_UP.format("nobody reads it")
    os.close(writer)


@pytest.mark.parametrize(
    ("encoding", "printed"), [("ascii", r"-> \xfcber"), ("latin-1", "-> über"), ("utf-8", "→ über")]
)
def test_characters_that_an_encoding_lacks_are_written_plainly(encoding: str, printed: str, tmp_path: Path) -> None:
    shown, _ = work(tmp_path, encoding=encoding)
    assert shown.decode(encoding).splitlines() == [*[printed] * 3, "at the end"]
