"""Data sets: where text and rows come from, how they are split, and how they become tokens."""

from .cache import DataError, cache_folder
from .corpus import (
    Corpus,
    Data,
    check_lengths,
    document_starts,
    document_windows,
    load_corpus,
    train_batch,
    train_positions,
    val_windows,
)

__all__ = [
    "Corpus",
    "Data",
    "DataError",
    "cache_folder",
    "check_lengths",
    "document_starts",
    "document_windows",
    "load_corpus",
    "train_batch",
    "train_positions",
    "val_windows",
]
