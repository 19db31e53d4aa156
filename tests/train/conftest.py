from pathlib import Path

import pytest
import torch
from crossover.train.config import DataConfig
from crossover.train.data import Corpus, load_corpus


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


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
