"""Grouped products where test_ops.py does not look: uneven and empty groups, blocks that do not fit, precisions."""

from typing import Any

import pytest
import torch
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import Unsupported, use_backend
from torch import Tensor

OP = ops.OPS["grouped_mm"]
BACKENDS = [name for name in OP.backends if name != "reference"]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")


def inputs(counts: list[int], D: int = 5, F: int = 7) -> dict[str, Tensor]:
    T, G = sum(counts), len(counts)
    x, weight = torch.randn(T, D, dtype=torch.float64), torch.randn(G, F, D, dtype=torch.float64)
    return {"x": x, "weight": weight, "counts": torch.tensor(counts)}


def run(backend: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    with use_backend(backend):
        return values_and_gradients(OP, tensors)


@pytest.mark.parametrize(
    "counts",
    [[45], [0, 0, 45], [45, 0, 0], [1, 0, 44], [16, 16, 16], [15, 17, 0, 1, 33], [0, 1, 0, 0, 1, 0], [1] * 5],
    ids=str,
)
@pytest.mark.parametrize("backend", BACKENDS)
def test_groups_of_any_size_have_their_own_matrices(backend: str, counts: list[int]) -> None:
    tensors = inputs(counts)
    assert_same(run(backend, cast(tensors, torch.float32)), run("reference", tensors), 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_rows_there_is_nothing_to_do(backend: str) -> None:
    found = run(backend, cast(inputs([0, 0]), torch.float32))
    assert [found[k].shape for k in ("output 0", "gradient of x")] == [(0, 7), (0, 5)]
    assert torch.equal(found["gradient of weight"], torch.zeros(2, 7, 5))


@pytest.mark.parametrize("counts", [[70, 3, 0, 20], [0, 150]], ids=str)
@pytest.mark.parametrize(("D", "F"), [(1, 1), (33, 70), (130, 17)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_blocks_need_not_fit(backend: str, counts: list[int], D: int, F: int) -> None:
    tensors = inputs(counts, D, F)
    assert_same(run(backend, cast(tensors, torch.float32)), run("reference", tensors), 1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_lose_no_more_than_their_own_rounding(backend: str, dtype: torch.dtype) -> None:
    tensors = cast(inputs([31, 0, 50], D=40, F=24), dtype)
    actual = run(backend, tensors)
    assert_same(actual, run("reference", cast(tensors, torch.float64)), 1e-2 if dtype == torch.bfloat16 else 1e-3)
    assert {t.dtype for t in actual.values()} == {dtype}


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_multiplies_in_its_precision(backend: str) -> None:
    tensors = cast(inputs([20, 5], D=16, F=16), torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(backend, tensors)
    assert_same(actual, run("reference", cast(cast(tensors, torch.bfloat16), torch.float64)), 1e-2)
    assert actual["output 0"].dtype == torch.bfloat16
    assert actual["gradient of weight"].dtype == torch.float32


@pytest.mark.parametrize("leaf", ["x", "weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_either_input_may_be_frozen(backend: str, leaf: str) -> None:
    tensors = cast(inputs([3, 9]), torch.float32)
    expected = run(backend, tensors)[f"gradient of {leaf}"]
    tensors[leaf].requires_grad_()
    with use_backend(backend):
        y = OP(**tensors)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    (grad,) = torch.autograd.grad((y.double() * weights).sum(), tensors[leaf])  # as in values_and_gradients
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_a_plain_sum_are_right(backend: str) -> None:
    tensors = inputs([3, 0, 9])  # autograd hands a sum's gradient down as one number that is repeated by zero strides

    def total(**leaves: Tensor) -> Tensor:
        return OP(**leaves).sum()

    with use_backend("reference"):
        expected = values_and_gradients(total, tensors)
    with use_backend(backend):
        assert_same(values_and_gradients(total, cast(tensors, torch.float32)), expected, 1e-6)


@needs_triton
def test_no_row_sees_another_groups() -> None:
    from crossover.kernels.grouped_mm import triton_kernels

    tensors = cast(inputs([20, 7, 0, 18], D=20, F=20), torch.float32)
    x, weight, counts = tensors.values()
    y = triton_kernels.product(x, weight, counts)
    grad = triton_kernels.weight_gradient(y, x, counts)
    x[20:27] = weight[1:3] = float("nan")
    other = triton_kernels.product(x, weight, counts)
    assert torch.equal(other.isnan().any(1).nonzero()[:, 0], torch.arange(20, 27))
    assert torch.equal(other[27:], y[27:])
    other_grad = triton_kernels.weight_gradient(y, x, counts)
    assert torch.equal(other_grad.isnan().flatten(1).any(1), torch.tensor([False, True, False, False]))
    assert torch.equal(other_grad[[0, 2, 3]], grad[[0, 2, 3]])


@needs_triton
@pytest.mark.parametrize(("tiles", "rows"), [(1, 16), (2, 20), (3, 27), (4, 43), (5, 45)])
def test_a_tile_writes_rows_of_its_group_alone(tiles: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from crossover.kernels.grouped_mm import triton_kernels

    def first_tiles(kernel: Any, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        launch(kernel, (min(tiles, grid[0]),), *arguments, **options)

    launch = triton_kernels.launch
    monkeypatch.setattr(triton_kernels, "launch", first_tiles)
    x, weight, counts = cast(inputs([20, 7, 0, 18]), torch.float32).values()
    y = triton_kernels.product(x, weight, counts)
    # what is not written is NaN (conftest.py)
    assert torch.equal(y.isnan().any(1), torch.arange(45) >= rows)


@needs_triton
def test_bounds_are_those_of_rows_and_tiles() -> None:
    from crossover.kernels.grouped_mm import triton_kernels

    found = triton_kernels.bounds(torch.tensor([16, 0, 17, 1]), 34, 16)
    assert found.tolist() == [[0, 16, 16, 33, 34], [0, 1, 1, 3, 4]]


@needs_triton
def test_blocks_suit_the_matrix_units_and_the_shape() -> None:
    from crossover.kernels.grouped_mm import triton_kernels

    for dtype, by_vectors in ((torch.float32, True), (torch.bfloat16, True), (torch.bfloat16, False)):
        for sizes in ((1, 1, 1), (2048, 5632, 1024), (3, 4096, 1001)):
            chosen = triton_kernels.configuration(*sizes, dtype, by_vectors)
            for size, name in zip(sizes, ("BLOCK_M", "BLOCK_N", "BLOCK_K"), strict=True):
                assert 16 <= chosen[name] <= max(16, 2 * size - 1)


@needs_triton
def test_triton_names_what_it_cannot_take() -> None:
    def refused(tensors: dict[str, Tensor], match: str) -> None:
        with use_backend("triton"), pytest.raises(Unsupported, match=match):
            OP(**tensors)

    refused(inputs([3, 2]), "float64")
    refused(cast(inputs([1] * 1024, D=1, F=1), torch.float32), "1024 groups are more than 1023")


@needs_triton
def test_compiles_into_one_graph() -> None:
    tensors = cast(ops.grouped_mm.cases.example(), torch.float32)

    def product(**leaves: Any) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return OP(**leaves)

    with use_backend("triton"):
        compiled = torch.compile(product, fullgraph=True, backend="aot_eager")
        assert_same(values_and_gradients(compiled, tensors), values_and_gradients(product, tensors), 1e-7)


@needs_triton
def test_custom_operators_are_registered_soundly() -> None:
    tensors = cast(inputs([4, 0, 6]), torch.float32)
    arguments = (tensors["x"].requires_grad_(), tensors["weight"].requires_grad_(), tensors["counts"])
    torch.library.opcheck(torch.ops.crossover.grouped_mm_triton, arguments)
