"""Imports run one way: kernels <- archs <- train <- benchmarks."""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
BELOW = {
    "kernels": {"kernels"},
    "archs": {"archs", "kernels"},
    "train": {"train", "archs", "kernels"},
    "benchmarks": {"benchmarks", "train", "archs", "kernels"},
}


Name = tuple[str, ...]


def imported(tree: ast.AST, package: Name) -> list[tuple[str, Name, Name]]:
    """Lists the imports of a module of `package`: the local name, what that stands for, and all that was named.

    The last two differ for `import a.b`, which binds a. Names are dotted ones, with `crossover` left out of our own.
    """
    found: list[tuple[str, Name, Name]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            for alias in node.names:
                name = (*module, alias.name)
                found.append((alias.asname or alias.name, name, name))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                name = tuple(alias.name.split("."))
                found.append((alias.asname, name, name) if alias.asname else (name[0], name[:1], name))
    return [(local, own(bound), own(name)) for local, bound, name in found]


def own(name: Name) -> Name:
    return name[1:] if name[:1] == ("crossover",) else name


def used(tree: ast.AST, package: Name) -> set[Name]:
    """Collects what a module of `package` imports by name, and what it reads from the modules that it imports."""
    bound = {local: name for local, name, _ in imported(tree, package)}
    found, inner = set[Name](), set[ast.AST]()
    for node in ast.walk(tree):  # an attribute comes before what it is read from
        chain, root = (), node
        while isinstance(root, ast.Attribute):
            chain, root = (root.attr, *chain), root.value
        if isinstance(root, ast.Name) and root.id in bound and node not in inner:
            found.add(own((*bound[root.id], *chain)))
        if isinstance(node, ast.Attribute):
            inner.add(node.value)
    return found | {name for _, _, name in imported(tree, package) if len(name) > 1}


def parsed(file: Path) -> tuple[ast.AST, Name]:
    return ast.parse(file.read_text()), file.relative_to(ROOT).parts[:-1]


def imports(file: Path) -> set[Name]:
    """Dotted names of what `file` imports, with `crossover` left out of our own."""
    return {name for _, _, name in imported(*parsed(file))}


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder: str) -> None:
    above = set(BELOW) - BELOW[folder]
    found = {str(f.relative_to(ROOT)): {n for n in imports(f) if n[0] in above} for f in sources(folder)}
    assert {file: names for file, names in found.items() if names} == {}


def test_what_stands_below_the_folders_imports_none_of_them_and_nothing_heavy() -> None:
    files = [path for path in ROOT.glob("*.py") if path.name != "setup.py" and path.name != "__init__.py"]
    assert files
    assert {n[0] for f in files for n in imports(f)} & {*BELOW, "torch", "numpy", "tyro"} == set()


def test_archs_enter_kernels_by_the_front_door() -> None:
    wrong = {
        str(f.relative_to(ROOT)): bad
        for f in sources("archs")
        if (bad := {n for n in imports(f) if n[0] == "kernels" and n[1:2] != ("ops",)})
    }
    assert wrong == {}


def test_only_triton_kernels_import_triton() -> None:
    importing = {f for folder in BELOW for f in sources(folder) if any(n[0] == "triton" for n in imports(f))}
    assert {f for f in importing if f.name != "triton_kernels.py"} == set()


def test_what_numba_compiles_takes_code_from_its_own_file_and_the_shared_ones_alone() -> None:
    from crossover.kernels.compiled import SHARED  # all of which its cache looks at

    shared = {("kernels", *name.removesuffix(".py").split("/")) for name in SHARED}
    marks = {"called", "inline", "kernel"}
    files = [
        file
        for file in sources("kernels")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef) and marks & {ast.unparse(mark) for mark in node.decorator_list}
    ]
    assert {ROOT / "kernels/ssd/cpu_kernels.py", ROOT / "kernels/step/products.py"} <= set(files)
    others = {n[:-1] for f in files if f.name != "blocks.py" for n in imports(f) if n[0] == "kernels"}
    assert others <= shared


def test_to_import_the_models_loads_no_compiler() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = "import sys; import crossover.archs; print(*sys.modules)"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    loaded = set(printed.split())
    assert "crossover.kernels.ops" in loaded
    heavy = {"numba", "llvmlite", "triton", "torch._dynamo", "torch._inductor", "sympy", "transformers", "datasets"}
    assert loaded & heavy == set()


def test_the_trainer_names_no_architecture() -> None:
    from crossover.archs import FFNS, MIXERS, available

    names = {*MIXERS, *FFNS, *available()} - {"attention"}
    text = (ROOT / "train/trainer.py").read_text() + (ROOT / "archs/model.py").read_text()
    words = {node.value for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant)}
    assert names & words == set()


def names_in(file: Path) -> Iterator[str]:
    """Every name that the code of a file uses or imports, and every word of its strings, but for docstrings."""
    tree = ast.parse(file.read_text())
    prose = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name) | ast.arg(arg=name) | ast.keyword(arg=str(name)):
                yield name
            case ast.FunctionDef(name=name) | ast.ClassDef(name=name):
                yield name
            case ast.Import(names=aliases):
                yield from (part for alias in aliases for part in alias.name.split("."))
            case ast.ImportFrom(module=module, names=aliases):
                yield from (module or "").split(".")
                yield from (alias.name for alias in aliases)
            case ast.Constant(value=str(text)) if node not in prose:
                yield from re.findall(r"\w+", text)


def test_nothing_names_an_operation_but_its_folder_the_list_the_compiled_step_the_peers_and_the_profiles() -> None:
    from crossover.kernels.ops import OPS

    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    names = {*OPS, *folders}
    room = "benchmarks/operations"  # whose profiles show an operator that they do not know under its name
    known = {"kernels/ops.py", "benchmarks/gpu/peers.py", f"{room}/peers.py", f"{room}/profiles.py"}
    assert {"ssd", "attention"} <= set(names_in(ROOT / "benchmarks/gpu/peers.py"))
    found = {
        str(path): bad
        for file in (*sources("kernels"), *sources("benchmarks"))
        if (path := file.relative_to(ROOT)).as_posix() not in known and path.parts[1] not in {*folders, "step"}
        if (bad := names & set(names_in(file)))
    }
    assert found == {}


@pytest.mark.parametrize("file", ["train/evaluate.py", "train/learner.py", "train/trainer.py"])
def test_what_trains_knows_models_by_build_and_objectives_by_their_interface(file: str) -> None:
    names = used(*parsed(ROOT / file))
    allowed = {("build",), ("ModelConfig",), ("States",)}
    models = {name for name in names if name[0] == "archs" and name[1:2] not in allowed}
    objectives = {name for name in names if name[:2] == ("train", "objectives")}
    assert models | objectives == set()


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from ..archs import build", {"archs.build"}),
        ("from .. import archs as a\ndef f(x: a.ModelConfig): return [a.presets.find(x).label]", {
            "archs.ModelConfig", "archs.presets.find",
        }),
        ("from .. import archs\ngetattr(archs, name)", {"archs"}),
        ("import crossover.archs.presets\ncrossover.archs.build()", {"archs.presets", "archs.build"}),
        ("def f():\n    from .objectives.pairs import Pairs as P", {"train.objectives.pairs.Pairs"}),
        ("from . import objectives", {"train.objectives"}),
    ],
)  # fmt: skip
def test_uses_are_seen_however_they_are_written(code: str, expected: set[str]) -> None:
    assert {".".join(name) for name in used(ast.parse(code), ("train",))} == expected
