"""What SECURITY.md promises: nothing in a file is a reason to run code, and we know no way to."""

import ast
import contextlib
import json
import pickle
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crossover.archs import build
from crossover.archs.hf import from_hf, to_hf

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FOLDERS = ("kernels", "archs", "train", "benchmarks", "examples")
FILES = sorted(
    path
    for pattern in (
        "*.py",
        *(f"{folder}/**/*.py" for folder in ("kernels", "archs", "train", "benchmarks", "examples")),
    )
    for path in ROOT.glob(pattern)
)
MODULES = {
    *("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code", "codeop", "webbrowser"),
    *("socket", "ssl", "http", "urllib", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "telnetlib"),
}
CALLS = {
    *("eval", "exec", "compile", "__import__", "runpy.run_path", "torch.save", "torch.hub.load"),
    *("os.system", "os.popen", "os.execv", "os.spawnv"),
}
ALLOWED = {
    ("kernels/compiled.py", "import pickle"),  # numba's form of machine code, in the user's own cache
    ("kernels/operators.py", "importlib.import_module"),  # our own files of an operation
    ("kernels/ops.py", "importlib.import_module"),  # our own files of an operation
    ("train/plugins.py", "importlib.import_module"),  # likewise
}


def dangers(tree: ast.AST) -> Iterator[str]:
    """Ways to run what a file says, or to reach the network, in a module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            local = isinstance(node, ast.ImportFrom) and node.level
            yield from (f"import {name}" for name in names if not local and name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        name, given = ast.unparse(node.func), {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if (
            name in CALLS
            or {"trust_remote_code", "allow_pickle"} & given.keys()
            or given.get("shell", "False") != "False"
        ):
            yield name
        if name.endswith("torch.load") and given.get("weights_only") != "True":
            yield name
        if name.endswith(("import_module", "run_module")) and not isinstance(node.args[0], ast.Constant):
            yield name
        if name.endswith("Environment") and "select_autoescape" not in given.get("autoescape", ""):
            yield name


def test_no_module_runs_what_a_file_says_or_reaches_the_network() -> None:
    assert len(FILES) > 100
    found = {
        (path.relative_to(ROOT).as_posix(), danger) for path in FILES for danger in dangers(ast.parse(path.read_text()))
    }
    assert found == ALLOWED


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from urllib.request import urlopen",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "importlib.import_module(name)",
        "load_dataset(name, trust_remote_code=True)",
        "jinja2.Environment()",
    ],
)
def test_dangers_are_seen(code: str) -> None:
    assert list(dangers(ast.parse(code)))


class Bomb:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


def test_code_in_a_hugging_face_folder_is_not_run(tmp_path: Path) -> None:
    folder, sign = tmp_path / "theirs", tmp_path / "executed"
    to_hf(build("transformer", d_model=32, n_layers=1, vocab_size=9, n_heads=2), folder)
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling.Model", "AutoConfig": "modeling.Config"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "modeling.py").write_text(f"open({str(sign)!r}, 'w')\n")
    with contextlib.suppress(ValueError):  # to refuse it is right, too
        from_hf(folder)
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Bomb(sign)}, folder / "pytorch_model.bin")
    del config["auto_map"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or holds more than tensors"):
        from_hf(folder)
    assert not sign.exists()
    pickle.loads(pickle.dumps(Bomb(sign)))
    assert sign.exists()  # the bomb is one
