"""The README works as shown: its commands parse, its Python runs, its targets and links exist."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from crossover.benchmarks import cli
from crossover.train.command_line import parse

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.M | re.S)
    assert found
    return found


def commands(program: str) -> list[str]:
    lines = "\n".join(blocks("sh")).splitlines()
    return [line for line in lines if line.startswith(f"{program} ")]


@pytest.mark.parametrize("line", commands("crossover"))
def test_commands_are_accepted(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)[1:]
    monkeypatch.chdir(ROOT)  # run files are named from here
    if words[0] == "train":
        assert parse(words[1:], prog="crossover train").train.steps > 0
        return
    asked = []
    monkeypatch.setattr(cli, "_run", lambda config, command: asked.append(config) or 0)
    assert cli.main(words) == 0
    assert asked


@pytest.mark.parametrize("line", commands("make"))
def test_make_targets_exist(line: str) -> None:
    target = shlex.split(line, comments=True)[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.M)


@pytest.mark.slow
def test_python_runs_as_shown(tmp_path: Path) -> None:
    for code in blocks("python"):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr


def test_links_and_pictures_exist() -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", README)
    assert targets
    assert [t for t in targets if not t.startswith("http") and not (ROOT / t).exists()] == []
