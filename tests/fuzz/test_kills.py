"""A comparison that is stopped at any point at which it writes goes on, and leaves what an undisturbed one leaves."""

import csv
import errno
import json
import os
import shlex
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossover.benchmarks.harness.processes import Child

from ..benchmarks.scripts import Script

OPTIONS = shlex.split(
    "--archs lstm transformer --params 60k --seeds 1 --steps 3 --batch-size 2 --seq-len 16 --eval-tokens 64 "
    "--position-len 32 --context 16 32 --threads 1 --precision fp32"
)
PRELOAD = (
    "crossover.benchmarks.cli", "crossover.benchmarks.comparison.compare", "crossover.benchmarks.report.write",
    "crossover.train.objectives", "crossover.train.trainer", "torch._dynamo", "torch.utils.tensorboard", "numba",
    "tensorboard.summary.writer.record_writer", "tokenizers", "torch.utils.tensorboard.summary",
)  # fmt: skip
FUZZ = int(os.environ.get("FUZZ", "1"))
N_SHARES = min(FUZZ, 8)
"""Parts that may run at once."""

MEASURED = {"seconds", "tokens_per_second", "peak_bytes", "train_seconds", "stopwatch", "started", "wall_seconds"}
STARTS = {"stretches", "resumed_from_step"}


def compare(folder: Path, fatal: int | None = None, fault: int | None = None) -> tuple[int, Any]:
    """Runs a comparison in a process; its exit code, negative where a signal ended it, and what it returned."""
    words = ["compare", "--data", str(folder / "text"), "--out", str(folder / "out"), *OPTIONS]
    work = Script(
        "import os, runpy",
        f"os.environ['CROSSOVER_CACHE'] = {str(folder / 'cache')!r}",
        f"main = runpy.run_path({str(Path(__file__).with_name('killed.py'))!r})['main']",
        "parent.send(main(*order))",
    )
    with Child(work, (words, str(folder / "out"), fatal, fault), log=folder / "log", preload=PRELOAD) as child:
        try:
            found = child.receive(timeout=300)
        except EOFError:
            found = None
        return child.join(), found


def content(out: Path) -> dict[str, Any]:
    """What a comparison leaves, without times, speeds and dates, and without the list of starts."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = path.relative_to(out).as_posix()
        if path.is_dir() or "tfevents" in name or name.startswith("logs/") or path.name == ".lock":
            continue
        if path.suffix in (".json", ".jsonl") and path.name not in ("manifest.json", "tokenizer.json"):
            text = path.read_text(encoding="utf-8").replace(str(out.parent), "FOLDER")
            lines = text.splitlines() if path.suffix == ".jsonl" else [text]
            found[name] = [steady(json.loads(line)) for line in lines]
        elif path.name == "manifest.json" or path.suffix in (".html", ".md", ".png", ".svg"):
            found[name] = None  # holds digests, dates and speeds of others
        elif path.suffix == ".csv":
            with path.open(encoding="utf-8", newline="") as file:
                found[name] = [steady(row) for row in csv.DictReader(file)]
        else:
            found[name] = path.read_bytes()
    return found


def steady(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {
            key: steady(entry) for key, entry in value.items() if key.removeprefix("perf/") not in MEASURED | STARTS
        }
        return kept
    return [steady(entry) for entry in value] if isinstance(value, list) else value


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """The folder of a comparison that nothing disturbed, and the number of points at which it wrote."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "text").mkdir()
    for i in range(24):
        (folder / "text" / f"{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 9)
    code, found = compare(folder)
    assert code == 0, (folder / "log").read_text()
    assert found[0] == 0, (folder / "log").read_text()
    return folder, found[1]


@pytest.mark.fuzz
@pytest.mark.parametrize("share", range(N_SHARES))
@pytest.mark.parametrize(
    ("faults", "n_points"),
    [((None,), 3 * FUZZ), ((errno.ENOSPC, errno.EIO, errno.EROFS), FUZZ)],
    ids=["killed", "without a disk"],
)
def test_a_comparison_that_is_stopped_while_it_writes_goes_on_as_if_nothing_had_been(
    share: int, faults: tuple[int | None, ...], n_points: int, undisturbed: tuple[Path, int], tmp_path: Path
) -> None:
    folder, n_all = undisturbed
    expected = content(folder / "out")
    drawn = np.random.default_rng(0).permutation(np.arange(1, n_all + 1))[:n_points][share::N_SHARES]
    failures = {}
    for point in drawn.tolist():
        broken = tmp_path / str(point)
        broken.mkdir()
        for name in ("text", "cache"):
            (broken / name).symlink_to(folder / name)
        fault = faults[point % len(faults)]
        code, found = compare(broken, point, fault)
        stopped = code == -signal.SIGKILL if fault is None else code == 0 and found[0] in (0, 1, 2)
        code, found = compare(broken)
        log = (broken / "log").read_text()
        if not stopped or (code, found and found[0]) != (0, 0) or "Traceback" in log:
            failures[point] = log
        else:
            left = content(broken / "out")
            names = sorted(left.keys() | expected.keys())
            if different := [name for name in names if left.get(name, "absent") != expected.get(name, "absent")]:
                failures[point] = different
        shutil.rmtree(broken)
    assert failures == {}, f"{len(failures)} of {len(drawn)} stops"
