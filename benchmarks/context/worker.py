"""Measures one architecture at one context length, in a process of its own.

Each cell is sent to the parent when its phase ends, so that what was measured is safe if the next one kills this
process.
"""

from __future__ import annotations

import resource
import traceback
import warnings
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

import torch

from ...archs import LanguageModel, ModelConfig
from ...kernels.dispatch import KernelFallbackWarning
from ...train.objectives.next_token import RandomTokens
from ...train.runtime import PeakMemory, choose_device, choose_precision, is_out_of_memory, keep_freed_memory
from ...train.verdict import apply_verdict
from ...train.warm_up import warm_up
from .jobs import ContextJob
from .measure import Bench

__all__ = ["attempt", "limit_memory", "measure_phases"]


def attempt(bench: Bench, phase: str) -> dict[str, Any]:
    """Measures one phase and returns what its cell says of it: status, numbers, reason of a failure."""
    try:
        found = bench.measure(phase)
    except (RuntimeError, MemoryError, ValueError, KernelFallbackWarning) as error:
        # The message only: the exception's traceback keeps the tensors of the failed phase alive.
        message = str(error).strip().partition("\n")[0][:300] or type(error).__name__
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        if status == "failed":
            traceback.print_exc()
        known = {"batch_size": bench.batch_size.get(phase, 1), "state_bytes": bench.state_bytes}
        return {"status": status, "error": message, **known}
    return {"status": "done", **vars(found)}


def limit_memory(limit: int, device: torch.device) -> None:
    """Makes allocations beyond `limit` bytes fail: of this process on the CPU, of this process on the GPU with CUDA.

    RLIMIT_DATA counts private writable memory. RLIMIT_AS would count reserved address space too, of which libraries
    take gigabytes without ever touching it.
    """
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
    else:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def measure_phases(job: ContextJob, phases: Sequence[str], parent: Connection) -> None:
    """Measures phases of a job one after the other, and sends the cell of each to the parent."""
    # A measurement must never be of a slower path than the one it names.
    warnings.simplefilter("error", KernelFallbackWarning)
    keep_freed_memory()
    apply_verdict()
    device = choose_device(job.device)
    torch.set_num_threads(job.threads)
    torch.mm(torch.ones(512, 512), torch.ones(512, 512))  # starts the thread pool, whose stacks are not the model's
    assert job.measure.memory_limit is not None
    limit_memory(job.measure.memory_limit, device)
    precision = choose_precision(job.precision, device)
    config = ModelConfig.from_dict(job.model)
    try:
        toy = RandomTokens(vocab_size=config.vocab_size, batch_size=8, seq_len=min(128, config.max_positions or 128))
        warm_up(config, toy, device, precision)  # what its libraries and compilers take for good is not the model's
        memory = PeakMemory(device)  # what is used from here on belongs to the model
        torch.manual_seed(0)
        lm = LanguageModel(config).to(device)
        bench = Bench.of(lm, job.context_len, job.measure, device=device, precision=precision, memory=memory)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:300]
        for phase in phases:
            parent.send(job.cell(phase, status="out_of_memory", error=reason))
        return
    for phase in phases:
        parent.send(job.cell(phase, **attempt(bench, phase)))
