"""Custom operators: what they give for tensors without memory is like what they give for real ones."""

from typing import Any

import pytest
import torch
from crossover.kernels import operators, ops
from crossover.kernels.compare import cast, values_and_gradients
from crossover.kernels.dispatch import use_backend
from crossover.kernels.operators import kernels_run, without_kernels
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

FAKE = FakeTensorMode()


def layout(results: Any) -> list[tuple[Any, ...]]:
    return [(t.shape, t.dtype, t.stride(), t.device) for t in tree_leaves(results)]


class Comparison(TorchDispatchMode):
    """Calls every operator of the project with fake tensors too; collects which, and which differ."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()
        self.different: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        real = func(*args, **(kwargs or {}))
        if func.namespace == "crossover":
            name = func.name().removesuffix(".default")
            self.seen.add(name)
            with FAKE:
                arguments = tree_map_only(Tensor, FAKE.from_tensor, (args, kwargs or {}))
                fake = func(*arguments[0], **arguments[1])
            if layout(fake) != layout(real):
                self.different.append((name, layout(fake), layout(real)))
        return real


def run(name: str, backend: str, tensors: dict[str, Tensor], **others: Any) -> None:
    with use_backend(backend):
        values_and_gradients(ops.OPS[name], tensors, **others)


def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs forward what is one operation only where it is traced; tests/archs/test_compile.py runs its gradients."""
    for name in ("attention", "ssm_kernel", "ssm_scan", "dplr_kernel", "dplr_scan", "gated_delta_rule"):
        cases = ops.OPS[name].cases
        tensors, others = cast(cases.example(L=20), torch.float32), cases.example_options(L=20)
        monkeypatch.setattr(operators, "is_traced", lambda: True)
        with use_backend("torch"), torch.no_grad():
            ops.OPS[name](**tensors, **others)
        monkeypatch.undo()


def test_all_operators_give_the_same_layout_without_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with Comparison() as found:
        for name, op in ops.OPS.items():
            for backend in op.backends[1:]:
                for dtype, optional in ((torch.float32, True), (torch.bfloat16, False)):
                    tensors = cast(ops.OPS[name].cases.example(L=20, optional=optional), dtype)
                    run(name, backend, tensors, **ops.OPS[name].cases.example_options(optional=optional, L=20))
        # what small examples do not reach
        for backend in ops.linear_cross_entropy.backends[1:]:
            for z_loss in (0.0, 0.1):
                tensors = cast(ops.linear_cross_entropy.cases.example(L=600, N=999), torch.float32)
                run("linear_cross_entropy", backend, tensors, z_loss=z_loss)
        with torch.no_grad():
            for backend in ops.state_update.backends[1:]:
                with use_backend(backend):
                    ops.state_update(**cast(ops.state_update.cases.example(), torch.float32), in_place=True)
        traced(monkeypatch)
    assert found.different == []
    plain = {f"{name}_backward" for name in found.seen if f"{name}_backward" in OPDEFS}
    assert found.seen | plain == {name for name in OPDEFS if name.startswith("crossover::")}


def test_without_kernels_memory_is_made_and_not_written() -> None:
    x = torch.randn(3, 40)
    for backend in ops.swiglu.backends[2:]:
        with use_backend(backend), without_kernels():
            y = ops.swiglu(x, x)
        assert kernels_run()
        assert y.shape == x.shape
        assert y.isnan().all()  # conftest.py fills new memory with it
