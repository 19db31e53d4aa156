"""Describes one token's way through a model, from which a compiled step is made (kernels/step/program.py).

A module that can be compiled has a method `describe_step` beside its forward pass, which says the same for one token:

    def describe_step(self, step: Step, x: Tensor, state: MyState) -> Tensor:
        x, z = step.linear(self.in_proj, x).chunk(2, dim=-1)
        ...

What Python would do around the modules is then left out, so nothing may be there: hooks, wrappers and parametrizations
(LoRA, quantization, FSDP2, torch.compile, a subclass with another forward pass) are `Unsupported`, and the modules run.
Norms and projections are PyTorch's or the project's own classes exactly. What comes between two tokens is seen too.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ..kernels import ops
from .state import State

__all__ = ["Step"]


class Step(ops.Program):
    """The step of one token for `n_rows` sequences, as the modules of a model describe it."""

    def __init__(self, model: nn.Module, n_rows: int) -> None:
        super().__init__(n_rows)
        self._numbers: list[tuple[State, str, Tensor]] = []
        self._modules = _Modules(model)

    def is_current(self) -> bool:
        """Whether the model is still made of the same modules and weights, and nothing has come between."""
        return self._modules.are_unchanged() and super().is_current()

    def through(self, module: nn.Module, *arguments: Any) -> Any:
        """What the module's `describe_step` gives for these arguments."""
        describe: Callable[..., Any] | None = vars(type(module)).get("describe_step")
        if describe is None:
            raise ops.Unsupported(f"{type(module).__name__} describes no step")
        return describe(module, self, *arguments)

    def linear(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an nn.Linear gives."""
        return self.product(x, *self.parameters_of(module))

    def parameters_of(self, module: nn.Module) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of an nn.Linear, for a step that does not call it by itself."""
        if type(module) is not nn.Linear:
            raise ops.Unsupported(f"a projection is a {type(module).__name__}")
        return module.weight, module.bias

    def norm(self, module: nn.Module, x: Tensor) -> Tensor:
        """What an RMSNorm or an nn.LayerNorm over the last axis gives; an RMSNorm may be narrower than x, in groups."""
        if type(module) is nn.LayerNorm:
            return self.layer_norm(x, module.weight, module.bias, module.eps)
        return self.through(module, x)

    def row(self, module: nn.Module, index: Tensor) -> Tensor:
        """What an nn.Embedding gives."""
        if type(module) is not nn.Embedding or module.max_norm is not None:
            raise ops.Unsupported(f"an embedding is a {type(module).__name__}")
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


class _Modules:
    """The modules of a model as they were when its step was described."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        for module in self._modules:
            name = type(module).__name__
            if module._forward_hooks or module._forward_pre_hooks:
                raise ops.Unsupported(f"a {name} has hooks")
            if "forward" in vars(module) or module._compiled_call_impl is not None:
                raise ops.Unsupported(f"a {name} has another forward pass than its class")
        self._types = [*map(type, self._modules)]
        self._hooks = [hooks for m in self._modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attributes = [*map(vars, self._modules)]
        self._n_attributes = [*map(len, self._attributes)]
        held = [d for m in self._modules for d in (m._parameters, m._modules)]
        self._dicts, self._names = [d for d in held for _ in d], [name for d in held for name in d]
        self._held = [part for d in held for part in d.values()]

    def are_unchanged(self) -> bool:
        """Whether they have their classes, parts, weights and attributes still, and no hooks.

        It is asked for every token, so all of it is loops of C: 50 modules take some 5 microseconds.
        """
        return (
            not any(self._hooks)
            and [*map(type, self._modules)] == self._types
            and [*map(len, self._attributes)] == self._n_attributes
            and all(map(operator.is_, map(dict.get, self._dicts, self._names), self._held))
        )


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
