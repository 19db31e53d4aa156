import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.train.config import DataConfig
from crossover.train.data import Corpus, load_corpus


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The new names of what is renamed, each file of which must be on the disk by then."""
    names, on_disk, fsync = list[str](), set[int](), os.fsync

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def watch(source: Any, target: Any) -> None:
            source, target = Path(source), Path(target)
            missing = {path.name for path in (source, *source.rglob("*")) if path.stat().st_ino not in on_disk}
            assert not missing
            names.append(target.name)
            rename(source, target)

        return watch

    monkeypatch.setattr(os, "fsync", lambda file: (on_disk.add(os.fstat(file).st_ino), fsync(file)))
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    return names


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short files."""
    folder = tmp_path_factory.mktemp("text")
    for i in range(40):
        (folder / f"{i}.txt").write_text(f"Document {i}: naïve café, " + f"{i * i} words and numbers. " * (3 + i % 5))
    return folder


@pytest.fixture(scope="session")
def corpus(text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The files of `text_folder` as bytes, a quarter of them held out."""
    cache = tmp_path_factory.mktemp("cache")
    return load_corpus(DataConfig(source=str(text_folder), val_fraction=0.25, cache=cache))
