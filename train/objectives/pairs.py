"""A target from its source. Rows are pairs of token ids, (S,) and (T,), each with the separator at its end.

A file holds one pair per line, {"source": "...", "target": "..."}; other keys are left alone. Pairs that are repeated,
hold NUL or have an empty target are dropped and counted, a pair is held out by the hash of its content, and pairs are
drawn by seed and step, all as for documents (data/). Lengths in tokens count the separator that ends each text. It also
is what the decoder reads first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor

from ..cache import DataError, cache_folder
from ..config import DataConfig, RunConfig, TrainConfig
from ..data import Data, byte_counts, digest_of, draw_indices, encode
from ..documents import Documents, split_documents
from ..objective import Batch, NoOptions, Objective
from ..score import bits_per_byte
from ..tokenizer import open_tokenizer

__all__ = ["Pair", "PairData", "PairTokens", "Pairs", "load_pairs"]

FORMAT = "pairs 1"
"""Part of every digest; changed when the meaning of a file of pairs changes."""

Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Token ids of source and target, (S,) and (T,), each with the separator at its end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairData(Data):
    """Pairs for training and validation; what is to be predicted are the targets."""

    train: Sequence[Pair]
    val: Sequence[Pair]

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Tokens of the targets, with separators between them only, as in a stream."""
        train, val = (sum(len(target) for _, target in pairs) - 1 for pairs in (self.train, self.val))
        return train, val

    def mean_lengths(self) -> tuple[int, int]:
        """Tokens of a target and of a source, rounded: the mean over the training pairs."""
        sources, targets = zip(*self.train, strict=True)
        return round(np.mean([len(ids) for ids in targets])), round(np.mean([len(ids) for ids in sources]))


@dataclass(frozen=True, kw_only=True)
class PairTokens(Batch):
    """Pairs of a source and a target, padded at their ends."""

    source: Tensor
    """(B, S) int64."""
    target: Tensor
    """What the decoder reads, (B, T) int64."""
    targets: Tensor
    """What it predicts, (B, T) int64; -100 where a target is padded."""
    source_len: Tensor
    """Tokens of each source, (B,) int64."""


class Pairs(Objective[Pair, PairTokens]):
    """Every token of a target from those before it and the source, judged by bits per byte of held-out targets."""

    kinds = ("seq2seq",)

    def __init__(self, pairs: PairData, *, seed: int, train: TrainConfig) -> None:
        self.data = self.pairs = pairs
        self.seed, self.train = seed, train

    @classmethod
    def load(cls, run: RunConfig, options: NoOptions, *, progress: bool = False) -> Self:
        """See Objective.load."""
        return cls(load_pairs(run.data, progress=progress), seed=run.seed, train=run.train)

    def check(self, config: Any) -> None:
        """See Objective.check."""
        if config.kind not in self.kinds:
            raise ValueError(
                "data.rows=pairs are for models that read a source, which this one does not: give documents"
            )
        longest = max(len(ids) for pair in (*self.pairs.train, *self.pairs.val) for ids in pair)
        if longest > self.train.seq_len:
            raise DataError(
                f"{self.pairs.name} has a text of {longest} tokens with the one that ends it, more than "
                f"train.seq_len={self.train.seq_len}: raise --train.seq-len or shorten the pair"
            )

    def rows(self, step: int) -> list[Pair]:
        """See Objective.rows."""
        pairs = self.pairs.train
        return [pairs[i] for i in draw_indices(len(pairs), seed=self.seed, step=step, n=self.train.batch_size)]

    def held_out(self, max_tokens: int) -> Sequence[Pair]:
        """The first held-out pairs, in the order of a hash: at most max_tokens target tokens, or one pair."""
        ends = np.cumsum([len(target) for _, target in self.pairs.val])
        return self.pairs.val[: max(1, int(np.searchsorted(ends, max_tokens, side="right")))]

    def collate(self, rows: Sequence[Pair]) -> PairTokens:
        """Pads sources and targets to the longest of each."""
        sources, targets = zip(*rows, strict=True)
        separator = self.pairs.separator
        return PairTokens(
            counts=dict.fromkeys(("loss", "aux_loss"), self.n_tokens(rows)),
            source=_padded(sources, separator),
            target=_padded([np.append(separator, ids[:-1]) for ids in targets], separator),
            targets=_padded(targets, -100),
            source_len=torch.tensor([len(ids) for ids in sources]),
        )

    def terms(self, model: Any, batch: PairTokens) -> dict[str, Tensor]:
        """Nats per target token, and the auxiliary loss of the layers."""
        out = model(batch.source, batch.target, source_len=batch.source_len, targets=batch.targets)
        return {"loss": out.loss, "aux_loss": out.aux_loss}

    def metrics(self, means: Mapping[str, float], rows: Sequence[Pair]) -> dict[str, float]:
        """The loss in nats per target token, and bits per byte of the targets."""
        targets = np.concatenate([target for _, target in rows])
        n_bytes = self.pairs.tokenizer.n_bytes(targets)
        quality = bits_per_byte(means["loss"] * targets.size, n_bytes)
        return {"loss": means["loss"], "bits_per_byte": quality, "bytes": n_bytes}

    def n_tokens(self, rows: Sequence[Pair]) -> int:
        """Target tokens."""
        return sum(len(target) for _, target in rows)

    def flops_per_token(self, model: Any) -> float:
        """FLOPs of training for each target token, at the mean lengths."""
        return model.training_flops_per_token(*self.pairs.mean_lengths())

    def sample(self, model: Any) -> str:
        """A held-out source and the most likely target, token by token; nothing is drawn."""
        stop, (source, _) = self.pairs.separator, self.pairs.val[0]
        read = torch.from_numpy(source.astype(np.int64))[None].to(next(model.parameters()).device)
        options = {"temperature": 0, "start_token": stop, "stop_tokens": [stop]}
        (written,) = model.generate(read, self.train.sample_tokens, **options)
        texts = (self.pairs.tokenizer.decode(ids[ids != stop]) for ids in (source, written.cpu().numpy()))
        return " -> ".join(texts)


def load_pairs(config: DataConfig, *, progress: bool = False) -> PairData:
    """Reads the pairs of a file and tokenizes them.

    Args:
        config: source, tokenizer, val_fraction and cache are used.
        progress: show the bars of `tokenizers`, on a terminal.

    Raises:
        DataError: if the file, the tokenizer or the cache cannot be used.
    """
    path = Path(config.source).expanduser()
    pairs = Documents(name=path.name)
    for source, target in _read(path):
        if "\0" in source + target:
            pairs.skipped["contains NUL"] += 1
        elif not target:
            pairs.skipped["empty"] += 1
        else:
            pairs.add(json.dumps([source, target]))
    splits = split_documents(pairs.texts, config.val_fraction)
    (train_sources, train_targets), (val_sources, val_targets) = (
        zip(*map(json.loads, split), strict=True) for split in splits
    )
    cache = cache_folder(config.cache)
    tokenizer = open_tokenizer(config.tokenizer, [*train_sources, *train_targets], cache=cache, progress=progress)

    def rows(texts: Sequence[str]) -> list[np.ndarray]:
        stream = np.append(encode(texts, tokenizer), tokenizer.separator)  # no text contains the separator
        return np.split(stream, np.flatnonzero(stream == tokenizer.separator) + 1)[:-1]

    documents_digest = digest_of(*splits)
    return PairData(
        name=pairs.name,
        digest=hashlib.sha256(f"{FORMAT} {documents_digest} {tokenizer.digest}".encode()).hexdigest(),
        documents_digest=documents_digest,
        n_train_documents=len(train_targets),
        n_val_documents=len(val_targets),
        skipped=dict(pairs.skipped),
        tokenizer=tokenizer,
        **byte_counts(train_targets, val_targets),
        train=list(zip(rows(train_sources), rows(train_targets), strict=True)),
        val=list(zip(rows(val_sources), rows(val_targets), strict=True)),
    )


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up with a value, (B, longest) int64."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)


def _read(path: Path) -> Iterator[tuple[str, str]]:
    try:
        lines = path.read_bytes().decode().split("\n")  # splitlines would also cut inside strings, at U+2028 and others
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise DataError(f"cannot read pairs from {path} ({reason}): give a file of JSON lines with --data") from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            match json.loads(line):
                case {"source": str(source), "target": str(target)}:
                    yield source, target
                    continue
        except ValueError:
            pass
        raise DataError(
            f'line {number} of {path} is not a pair: write {{"source": "...", "target": "..."}} on each line'
        )
