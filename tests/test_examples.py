"""Every example runs as it is, and prints the result that it promises."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))

# every line printed, with numbers checked in the test where they are results
PRINTED = {
    "custom_hybrid.py": r"""
d_model \d+: (?P<n_params>[\d,]+) parameters, of which a token uses [\d,]+

layer +state after 100 tokens +after 10,000
(mamba\+mlp .*
mamba\+moe .*
local\+mlp .*
mamba\+moe .*
mamba\+mlp .*
local\+moe) .*

a Transformer of [\d,]+ parameters: [\d,]+ bytes after 10,000 tokens
untrained, it writes b'def main\(.*
untrained, it writes b'x.*
""",
    "hugging_face.py": r"""
LlamaForCausalLM: 70,512 parameters in 2 layers
logits differ by (?P<error>.*) of the largest
ours continues the first row with \[\d+(, \d+){7}\]
written back, it gives the same logits: True
""",
    "new_mixer.py": r"""
token by token equals the full pass: largest difference (?P<error>.*)
ema\+mlp \| attention\+mlp: loss (?P<before>[\d.]+) -> (?P<after>[\d.]+) nats per token in 50 steps
""",
    "time_series.py": r"""
mamba: (?P<percent>[\d.]+)% of 500 new series classified correctly \(chance: 25%\)
""",
}


def run(path: Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_prints_what_it_promises(path: Path, tmp_path: Path) -> None:
    output = run(path, tmp_path)
    found = re.fullmatch(PRINTED[path.name].lstrip("\n"), output)
    assert found, output
    match path.name:
        case "custom_hybrid.py":
            assert abs(int(found["n_params"].replace(",", "")) / 1_000_000 - 1) < 0.15
        case "hugging_face.py" | "new_mixer.py":
            assert float(found["error"]) < 1e-5
        case "time_series.py":
            assert float(found["percent"]) > 95
    if path.name == "new_mixer.py":
        assert float(found["after"]) < 0.5 * float(found["before"])
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_time_series_stays_short_enough_to_copy() -> None:
    (path,) = (p for p in EXAMPLES if p.name == "time_series.py")
    assert len(path.read_text().splitlines()) < 60
