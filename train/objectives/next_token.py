"""Every token from those before it. Rows are windows of the corpus's token stream, (L + 1,) int64."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from ..config import RunConfig, TrainConfig
from ..data import Corpus, check_lengths, document_starts, load_corpus, train_batch, val_windows
from ..objective import Batch, Objective
from ..score import bits_per_byte

__all__ = ["NextToken", "NextTokenConfig", "RandomTokens", "Tokens", "buckets"]


@dataclass(frozen=True, kw_only=True)
class Tokens(Batch):
    """Sequences of tokens and what follows each of them."""

    tokens: Tensor
    """(B, L) int64."""
    targets: Tensor
    """(B, L) int64; -100 is not counted."""
    starts: Tensor | None = None
    """(B, L) bool, True at the first token of a document; None where documents are not told apart."""


@dataclass(frozen=True, kw_only=True)
class NextTokenConfig:
    """Options of NextToken."""

    packing: Literal["concat", "reset"] = "concat"
    """Whether a model sees across the end of a document in its window, or forgets at each start."""


class NextToken(Objective[np.ndarray, Tokens]):
    """Language modelling, judged by bits per byte of held-out windows."""

    Config = NextTokenConfig
    facts = frozenset({"bytes"})

    def __init__(self, corpus: Corpus, *, seed: int, train: TrainConfig, packing: str = "concat") -> None:
        self.data = self.corpus = corpus
        self.seed, self.train, self.packing = seed, train, packing

    @classmethod
    def load(cls, run: RunConfig, options: NextTokenConfig, *, progress: bool = False) -> Self:
        """See Objective.load."""
        return cls(load_corpus(run.data, progress=progress), seed=run.seed, train=run.train, packing=options.packing)

    def check(self, config: Any) -> None:
        """See Objective.check."""
        if config.kind == "seq2seq":
            raise ValueError("this model reads a source and writes a target: learn --objective pairs")
        if config.kind == "encoder":
            raise ValueError(
                "this model is an encoder, in which a token sees those to come, the answers to predicting the next "
                "one: train a causal model"
            )
        check_lengths(self.corpus, self.train.seq_len)
        length = self._position_len(config)
        if len(self.corpus.val) <= length:
            raise ValueError(
                f"train.position_len={length} is too long for a validation split of {len(self.corpus.val)} "
                f"tokens: shorten it, set it to 0, or hold out more with --data.val-fraction"
            )

    def rows(self, step: int) -> list[np.ndarray]:
        """See Objective.rows."""
        size = {"batch_size": self.train.batch_size, "seq_len": self.train.seq_len}
        return list(train_batch(self.corpus, seed=self.seed, step=step, **size))

    def held_out(self, max_tokens: int) -> list[np.ndarray]:
        """See Objective.held_out."""
        return list(val_windows(self.corpus, self.train.seq_len, max_tokens))

    def collate(self, rows: Sequence[np.ndarray]) -> Tokens:
        """See Objective.collate."""
        windows = np.stack(rows)
        starts = None
        if self.packing == "reset":
            starts = torch.from_numpy(document_starts(windows[:, :-1], self.corpus.separator))
        return Tokens(
            counts=dict.fromkeys(("loss", "aux_loss"), windows[:, 1:].size),
            tokens=torch.from_numpy(windows[:, :-1]),
            targets=torch.from_numpy(windows[:, 1:]),
            starts=starts,
        )

    def terms(self, model: Any, batch: Tokens) -> dict[str, Tensor]:
        """Nats per token, and the auxiliary loss of the layers."""
        out = model(batch.tokens, targets=batch.targets, starts=batch.starts)
        return {"loss": out.loss, "aux_loss": out.aux_loss}

    def metrics(self, means: Mapping[str, float], rows: Sequence[np.ndarray]) -> dict[str, float]:
        """The loss in nats per token, and bits per byte."""
        targets = np.stack(rows)[:, 1:]
        n_bytes = self.corpus.tokenizer.n_bytes(targets)
        quality = bits_per_byte(means["loss"] * targets.size, n_bytes)
        return {"loss": means["loss"], "bits_per_byte": quality, "bytes": n_bytes}

    def n_tokens(self, rows: Sequence[np.ndarray]) -> int:
        """Predicted tokens."""
        return sum(len(row) - 1 for row in rows)

    def sample(self, model: Any) -> str:
        """Text that the model continues from the start of a document."""
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(0)  # its own, so that sampling leaves training alone
        prompt = torch.tensor([[self.corpus.separator]], device=device)
        n_tokens = self.sample_len(model, 1)
        tokenizer = self.corpus.tokenizer
        options = {"temperature": 0.8, "top_p": 0.95, "vocab_size": tokenizer.vocab_size, "generator": generator}
        tokens = model.generate(prompt, max_new_tokens=n_tokens, **options)
        return tokenizer.decode(tokens[0, 1:].cpu().numpy())

    def examine(self, model: Any, *, poll: Callable[[], None]) -> dict[str, Any]:
        """Bits per byte by position, beyond the trained length too, as far as the model's positions go."""
        length = self._position_len(model.config)
        if not length:
            return {}
        windows = val_windows(self.corpus, length, self.train.final_eval_tokens)
        return {"position_bits_per_byte": self.by_position(model, windows, poll=poll)}

    def by_position(
        self, model: Any, windows: np.ndarray, *, poll: Callable[[], None] = lambda: None
    ) -> list[dict[str, Any]]:
        """Bits per byte of the tokens at positions [start, stop) of windows, (n, L + 1), L also untrained.

        Position 0 predicts the second token of a window. Each entry has start, stop, bits_per_byte and n_tokens.
        """
        length, device = windows.shape[1] - 1, next(model.parameters()).device
        rows_at_once = max(1, self.forward_tokens // length)
        nats = torch.zeros(length, dtype=torch.float64)
        for first in range(0, len(windows), rows_at_once):
            poll()
            batch = self.collate(list(windows[first : first + rows_at_once])).to(device)
            losses = model.token_losses(batch.tokens, batch.targets, starts=batch.starts)
            nats += losses.sum(0, dtype=torch.float64).cpu()
        table = []
        for start, stop in buckets(length):
            targets = windows[:, 1 + start : 1 + stop]
            quality = bits_per_byte(nats[start:stop].sum().item(), self.corpus.tokenizer.n_bytes(targets))
            table.append({"start": start, "stop": stop, "bits_per_byte": quality, "n_tokens": targets.size})
        return table

    def experiment(self) -> dict[str, Any]:
        """See Objective.experiment."""
        return {"kind": "next_token", "packing": self.packing}

    def _position_len(self, config: Any) -> int:
        """Longest window of the loss by position: a model is read as far as its positions go."""
        return min(self.train.position_len, config.max_positions or sys.maxsize)


class RandomTokens(NextToken):
    """Windows of tokens that are drawn at random: what speed is measured with, and never learned from."""

    def __init__(self, *, vocab_size: int, batch_size: int, seq_len: int) -> None:
        self.vocab_size, self.seed, self.packing = vocab_size, 0, "concat"
        self.train = TrainConfig(batch_size=batch_size, seq_len=seq_len)

    def rows(self, step: int) -> list[np.ndarray]:
        """See Objective.rows."""
        shape = (self.train.batch_size, self.train.seq_len + 1)
        return list(np.random.default_rng([self.seed, step]).integers(0, self.vocab_size, shape))


def buckets(length: int) -> list[tuple[int, int]]:
    """Returns [start, stop) ranges of positions whose bounds are powers of two: 0-1, 1-2, 2-4, ... up to `length`."""
    bounds = [0, *(2**power for power in range(length.bit_length()) if 2**power < length), length]
    return list(itertools.pairwise(bounds))
