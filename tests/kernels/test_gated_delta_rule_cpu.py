"""The CPU kernels of the gated delta rule where small examples do not reach: chunks, spans and parts of heads."""

from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import use_backend
from crossover.kernels.gated_delta_rule import cpu
from torch import Tensor


def run(backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with use_backend(backend):
        return values_and_gradients(ops.gated_delta_rule, tensors)


def inputs(B: int, L: int, P: int, N: int, begin: tuple[int, ...] = ()) -> dict[str, Tensor]:
    tensors = ops.gated_delta_rule.cases.example(B=B, L=L, E=P, N=N)
    tensors["starts"] = torch.zeros(B, L, dtype=torch.bool)
    tensors["starts"][-1, list(begin)] = True
    return tensors


@pytest.mark.parametrize(
    ("B", "L", "P", "N", "begin"),
    [
        (1, 129, 70, 3, (64, 65, 128)),  # parts of a head; starts where spans begin, and beside
        (3, 64, 33, 20, (0, 16, 19, 63)),  # starts where chunks begin, a chunk of one token
        (2, 150, 5, 37, ()),  # a partial chunk in a partial span, more keys than values
    ],
)
def test_matches_the_definition(B: int, L: int, P: int, N: int, begin: tuple[int, ...]) -> None:
    tensors = inputs(B, L, P, N, begin)
    assert_same(run("cpu", cast(tensors, torch.float32)), run("reference", tensors), 1e-6)


def test_heads_are_shared_out_only_where_there_are_few() -> None:
    def parts(B: int, P: int) -> int:
        width, n_parts = cpu.parts_of(torch.empty(B, 1, 1, P))
        assert width * (n_parts - 1) < P <= width * n_parts
        return n_parts

    assert parts(8, 1000) == parts(5, 1000) == parts(1, 3) == 1
    assert parts(1, 1000) > parts(3, 1000) > 1


def test_the_number_of_threads_changes_no_bit() -> None:
    tensors = cast(inputs(1, 70, 70, 5, (20,)), torch.float32)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 3):
            torch.set_num_threads(n)
            found.append(run("cpu", tensors))
    finally:
        torch.set_num_threads(threads)
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name


def test_reads_and_writes_only_its_own_memory(guard_bands: Any) -> None:
    tensors = cast(inputs(2, 41, 9, 19, (20,)), torch.float32)
    expected = run("cpu", tensors)
    with guard_bands.watched() as allocated:
        actual = run("cpu", {k: guard_bands.surrounded(t) for k, t in tensors.items()})
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert len(allocated) > 5
