"""The cases that `crossover bench kernels` times: each operation at its CPU sizes, with the contestants."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ...kernels.cases import Inputs, Maker, Size
from ...kernels.dispatch import use_backend
from ...kernels.ops import OPS

if TYPE_CHECKING:
    from .options import KernelsConfig

__all__ = ["Case", "Compiler", "Contestant", "case_of", "cases", "compiled", "contestants", "one_pass"]

_LENGTH = 1024
"""Tokens of operations that are timed at one length."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An operation at one size."""

    op: str
    length: int
    shape: str
    """The size as text."""
    inputs: Inputs


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """A way to compute a case."""

    run: Callable[[], Any]
    """Returns the outputs."""
    leaves: Sequence[Tensor]
    """Tensors whose gradients a backward pass gives."""


def cases(name: str, config: KernelsConfig) -> list[Case]:
    """The cases of an operation."""
    lengths = config.lengths if OPS[name].cases.at_every_length else (min(config.lengths[-1], _LENGTH),)
    return [case_of(name, length, config) for length in lengths]


def case_of(name: str, length: int, config: KernelsConfig) -> Case:
    """An operation at a length; for operations without one, it is the number of tokens."""
    torch.manual_seed(0)
    size = Size(sizes=OPS[name].cases.cpu(config.batch_size, length, config.channels))
    inputs = OPS[name].cases.build(Maker(device=torch.device("cpu"), dtype=torch.float32), size.sizes)
    return Case(op=name, length=length, shape=size.shape, inputs=inputs)


def contestants(case: Case) -> dict[str, Contestant]:
    """Makes those without a compiler: "ours" (the backend chosen by itself), "torch", "definition", perhaps "peer"."""
    op, tensors, options = OPS[case.op], case.inputs.tensors, case.inputs.options
    for t in tensors.values():
        if t.is_floating_point() or t.is_complex():
            t.requires_grad_()
    leaves = [t for t in tensors.values() if t.requires_grad]

    def ours() -> Any:
        return op.cases.call(op, tensors, options)

    def forced(backend: str) -> Callable[[], Any]:
        def run() -> Any:
            with use_backend(backend):
                return ours()

        return run

    found = {"ours": ours, "torch": forced("torch"), "definition": forced("reference")}
    racing = {name: Contestant(run=run, leaves=leaves) for name, run in found.items()}
    if op.cases.library is not None:
        run, their_leaves = op.cases.library(tensors)
        racing["peer"] = Contestant(run=run, leaves=their_leaves)
    return racing


def one_pass(contestant: Contestant, backward: bool) -> Callable[[], Any]:
    """Forward alone as in inference, which returns the outputs, or with backward, which returns all gradients."""
    incoming: list[Tensor] = []

    def forward() -> Any:
        with torch.no_grad():
            return contestant.run()

    def both() -> Any:
        out = contestant.run()
        y: Tensor = out[0] if isinstance(out, tuple) else out
        if not incoming:  # once: it is no part of the work, and all contestants get the same
            generator = torch.Generator(y.device).manual_seed(1)
            incoming.append(torch.randn(y.shape, generator=generator, dtype=y.dtype, device=y.device))
        return torch.autograd.grad(y, contestant.leaves, incoming[0], allow_unused=True)

    return both if backward else forward


class Compiler:
    """Hands out torch.compile as long as its seconds last."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._done: set[tuple[object, ...]] = set()

    def first_call(self, case: Case, backward: bool, work: Callable[[], object]) -> str | None:
        """Calls `work`, which compiles; returns None, or in one line why it cannot take part."""
        # what a loop repeats is the same at every length
        what = (case.op, backward, None if OPS[case.op].cases.loop else case.shape)
        if what in self._done:
            return None
        if self.seconds <= 0:
            return "no time left to compile (--compile-box)"
        begin = time.perf_counter()
        try:
            work()
        except RuntimeError as error:
            return f"does not compile: {(str(error).strip().splitlines() or [''])[0][:120]}"
        finally:
            self.seconds -= time.perf_counter() - begin
        self._done.add(what)
        return None


def compiled(case: Case) -> Contestant | None:
    """Plain PyTorch under torch.compile, or the operation's loop; None where that would change nothing."""
    op, tensors, options = OPS[case.op], case.inputs.tensors, case.inputs.options
    leaves = [t for t in tensors.values() if t.requires_grad]
    if (loop := op.cases.loop) is not None:
        fits = case.length % op.cases.loop_len == 0
        return Contestant(run=lambda: op.cases.call(loop, tensors, options), leaves=leaves) if fits else None
    if not op.cases.compiles:
        return None
    function = torch.compile(lambda tensors: op.cases.call(op, tensors, options), dynamic=False)

    def run() -> Any:
        with use_backend("torch"):
            return function(tensors)

    return Contestant(run=run, leaves=leaves)
