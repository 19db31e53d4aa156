"""Every example runs as it is, and prints the result that it promises."""

import json
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))

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
    "hf_trainer.py": r"""
(?:{.*}
)+loss (?P<before>[\d.]+) -> (?P<after>[\d.]+) nats per byte
b'the cat.*'
""",
    "hugging_face.py": r"""
LlamaForCausalLM: 70,512 parameters in 2 layers
logits differ by (?P<error>.*) of the largest
ours continues the first row with \[\d+(, \d+){7}\]
written back, it gives the same logits: True
""",
    "lightning_module.py": r"""
loss (?P<after>[\d.]+) nats per byte after 30 steps
loaded again, the weights are the same: True
""",
    "new_mixer.py": r"""
token by token equals the full pass: largest difference (?P<error>.*)
ema\+mlp \| attention\+mlp: loss (?P<before>[\d.]+) -> (?P<after>[\d.]+) nats per token in 50 steps
""",
    "new_task.py": r"""
\d+(?: \d+){12} -> \d+
(?P<accuracy>[\d.]+) of the answers are right; (?P<floor>[\d.]+) without recall
""",
    "plain_loop.py": r"""
[\d,]+ parameters: loss (?P<before>[\d.]+) -> (?P<after>[\d.]+) nats per byte in 40 steps
b'the cat.*'
""",
    "time_series.py": r"""
mamba: (?P<percent>[\d.]+)% of 500 new series classified correctly \(chance: 25%\)
""",
    "trl_sft.py": r"""
(?:{.*}
)+loss (?P<before>[\d.]+) -> (?P<after>[\d.]+) nats per token
dog <- .*
""",
}

# what an example needs beside what [dev] brings
NEEDS = {"hf_trainer.py": "accelerate", "lightning_module.py": "lightning", "trl_sft.py": "trl"}


def run(path: Path, folder: Path) -> str:
    done = subprocess.run([sys.executable, path], capture_output=True, text=True, cwd=folder, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_an_example_prints_what_it_promises(path: Path, tmp_path: Path) -> None:
    if (package := NEEDS.get(path.name)) and not find_spec(package):
        pytest.skip(f"{package} is not installed")
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
        case "new_task.py":
            assert float(found["accuracy"]) > 2 * float(found["floor"])
    if "after" in found.groupdict():  # a loss in nats, of which guessing is more than 2.7
        assert float(found["after"]) < 0.5 * float(found.groupdict().get("before", 2.7))
    assert not any(tmp_path.iterdir())  # nothing is left behind


def test_time_series_stays_short_enough_to_copy() -> None:
    (path,) = (p for p in EXAMPLES if p.name == "time_series.py")
    assert len(path.read_text().splitlines()) < 60


@pytest.fixture
def plugin(tmp_path: Path) -> Path:
    """A copy of the plug-in, in which building it leaves its traces."""
    return Path(shutil.copytree(FOLDER / "plugin", tmp_path / "plugin"))


def crossover(*words: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    code = "import sys; from crossover.benchmarks.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.slow
def test_a_plug_in_trains_compares_and_reports_by_import(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for i in range(30):
        (tmp_path / f"text/{i}.txt").write_text(f"Document {i} says that {i * i} is the square of {i}. " * 9)
    sizes = "--params 60k --steps 1 --batch-size 2 --seq-len 24 --eval-tokens 96 --position-len 24 --threads 1"
    speed = "--context 18 --time-box 0.01 --min-repeats 2 --decode-tokens 2"
    options = ["--data", tmp_path / "text", "--out", tmp_path / "out", *sizes.split(), *speed.split()]
    own = ["--import", "token_shift", "--archs", "token_shift", "--objective", "accuracy"]
    done = crossover("compare", *own, *options, cwd=plugin)
    assert done.returncode == 0, done.stderr
    assert "crossover.train --import token_shift " in done.stdout  # the command that repeats a run
    (row,) = json.loads((tmp_path / "out/summary.json").read_text())["quality"]
    assert (row["label"], row["lr"], row["score"]) == ("Token shift", 4e-3, "accuracy")
    cells = [json.loads(line) for line in (tmp_path / "out/context.jsonl").read_text().splitlines()]
    found = {cell["phase"]: (cell["arch"], cell["status"]) for cell in cells}  # one that was disturbed is there twice
    assert found == dict.fromkeys(("decode", "prefill", "train"), ("token_shift", "done"))
    run = json.loads((tmp_path / "out/token_shift-s0/run.json").read_text())
    assert run["provenance"]["imports"] == ["token_shift"]
    assert "--import token_shift" in (tmp_path / "out/report.md").read_text().replace("\\", "")


@pytest.mark.slow
def test_an_installed_plug_in_needs_no_import(plugin: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    site = tmp_path / "site"
    subprocess.run([*pip, "--no-build-isolation", "--target", str(site), str(plugin)], check=True)
    shutil.rmtree(plugin)
    code = (
        f"import sys; sys.path.append({str(site)!r})\n"
        "from crossover.benchmarks.cli import main\n"
        "try: main(['train', '--help'])\nexcept SystemExit: pass\n"
        "from crossover import build\n"
        "print(build('token_shift', d_model=8, n_layers=4).config.pattern)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    said = " ".join(done.stdout.replace("│", " ").split())
    assert "(default: mamba; imported: token_shift)" in said
    assert "(default: next_token; imported: accuracy)" in said
    assert said.endswith("('token_shift+mlp', 'token_shift+mlp', 'token_shift+mlp', 'attention+mlp')")
