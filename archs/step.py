"""Describes one token's way through a model, from which a compiled step is made (kernels/step/program.py).

A module that can be compiled has a method `describe_step` beside its forward pass, which says the same for one token:

    def describe_step(self, step: Step, x: Tensor, state: MyState) -> Tensor:
        x, z = step.linear(self.in_proj, x).chunk(2, dim=-1)
        ...

What Python would do around the modules is then left out, so nothing may be there: hooks, wrappers and parametrizations
(LoRA, quantization, FSDP2, torch.compile, a subclass with another forward pass) are `Unsupported`, and the modules run.
Norms and projections are PyTorch's or the project's own classes exactly.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from .state import State

__all__ = ["Step"]


class Step(ops.Program):
    """The step of one token for `n_rows` sequences, as modules describe it."""

    def __init__(self, n_rows: int) -> None:
        super().__init__(n_rows)
        self._numbers: list[tuple[State, str, Tensor]] = []

    def through(self, module: nn.Module, *arguments: Any) -> Any:
        """What the module's `describe_step` gives for these arguments."""
        describe: Callable[..., Any] | None = vars(type(module)).get("describe_step")
        if describe is None:
            raise ops.Unsupported(f"{type(module).__name__} describes no step")
        _require_bare(module)
        return describe(module, self, *arguments)

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an nn.Linear gives."""
        return self.product(x, *self.parameters_of(module))

    def parameters_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of an nn.Linear, for a step that does not call it by itself."""
        if type(module) is not nn.Linear:
            raise ops.Unsupported(f"a projection is a {type(module).__name__}")
        _require_bare(module)
        return module.weight, module.bias

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an RMSNorm or an nn.LayerNorm over the last axis gives; an RMSNorm may be narrower than x, in groups."""
        if type(module) is nn.LayerNorm:
            _require_bare(module)
            return self.layer_norm(x, module.weight, module.bias, module.eps)
        return self.through(module, x)

    def row(self, module: nn.Module, index: Tensor) -> Tensor:
        """What an nn.Embedding gives."""
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise ops.Unsupported(f"an embedding is a {type(module).__name__}")
        _require_bare(module)
        return self.lookup(module.weight, index)

    def counted(self, state: State, name: str, *, most: int | None = None) -> Tensor:
        """A number of a state that grows by one with every token, up to `most`: (n_rows,) int64."""
        number = getattr(state, name)
        if isinstance(number, Tensor) and not number.dim():
            raise ops.Unsupported("the host does not know how much a state holds")
        count = self.count(number, most=most)
        self._numbers.append((state, name, count))
        return count

    def write_numbers(self) -> None:
        """Brings the numbers of the states up to date: runs only advance the program's own."""
        for state, name, count in self._numbers:
            is_tensor = isinstance(getattr(state, name), Tensor)
            setattr(state, name, count.clone() if is_tensor else int(count[0]))


def _require_bare(module: nn.Module) -> None:
    """Unsupported if calling the module does more than its class says."""
    name = type(module).__name__
    if module._forward_hooks or module._forward_pre_hooks:
        raise ops.Unsupported(f"a {name} has hooks")
    if "forward" in vars(module) or module._compiled_call_impl is not None:
        raise ops.Unsupported(f"a {name} has another forward pass than its class")


def bypassed() -> str | None:
    """What of PyTorch is at work here that sees modules or operations, and would miss them; None where nothing is."""
    hooks = torch.nn.modules.module
    if hooks._global_forward_hooks or hooks._global_forward_pre_hooks:
        return "all modules have hooks"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if torch.compiler.is_compiling():
        return "torch.compile traces"
    if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return "a mode of PyTorch watches operations"
    if (name := ops.transform()) is not None:
        return name
    return None
