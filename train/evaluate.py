"""Quality on held-out text: bits per byte, loss by position, and a sample to read.

Bits per byte divide the nats of all predicted tokens by the UTF-8 bytes that those tokens stand for, so that another
tokenizer does not change the scale. All functions leave the model in the mode in which they found it.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .data import document_starts

if TYPE_CHECKING:
    from ..archs import LanguageModel
    from .tokenizer import Tokenizer

__all__ = ["Evaluator", "Validation", "bits_per_byte", "buckets", "document_inputs"]


def bits_per_byte(nats: float, n_bytes: int) -> float:
    """Converts the summed nats of a text into bits for each of its UTF-8 bytes."""
    return nats / math.log(2) / n_bytes


def buckets(length: int) -> list[tuple[int, int]]:
    """Returns [start, stop) ranges of positions whose bounds are powers of two: 0-1, 1-2, 2-4, ... up to `length`."""
    bounds = [0, *(2**power for power in range(length.bit_length()) if 2**power < length), length]
    return list(itertools.pairwise(bounds))


def document_inputs(
    windows: np.ndarray, device: torch.device, *, separator: int | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Splits windows (B, L + 1) into tokens and targets, (B, L) int64, and starts, (B, L) bool.

    `separator` is the token after which a document starts, or None (then starts is None) where a model reads on.
    """
    inputs, targets = torch.from_numpy(windows[:, :-1]), torch.from_numpy(windows[:, 1:])
    starts = None if separator is None else torch.from_numpy(document_starts(windows[:, :-1], separator)).to(device)
    return inputs.to(device), targets.to(device), starts


@dataclass(frozen=True, kw_only=True)
class Validation:
    """Quality of a model on fixed held-out windows."""

    loss: float
    """Mean nats per token."""
    bits_per_byte: float
    n_tokens: int
    n_bytes: int
    """UTF-8 bytes that these tokens stand for."""


@dataclass(frozen=True, kw_only=True)
class Evaluator:
    """Evaluates a model in the arithmetic in which it is trained."""

    model: LanguageModel
    tokenizer: Tokenizer
    device: torch.device
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
    """Context of the forward pass."""
    reset: bool = False
    """Whether the model forgets where a document starts, as in training with packing="reset"."""
    max_tokens: int = 16_384
    """Tokens of one forward pass, unless a single window is longer."""
    poll: Callable[[], None] = lambda: None
    """Called before each forward pass; stops the evaluation by raising."""

    def validate(self, windows: np.ndarray) -> Validation:
        """Returns the loss over `windows`, (n, L + 1)."""
        nats = 0.0
        for batch, (tokens, targets, starts) in self._batches(windows):
            with self.autocast():
                loss, _ = self.model.loss(tokens, targets, starts=starts)
            nats += loss.item() * batch[:, 1:].size
        n_tokens = windows[:, 1:].size
        n_bytes = self.tokenizer.n_bytes(windows[:, 1:])
        return Validation(
            loss=nats / n_tokens, bits_per_byte=bits_per_byte(nats, n_bytes), n_tokens=n_tokens, n_bytes=n_bytes
        )

    def by_position(self, windows: np.ndarray) -> list[dict[str, Any]]:
        """Returns bits per byte of the tokens at positions [start, stop) of `windows`, (n, L + 1), L also untrained.

        Position 0 predicts the second token of a window. Each entry has start, stop, bits_per_byte and n_tokens.
        """
        length = windows.shape[1] - 1
        nats = torch.zeros(length, dtype=torch.float64)
        for _, (tokens, targets, starts) in self._batches(windows):
            with self.autocast():
                losses = self.model.token_losses(tokens, targets, starts=starts)
            nats += losses.sum(0, dtype=torch.float64).cpu()
        table = []
        for start, stop in buckets(length):
            targets = windows[:, 1 + start : 1 + stop]
            quality = bits_per_byte(nats[start:stop].sum().item(), self.tokenizer.n_bytes(targets))
            table.append({"start": start, "stop": stop, "bits_per_byte": quality, "n_tokens": targets.size})
        return table

    def sample(self, n_tokens: int, *, seed: int = 0) -> str:
        """Returns text that the model continues from the start of a document: a pure function of weights and seed."""
        generator = torch.Generator(self.device).manual_seed(seed)  # its own, so that sampling leaves training alone
        prompt = torch.tensor([[self.tokenizer.separator]], device=self.device)
        with self._evaluating(), self.autocast():
            tokens = self.model.generate(
                prompt, max_new_tokens=n_tokens, temperature=0.8, top_p=0.95, generator=generator
            )
        return self.tokenizer.decode(tokens[0, 1:].cpu().numpy())

    def _batches(self, windows: np.ndarray) -> Iterator[tuple[np.ndarray, tuple[Tensor, Tensor, Tensor | None]]]:
        rows = max(1, self.max_tokens // (windows.shape[1] - 1))
        separator = self.tokenizer.separator if self.reset else None
        with self._evaluating():
            for first in range(0, len(windows), rows):
                self.poll()
                batch = windows[first : first + rows]
                yield batch, document_inputs(batch, self.device, separator=separator)

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        was_training = self.model.training
        self.model.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.model.train(was_training)
