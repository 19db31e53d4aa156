"""Options that several commands share, and their checks. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.constructors import PrimitiveConstructorSpec

from ...options import Length, Range, Size, check
from ...train.config import Count, DataConfig, ObjectiveSpec, OptimConfig
from .format import format_bytes, parse_bytes

__all__ = [
    "ARCHS",
    "Budget",
    "ByteSize",
    "Models",
    "Place",
    "Precision",
    "check_lengths",
]

ARCHS = ("transformer", "s4d", "mamba", "jamba", "lstm")

_TOKENS_PER_STEP = 2048
"""When nothing else is asked for."""

Precision = Literal["auto", "fp32", "bf16"]

ByteSize = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=lambda words: parse_bytes(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [format_bytes(value).replace(" ", "")],
    ),
]


def check_lengths(context: tuple[int, ...], tokens_per_batch: int | None, *, option: str = "--context") -> None:
    """Raises ValueError unless lengths are positive and increase, and none is longer than a batch."""
    if not context:
        raise ValueError(f"{option} names no length")
    if min(context) <= 0:
        raise ValueError(f"{option} must be positive lengths in tokens, got {min(context)}")
    if list(context) != sorted(set(context)):
        raise ValueError(f"{option} must be increasing lengths in tokens, got {' '.join(map(str, context))}")
    if tokens_per_batch is not None and tokens_per_batch < context[-1]:
        raise ValueError(
            f"--tokens-per-batch {tokens_per_batch} is less than the longest --context, {context[-1]}, so the lengths "
            "would not train on equally many tokens"
        )


@dataclass(frozen=True, kw_only=True)
class Models:
    """Architectures to compare, and their size."""

    archs: tuple[str, ...] = ARCHS
    """Architectures, in the order of tables and figures."""

    params: Count = 1_000_000
    """Parameters of every model, reached within 2 % (1M, 500k)."""

    def __post_init__(self) -> None:
        check(self, "--")
        if not self.archs:
            raise ValueError("--archs names no architecture")
        if len(set(self.archs)) < len(self.archs):
            raise ValueError(f"--archs names an architecture twice: {' '.join(self.archs)}")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Budget of every run of a comparison, and what it learns."""

    seeds: Length = 3
    """Runs of each kind, with seeds 0, 1, ...; fewer than 3 say nothing of noise."""

    steps: Count = 150
    """Optimizer steps of every run."""

    batch_size: Size | None = None
    """Sequences per step, of the shortest --seq-len; when not given, as many as one of the longest --seq-len has
    tokens, or several of it up to 2,048."""

    seq_len: Annotated[tuple[int, ...], Range(1, 2**32)] = (128, 512)
    """Tokens per training sequence."""

    eval_tokens: Count = 8_192
    """Held-out tokens read by one validation on the way, always the same ones."""

    objective: ObjectiveSpec = field(default_factory=ObjectiveSpec)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)

    def __post_init__(self) -> None:
        check(self, "--")
        check_lengths(self.seq_len, None, option="--seq-len")
        for length in self.seq_len:
            self._check_divides(length)

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, of every run."""
        shortest, longest = self.seq_len[0], self.seq_len[-1]
        tokens = max(1, _TOKENS_PER_STEP // longest) * longest
        return shortest * (self.batch_size or -(-tokens // shortest))

    def _check_divides(self, length: int) -> None:
        tokens = self.tokens_per_step
        if tokens % length == 0:
            return
        said = f"{tokens:,} tokens of a step, {tokens // self.seq_len[0]} times the shortest --seq-len"
        if length > tokens:
            needed = -(-length // self.seq_len[0])
            raise ValueError(f"--seq-len {length} is more than the {said}: give --batch-size {needed} or more")
        ways = range(1, tokens // self.seq_len[0] + 1)
        nearest = min((tokens // n for n in ways if tokens % n == 0), key=lambda fits: abs(fits - length))
        raise ValueError(f"--seq-len {length} does not divide the {said}: the nearest that does is {nearest}")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Folder and device of a command, and the share of the machine that it takes."""

    out: Path
    """Folder of the results."""

    precision: Precision = "fp32"
    """Arithmetic of matrix products in training and measurements, of all models alike; 'auto' takes bf16 where it pays:
    on a GPU that has it, and on a CPU where a measurement says so. Parameters, states and sums are float32 always."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    jobs: Size | None = None
    """Runs trained at once, which share the CPU threads; when not given, one per thread on the CPU and one on CUDA.
    Small models train faster side by side than with more threads each."""

    threads: Size | None = None
    """CPU threads in all; all cores when not given."""

    fresh: bool = False
    """Move what is in --out aside and start over."""

    def __post_init__(self) -> None:
        check(self, "--")
