"""The README works as shown: commands, Python, targets. Files that any page names or links to are there."""

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
NAMES = ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY")
PAGES = [*(ROOT / f"{name}.md" for name in NAMES), *sorted(ROOT.glob("docs/*.md"))]
SOURCES = ("kernels", "archs", "train", "benchmarks", "tests", "configs", "docs", "examples")


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


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_pictures_and_files_named_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)  # a new file may be shown there
    links = [page.parent / link for link in re.findall(r"\]\(([^)#]+)\)", text) if not link.startswith("http")]
    named = [ROOT / name for name in re.findall(rf"`((?:{'|'.join(SOURCES)})/[\w./-]*)`", text)]
    assert links or named
    assert [str(path) for path in (*links, *named) if not path.exists()] == []
