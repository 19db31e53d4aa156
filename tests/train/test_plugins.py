"""Other people's modules: imported because a command line or an installed package says so, and for no other reason."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from crossover.archs import build
from crossover.benchmarks.cli import main
from crossover.train import plugins, register_objective
from crossover.train.objective import Objective
from crossover.train.objectives import OBJECTIVES

pytestmark = pytest.mark.quick


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current directory, with nothing imported from it yet; what a test imports is forgotten."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(plugins, "_imported", [])
    monkeypatch.setattr(plugins, "_plugins", {})
    yield tmp_path
    for name in ("once", "inner", "inner.twice", "bent", "broken", "leaves", "sound", "plugged", "mine"):
        sys.modules.pop(name, None)


def install(folder: Path, entry: str) -> None:
    """Makes a folder of sys.path hold an installed package `neighbour` with one plug-in."""
    (folder / "neighbour-1.2.dist-info").mkdir()
    (folder / "neighbour-1.2.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: neighbour\nVersion: 1.2\n")
    (folder / "neighbour-1.2.dist-info/entry_points.txt").write_text(f"[crossover.plugins]\nnext = {entry}\n")


def saved_model(folder: Path, pattern: str, **provenance: object) -> None:
    """A run folder with a model of a mixer that there may not be, and no checkpoints."""
    build("lstm", d_model=8, n_layers=1, vocab_size=256).save_pretrained(folder / "run")
    config = json.loads((folder / "run/config.json").read_text())
    (folder / "run/config.json").write_text(json.dumps(config | {"pattern": [pattern]}))
    (folder / "run/run.json").write_text(json.dumps({"provenance": provenance}))


def test_a_module_of_the_current_directory_is_imported_once_wherever_the_option_stands(folder: Path) -> None:
    (folder / "once.py").write_text("print('imported')\n")
    (folder / "inner").mkdir()
    (folder / "inner/twice.py").write_text("")
    words = ["compare", "--import", "once", "--steps", "3", "--import=inner.twice", "--import=once"]
    assert plugins.take(words) == ["compare", "--steps", "3"]
    assert plugins.words() == ["--import", "once", "--import", "inner.twice"]
    assert plugins.record() == {"imports": ["once", "inner.twice"], "plugins": []}
    assert {"once", "inner.twice"} <= sys.modules.keys()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--import", "nowhere"], "--import nowhere: no such module in "),
        (["--import", "sound.nowhere"], "--import sound.nowhere: no such module in "),
        (["--import", "bent"], "--import bent failed (ModuleNotFoundError: No module named 'nowhere'): python -c"),
        (["--import", "broken"], "--import broken failed (RuntimeError: no): python -c 'import broken' shows where"),
        (["--import=leaves"], "--import leaves failed (SystemExit: 3)"),
        (["--import", "./broken.py"], "--import './broken.py' is not the name of a module, such as broken"),
        (["--import", "broken.py"], "--import 'broken.py' is not the name of a module, such as broken"),
        (["--import"], "--import '' is not the name of a module"),
        (["--out", "a\udcff"], "'a\\udcff' is not text in the encoding of this locale: use a UTF-8 one"),
    ],
)
@pytest.mark.parametrize("command", ["compare", "train", "generate"])
def test_a_module_that_cannot_be_imported_is_one_line(
    command: str, words: list[str], expected: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "sound").mkdir()
    (folder / "bent.py").write_text("import nowhere\n")
    (folder / "broken.py").write_text("raise RuntimeError('no\\nway')\n")
    (folder / "leaves.py").write_text("raise SystemExit(3)\n")
    assert main([command, *words]) == 2
    complaint = capsys.readouterr().err
    assert expected in complaint
    assert complaint.count("\n") == 1


@pytest.mark.parametrize("entry", ["plugged", "plugged:begin"])
def test_a_plug_in_is_a_module_or_a_function(
    entry: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, entry)
    (folder / "plugged.py").write_text("print('imported')\ndef begin():\n    print('called')\n")
    monkeypatch.syspath_prepend(str(folder))
    plugins.load()
    plugins.load()
    assert capsys.readouterr().out.split() == ["imported", "called"][: 2 if ":" in entry else 1]
    assert plugins.record() == {"imports": [], "plugins": ["neighbour 1.2"]}


@pytest.mark.parametrize("entry", ["plugged", "plugged:begin", "plugged:missing", "nowhere"])
def test_a_broken_plug_in_is_one_line_that_names_it_and_its_package(
    entry: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, entry)
    breaks = "raise RuntimeError('no')"
    (folder / "plugged.py").write_text(f"def begin():\n    {breaks}\n" if ":" in entry else breaks)
    monkeypatch.syspath_prepend(str(folder))
    assert main(["doctor"]) == 2
    complaint = capsys.readouterr().err
    assert complaint.startswith("crossover: the plug-in next of the installed package neighbour 1.2 cannot be loaded")
    assert complaint.count("\n") == 1


def test_a_run_folder_names_what_it_was_made_with_and_imports_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine.py").write_text("open('executed', 'w')\n")
    saved_model(folder, "mine", imports=["mine", "\x1b[2J", "a b"], plugins=["neighbour 1.2"])
    assert main(["generate", "run", "x"]) == 2
    complaint = capsys.readouterr().err
    said = "run/run.json was made with --import mine and neighbour 1.2 installed: do the same if you trust that code"
    assert said in complaint
    assert "\x1b" not in complaint
    assert complaint.count("\n") == 1
    assert not (folder / "executed").exists()
    assert main(["generate", "run", "x", "--import", "mine"]) == 2  # it registers no such mixer
    assert "--import mine" not in capsys.readouterr().err


@pytest.mark.parametrize("provenance", [{}, {"imports": 3}, {"imports": [3, None]}])
def test_an_unknown_part_of_a_saved_model_asks_for_its_module(
    provenance: dict[str, object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_model(folder, "mine", **provenance)
    assert main(["generate", "run", "x"]) == 2
    assert "a part of your own needs the --import MODULE that registers it" in capsys.readouterr().err


@pytest.mark.parametrize("no_objective", [3, None, Objective, dict])
def test_what_is_no_objective_is_not_registered(no_objective: Any) -> None:
    with pytest.raises(ValueError, match="is no objective: a subclass of Objective"):
        register_objective("sound", no_objective)
    assert "sound" not in OBJECTIVES
