"""Training data of models that read one text and write another: pairs of a source and a target.

A file holds one pair per line, {"source": "...", "target": "..."}; other keys are left alone. Pairs that are repeated,
hold NUL or have an empty target are dropped and counted, a pair is held out by the hash of its content, and pairs are
drawn by seed and step, all as for documents (documents.py, data.py). Lengths in tokens count the separator that ends
each text. It also is what the decoder reads first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .cache import DataError, cache_folder
from .config import DataConfig
from .data import Corpus, byte_counts, digest_of, encode
from .documents import Documents, split_documents
from .evaluate import Evaluator, Validation, bits_per_byte
from .step import PairBatch, batch_loss
from .tokenizer import open_tokenizer

__all__ = ["Pair", "PairCorpus", "PairEvaluator", "load_pairs", "pair_inputs", "train_pairs", "val_pairs"]

FORMAT = "pairs 1"
"""Part of every digest; changed when the meaning of a file of pairs changes."""

Pair: TypeAlias = tuple[np.ndarray, np.ndarray]
"""Token ids of source and target, (S,) and (T,), each with the separator at its end."""


@dataclass(frozen=True, kw_only=True, eq=False)
class PairCorpus(Corpus):
    """Pairs for training and validation. All that a Corpus says of tokens and bytes is said of the targets."""

    train_pairs: Sequence[Pair]
    val_pairs: Sequence[Pair]

    def check_lengths(self, seq_len: int) -> None:
        """Raises DataError if a source or a target is longer than seq_len tokens."""
        longest = max(len(ids) for pair in (*self.train_pairs, *self.val_pairs) for ids in pair)
        if longest > seq_len:
            raise DataError(
                f"{self.name} has a text of {longest} tokens with the one that ends it, more than "
                f"train.seq_len={seq_len}: raise --train.seq-len or shorten the pair"
            )

    def mean_lengths(self) -> tuple[int, int]:
        """Tokens of a target and of a source, rounded: the mean over the training pairs."""
        sources, targets = zip(*self.train_pairs, strict=True)
        return round(np.mean([len(ids) for ids in targets])), round(np.mean([len(ids) for ids in sources]))


def load_pairs(config: DataConfig, *, progress: bool = False) -> PairCorpus:
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
    return PairCorpus(
        name=pairs.name,
        digest=hashlib.sha256(f"{FORMAT} {documents_digest} {tokenizer.digest}".encode()).hexdigest(),
        documents_digest=documents_digest,
        n_train_documents=len(train_targets),
        n_val_documents=len(val_targets),
        skipped=dict(pairs.skipped),
        tokenizer=tokenizer,
        train=encode(train_targets, tokenizer),
        val=encode(val_targets, tokenizer),
        **byte_counts(train_targets, val_targets),
        train_pairs=list(zip(rows(train_sources), rows(train_targets), strict=True)),
        val_pairs=list(zip(rows(val_sources), rows(val_targets), strict=True)),
    )


def train_pairs(corpus: PairCorpus, *, seed: int, step: int, batch_size: int) -> list[Pair]:
    """Returns the training pairs of one step, a pure function of its arguments, as `data.train_batch` draws windows."""
    raw = np.random.Philox(key=seed, counter=[0, 0, step, 0]).random_raw(batch_size)
    return [corpus.train_pairs[i] for i in raw % np.uint64(len(corpus.train_pairs))]


def val_pairs(corpus: PairCorpus, max_tokens: int) -> Sequence[Pair]:
    """Returns the first held-out pairs, in the order of a hash: at most max_tokens target tokens, or one pair."""
    ends = np.cumsum([len(target) for _, target in corpus.val_pairs])
    return corpus.val_pairs[: max(1, int(np.searchsorted(ends, max_tokens, side="right")))]


def pair_inputs(pairs: Sequence[Pair], device: torch.device, *, separator: int) -> PairBatch:
    """Pads sources and targets to the longest of each."""
    sources, targets = zip(*pairs, strict=True)
    wanted = _padded(targets, -100)
    read = _padded([np.append(separator, ids[:-1]) for ids in targets], separator)
    lengths = torch.tensor([len(ids) for ids in sources])
    return PairBatch(*(t.to(device) for t in (_padded(sources, separator), read, wanted, lengths)))


@dataclass(frozen=True, kw_only=True)
class PairEvaluator(Evaluator):
    """Evaluates a model of pairs: all quality is that of the targets, given their sources."""

    example: np.ndarray
    """Source of the samples, (S,)."""

    def validate(self, windows: Sequence[Pair]) -> Validation:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Returns the loss over pairs."""
        nats, longest = 0.0, max(len(ids) for pair in windows for ids in pair)
        rows = max(1, self.max_tokens // longest)
        with self._evaluating():
            for first in range(0, len(windows), rows):
                self.poll()
                batch = pair_inputs(windows[first : first + rows], self.device, separator=self.tokenizer.separator)
                with self.autocast():
                    loss, _ = batch_loss(self.model, batch)
                nats += loss.item() * batch.n_targets
        targets = np.concatenate([target for _, target in windows])
        n_bytes = self.tokenizer.n_bytes(targets)
        return Validation(
            loss=nats / targets.size,
            bits_per_byte=bits_per_byte(nats, n_bytes),
            n_tokens=targets.size,
            n_bytes=n_bytes,
        )

    def sample(self, n_tokens: int, *, seed: int = 0) -> str:
        """Returns a held-out source and the most likely target, token by token; nothing is drawn."""
        stop = self.tokenizer.separator
        source = torch.from_numpy(self.example.astype(np.int64))[None].to(self.device)
        model: Any = self.model
        with self._evaluating(), self.autocast():
            written = model.generate(source, n_tokens, temperature=0, start_token=stop, stop_tokens=[stop])[0]
        texts = (self.tokenizer.decode(ids[ids != stop]) for ids in (self.example, written.cpu().numpy()))
        return " -> ".join(texts)


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
