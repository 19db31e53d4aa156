"""The parts that models are put together from: projections and their FLOPs, norms, learned positions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels import ops
from ..options import Positive
from .mixer import State, Zeros
from .state import joined_numbers, per_row
from .step import Step


def linear(d_in: int, d_out: int, *, bias: bool = False, scale: float = 1.0) -> nn.Linear:
    """A projection with weights uniform in +-scale / sqrt(d_in), PyTorch's default times `scale`, and a zero bias."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    with torch.no_grad():
        layer.weight.mul_(scale)
        if bias:
            layer.bias.zero_()
    return layer


@dataclass(frozen=True, kw_only=True)
class StepSizes:
    """Options of mixers that learn the step size of a state-space model."""

    dt_min: Positive = 1e-3
    """Smallest initial step size; where softplus makes it of a bias, itself at least 1e-4."""
    dt_max: Positive = 1e-1
    """Largest initial step size."""

    def __post_init__(self) -> None:
        if self.dt_min > self.dt_max:
            raise ValueError(f"dt_min={self.dt_min} must not be more than dt_max={self.dt_max}")


def inner_width(expand: float, d_model: int) -> int:
    """E, the channels inside a mixer that is `expand` times as wide as the model.

    Raises:
        ValueError: if that leaves none.
    """
    width = int(expand * d_model)
    if width < 1:
        raise ValueError(f"expand={expand} of d_model={d_model} leaves no channel: use a larger one")
    return width


def step_bias(n: int, dt_min: float, dt_max: float) -> nn.Parameter:
    """dt_bias, (n,), where softplus(dt_bias) is log-uniform in [dt_min, dt_max], at least 1e-4 (Mamba, section 3.6)."""
    dt = torch.empty(n).uniform_(math.log(dt_min), math.log(dt_max)).exp().clamp(min=1e-4)
    return nn.Parameter(dt + torch.log(-torch.expm1(-dt)))


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), in float32 at least."""
    return -torch.exp(A_log.to(torch.promote_types(A_log.dtype, torch.float32)))


def default_head_dim(width: int, *, n_groups: int = 1) -> int:
    """The largest power of two up to 64 that leaves at least three heads, in equal groups; 1 where there is none."""
    least = max(3, n_groups)
    return next((p for p in (64, 32, 16, 8, 4, 2) if width % (p * n_groups) == 0 and width // p >= least), 1)


def linear_flops(module: nn.Module) -> float:
    """Forward FLOPs per token of every nn.Linear inside `module`."""
    return sum(2.0 * m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


class RMSNorm(nn.Module):
    """weight x / rms(x) over the last axis (arXiv:1910.07467)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) -> (..., width)."""
        return ops.rms_norm(x, self.weight, self.eps)

    def describe_step(self, step: Step, x: Tensor) -> Tensor:
        """`forward` for one token, (n_rows, width), or of equal groups of channels, (n_rows, groups width)."""
        return step.rms_norm(x, self.weight, self.eps)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}
"""Norms of the residual stream: made from the width and eps."""


@dataclass
class PositionState(State):
    """The position that a sequence has reached."""

    first: Tensor
    """Index of the first token of the current document, (B,) int64."""
    n_seen: int | Tensor = 0
    """Tokens seen: the index of the next one; (B,) where rows were joined that have seen unlike numbers."""

    def forget(self, rows: Tensor) -> Self:
        """See State.forget: the next token is the first one of these rows."""
        return dataclasses.replace(self, first=torch.where(rows, self.n_seen, self.first))

    @classmethod
    def cat(cls, states: Sequence[Any]) -> Self:
        """See State.cat."""
        first = torch.cat([state.first for state in states])
        return cls(first, joined_numbers([(s.n_seen, len(s.first)) for s in states], first.device))


class LearnedPositions(nn.Module):
    """x[t] + weight[p], where p counts the tokens of its document before token t (Gehring et al. 2017, 1705.03122)."""

    State = PositionState

    def __init__(self, max_positions: int, d_model: int) -> None:
        super().__init__()
        # as large as the token embeddings
        self.weight = nn.Parameter(torch.empty(max_positions, d_model).normal_(std=d_model**-0.5))

    def forward(
        self, x: Tensor, state: PositionState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, PositionState | None]:
        """(B, L, D) -> (B, L, D); state and starts are as in Mixer.forward.

        Raises:
            ValueError: if the sequence is longer than max_positions, even if each of its documents is not: their
                lengths are only known on the device. Those of joined rows are read back.
        """
        n_seen = 0 if state is None else state.n_seen
        if not isinstance(n_seen, Tensor):
            self._check(n_seen + x.shape[1])
        elif state is not None and n_seen.dim() and len(n_seen) and not torch.compiler.is_compiling():
            self._check(int((n_seen - state.first).max()) + x.shape[1])
        # a single number of the device is not read back: `init_state` has checked the length
        index = per_row(n_seen) + torch.arange(x.shape[1], device=x.device)
        first = index.new_zeros(1, 1) if state is None else state.first[:, None]
        if starts is not None:
            first = torch.where(starts, index, first).cummax(1).values  # (B, L): of the document of each token
        y = x + F.embedding(index - first, self.weight)
        if state is None or not x.shape[1]:
            return y, state
        return y, PositionState(first[:, -1].clone(), n_seen + x.shape[1])

    def describe_step(self, step: Step, x: Tensor, state: PositionState) -> Tensor:
        """`forward` for one token, (n_rows, D)."""
        first, n_seen = step.state(state.first), step.counted(state, "n_seen")
        # as in `forward`, which knows how long documents are only where rows were joined
        reached = n_seen - first if isinstance(state.n_seen, Tensor) else n_seen
        step.n_left = min(step.n_left, len(self.weight) - int(reached.max()))
        return step.lookup(self.weight, n_seen, less=first, into=x)

    def init_state(self, batch_size: int, max_len: int, *, device: torch.device | str | None = None) -> PositionState:
        """The state before the first of at most `max_len` tokens; ValueError where max_positions is less."""
        self._check(max_len)
        return PositionState(torch.zeros(batch_size, device=device, dtype=torch.int64))

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {"first": Zeros((), at_least=torch.int64)}

    def _check(self, length: int) -> None:
        if length > len(self.weight):
            raise ValueError(
                f"{length} tokens are more than max_positions={len(self.weight)}: build the model with more positions,"
                " or shorten the context"
            )
