"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from ...options import Positive, Range, Size, check
from ..harness.options import check_lengths

__all__ = ["DoctorConfig", "KernelsConfig"]


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Time each operation on the CPU against plain PyTorch, torch.compile and the definition, and models against peers.

    The contestants of a row take turns, so that whatever else the machine does hits all alike. Small whole models are
    compared with those of Hugging Face's transformers where it is installed (pip install 'crossover[hf]').
    """

    ops: tuple[str, ...] = ()
    """Operations; all when not given."""

    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths of the selective scan, in tokens; other operations are timed at one of their own, at most the
    longest of these."""

    batch_size: Size = 8
    """Sequences."""

    channels: Size = 512
    """Channels of every operation."""

    threads: Size | None = None
    """Most CPU threads; all cores when not given. Every row is measured with one thread as well."""

    time_box: Positive = 1.5
    """Seconds spent on the repeats of one row. The definition is left out where one repeat would take twice as long."""

    compile_box: Annotated[float, Range(0)] = 75.0
    """Seconds that torch.compile may take in all; what comes later is left out. 0 leaves out all."""

    models: bool = True
    """Whether whole models are timed against Hugging Face's, too."""

    out: Path = Path("runs/kernels")
    """Folder that gets kernels.jsonl, a line as each row is measured, and kernels.md."""

    def __post_init__(self) -> None:
        check_lengths(self.lengths, None, option="--lengths")
        check(self, "--")
        if self.channels % 16:
            raise ValueError(f"--channels must be a multiple of 16, got {self.channels}")


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
