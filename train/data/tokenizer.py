"""Tokenizers: raw bytes, byte-level BPE trained on the corpus, or a byte-level tokenizer.json.

Every tokenizer here is lossless over UTF-8: each token stands for a known string of bytes, so that the nats of any run
of tokens turn into exact bits per byte and vocabularies cannot change a ranking. Tokenizers without that property
(lower-casing, WordPiece, SentencePiece with a prefix space) are refused. Special tokens are never recognised inside
text: a document that quotes "<|endoftext|>" stays one document.
"""

import contextlib
import hashlib
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import numpy as np

from ...files import read_json, write_json
from .cache import DataError, expanded, is_whole, locked, publish

if TYPE_CHECKING:
    import tokenizers

__all__ = ["BpeTokenizer", "BytesTokenizer", "SymbolTokenizer", "Tokenizer", "load_tokenizer", "open_tokenizer"]

SEPARATORS = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>")
"""Special tokens that can separate documents, in order of preference; the first is what we train with."""
BATCH_CHARS = 1 << 20
REMEDY = "use --tokenizer bytes, bpe:SIZE, or a byte-level tokenizer.json such as GPT-2's"

Ids: TypeAlias = Sequence[int] | np.ndarray


class Tokenizer(Protocol):
    """Maps text to token ids below `vocab_size` and back without loss."""

    name: str
    """Name in reports: "bytes", "bpe:4096" or the name of a file."""
    vocab_size: int
    separator: int
    """Token id between documents; counts as one byte and decodes to NUL."""
    digest: str
    """SHA-256 (hex) of everything that decides how text becomes ids."""
    bytes_per_token: np.ndarray
    """Number of UTF-8 bytes that each id stands for, (V,) int64."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`, (n,) int64; no separator, unless bytes meet a NUL in the text."""
        ...

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each text, in order."""
        return map(self.encode, texts)

    def to_bytes(self, ids: Ids) -> bytes:
        """Returns the bytes that `ids` (n,) stand for; equal to `text.encode()` for the ids of `text`."""
        ...

    def decode(self, ids: Ids) -> str:
        """Returns the text of `ids` (n,); bytes that are no UTF-8, as untrained models write, become U+FFFD."""
        return self.to_bytes(ids).decode(errors="replace")

    def n_bytes(self, ids: Ids) -> int:
        """Returns how many UTF-8 bytes `ids` (any shape) stand for."""
        return int(self.bytes_per_token[np.asarray(ids, dtype=np.int64)].sum())

    def save(self, path: Path) -> None:
        """Writes a JSON file that `load_tokenizer` reads."""
        ...


class BytesTokenizer(Tokenizer):
    """The 256 byte values; NUL separates documents."""

    def __init__(self) -> None:
        self.name = "bytes"
        self.vocab_size = 256
        self.separator = 0
        self.digest = hashlib.sha256(b"bytes").hexdigest()
        self.bytes_per_token = np.ones(256, dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Returns the UTF-8 bytes of `text`."""
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int64)

    def to_bytes(self, ids: Ids) -> bytes:
        """Returns the ids as bytes."""
        return np.asarray(ids, dtype=np.uint8).tobytes()

    def save(self, path: Path) -> None:
        """Writes a note that there is nothing to know."""
        write_json(path, {"type": "bytes"})


class SymbolTokenizer(Tokenizer):
    """Symbols that stand for no text, as synthetic tasks have them: their numbers in words, 0 separates rows."""

    def __init__(self, n: int) -> None:
        self.name = f"symbols:{n}"
        self.vocab_size = n
        self.separator = 0
        self.digest = hashlib.sha256(self.name.encode()).hexdigest()
        self.bytes_per_token = np.array([len(str(i)) + 1 for i in range(n)], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Returns the numbers that `text` names; a ValueError for other words."""
        ids = np.array([int(word) for word in text.split()], dtype=np.int64)
        if len(ids) and not 0 <= ids.min() <= ids.max() < self.vocab_size:
            raise ValueError(f"{text!r} names symbols beyond 0 to {self.vocab_size - 1}")
        return ids

    def to_bytes(self, ids: Ids) -> bytes:
        """Returns the numbers, each with a space after it."""
        return "".join(f"{i} " for i in np.asarray(ids)).encode()

    def save(self, path: Path) -> None:
        """Writes how many there are."""
        write_json(path, {"type": "symbols", "n": self.vocab_size})


class BpeTokenizer(Tokenizer):
    """A byte-level tokenizer of the `tokenizers` library, as GPT-2 introduced it."""

    def __init__(self, tokenizer: "tokenizers.Tokenizer", name: str) -> None:
        tokenizer.no_padding()
        tokenizer.no_truncation()
        tokenizer.encode_special_tokens = True  # as ordinary text; not part of the file
        description = tokenizer.to_str()
        if "ByteLevel" not in _kinds(json.loads(description).get("decoder")):
            raise DataError(f"{name} is not byte-level, so bits per byte would be wrong: {REMEDY}")
        separators = [tokenizer.token_to_id(token) for token in SEPARATORS]
        separator = next((i for i in separators if i is not None), None)
        if separator is None:
            raise DataError(f"{name} has no token to separate documents (one of {', '.join(SEPARATORS)}): {REMEDY}")
        self.name = name
        self.separator = separator
        self.digest = hashlib.sha256(description.encode()).hexdigest()
        self._tokenizer = tokenizer
        self._bytes = self._token_bytes()
        self.vocab_size = len(self._bytes)
        self.bytes_per_token = np.array([len(token) for token in self._bytes], dtype=np.int64)

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids of `text`; special tokens in it are ordinary text."""
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def encode_each(self, texts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yields the ids of each text, several texts at a time on the library's threads."""
        for batch in _batches(texts):
            for encoding in self._tokenizer.encode_batch_fast(batch, add_special_tokens=False):
                yield np.array(encoding.ids, dtype=np.int64)

    def to_bytes(self, ids: Ids) -> bytes:
        """Joins the bytes of the tokens."""
        return b"".join([self._bytes[i] for i in np.asarray(ids, dtype=np.int64).tolist()])

    def save(self, path: Path) -> None:
        """Writes a tokenizer.json that any reader of that format takes."""
        path.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def _token_bytes(self) -> list[bytes]:
        """Returns the bytes of each id: its characters through GPT-2's table, or an added token's own text."""
        alphabet = _byte_alphabet()
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        added = self._tokenizer.get_added_tokens_decoder()
        table = [b""] * (max(vocabulary.values()) + 1)
        for token, i in vocabulary.items():
            if i in added:
                table[i] = token.encode()
            elif alphabet.keys() >= set(token):
                table[i] = bytes(alphabet[character] for character in token)
            else:
                raise DataError(
                    f"{self.name} is not byte-level (token {token!r}), so bits per byte would be wrong: {REMEDY}"
                )
        table[self.separator] = b"\0"
        return table


def open_tokenizer(spec: str, texts: Sequence[str], *, cache: Path, progress: bool = False) -> Tokenizer:
    """Returns the tokenizer that `spec` names: "bytes", "bpe:SIZE" (trained on `texts`), or a tokenizer.json.

    Args:
        spec: as in DataConfig.tokenizer; for a folder its tokenizer.json is read.
        texts: the training documents, never the held-out ones.
        cache: folder in which trained tokenizers are kept, by SIZE and the digest of `texts`.
        progress: show the bars of `tokenizers`, on a terminal.

    Raises:
        DataError: if `spec` is none of the three, or the file does not keep every byte.
    """
    if spec == "bytes":
        return BytesTokenizer()
    kind, _, size = spec.partition(":")
    if kind != "bpe":
        return load_tokenizer(expanded(Path(spec)))
    if not size.isdecimal() or not 257 <= int(size) <= 1_000_000:
        raise DataError(f"--tokenizer {spec} needs a vocabulary size from 257 to 1000000, for example bpe:4096")
    digest = hashlib.sha256()
    for text in texts:
        digest.update(hashlib.sha256(text.encode()).digest())
    folder = cache / "tokenizers" / f"bpe-{size}-{digest.hexdigest()[:32]}"
    if not is_whole(folder, "tokenizer.json"):
        with locked(folder, "tokenizer"):
            if not is_whole(folder, "tokenizer.json"):
                with publish(folder) as draft:
                    _train_bpe(texts, int(size), progress).save(str(draft / "tokenizer.json"))
    return load_tokenizer(folder / "tokenizer.json", name=spec)


def load_tokenizer(path: Path, *, name: str | None = None) -> Tokenizer:
    """Reads a tokenizer.json of the `tokenizers` library, or what `Tokenizer.save` wrote; a folder means the one in it.

    Raises:
        DataError: if the file is missing, no such JSON, not byte-level, or has no token to separate documents.
    """
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        description = read_json(file)
    except OSError as error:
        raise DataError(f"cannot read the tokenizer {path} ({error.strerror}): {REMEDY}") from error
    except ValueError as error:
        raise DataError(f"{error}: {REMEDY}") from error
    if description == {"type": "bytes"}:
        return BytesTokenizer()
    if description.keys() == {"type", "n"} and description["type"] == "symbols" and isinstance(description["n"], int):
        return SymbolTokenizer(description["n"])
    model = description.get("model")
    if not isinstance(model, dict) or "vocab" not in model:
        raise DataError(f"{path} is not a tokenizer.json (it has no model with a vocabulary): {REMEDY}")
    _check_ids(description, file)
    import tokenizers

    with _refusing(file):
        return BpeTokenizer(tokenizers.Tokenizer.from_str(json.dumps(description)), name or file.name)


def _check_ids(description: dict[str, Any], file: Path) -> None:
    """Refuses ids far beyond the number of tokens: the library makes a table up to the largest, of any size."""
    vocabulary, added = description["model"]["vocab"], description.get("added_tokens") or []
    entries = added if isinstance(added, list) else []
    ids = [*(vocabulary.values() if isinstance(vocabulary, dict) else []), *(_id_of(entry) for entry in entries)]
    numbers = [i for i in ids if type(i) is int]  # the library refuses others
    if numbers and max(numbers) > 4 * len(vocabulary) + 1024:
        raise DataError(f"{file} has {len(vocabulary):,} tokens with ids up to {max(numbers):,}: {REMEDY}")


def _id_of(entry: Any) -> Any:
    return entry.get("id") if isinstance(entry, dict) else None


@contextlib.contextmanager
def _refusing(file: Path) -> Iterator[None]:
    """Turns what `tokenizers` raises on a file that it cannot use into a DataError: Exception itself, or a panic."""
    try:
        yield
    except (DataError, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        reason = str(error).partition("\n")[0][:200]
        raise DataError(f"{file} is a tokenizer.json that cannot be used ({reason}): {REMEDY}") from error


def _train_bpe(texts: Iterable[str], size: int, progress: bool) -> "tokenizers.Tokenizer":
    from tokenizers import Tokenizer as HfTokenizer
    from tokenizers import decoders, models, pre_tokenizers, trainers

    tokenizer = HfTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[SEPARATORS[0]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=progress and sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Groups texts to about BATCH_CHARS characters: enough for the library's threads, little to hold."""
    batch: list[str] = []
    n_chars = 0
    for text in texts:
        batch.append(text)
        n_chars += len(text)
        if n_chars >= BATCH_CHARS:
            yield batch
            batch, n_chars = [], 0
    if batch:
        yield batch


def _kinds(decoder: dict[str, Any] | None) -> list[str]:
    if decoder is None:
        return []
    return [part["type"] for part in decoder.get("decoders", [decoder])]


def _byte_alphabet() -> dict[str, int]:
    """Returns GPT-2's byte of each character: printable bytes stand for themselves, the others follow from U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
