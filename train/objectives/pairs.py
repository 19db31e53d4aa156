"""A target from its source. Rows are pairs of token ids, (S,) and (T,), each with the separator at its end.

The data are rows with two columns, such as lines of {"source": "...", "target": "..."}; others are left alone. Pairs
that are repeated, hold NUL or have an empty target are dropped and counted, a pair is held out by the hash of its
content, and pairs are drawn by seed and step, all as for documents (data/). Lengths in tokens count the separator that
ends each text.

An encoder-decoder reads the source with its encoder, and its decoder reads a separator and then the target. A decoder
reads source and target as one sequence, and predicts the target only.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from ..config import DataConfig, RunConfig, TrainConfig
from ..data import Data, DataError, cache_folder
from ..data.cache import expanded
from ..data.corpus import byte_counts, digest_of, draw_indices, encode
from ..data.documents import Documents, split_documents
from ..data.records import read_hub, read_rows
from ..data.tokenizer import open_tokenizer
from ..objective import Batch, Objective
from ..score import bits_per_byte
from .next_token import Tokens

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
    """Tokens that the decoder reads, (B, T) int64."""
    targets: Tensor
    """Tokens that the decoder predicts, (B, T) int64; -100 where a target is padded."""
    source_len: Tensor
    """Tokens of each source, (B,) int64."""


@dataclass(frozen=True, kw_only=True)
class PairsConfig:
    """Options of Pairs."""

    source: str = "source"
    """Column of the texts that are read."""
    target: str = "target"
    """Column of the texts that are to be written."""


class Pairs(Objective[Pair, PairTokens | Tokens]):
    """Every token of a target from those before it and the source, judged by bits per byte of held-out targets."""

    Config = PairsConfig
    facts = frozenset({"bytes"})
    kinds = ("seq2seq", "decoder")

    def __init__(
        self, pairs: PairData, *, seed: int, train: TrainConfig, columns: tuple[str, str] = ("source", "target")
    ) -> None:
        self.data = self.pairs = pairs
        self.seed, self.train, self._columns = seed, train, columns
        self._joined = False

    @classmethod
    def load(cls, run: RunConfig, options: PairsConfig, *, progress: bool = False) -> Self:
        """See Objective.load."""
        columns = (options.source, options.target)
        pairs = load_pairs(run.data, columns, progress=progress)
        return cls(pairs, seed=run.seed, train=run.train, columns=columns)

    @classmethod
    def example(cls, folder: Path) -> tuple[Path, PairsConfig]:
        """Numbers of one to four digits, and their digits in reverse."""
        numbers = [str(i * i) for i in range(100)]
        lines = [json.dumps({"source": number, "target": number[::-1]}) for number in numbers]
        (folder / "pairs.jsonl").write_text("\n".join(lines), encoding="utf-8")
        return folder / "pairs.jsonl", PairsConfig()

    def check(self, config: Any) -> None:
        """See Objective.check."""
        if config.kind not in self.kinds:
            raise ValueError(
                "this model is an encoder, in which a token sees those to come, and writes nothing: train a causal "
                "model or an encoder-decoder on pairs"
            )
        pairs, limit = (*self.pairs.train, *self.pairs.val), self.train.seq_len
        if config.kind == "decoder":
            longest, what = max(len(source) + len(target) - 1 for source, target in pairs), "pair"
        else:
            longest, what = max(len(ids) for pair in pairs for ids in pair), "text"
        if longest > limit:
            raise DataError(
                f"{self.pairs.name} has a {what} of {longest} tokens with what ends it, more than "
                f"train.seq_len={limit}: raise --train.seq-len or shorten the pair"
            )

    def prepare(self, model: nn.Module) -> nn.Module:
        """Notes whether the model reads a source and its target as one sequence."""
        config: Any = model.config
        self._joined = config.kind == "decoder"
        return model

    def rows(self, step: int) -> list[Pair]:
        """See Objective.rows."""
        pairs = self.pairs.train
        return [pairs[i] for i in draw_indices(len(pairs), seed=self.seed, step=step, n=self.train.batch_size)]

    def held_out(self, max_tokens: int) -> Sequence[Pair]:
        """The first held-out pairs, in the order of a hash: at most max_tokens target tokens, or one pair."""
        ends = np.cumsum([len(target) for _, target in self.pairs.val])
        return self.pairs.val[: max(1, int(np.searchsorted(ends, max_tokens, side="right")))]

    def collate(self, rows: Sequence[Pair]) -> PairTokens | Tokens:
        """Pads to the longest; of a decoder's sequences the tokens of the source are no targets."""
        sources, targets = zip(*rows, strict=True)
        separator = self.pairs.separator
        counts: dict[str, int] = dict.fromkeys(("loss", "aux_loss"), self.n_tokens(rows))
        if self._joined:
            read = [np.concatenate(pair)[:-1] for pair in rows]
            wanted = [np.append(np.full(len(source) - 1, -100), target) for source, target in rows]
            return Tokens(counts=counts, tokens=_padded(read, separator), targets=_padded(wanted, -100))
        return PairTokens(
            counts=counts,
            source=_padded(sources, separator),
            target=_padded([np.append(separator, ids[:-1]) for ids in targets], separator),
            targets=_padded(targets, -100),
            source_len=torch.tensor([len(ids) for ids in sources]),
        )

    def terms(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Nats per target token, and the auxiliary loss of the layers."""
        if self._joined:  # padding at the end needs no mark: no token sees what follows it
            out = model(batch.tokens, targets=batch.targets)
        else:
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
        n_target, n_source = self.pairs.mean_lengths()
        if model.config.kind == "decoder":
            length = n_source + n_target - 1
            return model.training_flops_per_token(length) * length / n_target
        return model.training_flops_per_token(n_target, n_source)

    def experiment(self) -> dict[str, Any]:
        """See Objective.experiment."""
        source, target = self._columns
        return {"kind": "pairs", "source": source, "target": target}

    def sample(self, model: Any) -> str:
        """A held-out source and the most likely target, token by token; nothing is drawn."""
        stop, (source, _) = self.pairs.separator, self.pairs.val[0]
        read = torch.from_numpy(source.astype(np.int64))[None].to(next(model.parameters()).device)
        vocab_size = self.pairs.tokenizer.vocab_size
        options: dict[str, Any] = {"temperature": 0, "stop_tokens": [stop], "vocab_size": vocab_size}
        if self._joined:
            written = model.generate(read, self.sample_len(model, len(source)), **options)[0, len(source) :]
        else:
            (written,) = model.generate(read, self.sample_len(model, 1), start_token=stop, **options)
        texts = (self.pairs.tokenizer.decode(ids[ids != stop]) for ids in (source, written.cpu().numpy()))
        return " -> ".join(texts)


def load_pairs(
    config: DataConfig, columns: tuple[str, str] = ("source", "target"), *, progress: bool = False
) -> PairData:
    """Reads the pairs of a file of rows or of a set of the hub, and tokenizes them.

    Args:
        config: source, tokenizer, val_fraction and cache are used.
        columns: names of the columns of the source and of the target.
        progress: show the bars of `datasets` and `tokenizers`, on a terminal.

    Raises:
        DataError: if the data, the tokenizer or the cache cannot be used.
    """
    cache = cache_folder(config.cache)
    option = "--objective.set source=COLUMN and target=COLUMN"
    if config.column != DataConfig().column:
        raise DataError(f"data.column={config.column} names the text of documents: choose columns of pairs by {option}")
    if config.source.startswith("hf:"):
        rows = read_hub(config.source, columns, option=option, cache=cache, progress=progress)
        pairs = Documents(name=config.source)
    elif config.source == "stdlib":
        raise DataError("the standard library holds no pairs: give rows with a source and a target with --data")
    else:
        path = expanded(Path(config.source))
        rows, pairs = read_rows(path, columns, option=option), Documents(name=path.name)
    for source, target in rows:
        if "\0" in source + target:
            pairs.skipped["contains NUL"] += 1
        elif not target:
            pairs.skipped["empty"] += 1
        else:
            pairs.add(json.dumps([source, target]))
    splits = split_documents(pairs.texts, config.val_fraction, config.held_out)
    (train_sources, train_targets), (val_sources, val_targets) = (
        zip(*map(json.loads, split), strict=True) for split in splits
    )
    tokenizer = open_tokenizer(config.tokenizer, [*train_sources, *train_targets], cache=cache, progress=progress)

    def each(texts: Sequence[str]) -> list[np.ndarray]:
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
        train=list(zip(each(train_sources), each(train_targets), strict=True)),
        val=list(zip(each(val_sources), each(val_targets), strict=True)),
    )


def _padded(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Rows of different lengths as one tensor, filled up with a value, (B, longest) int64."""
    padded = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = row
    return torch.from_numpy(padded)
