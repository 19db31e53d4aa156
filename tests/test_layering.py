"""Imports run one way: kernels <- archs <- train <- benchmarks."""

import ast
import re
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


def imports(file: Path) -> set[tuple[str, ...]]:
    """Absolute dotted names of what `file` imports, with `crossover` left out of our own."""
    found: set[tuple[str, ...]] = set()
    package = file.relative_to(ROOT).parts[:-1]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module or "").split(".")) if node.module else base
            found |= {(*module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {tuple(alias.name.split(".")) for alias in node.names}
    return {name[1:] if name[0] == "crossover" else name for name in found}


def sources(folder: str) -> list[Path]:
    files = sorted((ROOT / folder).rglob("*.py"))
    assert files
    return files


@pytest.mark.parametrize("folder", BELOW)
def test_imports_point_down(folder: str) -> None:
    above = set(BELOW) - BELOW[folder]
    found = {str(f.relative_to(ROOT)): {n for n in imports(f) if n[0] in above} for f in sources(folder)}
    assert {file: names for file, names in found.items() if names} == {}


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


def test_nothing_names_an_operation_but_its_folder_the_list_and_the_peers() -> None:
    from crossover.kernels.ops import OPS

    folders = {path.parent.name for path in (ROOT / "kernels").glob("*/reference.py")}
    names = {*OPS, *folders}
    known = {"kernels/ops.py", "benchmarks/gpu/peers.py"}
    assert {"ssd", "attention"} <= set(names_in(ROOT / "benchmarks/gpu/peers.py"))
    found = {
        str(path): bad
        for file in (*sources("kernels"), *sources("benchmarks"))
        if (path := file.relative_to(ROOT)).as_posix() not in known and path.parts[1] not in folders
        if (bad := names & set(names_in(file)))
    }
    assert found == {}
