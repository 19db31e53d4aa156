"""Training data: documents as one memory-mapped token stream per split, and the windows that runs read from it.

A corpus is cached under the digest of its documents, split and tokenizer, so a changed file gives another corpus and is
never served stale. Documents follow each other with one separator between them; byte counts include the separators.

Windows are a pure function of seed and step (Philox, Salmon et al. 2011): the position in the data is the step number,
resuming needs no sampler state, and the processes of one run share one global batch, of which rank r of R takes rows
`batch[r::R]`, so that the data does not depend on their number.
"""

import hashlib
import lzma
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...files import read_json, write_json
from ..config import DataConfig
from .cache import DataError, cache_folder, is_whole, locked, publish
from .documents import read_documents, split_documents
from .tokenizer import Tokenizer, open_tokenizer

__all__ = [
    "Corpus",
    "Data",
    "DataError",
    "byte_counts",
    "check_lengths",
    "digest_of",
    "document_starts",
    "document_windows",
    "draw_indices",
    "encode",
    "load_corpus",
    "train_batch",
    "train_positions",
    "val_windows",
]

_FILES = ("train.npy", "val.npy", "corpus.json")

FORMAT = 1
"""Part of every digest; raised when the meaning of a cached corpus changes."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Data:
    """A data set in two splits, training and validation: what is known of it whatever its rows are."""

    name: str
    digest: str
    """SHA-256 (hex) over content, split and tokenizer; equal digests mean equal data."""
    documents_digest: str
    """SHA-256 (hex) over content and split: bits per byte compare across tokenizers where it is equal."""
    n_train_documents: int
    n_val_documents: int
    skipped: dict[str, int]
    """Files and rows that were left out, by reason."""
    tokenizer: Tokenizer
    train_bytes: int
    """UTF-8 bytes of what is to be predicted, with one per separator: the same for every tokenizer."""
    val_bytes: int
    reference_bits_per_byte: dict[str, float]
    """Bits per byte of general compressors on the validation bytes: zlib level 9, xz preset 6."""
    made: str = ""
    """How rows are made, in words, where no documents hold them."""

    @property
    def n_documents(self) -> int:
        """Documents, or rows, in both splits."""
        return self.n_train_documents + self.n_val_documents

    @property
    def separator(self) -> int:
        """Token id between documents."""
        return self.tokenizer.separator

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Tokens to be predicted in training and in validation."""
        raise NotImplementedError

    def summary(self) -> dict[str, Any]:
        """Returns what a result must say about its data, as JSON-able values."""
        train_tokens, val_tokens = self.n_tokens
        return {
            "name": self.name,
            "digest": self.digest,
            "documents_digest": self.documents_digest,
            "n_documents": self.n_documents,
            "n_train_documents": self.n_train_documents,
            "n_val_documents": self.n_val_documents,
            "skipped": self.skipped,
            "tokenizer": {
                "name": self.tokenizer.name,
                "digest": self.tokenizer.digest,
                "vocab_size": self.tokenizer.vocab_size,
                "separator": self.tokenizer.separator,
            },
            "train_tokens": train_tokens,
            "val_tokens": val_tokens,
            "train_bytes": self.train_bytes,
            "val_bytes": self.val_bytes,
            "reference_bits_per_byte": self.reference_bits_per_byte,
            **({"made": self.made} if self.made else {}),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus(Data):
    """Two token streams."""

    train: np.ndarray
    """Token ids, 1-D, in the smallest of uint8, uint16 and uint32 that holds the vocabulary."""
    val: np.ndarray

    @property
    def n_tokens(self) -> tuple[int, int]:
        """Tokens of each stream."""
        return len(self.train), len(self.val)


def load_corpus(config: DataConfig, *, progress: bool = False) -> Corpus:
    """Reads the documents, and tokenizes them unless the cache holds this very content.

    Args:
        config: source, column, tokenizer, val_fraction, held_out and cache are used.
        progress: show the bars of `datasets` and `tokenizers`, on a terminal.

    Raises:
        DataError: if the source, the tokenizer or the cache cannot be used.
    """
    cache = cache_folder(config.cache)
    documents = read_documents(config.source, column=config.column, cache=cache, progress=progress)
    train, val = split_documents(documents.texts, config.val_fraction, config.held_out)
    tokenizer = open_tokenizer(config.tokenizer, train, cache=cache, progress=progress)
    documents_digest = digest_of(train, val)
    digest = hashlib.sha256(f"{FORMAT} {documents_digest} {tokenizer.digest}".encode()).hexdigest()
    folder = cache / "corpora" / digest[:32]
    if not is_whole(folder, *_FILES):
        with locked(folder, "corpus"):
            if not is_whole(folder, *_FILES):
                _write(folder, train, val, tokenizer)
    return Corpus(
        name=documents.name,
        digest=digest,
        documents_digest=documents_digest,
        n_train_documents=len(train),
        n_val_documents=len(val),
        skipped=dict(documents.skipped),
        tokenizer=tokenizer,
        **read_json(folder / "corpus.json"),
        **{split: np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "val")},
    )


def check_lengths(corpus: Corpus, seq_len: int) -> None:
    """Raises DataError unless both splits hold a window of seq_len + 1 tokens; call it before building a model."""
    _check_length(corpus.name, "training", corpus.train, seq_len)
    _check_length(corpus.name, "validation", corpus.val, seq_len)


def train_batch(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int, carry: bool = False
) -> np.ndarray:
    """Returns the training windows of one step, a pure function of its arguments; (batch_size, seq_len + 1) int64.

    A window holds inputs [:, :-1] and targets [:, 1:], starts anywhere and stays inside the stream. Rows do not depend
    on batch_size: a larger batch begins with the rows of a smaller one.

    Args:
        corpus: the data.
        seed: key of the counter-based generator, 0 <= seed < 2**128.
        step: optimizer step, from 0.
        batch_size: rows of the global batch; rank r of R takes rows [r::R].
        seq_len: tokens to predict per row.
        carry: as in `train_positions`.

    Raises:
        DataError: if the training split is shorter than one window.
    """
    _check_length(corpus.name, "training", corpus.train, seq_len)
    starts = train_positions(corpus, seed=seed, step=step, batch_size=batch_size, seq_len=seq_len, carry=carry)
    return _windows(corpus.train, starts, seq_len)


def train_positions(
    corpus: Corpus, *, seed: int, step: int, batch_size: int, seq_len: int, carry: bool = False
) -> np.ndarray:
    """Returns where the windows of `train_batch` begin in the stream, (batch_size,) int64.

    With `carry` a row begins at step 0 where it does without, and each later window follows the one of the step before;
    near the end of the stream it wraps round, to a place among the first `seq_len` tokens.
    """
    below = len(corpus.train) - seq_len
    if not carry:
        return draw_indices(below, seed=seed, step=step, n=batch_size)
    return (draw_indices(below, seed=seed, step=0, n=batch_size) + step * seq_len) % below


def draw_indices(below: int, *, seed: int, step: int, n: int) -> np.ndarray:
    """Returns n indices from 0 to below - 1, (n,) int64, a pure function of its arguments; n only cuts them off."""
    # Raw Philox output, because NumPy guarantees it across versions and Generator.integers not (NEP 19); the bias of
    # the remainder is below `below` / 2**64.
    raw = np.random.Philox(key=seed, counter=[0, 0, step, 0]).random_raw(n)
    return (raw % np.uint64(below)).astype(np.int64)


def val_windows(corpus: Corpus, seq_len: int, max_tokens: int) -> np.ndarray:
    """Returns fixed, ordered windows spread evenly over the whole validation stream; (n, seq_len + 1) int64.

    They predict n * seq_len distinct tokens: as many as fit into max_tokens and the stream, and at least one window.

    Raises:
        DataError: if the validation split is shorter than one window.
    """
    _check_length(corpus.name, "validation", corpus.val, seq_len)
    last = len(corpus.val) - 1 - seq_len
    n = max(1, min(max_tokens, len(corpus.val) - 1) // seq_len)
    return _windows(corpus.val, np.arange(n) * last // max(n - 1, 1), seq_len)


def document_windows(corpus: Corpus, length: int, *, max_tokens: int, min_documents: int = 1) -> tuple[np.ndarray, int]:
    """Returns fixed windows of the held-out documents that have at least `length` tokens.

    Each document is read from its start, after a separator, in windows that follow each other; what is left at its end
    is not read. Where there are more than needed, every document gives as many as another, if it has them.

    Args:
        corpus: the data.
        length: tokens to predict per window.
        max_tokens: predicted tokens that are enough: no window beyond them but for min_documents.
        min_documents: documents that are read at least, where there are so many.

    Returns:
        The windows, (n, length + 1) int64, in the order of the stream, and the number of documents that they are of.
    """
    ends = np.append(np.flatnonzero(corpus.val == corpus.separator), len(corpus.val))
    starts = np.append(0, ends[:-1] + 1)
    n_windows = (ends - starts) // length  # of each document
    starts, n_windows = starts[n_windows > 0], n_windows[n_windows > 0]
    wanted = min(max(-(-max_tokens // length), min_documents), int(n_windows.sum()))
    share = 0
    while np.minimum(n_windows, share).sum() < wanted:
        share += 1
    taken = np.minimum(n_windows, share)
    surplus = int(taken.sum()) - wanted  # documents of the last round that give one less, spread evenly
    last = np.flatnonzero(taken == share)
    taken[last[np.arange(surplus) * len(last) // max(surplus, 1)]] -= 1
    document = np.repeat(np.arange(len(starts)), taken)
    number = np.arange(wanted) - np.repeat(np.cumsum(taken) - taken, taken)  # of those taken of its document
    before = starts[document] - 1 + length * (number * n_windows[document] // taken[document])
    index = before[:, None] + np.arange(length + 1)
    windows = np.where(index < 0, corpus.separator, corpus.val[index]).astype(np.int64)
    return windows, int((taken > 0).sum())


def document_starts(tokens: np.ndarray, separator: int) -> np.ndarray:
    """Returns where documents start, bool in the shape of tokens: True after each separator along the last axis.

    The first token of a row is not marked, whatever it is: what came before it is not in the row.
    """
    starts = np.zeros(tokens.shape, dtype=bool)
    starts[..., 1:] = tokens[..., :-1] == separator
    return starts


def _check_length(name: str, split: str, tokens: np.ndarray, seq_len: int) -> None:
    if len(tokens) <= seq_len:
        raise DataError(
            f"the {split} split of {name} has {len(tokens)} tokens, too few for a window of {seq_len} + 1: "
            f"give more text with --data, change --data.val-fraction or shorten --train.seq-len"
        )


def _windows(tokens: np.ndarray, starts: np.ndarray, seq_len: int) -> np.ndarray:
    return tokens[starts[:, None] + np.arange(seq_len + 1)].astype(np.int64)


def digest_of(train: Sequence[str], val: Sequence[str]) -> str:
    """Returns the SHA-256 (hex) over documents and split."""
    digest = hashlib.sha256()
    for split, texts in ((b"train", train), (b"val", val)):
        digest.update(split)
        for text in texts:
            digest.update(hashlib.sha256(text.encode()).digest())
    return digest.hexdigest()


def byte_counts(train: Sequence[str], val: Sequence[str]) -> dict[str, Any]:
    """Returns the fields of Data that no tokenizer changes."""
    stream = "\0".join(val).encode()
    return {
        "train_bytes": sum(len(text.encode()) for text in train) + len(train) - 1,
        "val_bytes": len(stream),
        "reference_bits_per_byte": {
            "zlib": 8 * len(zlib.compress(stream, 9)) / len(stream),
            "xz": 8 * len(lzma.compress(stream, preset=6)) / len(stream),
        },
    }


def _write(folder: Path, train: Sequence[str], val: Sequence[str], tokenizer: Tokenizer) -> None:
    record = byte_counts(train, val)
    with publish(folder) as draft:
        np.save(draft / "train.npy", encode(train, tokenizer))
        np.save(draft / "val.npy", encode(val, tokenizer))
        write_json(draft / "corpus.json", record)


def encode(texts: Sequence[str], tokenizer: Tokenizer) -> np.ndarray:
    """Returns the documents as one stream of ids, after checking that each of them can be restored byte for byte."""
    dtype = np.min_scalar_type(tokenizer.vocab_size - 1)
    separator = np.array([tokenizer.separator], dtype=dtype)
    parts: list[np.ndarray] = []
    for text, ids in zip(texts, tokenizer.encode_each(texts), strict=True):
        if tokenizer.to_bytes(ids) != text.encode():
            raise DataError(
                f"the tokenizer {tokenizer.name} changes the text of the document that begins {text[:40]!r}, "
                f"so bits per byte would be wrong: use --tokenizer bytes, bpe:SIZE, or a file that keeps every byte"
            )
        parts += [ids.astype(dtype), separator]
    return np.concatenate(parts[:-1])
