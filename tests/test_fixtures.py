"""Files of earlier versions stay readable: reports, runs that were interrupted, saved models."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from crossover.archs import LanguageModel

from . import losses

FORMAT_1 = losses.FIXTURES / "format-1"
EXPECTED = json.loads((FORMAT_1 / "expected.json").read_text())


def crossover(*words: str, cwd: Path) -> str:
    """Output of a command of the project, which succeeds."""
    code = "import sys; from crossover.benchmarks.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A copy of all fixtures of the first format."""
    return shutil.copytree(FORMAT_1, tmp_path / "format-1")


def test_a_report_is_made_of_an_old_comparison(folder: Path) -> None:
    old = {name: list(csv.DictReader((folder / "comparison" / name).open())) for name in ("quality.csv", "context.csv")}
    crossover("report", str(folder / "comparison"), cwd=folder)
    for name, rows in old.items():
        new = list(csv.DictReader((folder / "comparison" / name).open()))
        for before, after in zip(rows, new, strict=True):
            assert {key: after.get(key) for key in before} == before
    page = (folder / "comparison/report.md").read_text()
    for value in EXPECTED["quality"].values():
        assert f"{value:.2f}" in page


def test_an_old_interrupted_run_is_continued(folder: Path) -> None:
    words = "--name interrupted --out . --model.preset mamba --params 29k --data text --train.steps 9"
    words += " --train.batch-size 2 --train.seq-len 32 --train.log-every 1 --train.eval-every 3 --train.eval-tokens 128"
    words += " --optim.lr 4e-3"  # the preset's rate of then
    words += " --train.final-eval-tokens 256 --train.position-len 64 --train.precision fp32 --train.threads 1"
    output = crossover("train", *words.split(), "--resume", "must", cwd=folder)
    assert "continuing from step 5" in output
    found = losses.run_losses(folder / "interrupted")[-len(EXPECTED["resumed_losses"]) :]
    assert found == pytest.approx(EXPECTED["resumed_losses"], rel=1e-4)  # other processors round otherwise


def test_an_old_model_is_loaded() -> None:
    lm = LanguageModel.from_pretrained(FORMAT_1 / "comparison/mamba-s0/checkpoints/step-00000008")
    with torch.no_grad():
        logits = lm(torch.arange(1, 14)[None] * 7 % 256).logits[0, -1, :6]
    torch.testing.assert_close(logits, torch.tensor(EXPECTED["logits"]), rtol=1e-4, atol=1e-5)


def test_short_runs_have_the_losses_that_they_always_had() -> None:
    recorded = json.loads((losses.FIXTURES / "losses.json").read_text())["presets"]
    found = losses.preset_losses()
    assert found.keys() == recorded.keys()
    for name, values in recorded.items():
        assert found[name] == pytest.approx(values, rel=1e-4), name
