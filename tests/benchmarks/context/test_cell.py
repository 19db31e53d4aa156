import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from crossover.benchmarks.context.cell import Cell, Status, over_repeats, read_cells
from crossover.files import FORMAT

from ..fake_runs import append_line, cell

pytestmark = pytest.mark.quick

KEYS = [
    "format", "arch", "label", "phase", "context_len", "n_params", "n_active_params", "batch_size", "tokens_per_second",
    "spread", "repeats", "seconds", "cpu_seconds", "load", "disturbed", "repeat", "peak_bytes", "peak_method",
    "state_bytes", "backend", "dtype", "status", "error", "model", "settings", "provenance",
]  # fmt: skip


@pytest.mark.parametrize("status", ["done", "out_of_memory"])
def test_a_cell_read_back_from_json_is_the_same(status: Status) -> None:
    found = cell("mamba", "train", 128, status=status)
    line = json.loads(json.dumps(found.to_dict()))
    assert list(line) == KEYS
    assert Cell.from_dict(line) == found
    assert found.done == (status == "done")


def test_a_line_of_an_older_version_is_read() -> None:
    line = cell("mamba", "train", 128).to_dict()
    newer = ("seconds", "cpu_seconds", "load", "disturbed", "repeat")
    for key in ("format", "label", "provenance", "peak_method", "state_bytes", "spread", *newer):
        del line[key]
    found = Cell.from_dict(line)
    assert (found.repeat, found.disturbed) == (0, False)
    assert (found.label, found.provenance, found.peak_method, found.spread) == ("mamba", {}, None, None)


def of_repeat(repeat: int, speed: float | None, **changes: Any) -> Cell:
    found = cell("mamba", "train", 128, status="done" if speed else "timeout")
    return dataclasses.replace(found, repeat=repeat, tokens_per_second=speed, **changes)


def test_of_several_processes_the_median_stands_and_their_range_is_the_spread() -> None:
    other = cell("lstm", "train", 128)
    cells = [
        of_repeat(0, 7.0, peak_bytes=31),
        other,
        of_repeat(1, 2.0, peak_bytes=90),
        of_repeat(2, 3.0, peak_bytes=40),
    ]
    merged, same = over_repeats(cells)
    assert (merged.tokens_per_second, merged.spread, merged.peak_bytes) == (3.0, (2.0, 7.0), 40)
    assert merged.repeats == 3 * (cells[0].repeats or 0)
    assert same is other


def test_the_later_of_two_cells_of_one_repeat_counts() -> None:
    (merged,) = over_repeats([of_repeat(0, 7.0, disturbed=True), of_repeat(1, 5.0), of_repeat(0, 9.0)])
    assert (merged.tokens_per_second, merged.disturbed) == (7.0, False)


def test_where_most_processes_did_not_get_through_the_cell_did_not() -> None:
    (lost,) = over_repeats([of_repeat(0, 7.0), of_repeat(1, None), of_repeat(2, None)])
    assert (lost.status, lost.tokens_per_second) == ("timeout", None)
    (kept,) = over_repeats([of_repeat(0, 7.0), of_repeat(1, None), of_repeat(2, 5.0)])
    assert (kept.status, kept.tokens_per_second) == ("done", 6.0)


def test_a_line_of_a_newer_version_is_refused_in_one_sentence_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "context.jsonl"
    append_line(path, json.dumps({**cell("mamba", "train", 128).to_dict(), "format": FORMAT + 1}) + "\n")
    message = f"{path} has format {FORMAT + 1}, newer than the {FORMAT} that is read here: update crossover"
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        read_cells(path)
    assert "\n" not in str(refused.value)


def test_reading_cells_needs_no_torch() -> None:
    code = "import crossover.benchmarks.context.cell, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
