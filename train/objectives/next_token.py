"""Every token from those before it. Rows are windows of the corpus's token stream, (L + 1,) int64."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ...archs import States
from ..config import RunConfig, TrainConfig
from ..data import (
    Corpus,
    check_lengths,
    document_starts,
    document_windows,
    load_corpus,
    train_batch,
    train_positions,
    val_windows,
)
from ..objective import Batch, Judge, Objective
from ..score import bits_per_byte

__all__ = ["NextToken", "NextTokenConfig", "RandomTokens", "Tokens", "buckets"]


MIN_DOCUMENTS, MIN_BYTES = 8, 2**16
"""What must have been read at a context length before a score there means something."""

_SHORTEST_CUT = 64
"""Tokens, below which cutting the context says nothing that is still of interest."""

_AT_ONCE = 2048
"""Tokens of a text that are read at once, or as many as in training: longer ones are read in parts, with a state."""


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
    has_windows = True
    carries = True

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
        return list(train_batch(self.corpus, step=step, **self._order))

    def begins(self, step: int) -> np.ndarray:
        """See Objective.begins: where the stream wraps round, and where a document begins that is read apart."""
        first = train_positions(self.corpus, step=step, **self._order)
        # a window that goes on begins at least a window's length after the start of the stream
        begins = (first < self.train.seq_len) | (step == 0)
        if self.packing == "reset":
            begins |= self.corpus.train[first - 1] == self.corpus.separator
        return begins

    @property
    def _order(self) -> dict[str, Any]:
        """What decides the order of the data, besides the step."""
        train = self.train
        return {
            "seed": self.seed,
            "batch_size": train.batch_size,
            "seq_len": train.seq_len,
            "carry": train.carry,
        }

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
        if batch.tokens.shape[1] <= self._at_once or torch.is_grad_enabled():
            return self.terms_from(model, batch, None)[0]
        shares: list[Tensor] = []
        for x, targets, aux_loss in self._parts(model, batch):
            share = targets.numel() / batch.targets.numel()
            shares.append(torch.stack([model.cross_entropy(x, targets), aux_loss]) * share)
        loss, aux_loss = torch.stack(shares).sum(0)
        return {"loss": loss, "aux_loss": aux_loss}

    def terms_from(self, model: Any, batch: Tokens, state: States | None) -> tuple[dict[str, Tensor], States | None]:
        """See Objective.terms_from."""
        out = model(batch.tokens, state, targets=batch.targets, starts=batch.starts)
        return {"loss": out.loss, "aux_loss": out.aux_loss}, out.state

    def _parts(self, model: Any, batch: Tokens) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Reads texts part by part: what the backbone makes of each, its targets, and the auxiliary loss."""
        length = batch.tokens.shape[1]
        state = model.init_state(len(batch.tokens), length)
        for first in range(0, length, self._at_once):
            part = slice(first, first + self._at_once)
            starts = None if batch.starts is None else batch.starts[:, part]
            x, state, aux_loss = model.hidden(batch.tokens[:, part], state, starts=starts)
            yield x, batch.targets[:, part], aux_loss

    def _token_losses(self, model: Any, batch: Tokens) -> Tensor:
        """Nats of every token, (B, L); logits of one part at a time are in memory."""
        if batch.tokens.shape[1] <= self._at_once:
            return model.token_losses(batch.tokens, batch.targets, starts=batch.starts)
        losses = [
            F.cross_entropy(model.logits(x).float().mT, targets, reduction="none")
            for x, targets, _ in self._parts(model, batch)
        ]
        return torch.cat(losses, dim=1)

    @property
    def _at_once(self) -> int:
        return max(_AT_ONCE, self.forward_tokens)

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

    def examine(self, model: Any, *, judge: Judge, poll: Callable[[], None]) -> dict[str, Any]:
        """Bits per byte by position, beyond the trained length too, as far as the model's positions go; by length."""
        found: dict[str, Any] = {}
        if length := self._position_len(model.config):
            windows = val_windows(self.corpus, length, self.train.final_eval_tokens)
            found["position_bits_per_byte"] = self.by_position(model, windows, poll=poll)
        if self.train.lengths:
            lengths = sorted(set(self.train.lengths))
            n_positions = model.config.max_positions or sys.maxsize
            of_length = {n: self._at_length(n, n_positions, judge) for n in sorted({*lengths, self.train.seq_len})}
            found["by_length"] = [of_length[n] for n in lengths]
            found["context_cut"] = self._with_less_context(of_length[self.train.seq_len], judge)
        return found

    def _at_length(self, length: int, n_positions: int, judge: Judge) -> dict[str, Any]:
        """The score of held-out documents that are read at a context length, or why there is none."""
        windows, n_documents, n_bytes = self._documents(length)
        entry: dict[str, Any] = {"context_len": length, self.score.name: None}
        entry |= {"n_documents": n_documents, "n_bytes": n_bytes}
        if length > n_positions:
            return entry | {"status": "beyond_positions"}
        if n_documents < MIN_DOCUMENTS or n_bytes < MIN_BYTES:
            return entry | {"status": "too_little_text"}
        return entry | {self.score.name: self._score(windows, judge), "status": "done"}

    def _with_less_context(self, whole: Mapping[str, Any], judge: Judge) -> list[dict[str, Any]]:
        """The score of the same tokens of held-out documents with the trained length, its half, its quarter, ...

        `whole` is what `_at_length` says of the trained length; nothing is cut where that has no score.
        """
        if whole["status"] != "done":
            return []
        length = cut = whole["context_len"]
        windows, _, n_bytes = self._documents(length)
        entries = [{key: whole[key] for key in ("context_len", self.score.name, "n_bytes")}]
        while cut % 2 == 0 and cut // 2 >= _SHORTEST_CUT:
            cut //= 2
            parts = [windows[:, first : first + cut + 1] for first in range(0, length, cut)]
            score = self._score(np.concatenate(parts), judge)
            entries.append({"context_len": cut, self.score.name: score, "n_bytes": n_bytes})
        return entries

    def _documents(self, length: int) -> tuple[np.ndarray, int, int]:
        """Windows of held-out documents that are so long, the number of these documents and of the windows' bytes."""
        windows, n_documents = document_windows(
            self.corpus, length, max_tokens=self.train.length_tokens, min_documents=MIN_DOCUMENTS
        )
        return windows, n_documents, self.corpus.tokenizer.n_bytes(windows[:, 1:])

    def _score(self, windows: np.ndarray, judge: Judge) -> float:
        length = windows.shape[1] - 1
        rows_at_once = max(1, self.forward_tokens // length)
        return judge(list(windows), rows_at_once=rows_at_once, what=f"reading {length:,} tokens")[self.score.name]

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
            losses = self._token_losses(model, batch)
            nats += losses.sum(0, dtype=torch.float64).cpu()
        table = []
        for start, stop in buckets(length):
            targets = windows[:, 1 + start : 1 + stop]
            quality = bits_per_byte(nats[start:stop].sum().item(), self.corpus.tokenizer.n_bytes(targets))
            table.append({"start": start, "stop": stop, "bits_per_byte": quality, "n_tokens": targets.size})
        return table

    def experiment(self) -> dict[str, Any]:
        """See Objective.experiment."""
        carry = {"carry": True} if self.train.carry else {}  # runs of before there was a choice do not say it
        return {"kind": "next_token", "packing": self.packing, **carry}

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
