"""Memory and threads of the kernels for the CPU."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from crossover.archs import LanguageModel, build
from crossover.kernels.dispatch import record_backends
from crossover.kernels.parallel import as_array
from torch import Tensor
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("shape", [(0,), (5,), (3, 0, 2), (1, 4), (2, 3, 4, 5)])
def test_an_array_is_the_memory_of_its_tensor(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (torch.randn(shape) > 0).to(dtype)
    array = as_array(x)
    assert array.flags.writeable
    assert (array.shape, array.dtype) == (x.shape, np.empty(0, x.numpy().dtype).dtype)
    array[...] = 1
    assert torch.equal(x, torch.ones_like(x))


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x[1:, 2:],
        lambda x: x[:, ::2],
        lambda x: x[:, :1].expand(6, 3, 4),
        lambda x: x.transpose(0, 1),
        lambda x: torch.complex(x, x).conj().imag,  # negated when it is read
    ],
)
def test_a_view_keeps_its_strides_and_its_values(view: Callable[[Tensor], Tensor]) -> None:
    x = view(torch.randn(6, 5, 4))
    array = as_array(x)
    np.testing.assert_array_equal(array, x.resolve_neg().numpy())
    if not x.is_neg():
        assert array.ctypes.data == x.data_ptr()


def test_only_a_last_axis_with_gaps_is_copied() -> None:
    x = torch.randn(6, 4).T
    array = as_array(x)
    assert array.flags.c_contiguous
    np.testing.assert_array_equal(array, x.numpy())


def test_an_array_keeps_its_memory_alive() -> None:
    array = as_array(torch.full((1000,), 7.0))
    torch.zeros(1000)
    assert (array == 7).all()


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(lm: LanguageModel, tokens: Tensor) -> list[Tensor]:
    logits, _, aux_loss = lm(tokens[:, :-1])  # by forward, in which the hooks run
    (F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()) + aux_loss).backward()
    grads = [p.grad for p in lm.parameters()]
    return [grad.full_tensor() if isinstance(grad, DTensor) else grad for grad in grads if grad is not None]


@pytest.mark.parametrize("name", ["transformer", "mamba", "mamba2", "lstm"])
def test_kernels_leave_the_memory_of_parameters_to_fsdp(name: str, one_process: None) -> None:
    tokens = torch.randint(17, (8, 130))
    torch.manual_seed(1)
    alone = build(name, d_model=64, n_layers=2, vocab_size=17)
    sharded = build(name, d_model=64, n_layers=2, vocab_size=17)
    sharded.load_state_dict(alone.state_dict())
    with record_backends() as used:
        expected = gradients(alone, tokens)
    assert "cpu" in {backend for names in used.values() for backend in names}
    for block in sharded.backbone.blocks:
        fully_shard(block)
    fully_shard(sharded)
    for actual, wanted in zip(gradients(sharded, tokens), expected, strict=True):
        torch.testing.assert_close(actual, wanted)
