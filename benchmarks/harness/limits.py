"""What a machine does at most, and what a computation takes there at least."""

from __future__ import annotations

from dataclasses import dataclass

from ...kernels.cases import Counts

__all__ = ["Limits"]


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Rates of the machine, each per second; None where it could not be measured."""

    bytes: float | None = None
    flops: float | None = None
    exps: float | None = None

    def floor(self, counts: Counts) -> tuple[float, str] | None:
        """Milliseconds that the counts take at least, and which of them decides: bytes, flops or exps."""
        seconds = {
            name: getattr(counts, name) / rate
            for name in ("bytes", "flops", "exps")
            if (rate := getattr(self, name)) is not None and getattr(counts, name)
        }
        if not seconds:
            return None
        name = max(seconds, key=lambda name: seconds[name])
        return seconds[name] * 1e3, name
