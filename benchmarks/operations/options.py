"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from ...options import Positive, Range, Size, check
from ...train.config import Count
from ..harness.options import check_lengths

__all__ = ["PARTS", "DoctorConfig", "KernelsConfig", "Part"]

Part = Literal["operations", "training", "profiles", "decoding"]
PARTS: tuple[Part, ...] = ("operations", "training", "profiles", "decoding")


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Time operations and models on the CPU against their peers, and against what this processor does at most.

    Operations are raced against plain PyTorch, torch.compile, the definition and PyTorch's own modules; training steps
    and decoding of whole models against those of transformers and mambapy where they are installed, and against plain
    PyTorch; profiles say what a training step spends its time on. The contestants of a row take turns, so that whatever
    else the machine does hits all alike; one thread is timed by the CPU time of its process. What is behind comes
    first.
    """

    parts: tuple[Part, ...] = PARTS
    """What is measured."""

    ops: tuple[str, ...] = ()
    """Operations; all when not given."""

    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths of the selective scan, in tokens; other operations are timed at one of their own, at most the
    longest of these."""

    batch_size: Size = 8
    """Sequences."""

    channels: Size = 512
    """Channels of every operation."""

    archs: tuple[str, ...] = ()
    """Architectures of training, profiles and decoding; all decoders when not given."""

    params: tuple[Count, ...] = (1_000_000,)
    """Sizes of the models that are trained: the results in the repository were made with 1M 10M."""

    model_lengths: tuple[int, ...] = (512,)
    """Sequence lengths of the models that are trained, in tokens, 4,096 or one sequence a step: the results in the
    repository were made with 128 512 2048 8192."""

    decode_params: tuple[Count, ...] = (1_000_000, 30_000_000)
    """Sizes of the models that decode."""

    against: Path | None = None
    """Folder with another checkout of this repository, whose models take turns with these, but for operations."""

    threads: Size | None = None
    """Most CPU threads; all cores when not given. Every row is measured with one thread as well."""

    time_box: Positive = 1.0
    """Seconds spent on the repeats of one row of operations; the definition is left out where one repeat would take
    twice as long. Models have a share of them each, and three turns at least."""

    patience: Positive = 30.0
    """Seconds without an answer after which a model leaves the race."""

    compile_box: Annotated[float, Range(0)] = 75.0
    """Seconds that torch.compile may take in all; what comes later is left out. 0 leaves out all."""

    out: Path = Path("runs/kernels")
    """Folder that gets kernels.jsonl, a line as each row is measured, and kernels.md."""

    def __post_init__(self) -> None:
        check_lengths(self.lengths, None, option="--lengths")
        check_lengths(self.model_lengths, None, option="--model-lengths")
        check(self, "--")
        if self.channels % 16:
            raise ValueError(f"--channels must be a multiple of 16, got {self.channels}")
        if self.against is not None and not (self.against / "archs" / "__init__.py").is_file():
            raise ValueError(f"--against {self.against} is no checkout of this repository: it has no archs/__init__.py")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check every operation on this machine: each backend and dtype, values and gradients, in under a minute.

    A backend that fails is switched off for training and measurements here, until the doctor is run again or versions
    change. The exit code is 1 if something failed.
    """

    ops: tuple[str, ...] = ()
    """Operations; all when not given."""

    json: Path | None = None
    """File that gets the same as JSON."""
