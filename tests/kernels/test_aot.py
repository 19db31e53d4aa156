"""The compile gate: what every Triton kernel costs on two generations of GPU, without one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOL = Path(__file__).with_name("aot.py")
TABLE = json.loads(TOOL.with_name("aot.json").read_text())


@pytest.mark.slow
def test_kernels_cost_what_the_table_says(tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    if triton.__version__ != TABLE["triton"]:
        pytest.skip(f"the table is of Triton {TABLE['triton']}, and code generation differs between versions")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(TOOL)],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["kernels"]
    assert found.keys() == TABLE["kernels"].keys()
    worse = {}
    for name, expected in TABLE["kernels"].items():
        actual = found[name]
        if (
            actual["stack"] > expected["stack"]
            or actual["registers"] > 1.05 * expected["registers"]
            or sum(actual["loops"]) > 1.05 * sum(expected["loops"])
            or len(actual["loops"]) != len(expected["loops"])
        ):
            worse[name] = {"now": actual, "table": expected}
    assert worse == {}, "record the table anew (python tests/kernels/aot.py --record) if the change is meant"


def test_what_spills_is_known() -> None:
    spilling = {name for name, cost in TABLE["kernels"].items() if cost["stack"]}
    assert spilling == TABLE["why_stack"].keys()
