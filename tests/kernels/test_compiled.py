"""Machine code of kernels on disk: found by its content, shared by processes, never wrong."""

from __future__ import annotations

import errno
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossover.kernels import compiled
from crossover.kernels.compiled import KEPT, kernel
from numba.core import config

SOURCE = """
from __future__ import annotations
from crossover.kernels.simd import Floats1, kernel

@kernel
def twice(first: int, last: int, x: Floats1) -> None:
    for i in range(first, last):
        x[i] *= 2
"""


def module_of(folder: Path) -> Any:
    spec = importlib.util.spec_from_file_location("kernel_to_cache", folder / "kernel_to_cache.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def twice(folder: Path) -> bool:
    """Makes a kernel anew, compiled or from the cache, and runs it; whether it was from the cache."""
    module = module_of(folder)
    x = np.arange(3, dtype=np.float32)
    module.twice(0, 3, x)
    assert x.tolist() == [0, 2, 4]
    return module.twice.stats.cache_hits.total() == 1


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "code"))
    return tmp_path / "code"


@pytest.fixture
def source(tmp_path: Path, cache: Path) -> Path:
    (tmp_path / "kernel_to_cache.py").write_text(SOURCE)
    assert [twice(tmp_path), twice(tmp_path)] == [False, True]
    return tmp_path


def test_code_is_found_by_its_content_wherever_the_source_lies(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / "kernel_to_cache.py").write_text(SOURCE)
    assert twice(clone)
    (clone / "kernel_to_cache.py").write_text(SOURCE + "# an edit")
    assert [twice(clone), twice(clone)] == [False, True]
    monkeypatch.setattr(config, "OPT", 2)
    compiled._of_all.cache_clear()
    assert not twice(source)
    monkeypatch.undo()
    compiled._of_all.cache_clear()


@pytest.mark.parametrize("others", [0, KEPT + 2])
def test_a_cache_keeps_what_was_used_last(source: Path, cache: Path, others: int) -> None:
    for i in range(others):
        old = cache / f"kernel_to_cache.twice-{i}.bin"
        old.write_bytes(b"of another version")
        os.utime(old, (i, i))
    (cache / "kernel_to_cache.twice_as_much-0.bin").write_bytes(b"of another kernel")
    (source / "kernel_to_cache.py").write_text(SOURCE + "# an edit")
    assert not twice(source)
    kept = {path.name for path in cache.glob("kernel_to_cache.twice-*")}
    assert len(kept) == min(KEPT, 2 + others)
    assert {f"kernel_to_cache.twice-{i}.bin" for i in range(max(0, others - KEPT + 2))} & kept == set()
    (source / "kernel_to_cache.py").write_text(SOURCE)
    assert twice(source)


def test_a_damaged_cache_is_built_again(source: Path, cache: Path) -> None:
    (path,) = cache.glob("*.bin")
    whole = path.read_bytes()
    middle = len(whole) // 2
    zeros = whole[:middle] + bytes(len(whole) - middle)
    for damaged in (b"", whole[:5], whole[:-1], zeros, whole[:middle] + b"?" + whole[middle + 1 :]):
        path.write_bytes(damaged)
        assert [twice(source), twice(source)] == [False, True]


def test_a_cache_that_cannot_be_written_or_read_costs_only_the_time_to_compile(
    source: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = cache.glob("*.bin")
    path.unlink()
    path.mkdir()
    assert not twice(source)
    path.rmdir()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        assert not twice(source)
    assert not [*cache.glob("*.tmp"), *cache.glob("*.bin")]
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(source / "kernel_to_cache.py"))  # no folder
    assert not twice(source)
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    monkeypatch.delenv("CROSSOVER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    assert not twice(source)


def test_without_a_variable_of_numba_code_lies_in_the_users_cache(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NUMBA_CACHE_DIR")
    assert [twice(source), twice(source)] == [False, True]
    assert len(list((tmp_path / "cache/kernels").glob("kernel_to_cache.twice-*.bin"))) == 1


def test_processes_and_threads_that_start_together_compile_once(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "kernel_to_cache.py").write_text(SOURCE)
    program = """if True:
        import threading, torch, kernel_to_cache
        from crossover.kernels.parallel import run
        x = torch.ones(2, 3)
        threads = [threading.Thread(target=run, args=(kernel_to_cache.twice, 3, row)) for row in x]
        for t in threads: t.start()
        for t in threads: t.join()
        assert x.tolist() == [[2, 2, 2]] * 2
        print(kernel_to_cache.twice.stats.cache_misses.total())"""
    children = [
        subprocess.Popen([sys.executable, "-c", program], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert sorted(child.communicate()[0].strip() for child in children) == ["0", "1"]


def test_a_kernel_whose_source_is_nowhere_is_compiled_anyway() -> None:
    namespace: dict[str, Any] = {"__name__": "nowhere"}
    exec("def fill(x: Floats1) -> None:\n    x[:] = 1\n", namespace)
    fill = namespace["fill"]
    fill.__annotations__ = {"x": "Floats1", "return": "None"}
    x = np.zeros(3, np.float32)
    kernel(fill)(x)
    assert x.tolist() == [1, 1, 1]


def test_a_kernel_takes_nothing_but_what_it_is_annotated_with(source: Path) -> None:
    module = module_of(source)
    for _ in range(2):  # before it is compiled, and after
        with pytest.raises(TypeError):
            module.twice(0, 3, np.ones(3, np.float64))
    assert len(module.twice.overloads) == 1
