import json
import subprocess
import sys

import pytest
from crossover.benchmarks.context.cell import FORMAT, Cell

from ..fake_runs import cell

KEYS = [
    "format", "arch", "label", "phase", "context_len", "n_params", "n_active_params", "batch_size", "tokens_per_second",
    "spread", "repeats", "peak_bytes", "peak_method", "state_bytes", "backend", "dtype", "status", "error", "model",
    "settings", "provenance",
]  # fmt: skip


@pytest.mark.parametrize("status", ["done", "out_of_memory"])
def test_a_cell_read_back_from_json_is_the_same(status: str) -> None:
    one = Cell.from_dict(cell("mamba", "train", 128, status=status))
    line = json.loads(json.dumps(one.to_dict()))
    assert list(line) == KEYS
    assert Cell.from_dict(line) == one
    assert one.done == (status == "done")


def test_a_line_of_an_older_version_is_read() -> None:
    line = cell("mamba", "train", 128)
    assert "format" not in line
    for key in ("label", "provenance", "peak_method", "state_bytes", "spread"):
        del line[key]
    one = Cell.from_dict(line)
    assert (one.label, one.provenance, one.peak_method, one.spread) == ("mamba", {}, None, None)


def test_a_line_of_a_newer_version_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match=rf"^a cell has format {FORMAT + 1}, newer .*update crossover") as refused:
        Cell.from_dict({**cell("mamba", "train", 128), "format": FORMAT + 1})
    assert "\n" not in str(refused.value)


def test_reading_cells_needs_no_torch() -> None:
    code = "import crossover.benchmarks.context.cell, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
