"""The fused loss where test_ops.py does not look: chunks, targets that do not count, precisions, what is kept."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import Unsupported, use_backend
from crossover.kernels.linear_cross_entropy import torch_impl
from torch import Tensor

OP = ops.OPS["linear_cross_entropy"]
BACKENDS = [name for name in OP.backends if name != "reference"]
needs_triton = pytest.mark.skipif("triton" not in BACKENDS, reason="Triton cannot run here")


@pytest.fixture(autouse=True)
def _short_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks of eight tokens for 33 classes, and none that autograd keeps."""
    monkeypatch.setattr(torch_impl, "KEPT", 0)
    monkeypatch.setattr(torch_impl, "TOKENS", 1)
    monkeypatch.setattr(torch_impl, "LOGITS", 8 * 33)
    if "triton" in BACKENDS:
        from crossover.kernels.linear_cross_entropy import triton_kernels

        monkeypatch.setattr(triton_kernels, "LOGITS", 8 * 33)
        monkeypatch.setattr(triton_kernels, "BLOCK", 32)


def inputs(T: int = 17, D: int = 7, V: int = 33, ignored: slice = slice(0)) -> dict[str, Tensor]:
    tensors = {"x": 2 * torch.randn(T, D, dtype=torch.float64), "weight": torch.randn(V, D, dtype=torch.float64)}
    targets = torch.randint(V, (T,))
    targets[ignored] = -100
    return tensors | {"targets": targets}


def run(backend: str, tensors: dict[str, Tensor], **others: Any) -> dict[str, Tensor]:
    with use_backend(backend):
        return values_and_gradients(OP, tensors, **others)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("ignored", [slice(0), slice(0, 8), slice(5, 13), slice(0, None)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_without_a_counted_token_change_nothing(backend: str, ignored: slice, z_loss: float) -> None:
    tensors = inputs(ignored=ignored)
    actual = run(backend, cast(tensors, torch.float32), z_loss=z_loss)
    assert_same(actual, run("reference", tensors, z_loss=z_loss), 2e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize(("T", "V"), [(1, 2), (9, 16), (5, 31), (3, 32), (2, 65)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_of_classes_is_taken(backend: str, T: int, V: int, z_loss: float) -> None:
    tensors = inputs(T=T, V=V)
    actual = run(backend, cast(tensors, torch.float32), z_loss=z_loss)
    assert_same(actual, run("reference", tensors, z_loss=z_loss), 2e-6)


@pytest.mark.parametrize("kept", [0, 1 << 20])
@pytest.mark.parametrize("z_loss", [0.0, 0.3])
def test_plain_pytorch_is_exact_in_float64(kept: int, z_loss: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "KEPT", kept)
    tensors = inputs(ignored=slice(3, None, 4))
    expected = run("reference", tensors, z_loss=z_loss)
    assert_same(run("torch", tensors, z_loss=z_loss), expected, 1e-13)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(run("torch", tensors, z_loss=z_loss), expected, 1e-13)


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_number_may_mark_what_does_not_count(backend: str) -> None:
    tensors = inputs()
    assert_same(
        run(backend, cast(tensors, torch.float32), ignore_index=int(tensors["targets"][4]), z_loss=0.1),
        run("reference", tensors, ignore_index=int(tensors["targets"][4]), z_loss=0.1),
        2e-6,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("of_loss", "of_z"), [(-3.0, 0.0), (0.0, 2.0), (0.5, -7.0)])
def test_loss_and_z_loss_have_gradients_of_their_own(backend: str, of_loss: float, of_z: float) -> None:
    tensors = inputs(T=9, ignored=slice(2, 4))

    def weighted(**leaves: Tensor) -> Tensor:
        loss, z = OP(**leaves, z_loss=0.2)
        return of_loss * loss + of_z * z

    with use_backend("reference"):
        expected = values_and_gradients(weighted, tensors)
    with use_backend(backend):
        assert_same(values_and_gradients(weighted, cast(tensors, torch.float32)), expected, 2e-6)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("leaf", ["x", "weight"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_frozen_costs_no_gradient(backend: str, leaf: str, z_loss: float) -> None:
    tensors = cast(inputs(), torch.float32)
    expected = run(backend, tensors, z_loss=z_loss)[f"gradient of {leaf}"]
    saved: list[Tensor] = []
    tensors[leaf].requires_grad_()
    with use_backend(backend), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        loss, z = OP(**tensors, z_loss=z_loss)
    generator = torch.Generator().manual_seed(1)  # the weights of values_and_gradients
    weights = [torch.randn((), generator=generator, dtype=torch.float64) for _ in range(2)]
    (grad,) = torch.autograd.grad(loss * weights[0] + z * weights[1], tensors[leaf])
    torch.testing.assert_close(grad, expected)
    if z_loss == 0:
        assert sum(t.numel() for t in saved if t.is_floating_point() and t.dim()) == tensors[leaf].numel()


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_are_never_whole(backend: str, z_loss: float) -> None:
    T, D, V = 48, 4, 33
    tensors = {k: t.requires_grad_(t.is_floating_point()) for k, t in cast(inputs(T, D, V), torch.float32).items()}
    with use_backend(backend), torch.profiler.profile(profile_memory=True) as profile:
        loss, z = OP(**tensors, z_loss=z_loss)
        (loss + z).backward()
    largest = max(event.cpu_memory_usage for event in profile.events() or [])
    assert 0 < largest < 4 * T * V / 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_gradients_lose_no_more_than_their_own_rounding(
    backend: str, z_loss: float, dtype: torch.dtype
) -> None:
    tensors = cast(inputs(D=16), dtype)
    actual = run(backend, tensors, z_loss=z_loss)
    tolerance = 2e-2 if dtype == torch.bfloat16 else 2e-3
    assert_same(actual, run("reference", cast(tensors, torch.float64), z_loss=z_loss), tolerance)
    assert actual["output 0"].dtype == torch.float32
    assert actual["gradient of weight"].dtype == dtype


def test_many_tokens_do_not_make_half_precision_gradients_vanish() -> None:
    # (p - 1) / n of 65536 tokens is below what float16 can hold; before it is divided by n it is not
    T = 1 << 16
    tensors = {"x": torch.ones(T, 1, dtype=torch.float16), "weight": torch.zeros(2, 1, dtype=torch.float16)}
    tensors["weight"].requires_grad_()
    with use_backend("torch"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_impl, "LOGITS", 1 << 14)
        loss, _ = OP(**tensors, targets=torch.zeros(T, dtype=torch.int64))
    (grad,) = torch.autograd.grad(loss, tensors["weight"])
    torch.testing.assert_close(grad, torch.tensor([[-0.5], [0.5]], dtype=torch.float16))


@pytest.mark.parametrize(("backend", "kept"), [("torch", 1 << 20), *((backend, 0) for backend in BACKENDS)])
def test_autocast_multiplies_in_its_precision_and_keeps_the_weight_in_its_own(
    backend: str, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_impl, "KEPT", kept)
    tensors = cast(inputs(T=9, D=16), torch.float32)
    rounded = cast(tensors, torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        actual = run(backend, tensors)
    assert_same(actual, run("reference", cast(rounded, torch.float64)), 2e-2)
    assert torch.equal(actual["output 0"], run(backend, rounded)["output 0"])
    assert actual["gradient of weight"].dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_logits_do_not_overflow(backend: str) -> None:
    tensors = inputs()
    tensors["x"] *= 1e4
    assert_same(run(backend, cast(tensors, torch.float32), z_loss=1e-9), run("reference", tensors, z_loss=1e-9), 2e-5)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_compiles_into_one_graph(backend: str, z_loss: float) -> None:
    tensors = cast(inputs(), torch.float32)

    def loss(**leaves: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return OP(**leaves, z_loss=z_loss)

    with use_backend(backend):
        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        actual, expected = values_and_gradients(compiled, tensors), values_and_gradients(loss, tensors)
    assert_same(actual, expected, 1e-7)


@pytest.mark.parametrize("z_loss", [0.0, 0.3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_can_be_repeated(backend: str, z_loss: float) -> None:
    tensors = {k: t.requires_grad_(t.is_floating_point()) for k, t in cast(inputs(), torch.float32).items()}
    with use_backend(backend):
        loss, z = OP(**tensors, z_loss=z_loss)
    first = torch.autograd.grad(loss + z, tensors["weight"], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * (loss + z), tensors["weight"])[0], 2 * first)


def test_equals_pytorch_without_gradients() -> None:
    tensors = cast(inputs(ignored=slice(4)), torch.float32)
    expected = F.cross_entropy(tensors["x"] @ tensors["weight"].T, tensors["targets"])
    for backend in BACKENDS:
        with use_backend(backend), torch.no_grad():
            torch.testing.assert_close(OP(**tensors)[0], expected)


@needs_triton
def test_triton_refuses_float64() -> None:
    with use_backend("triton"), pytest.raises(Unsupported, match="float64"):
        OP(**ops.linear_cross_entropy.cases.example(), **ops.linear_cross_entropy.cases.example_options())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("wanted", [(True, True), (True, False), (False, False)])
def test_custom_operators_are_registered_soundly(backend: str, wanted: tuple[bool, bool]) -> None:
    tensors = cast(inputs(T=5), torch.float32)
    # what is not asked for at once is frozen, or left to backward
    leaves = [tensors[k].requires_grad_(w or not any(wanted)) for k, w in zip(("x", "weight"), wanted, strict=True)]
    suffix = "" if backend == "torch" else f"_{backend}"
    operator = getattr(torch.ops.crossover, f"linear_cross_entropy{suffix}")
    torch.library.opcheck(operator, (*leaves, tensors["targets"], -100, *wanted))
