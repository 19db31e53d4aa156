"""Functions that run kernels as custom operators of PyTorch: torch.compile takes each for one operation."""

from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import math
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.nn import Parameter
from torch.utils._pytree import tree_map

from .dispatch import KernelFallbackWarning, no_kernel

P = ParamSpec("P")
R = TypeVar("R")


class _OfThread(threading.local):
    runs = True


_kernels = _OfThread()


def kernels_run() -> bool:
    """Whether kernels are to run, or only the memory for their results is to be made."""
    return _kernels.runs


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """Makes kernels do nothing inside the block; other threads go on."""
    before, _kernels.runs = _kernels.runs, False
    try:
        yield
    finally:
        _kernels.runs = before


def operator(
    name: str,
    function: Callable[..., Any],
    *,
    device_types: str | None = None,
    mutates_args: Iterable[str] = (),
) -> CustomOpDef:
    """Makes a custom operator of a function, which itself stays callable.

    What the operator gives for tensors without memory, as torch.compile traces it, needs no second definition: the
    function makes its results, and no kernel fills them.

    Args:
        name: name of the operator, in the namespace crossover.
        function: annotated; gives new memory only. Kernels run by parallel.run or triton_kernels.launch.
        device_types: the only one it is for.
        mutates_args: names of the arguments that it writes to.
    """
    mutates_args = frozenset(mutates_args)
    made = torch.library.custom_op(f"crossover::{name}", function, mutates_args=mutates_args, device_types=device_types)

    def fake(*arguments: Any, **named: Any) -> Any:
        if device_types == "cpu":
            _import_kernels(function.__module__.rpartition(".")[0])
        with without_kernels():
            return function(*arguments, **named)

    made.register_fake(fake)
    return made if mutates_args else _Quick(made, function)


class _Quick(CustomOpDef):
    """A custom operator that ordinary tensors pass by: eagerly its function runs at once, or as an autograd.Function.

    PyTorch's dispatcher takes longer than a small kernel. It is for whatever looks at operators: tracing, modes and
    classes of tensors.
    """

    def __init__(self, made: CustomOpDef, function: Callable[..., Any]) -> None:
        self.__dict__ = made.__dict__  # the same operator: PyTorch knows `made`
        self._run, self._apply = function, None

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """See CustomOpDef.register_autograd."""
        super().register_autograd(backward, setup_context=setup_context)
        run = self._run

        def forward(ctx: Any, *arguments: Any) -> Any:
            output = run(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, output)
            return output

        methods = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self._apply = type(self._opoverload.name(), (torch.autograd.Function,), methods).apply

    def __call__(self, *arguments: Any) -> Any:
        """Calls the operator with all of its arguments."""
        if is_traced() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return super().__call__(*arguments)
        is_differentiated = False
        for x in arguments:
            if isinstance(x, Tensor):
                if type(x) not in _ORDINARY:
                    return super().__call__(*arguments)
                is_differentiated = is_differentiated or x.requires_grad
        if not (is_differentiated and torch.is_grad_enabled()):
            return self._run(*arguments)
        return super().__call__(*arguments) if self._apply is None else self._apply(*arguments)


_ORDINARY = (Tensor, Parameter)


def is_traced() -> bool:
    """Whether torch.compile or torch.export trace what is called here."""
    return torch.compiler.is_compiling()


_BUILTINS = ((builtins, "max", max), (builtins, "min", min), (math, "pow", math.pow))


@functools.cache
def _import_kernels(folder: str) -> None:
    """Imports a folder's compiled kernels as if nothing were traced.

    While it traces, torch.export has functions of its own in the place of some builtins, and numba, which looks at them
    when it is first imported, must not see those.
    """
    traced = [getattr(module, name) for module, name, _ in _BUILTINS]
    try:
        for module, name, real in _BUILTINS:
            setattr(module, name, real)
        importlib.import_module(f"{folder}.cpu_kernels")
    finally:
        for (module, name, _), value in zip(_BUILTINS, traced, strict=True):
            setattr(module, name, value)


def opaque(results: Callable[..., Any]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A function of plain PyTorch that torch.compile and torch.export take for one operation.

    For loops over a length, which would be unrolled, and anew for every length. Untraced, nothing changes.

    Args:
        results: maps the function's arguments to empty results, contiguous, from shapes alone.
    """

    def make(function: Callable[P, R]) -> Callable[P, R]:
        name = f"crossover::{function.__module__.split('.')[-2]}_{function.__name__.strip('_')}"

        @functools.wraps(function)
        def contiguous(*arguments: Any) -> Any:
            with _untraced():
                return tree_map(_plain, function(*arguments))  # pyright: ignore[reportCallIssue]

        made = torch.library.custom_op(name, contiguous, mutates_args=())
        made.register_fake(results)
        schema = str(made._opoverload._schema)
        arguments = schema[schema.index("(") + 1 : schema.rindex(") ->")]

        def backward(grads: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
            places = _differentiable(inputs)

            def of_those(*tensors: Tensor) -> Any:
                return function(*by_place(inputs, places, tensors))  # pyright: ignore[reportCallIssue]

            with _untraced():
                outputs, pull = torch.func.vjp(  # pyright: ignore[reportAssignmentType]
                    of_those, *(inputs[i].detach() for i in places)
                )
                found = pull(tuple(grads) if isinstance(outputs, tuple) else grads[0])
                return [_plain(t).clone() for t in found]

        def empty(grads: Sequence[Tensor], *inputs: Any) -> list[Tensor]:
            return [inputs[i].new_empty(inputs[i].shape) for i in _differentiable(inputs)]

        of_gradients = f"(Tensor[] grads, {arguments}) -> Tensor[]"
        made_backward = torch.library.custom_op(f"{name}_backward", backward, mutates_args=(), schema=of_gradients)
        made_backward.register_fake(empty)

        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.save_for_backward(*(x for x in inputs if isinstance(x, Tensor)))
            ctx.inputs = tuple(None if isinstance(x, Tensor) else x for x in inputs)
            ctx.tensors = [i for i, x in enumerate(inputs) if isinstance(x, Tensor)]

        def gradients(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            inputs = by_place(ctx.inputs, ctx.tensors, ctx.saved_tensors)
            found = dict(zip(_differentiable(inputs), made_backward(list(grads), *inputs), strict=True))
            return tuple(found.get(i) for i in range(len(inputs)))

        made.register_autograd(gradients, setup_context=setup_context)

        @functools.wraps(function)
        def either(*arguments: P.args, **named: P.kwargs) -> R:
            return (made if is_traced() else function)(*arguments, **named)

        return either

    return make


_OFF_IN_GRAPHS = tuple(
    getattr(torch._C.DispatchKey, name)
    for name in (
        "Conjugate", "Negative", "ADInplaceOrView",
        "FuncTorchDynamicLayerFrontMode", "FuncTorchDynamicLayerBackMode", "FuncTorchGradWrapper",
    )
)  # fmt: skip
"""What PyTorch leaves out while it runs a traced graph, where nothing is conjugated lazily or differentiated."""


@contextlib.contextmanager
def _untraced() -> Iterator[None]:
    """Lets a function inside a traced graph compute as it does outside, lazy conjugates and torch.func included."""
    off = [key for key in _OFF_IN_GRAPHS if torch._C._dispatch_tls_is_dispatch_key_excluded(key)]
    try:
        for key in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
    finally:
        for key in off:
            torch._C._dispatch_tls_set_dispatch_key_excluded(key, True)


def _plain(t: Tensor) -> Tensor:
    """The tensor as its memory has it, in order: neither strided nor marked as conjugate or negative."""
    return t.resolve_conj().resolve_neg().contiguous()


def by_place(values: Sequence[Any], places: Sequence[int], others: Sequence[Any]) -> list[Any]:
    """The values, with others at some places."""
    replaced = dict(zip(places, others, strict=True))
    return [replaced.get(i, x) for i, x in enumerate(values)]


def _differentiable(inputs: Sequence[Any]) -> list[int]:
    """Places of the inputs that can have a gradient."""
    return [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())]


Again = Callable[[Any], tuple[Callable[..., Any], tuple[Any, ...]]]
"""Maps what an operator's forward left for backward to a function that PyTorch differentiates as often as it likes, and
its arguments: the operator's first ones, by place. It gives the operator's first results."""


def differentiable(
    made: CustomOpDef,
    backward: Callable[..., Any],
    setup_context: Callable[..., None],
    again: Again | None = None,
) -> None:
    """Registers the gradients of a custom operator, which kernels compute and nothing differentiates.

    Where they are to be differentiated themselves (create_graph=True), they are taken through the function of `again`;
    without it, a NotImplementedError says what can be done.
    """

    def gradients(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        if again is None:
            raise NotImplementedError(no_kernel(made._name, "gradients of gradients"))
        message = f"{made._name}: gradients that are differentiated again take the definition, step by step"
        warnings.warn(message, KernelFallbackWarning, stacklevel=2)
        function, saved = again(ctx)
        # aliases: where one input was made of another, as dt of x, its gradient has no part in that of the other
        inputs = [x.view_as(x) if isinstance(x, Tensor) and x.requires_grad else x for x in saved]
        outputs = function(*inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        weighted = [o for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
        weights = [g for o, g in zip(outputs, grads, strict=False) if g is not None and o.requires_grad]
        places = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
        wanted = [inputs[i] for i in places]
        found = torch.autograd.grad(weighted, wanted, weights, create_graph=True, allow_unused=True)
        by_place = dict(zip(places, found, strict=True))
        return tuple(by_place.get(i) for i in range(len(ctx.needs_input_grad)))

    made.register_autograd(gradients, setup_context=setup_context)
