"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ...options import Length, Positive, Size, check
from ..harness.format import format_bytes
from ..harness.options import ByteSize, Models, Place, check_lengths

__all__ = ["CellsConfig", "ContextConfig", "MeasureConfig", "Phase"]

Phase = Literal["decode", "first_token", "prefill", "long_prompt", "decode_many", "train", "long_answer"]
"""What is measured at a context length; docs/architecture.md and `Bench` say what each is."""


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How a cell (one architecture at one context length) is measured; part of the identity of a result."""

    tokens_per_batch: Length | None = None
    """Tokens in one training step at every length, as a batch of tokens // length sequences, or one that is longer.
    When not given, the longest --context, or what measurements in --out were made with."""

    prompts: Size = 1
    """Sequences read at once in prefill and continued at once in decode."""

    decode_tokens: Length = 32
    """Tokens generated one at a time in each repeat of the decode measurements, and the short part of a request: the
    answer of long_prompt, the prompt of long_answer (an eighth of a context that is less than eight times as long)."""

    max_batch: Size = 64
    """Most sequences of decode_many, which continues as many at once as fit into the memory, in powers of two."""

    time_box: Positive = 0.5
    """Seconds spent on the repeats of one phase, longer where --min-repeats take longer."""

    min_repeats: Size = 3
    """Fewest repeats of a phase after its warm-up; training whose warm-up step alone takes longer than --time-box needs
    only 2."""

    timeout: Positive = 300.0
    """Seconds after which a phase is stopped and recorded as a timeout."""

    memory_limit: ByteSize | None = None
    """Most memory a measurement may allocate (RLIMIT_DATA on the CPU, allocator limit on CUDA); more is recorded as
    out of memory. When not given, 3 GiB on the CPU, of which the Python process itself takes about 0.3 GiB, and on CUDA
    what is free on the card."""

    def __post_init__(self) -> None:
        check(self, "--")
        if self.memory_limit is not None and self.memory_limit < 2**29:
            raise ValueError(
                f"--memory-limit {format_bytes(self.memory_limit)} is too little for Python and torch: give 512MiB"
            )


@dataclass(frozen=True, kw_only=True)
class CellsConfig:
    """What is measured against the context length."""

    context: tuple[int, ...] = (128, 512, 2048, 8192)
    """Context lengths in tokens at which speed and memory are measured."""

    phases: tuple[Phase, ...] = ("train", "prefill", "decode")
    """What is measured: training steps, reading a prompt, writing after it (decode; decode_many: as many sequences at
    once as fit), the time to the first token, and whole requests with a long prompt or a long answer."""

    repeats: Size = 3
    """Processes that measure the same, one after the other, each after all models have had the one before."""

    measure: Annotated[MeasureConfig, tyro.conf.arg(name="")] = field(default_factory=MeasureConfig)

    def __post_init__(self) -> None:
        check_lengths(self.context, self.measure.tokens_per_batch)
        if not self.phases:
            raise ValueError("--phases names nothing to measure")


@dataclass(frozen=True, kw_only=True)
class ContextConfig(CellsConfig, Place, Models):
    """Measure speed, peak memory and state size at each context length."""

    vocab_size: Length = 256
    """Vocabulary of the models; tokens are drawn at random."""

    dry_run: bool = False
    """Print what is to be measured and how long it takes here, and do nothing."""

    out: Path = Path("runs/context")
    """Folder that gets context.jsonl, context.csv and the report."""

    jobs: tyro.conf.Suppress[int | None] = None
    """Unused: measurements run one after the other."""

    def __post_init__(self) -> None:
        for part in (Models, Place, CellsConfig):
            part.__post_init__(self)
        if self.dry_run and self.fresh:
            raise ValueError("--dry-run says what is left to do in --out: leave --fresh out")
