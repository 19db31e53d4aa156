import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from crossover.benchmarks.context.cell import Cell, Status, read_cells
from crossover.files import FORMAT

from ..fake_runs import append_line, cell

pytestmark = pytest.mark.quick

KEYS = [
    "format", "arch", "label", "phase", "context_len", "n_params", "n_active_params", "batch_size", "tokens_per_second",
    "spread", "repeats", "peak_bytes", "peak_method", "state_bytes", "backend", "dtype", "status", "error", "model",
    "settings", "provenance",
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
    for key in ("format", "label", "provenance", "peak_method", "state_bytes", "spread"):
        del line[key]
    found = Cell.from_dict(line)
    assert (found.label, found.provenance, found.peak_method, found.spread) == ("mamba", {}, None, None)


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
