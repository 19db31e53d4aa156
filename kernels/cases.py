"""Inputs that operations are checked and timed on: `<operation>/cases.py` has a `Cases` for each operation.

Doctor, benchmarks, compile gate and tests loop over `ops.OPS` and know no operation by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .compare import cast

Sizes = Mapping[str, int]
"""Sizes of an operation, by letter: B rows, L tokens of each, and so on."""

Example = Mapping[str, Any]
"""Arguments of `Cases.example`: B, L, E, N, optional."""


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Least work of a computation."""

    bytes: float
    """Bytes read or written in memory."""
    flops: float = 0.0
    """FLOPs of matrix products, transforms and recurrences: a multiply-add is two."""
    exps: float = 0.0
    """Exponentials, and logarithms and reciprocals, which the same unit takes."""

    def __add__(self, other: Counts) -> Counts:
        return Counts(bytes=self.bytes + other.bytes, flops=self.flops + other.flops, exps=self.exps + other.exps)


@dataclass(frozen=True, kw_only=True)
class Maker:
    """Makes random tensors on a device: activations in `dtype`, parameters in float32."""

    device: torch.device
    dtype: torch.dtype

    def act(self, *shape: int) -> Tensor:
        """Standard normal."""
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def param(self, *shape: int) -> Tensor:
        """Standard normal, in float32."""
        return torch.randn(shape, device=self.device)

    def rising(self, n: int) -> Tensor:
        """1, 2, ... n in float32."""
        return torch.arange(1.0, n + 1, device=self.device)

    def poles(self, E: int, N: int) -> dict[str, Tensor]:
        """A that decays slowly and C, (E, N), complex."""
        A = torch.complex(-torch.rand(E, N, device=self.device) * 0.1 - 1e-3, self.param(E, N))
        return {"A": A, "C": torch.complex(self.param(E, N), self.param(E, N))}


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Arguments of an operation at one size, and the least work that it is there."""

    tensors: dict[str, Tensor]
    """Tensors by name of the argument, unless `Cases.call` says otherwise."""
    options: dict[str, Any] = field(default_factory=dict)
    written: int
    """Bytes of the outputs."""
    flops: tuple[float, float] = (0.0, 0.0)
    """FLOPs of (forward, backward)."""
    exps: tuple[float, float] = (0.0, 0.0)
    """Exponentials of (forward, backward)."""
    has_backward: bool = True

    @property
    def counts(self) -> dict[str, Counts]:
        """Counts by pass: "fwd" and, unless the operation is of inference alone, "fwd+bwd".

        Bytes are counted the same way for all: forward reads every input and writes every output once; backward reads
        the inputs and the gradient of the output and writes the gradients of the inputs. What a kernel saves for
        backward, or reads twice, is its own choice and no part of a floor.
        """
        read = sum(t.nbytes for t in self.tensors.values())
        differentiable = sum(t.nbytes for t in self.tensors.values() if t.is_floating_point() or t.is_complex())
        forward = Counts(bytes=read + self.written, flops=self.flops[0], exps=self.exps[0])
        backward = Counts(bytes=read + self.written + differentiable, flops=self.flops[1], exps=self.exps[1])
        return {"fwd": forward} | ({"fwd+bwd": forward + backward} if self.has_backward else {})


@dataclass(frozen=True, kw_only=True)
class Size:
    """An operation at one size, as it is timed on a GPU."""

    sizes: Sizes
    """Arguments of `Cases.inputs`."""
    predicted: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Milliseconds, least and most, by pass: what was expected of an H200 before anything had been measured."""

    @property
    def shape(self) -> str:
        """The size as text."""
        return " ".join(f"{name}={n}" for name, n in self.sizes.items())


def size(predicted: Mapping[str, tuple[float, float]] | None = None, /, **sizes: int) -> Size:
    """A `Size` in one line."""
    return Size(sizes=sizes, predicted=predicted or {})


def call(op: Callable[..., Any], tensors: Mapping[str, Tensor], options: Mapping[str, Any]) -> Any:
    """The operation on its inputs."""
    return op(**tensors, **options)


@dataclass(frozen=True, kw_only=True)
class Cases:
    """Everything that one operation is checked and timed on."""

    example_tensors: Callable[..., dict[str, Tensor]]
    """Maps (B, L, E, N, starts, optional) to the tensors of `example`."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are not tensors and go with every example."""
    optional_options: Mapping[str, Any] = field(default_factory=dict)
    """Further ones that go with the optional tensors."""
    takes_length: bool = False
    """Whether the operation takes the length as an argument, because no tensor has it."""
    blocks: tuple[Example, ...] = (
        {"L": 300, "E": 200, "N": 16, "optional": True},
        {"L": 256, "E": 64, "N": 16, "optional": False},
    )
    """Examples of several blocks of a GPU kernel, one of them partial."""

    inputs: Callable[..., Inputs] | None = None
    """Maps (maker, **sizes) to what is timed. Without it, that is the example without anything optional."""
    call: Callable[[Callable[..., Any], Mapping[str, Tensor], Mapping[str, Any]], Any] = call
    """Maps (operation, tensors, options) to the outputs, where what is timed is more than the operation."""
    cpu: Callable[[int, int, int], Sizes] = lambda B, L, E: {"B": B, "L": L, "E": E // 8, "N": 16}
    """Maps (rows, tokens of each, channels) to the sizes that are timed on a CPU."""
    at_every_length: bool = False
    """Whether the operation is timed on a CPU at every length that is asked for, and not at one."""
    gpu: tuple[Size, ...] = (size(B=8, L=2048, E=256, N=16),)
    """Standard sizes on a GPU."""
    quick: tuple[Size, ...] = (size(B=2, L=32, E=16, N=4),)
    """Small sizes, to try the benchmark itself."""
    aot: Mapping[str, Sizes] = field(default_factory=dict)
    """Sizes for the compile gate, by what is special about them; the first of `gpu` unless "" is given."""

    compiles: bool = True
    """Whether torch.compile can look into the plain PyTorch form."""
    loop: Callable[..., Any] | None = None
    """A form for torch.compile in the place of the plain one; called like the operation on what is timed."""
    loop_len: int = 1
    """Number of which the length must be a multiple for `loop`."""
    library: Callable[[Mapping[str, Tensor]], tuple[Callable[[], Any], Sequence[Tensor]]] | None = None
    """PyTorch's own module for what is timed, on the tensors of `inputs`: how to call it, and its inputs and weights,
    which are its own."""

    def example(self, *, B: int = 2, L: int = 37, E: int = 6, N: int = 5, optional: bool = True) -> dict[str, Any]:
        """Random inputs in float64, by argument name.

        Args:
            B: batch.
            L: length; the number of tokens for operations without a length.
            E: channels.
            N: states, heads' width, taps or classes, whichever the operation has.
            optional: whether optional tensors are given too: bias, gate, initial state, starts with a mark in most
                rows.
        """
        starts = torch.rand(B, L) < 2 / L
        return self.example_tensors(B=B, L=L, E=E, N=N, starts=starts, optional=optional)

    def example_options(self, *, L: int = 37, optional: bool = True) -> dict[str, Any]:
        """Arguments that are not tensors, to go with `example`."""
        length = {"length": L} if self.takes_length else {}
        return {**self.options, **length, **(self.optional_options if optional else {})}

    def build(self, make: Maker, sizes: Sizes) -> Inputs:
        """Makes what is timed at a size; on "meta" its counts alone."""
        if self.inputs is not None:
            return self.inputs(make, **sizes)
        tensors = cast(self.example(**sizes, optional=False), make.dtype)
        moved = {name: t.to(make.device) for name, t in tensors.items()}
        return Inputs(tensors=moved, options=self.example_options(L=sizes["L"], optional=False), written=0)

    def aot_sizes(self, special: str = "") -> Sizes:
        """The sizes of a case of the compile gate."""
        return self.gpu[0].sizes if special == "" and "" not in self.aot else self.aot[special]


def normal(*shape: int) -> Tensor:
    """Standard normal in float64, for examples."""
    return torch.randn(*shape, dtype=torch.float64)


def uniform(*shape: int) -> Tensor:
    """Uniform from 0 to 1 in float64, for examples."""
    return torch.rand(*shape, dtype=torch.float64)


def steps(*shape: int) -> Tensor:
    """Step sizes in float64, (B, L, ...), for examples: after large ones, which forget everything, tiny and usual ones.

    What decays by little must not lose digits to what decayed by much before.
    """
    share, t = uniform(*shape), torch.arange(shape[1]).view(-1, *[1] * (len(shape) - 2))
    later = torch.where(torch.rand(shape) < 0.5, 1e-5 * share, share)
    return torch.where(3 * t + 3 <= shape[1], 30 * share, later)


def before_softplus(x: Tensor) -> Tensor:
    """What softplus makes x of."""
    return x + torch.log(-torch.expm1(-x))


def complex_normal(*shape: int) -> Tensor:
    """Standard normal in complex128, for examples."""
    return torch.complex(normal(*shape), normal(*shape))


def decaying(*shape: int) -> Tensor:
    """Poles with a negative real part in complex128, for examples."""
    return torch.complex(-uniform(*shape) - 0.01, normal(*shape))
