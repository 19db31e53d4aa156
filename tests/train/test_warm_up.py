"""The toy run before a measurement."""

import contextlib
import importlib
import sys
from typing import ClassVar

import pytest
import torch
from crossover import archs
from crossover.archs import configure
from crossover.kernels.compiled import Kernel
from crossover.train.objectives.next_token import NextToken, RandomTokens
from crossover.train.runtime import PeakMemory, Precision
from crossover.train.warm_up import warm_up

CPU = torch.device("cpu")
FP32 = Precision("fp32", "for the test")
TOKENS = RandomTokens(vocab_size=256, batch_size=8, seq_len=128)


@pytest.mark.quick
@pytest.mark.parametrize("name", ["transformer", "jamba"])
def test_the_random_state_is_left_alone(name: str) -> None:
    before = torch.get_rng_state()
    warm_up(configure(name), TOKENS, CPU, FP32)
    assert torch.equal(torch.get_rng_state(), before)


def test_options_that_need_their_own_width_are_no_obstacle() -> None:
    warm_up(configure("transformer", d_model=35, n_heads=1, head_dim=14), TOKENS, CPU, FP32)
    warm_up(configure("transformer", d_model=70, n_heads=7), TOKENS, CPU, FP32)


class Recorded(Precision):
    """Arithmetic of a GPU on the CPU."""

    used: ClassVar[list[str]] = []

    def autocast(self, device: torch.device) -> torch.autocast:
        self.used.append(device.type)
        return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.quick
def test_on_a_gpu_the_model_itself_is_warmed_up_in_the_arithmetic_to_come(monkeypatch: pytest.MonkeyPatch) -> None:
    built, rows, made = [], [], archs.build
    monkeypatch.setattr(archs, "build", lambda config, device: built.append((config, device.type)) or made(config))
    monkeypatch.setattr(
        RandomTokens, "collate", lambda self, given: rows.append(len(given)) or NextToken.collate(self, given)
    )
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())
    config = configure("transformer", d_model=70, n_layers=3, n_heads=7)
    warm_up(config, TOKENS, torch.device("cuda"), Recorded("bf16", "for the test"))
    assert built == [(config, "cuda")]
    assert rows == [1]
    assert Recorded.used == ["cpu", "cuda"]  # of the update, whose model is on the CPU here, and of decoding


def test_a_second_warm_up_takes_almost_no_memory() -> None:
    config = configure("mamba")
    warm_up(config, TOKENS, CPU, FP32)
    memory = PeakMemory(CPU)
    warm_up(config, TOKENS, CPU, FP32)
    assert memory.peak_bytes() < 16 * 2**20


def test_it_compiles_the_kernels_that_leave_small_inputs_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        f"crossover.kernels.{operation}.cpu_kernels" for operation in ("attention", "rms_norm", "rotary", "swiglu")
    ]
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
        monkeypatch.delattr(importlib.import_module(name.rpartition(".")[0]), "cpu_kernels", raising=False)
    warm_up(configure("transformer"), TOKENS, CPU, FP32)
    kernels = [kernel for name in names for kernel in vars(sys.modules[name]).values() if isinstance(kernel, Kernel)]
    assert len(kernels) == 7
    assert [kernel for kernel in kernels if not kernel.overloads] == []
