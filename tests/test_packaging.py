"""The import path after an install."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "archs", "train", "benchmarks")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder into which the built wheel and a stand-in for Hugging Face's `kernels` are installed."""
    source, site = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in (
        *FOLDERS,
        "__init__.py",
        "files.py",
        "options.py",
        "py.typed",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    ):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, source)
    stand_in = tmp_path_factory.mktemp("stand_in")
    (stand_in / "kernels").mkdir()
    (stand_in / "kernels/__init__.py").write_text("OWNER = 'stand-in'\n")
    (stand_in / "setup.py").write_text("from setuptools import setup\nsetup(name='kernels', packages=['kernels'])\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "-q", "--no-deps"]
    pip += ["--no-build-isolation", "--target", str(site)]
    # one call each, ours last: a package that claimed the same name would overwrite the other's files
    for project in (stand_in, source):
        subprocess.run([*pip, str(project)], check=True, cwd=project)
    return site


def run(code: str, site: Path, cwd: Path) -> str:
    """Output of `code` with only `site` and the third-party packages importable, started in `cwd`."""
    script = f"import sys; sys.path.insert(0, {str(site)!r})\n"
    script += "sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]  # the checkout's own install\n"
    script += code
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.slow
@pytest.mark.parametrize("started_in", ["an empty folder", "the repository"])
def test_the_wheel_and_a_package_named_kernels_hide_neither_one(site: Path, tmp_path: Path, started_in: str) -> None:
    cwd = ROOT if started_in == "the repository" else tmp_path
    code = "import kernels; from crossover.kernels import ops; print(kernels.OWNER, len(ops.OPS) > 5, ops.__file__)"
    owner, works, where = run(code, site, cwd).split()
    assert (owner, works) == ("stand-in", "True")
    assert where.startswith(str(site))


def test_the_wheel_adds_one_name(site: Path) -> None:
    names = {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")}
    assert names <= {"crossover", "kernels", "bin", "__pycache__"}
    assert {p.name for p in (site / "crossover").glob("*.py")} == {"__init__.py", "files.py", "options.py"}


def test_the_wheel_holds_every_module_and_template_and_the_type_marker(site: Path) -> None:
    files = [p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in (".py", ".j2", ".css", ".bib")]
    expected = {str(p.relative_to(ROOT)) for p in files} | {"py.typed"}
    assert {name for name in expected if not (site / "crossover" / name).exists()} == set()


@pytest.mark.slow
def test_the_models_are_at_the_top(site: Path, tmp_path: Path) -> None:
    code = """
import crossover
print(crossover.__version__, "torch" in sys.modules)
from crossover import Backbone, LanguageModel, build
print(isinstance(build("mamba", d_model=8, n_layers=1, vocab_size=5).backbone, Backbone))
"""
    (info,) = site.glob("crossover-*.dist-info")
    version = importlib.metadata.PathDistribution(info).version
    assert run(code, site, tmp_path).split() == [version, "False", "True"]


def test_the_wheel_has_the_command(site: Path) -> None:
    (info,) = site.glob("crossover-*.dist-info")
    scripts = importlib.metadata.PathDistribution(info).entry_points.select(group="console_scripts")
    assert [(s.name, s.value) for s in scripts] == [("crossover", "crossover.benchmarks.cli:main")]


def test_the_kernels_folder_is_no_regular_package() -> None:
    assert not (ROOT / "kernels/__init__.py").exists(), "it would hide Hugging Face's `kernels`; see setup.py"


def test_every_requirement_has_an_exact_version() -> None:
    names = set(re.findall(r'"([a-z][\w-]*)(?:\[[\w,]+\])?>=', (ROOT / "setup.py").read_text()))
    pinned = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert names - {n.lower().replace("_", "-") for n in pinned} == set()
    assert pinned["torch"] == "2.13.0"
    assert pinned["triton"] == "3.7.1"
    assert not any("+" in version for version in pinned.values()), "a local version exists on one machine only"


def test_help_needs_no_torch() -> None:
    code = "import sys; sys.argv = ['crossover', '--help']\nfrom crossover.benchmarks.cli import main\n"
    code += "try: main()\nexcept SystemExit: pass\nassert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert done.returncode == 0, done.stderr
    assert "compare" in done.stdout
