"""Every test starts from the same random state, draws the same examples, and writes no cache outside its own folder.

Only compiled kernels are shared, with the user's own: they are found by their content, and take long to make. Without a
GPU, Triton kernels run in Triton's interpreter, which must be chosen before they are imported.
"""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from crossover.files import cache_home
from hypothesis import settings

# no deadline: on a busy machine any example can take long
settings.register_profile("crossover", deadline=None, derandomize=True)
settings.load_profile("crossover")

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

os.environ.setdefault("NUMBA_CACHE_DIR", str((cache_home() / "kernels").expanduser()))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _private_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSSOVER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT stops the test and the processes that it starts, also in a shell's background job, which ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
