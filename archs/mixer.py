"""The interface every sequence mixer implements, and the legend of axis names.

Axes, in tuples and comments: B batch, L length, D d_model, E d_inner, N d_state, H heads, P head_dim, G groups,
K d_conv, V vocabulary, S keys. Batch first, length second, channels last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ..kernels import ops
from ..options import check
from .state import State
from .step import Step

__all__ = ["Mixer", "State", "Zeros"]


class Zeros(NamedTuple):
    """A tensor of an empty state."""

    shape: tuple[int, ...]
    """Its axes after the batch."""
    at_least: torch.dtype | None = None
    """The least precision that it is kept in, whatever that of the activations: float32 or complex64, which float64
    makes float64 or complex128; None means the precision of the activations."""


S = TypeVar("S", bound=State)
C = TypeVar("C")


class Mixer(nn.Module, Generic[C, S]):
    """Mixes information along the sequence axis, causally: output t depends on inputs 0..t only.

    Encoders (attention with causal=False, bidirectional recurrences) see both sides, and take no state.

    A mixer is one file in archs/mixers/ and one line in archs/registry.py. It sees (B, L, D) in and out; the norm, the
    residual and the channel mixing belong to Block. It creates and initializes its own parameters, and nothing else
    initializes them again. What every mixer must hold is stated by tests/archs/test_contract.py: a full pass, any split
    into chunks, token by token, packed documents apart and left-padded rows all give the same outputs and gradients.
    """

    Config: ClassVar[type[Any]]
    """Frozen dataclass of options, every field with a default."""

    State: ClassVar[type[Any]]
    """Subclass of `State` with the tensors of `state_layout`; its other fields have defaults."""

    no_weight_decay: ClassVar[frozenset[str]] = frozenset()
    """Names of this module's own parameters that the optimizer must not decay (A_log, ...). Vectors never decay."""

    lr_scale: ClassVar[Mapping[str, float]] = {}
    """Learning-rate multipliers for this module's own parameters (S4D trains its poles slower, for instance)."""

    def __init__(self, d_model: int, config: C, *, residual_scale: float = 1.0) -> None:
        """Builds the mixer for width `d_model`.

        Args:
            d_model: D.
            config: an instance of `Config`.
            residual_scale: factor on the initial weights of the projection into the residual stream, so that the
                variance of a deep stack does not grow with its depth (GPT-2, section 2.3).
        """
        super().__init__()
        self.d_model = d_model
        check(config)
        self.config = config
        self.residual_scale = residual_scale

    def forward(self, x: Tensor, state: S | None = None, *, starts: Tensor | None = None) -> tuple[Tensor, S | None]:
        """Runs over a sequence: training, prefill, a chunk of a prefill, or one decode step.

        Args:
            x: (B, L, D).
            state: the state before x[:, 0], or None to start from nothing and keep nothing (training).
            starts: (B, L) bool, True at the first token of a document, at which everything before (a given state too)
                is forgotten.

        Returns:
            y, (B, L, D), and the state after x[:, L-1]: None in gives None out. Only the returned state is valid
            afterwards: a given one is updated in place, unless gradients are recorded.
        """
        raise NotImplementedError

    def step(self, x: Tensor, state: S) -> tuple[Tensor, S]:
        """Runs one token: x and y are (B, D). Equals forward at length 1."""
        y, after = self(x[:, None], state)
        return y[:, 0], after

    def describe_step(self, step: Step, x: Tensor, state: S) -> Tensor:
        """Describes `step` for a compiled program (see step.py): x and y are (n_rows, D), `state` changes in place.

        A class that has none, and a subclass that does not say it again, is decoded by its forward pass.
        """
        raise NotImplementedError

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S:
        """An empty state for `batch_size` rows of at most `max_len` tokens.

        `dtype` is that of the activations kept; what `state_layout` declares to be wider stays so.
        """
        activations = dtype or torch.get_default_dtype()
        tensors: dict[str, Tensor] = {}
        for name, (shape, at_least) in self.state_layout(max_len).items():
            precision = torch.promote_types(activations, at_least or activations)
            tensors[name] = torch.zeros(batch_size, *shape, device=device, dtype=precision)
        return self.State(**tensors)

    def state_layout(self, max_len: int) -> Mapping[str, Zeros]:
        """The tensors of an empty state by name (recurrent mixers ignore max_len): recurrences are kept in float32."""
        raise NotImplementedError

    def flops_per_token(self, context_len: float) -> float:
        """Forward FLOPs (a multiply-add is two) of one token with `context_len` tokens before it."""
        raise NotImplementedError

    def sequence_flops(self, seq_len: int) -> float:
        """Forward FLOPs of a whole sequence: the sum over its tokens, unless sequences are computed another way."""
        return sum(self.flops_per_token(t) for t in range(seq_len))

    def may_write_in_place(self, *tensors: Tensor) -> bool:
        """Whether a state may be updated in place: not while autograd records any of these, nor under torch.func."""
        return ops.transform() is None and not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors))
