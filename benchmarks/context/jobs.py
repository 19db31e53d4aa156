"""Jobs that measure against the context length: one architecture at one length, with all that decides the result."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from ..harness.sizes import SizedArch
from .cell import Cell
from .options import MeasureConfig, Phase

if TYPE_CHECKING:
    import torch

__all__ = ["BASIC_PHASES", "PHASES", "ContextJob", "context_jobs", "default_memory_limit"]

PHASES = get_args(Phase)
"""Phases from the lightest to the heaviest."""

BASIC_PHASES = ("decode", "prefill", "train")
"""Those that are measured unless others are asked for."""


@dataclass(frozen=True, kw_only=True)
class ContextJob:
    """One architecture at one context length.

    Raises:
        ValueError: if the model reads a source and writes a target.
    """

    arch: str
    label: str
    """The architecture's name as written in text."""
    context_len: int
    model: Mapping[str, Any]
    """ModelConfig.to_dict()"""
    n_params: int
    n_active_params: int
    measure: MeasureConfig
    precision: str
    device: str
    threads: int
    provenance: Mapping[str, Any]
    """Machine and versions: cpu, device, torch, git_commit."""
    phases: Sequence[str] = BASIC_PHASES
    """What is measured, the lightest first."""
    repeat: int = 0
    """Number of the process, where several measure the same one after the other."""

    def __post_init__(self) -> None:
        if "source" in self.model:
            raise ValueError(
                f"{self.label} has two lengths, of a source and of a target, where the others have one context: leave "
                f"{self.arch} out of --archs (crossover train --objective pairs trains it)"
            )

    @property
    def name(self) -> str:
        """Name of the job in progress and messages."""
        again = f", repeat {self.repeat + 1}" if self.repeat else ""
        return f"{self.label} at {self.context_len:,} tokens{again}"

    @property
    def settings(self) -> dict[str, Any]:
        """Settings that all cells of a comparison must share."""
        return {
            **dataclasses.asdict(self.measure),
            "precision": self.precision,
            "device": self.device,
            "threads": self.threads,
            "allocator": "freed memory is kept for reuse (glibc mallopt), for every model alike",
        }

    def beyond_positions(self, phase: str) -> str | None:
        """Says that the model has too few learned positions for a phase; None where it has enough."""
        n_positions = self.model["max_positions"]
        needed = self.context_len + (self.measure.decode_tokens if phase.startswith("decode") else 0)
        if n_positions is None or needed <= n_positions:
            return None
        return f"{needed:,} tokens are beyond its {n_positions:,} positions"

    def cell(self, phase: str, **found: Any) -> Cell:
        """Makes the cell of a phase; `found` is what was measured, or why nothing was."""
        return Cell(
            arch=self.arch,
            label=self.label,
            phase=phase,
            context_len=self.context_len,
            n_params=self.n_params,
            n_active_params=self.n_active_params,
            dtype=self.precision,
            model=self.model,
            settings=self.settings,
            provenance=self.provenance,
            repeat=self.repeat,
            **found,
        )


def context_jobs(
    sizes: Sequence[SizedArch],
    lengths: Sequence[int],
    *,
    measure: MeasureConfig,
    precision: str,
    device: str,
    threads: int | None,
    provenance: Mapping[str, Any],
    before: Sequence[Cell] = (),
    phases: Collection[str] = BASIC_PHASES,
    repeats: int = 1,
) -> list[ContextJob]:
    """Every architecture at every length, short lengths first, so that an unfinished comparison can be compared.

    All that is measured again is so after everything was measured once: whatever the machine does for a while then hits
    one repeat of all models, and not all repeats of one.

    Args:
        sizes: the architectures.
        lengths: context lengths in tokens.
        measure: settings. What they leave open is as in the cells `before`; of a new comparison, a training step has
            as many tokens as the longest length, and memory is limited to what `default_memory_limit` says.
        precision: arithmetic, fp32 or bf16.
        device: where models run; 'auto' is resolved on this machine.
        threads: CPU threads; all cores where None.
        provenance: machine and versions, of which cells keep cpu, device, torch and git_commit.
        before: cells of the comparison that these jobs extend.
        phases: what is measured.
        repeats: processes that measure the same, one after the other.

    Raises:
        ValueError: if the device cannot be used, a model is an encoder, or it reads a source and writes a target.
    """
    for sized in sizes:
        if sized.config.kind == "encoder":
            raise ValueError(
                f"{sized.label} is an encoder, which generates nothing and carries no state: leave {sized.arch} out of "
                "--archs (crossover.benchmarks.measure times its training and reading)"
            )
    import torch

    from ...train.runtime import choose_device

    chosen = choose_device(device)
    pinned = before[0].settings if before else {}
    measure = dataclasses.replace(
        measure,
        tokens_per_batch=measure.tokens_per_batch or pinned.get("tokens_per_batch") or max(lengths),
        memory_limit=measure.memory_limit or pinned.get("memory_limit") or default_memory_limit(chosen),
    )
    return [
        ContextJob(
            arch=sized.arch,
            label=sized.label,
            context_len=context_len,
            model=sized.config.to_dict(),
            n_params=sized.n_params,
            n_active_params=sized.n_active_params,
            measure=measure,
            precision=precision,
            device=str(chosen),
            threads=threads if threads is not None else torch.get_num_threads(),
            provenance={key: provenance[key] for key in ("cpu", "device", "torch", "git_commit")},
            phases=[phase for phase in PHASES if phase in phases],
            repeat=repeat,
        )
        for repeat in range(repeats)
        for context_len in lengths
        for sized in sizes
    ]


def default_memory_limit(device: torch.device) -> int:
    """Bytes that a measurement may allocate where no limit is given: 3 GiB on the CPU, on CUDA what is free now."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 3 * 2**30
