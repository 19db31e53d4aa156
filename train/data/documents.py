"""Documents of a corpus: where they come from, which ones are kept, and which ones are held out.

Three sources, chosen by `--data`:

* `stdlib`: the `.py` files of the running Python's standard library, without tests, tables of encodings and installed
  packages: about 10 MB of real text on every machine, read in a fraction of a second. It differs between Python
  versions, therefore results carry the digest of the documents.
* PATH: one file or a folder, searched recursively. Files of rows (records.py says which) hold one document per row, in
  `--data.column`. A text file is one document, taken byte for byte but for a byte order mark. In a folder a text file
  is what TEXT_SUFFIXES lists; any other file is left out and counted, and whatever a leading dot hides is not looked
  at. All may be compressed.
* `hf:NAME[:CONFIG]`: the `train` split of a data set of the Hugging Face hub, read by `datasets`.

The same rules hold for every source:

* Files of `stdlib` are dropped when they are not UTF-8 or shorter than 64 characters. A file that the user names is
  never dropped for such a reason: it is refused, with the reason.
* Empty documents, repeated documents (by SHA-256; the first path stays) and rows with NUL, which separates documents
  in the token stream, are dropped and counted.
* A document is held out if a hash of its key falls below `val_fraction`. The key is the relative path of a file and the
  content of a row, so that adding documents moves none of the others. If no hash falls below, the lowest is held out;
  one document always stays for training. A split for tuning is as large a share of the hashes, next above it.
* A source of one document is cut at blank lines into blocks of at most 64 Ki characters (a sixteenth of it where that
  is less), which count as documents, repeated ones too; the index of a block is its key.
* Documents are ordered by that same hash, not by path: any stretch of the stream is a fair sample of the corpus, and
  long windows win nothing by reading the neighbouring file of the same package.

Documents are held in memory once, as text.
"""

import hashlib
import os
import platform
import sysconfig
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .cache import DataError, expanded
from .records import ROW_SUFFIXES, kind_of, read_bytes, read_hub, read_rows, read_text

__all__ = ["Documents", "read_documents", "split_documents"]

STDLIB_SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "lib2to3", "encodings", "site-packages", "dist-packages"}
)
STDLIB_MIN_CHARS = 64
# Without a salt pydoc_data/topics.py, one generated text of 0.75 MB, is held out and makes 70 % of that split.
SPLIT_SALT = "split:"
BLOCK_CHARS = 64 * 1024
_OPTION = "--data.column"
PROSE = {".txt", ".md", ".rst", ".tex", ".org", ".html", ".xml", ".css", ".toml", ".yaml", ".yml", ".ini", ".cfg"}
CODE = {".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".rs", ".go", ".java", ".kt", ".scala", ".cs"}
SCRIPTS = {".js", ".jsx", ".ts", ".tsx", ".swift", ".rb", ".php", ".lua", ".r", ".jl", ".hs", ".ml", ".sh", ".sql"}
TEXT_SUFFIXES = frozenset(PROSE | CODE | SCRIPTS)
# Tab, line feed, vertical tab, form feed, carriage return and escape occur in text.
CONTROL_BYTES = bytes(set(range(32)) - set(b"\t\n\v\f\r\x1b") | {127})
MAX_CONTROL_SHARE = 0.01


@dataclass
class Documents:
    """The distinct documents of one source, by key, and what was left out."""

    name: str
    """Name of the corpus in reports; holds no machine path."""
    texts: dict[str, str] = field(default_factory=dict)
    """Text by key, in the order of reading; no text is empty, repeated or contains NUL."""
    skipped: Counter[str] = field(default_factory=Counter)
    """Number of files or rows that were left out, by reason."""
    _seen: set[bytes] = field(default_factory=set)

    def add(self, text: str, key: str | None = None) -> None:
        """Keeps one document unless it is empty, repeated or contains NUL; `key` None means its content."""
        digest = hashlib.sha256(text.encode())
        if not text.strip():
            self.skipped["empty"] += 1
        elif "\0" in text:
            self.skipped["contains NUL"] += 1
        elif digest.digest() in self._seen:
            self.skipped["duplicate"] += 1
        else:
            self._seen.add(digest.digest())
            self.texts[digest.hexdigest() if key is None else key] = text


def read_documents(source: str, *, column: str, cache: Path, progress: bool = False) -> Documents:
    """Reads the documents of `source` ("stdlib", a path, or "hf:NAME[:CONFIG]"); the rules are above.

    Args:
        source: as in DataConfig.source; a folder that is itself called stdlib is given as ./stdlib.
        column: the column of rows that holds the text.
        cache: folder in which `datasets` keeps what it downloads.
        progress: show the bars of `datasets`, on a terminal.

    Raises:
        DataError: if the source is missing, unreadable, empty, binary, not UTF-8, or lacks the column.
    """
    if source == "stdlib":
        documents = _from_stdlib(Path(sysconfig.get_path("stdlib")))
    elif source.startswith("hf:"):
        documents = _from_hub(source, column, cache, progress)
    else:
        documents = _from_path(expanded(Path(source)), column)
    if not documents.texts:
        left_out = ", ".join(f"{count} {reason}" for reason, count in documents.skipped.items()) or "nothing was found"
        raise DataError(f"{source} has no documents to train on ({left_out}): give other text with --data")
    if len(documents.texts) == 1:
        (text,) = documents.texts.values()
        documents.texts = {str(i): block for i, block in enumerate(cut_into_blocks(text))}
    return documents


def split_documents(
    texts: Mapping[str, str], val_fraction: float, held_out: str = "validation"
) -> tuple[list[str], list[str]]:
    """Returns the training and the held-out documents, both in the order of the salted SHA-256 of their keys.

    Held out is what validation reads, or, for "tuning", as large a share of the hashes above it; what validation reads
    is then in neither list, and which documents that are does not change.

    Raises:
        DataError: if val_fraction is not between 0 and 1, or there are fewer documents than splits.
    """
    if not 0 < val_fraction < 1:
        raise DataError(
            f"val_fraction={val_fraction} is not between 0 and 1: set --data.val-fraction, for example to 0.05"
        )
    n_splits = 3 if held_out == "tuning" else 2
    if len(texts) < n_splits:
        few = "one document" if len(texts) == 1 else "two documents"
        raise DataError(f"the corpus has only {few}, too little to hold some text out: give more with --data")
    # surrogateescape: a file name is any bytes
    salted = {key: (SPLIT_SALT + key).encode(errors="surrogateescape") for key in texts}
    ranks = {key: int.from_bytes(hashlib.sha256(name).digest()) for key, name in salted.items()}
    order = sorted(ranks, key=lambda key: ranks[key])

    def n_below(share: float) -> int:
        return sum(rank < int(share * 2**256) for rank in ranks.values())

    first, last = 0, min(max(n_below(val_fraction), 1), len(order) - 1)
    if held_out == "tuning":
        first = min(last, len(order) - 2)
        last = min(max(n_below(2 * val_fraction), first + 1), len(order) - 1)
    return [texts[key] for key in order[last:]], [texts[key] for key in order[first:last]]


def cut_into_blocks(text: str) -> Iterable[str]:
    """Cuts one long text into blocks of at most 64 Ki characters (a sixteenth of a short text) that join to the text.

    A block ends after the last blank line that fits, else after the last line, else after the last space; a boundary
    in its first half is too early, and without a later one the block is cut at its full length.
    """
    size = min(BLOCK_CHARS, max(len(text) // 16, 256))
    start = 0
    while len(text) - start > size:
        stop = start + size
        for boundary in ("\n\n", "\n", " "):
            found = text.rfind(boundary, start + size // 2, stop)
            if found >= 0:
                stop = found + len(boundary)
                break
        yield text[start:stop]
        start = stop
    yield text[start:]


def _from_stdlib(root: Path) -> Documents:
    documents = Documents(name=f"stdlib (Python {platform.python_version()})")
    for key in _files(root, skipped_folders=STDLIB_SKIPPED_FOLDERS):
        if not key.endswith(".py"):
            continue
        try:
            text = (root / key).read_bytes().decode()
        except UnicodeDecodeError:
            documents.skipped["not UTF-8"] += 1
            continue
        except OSError:
            documents.skipped["unreadable"] += 1
            continue
        if len(text) < STDLIB_MIN_CHARS:
            documents.skipped[f"shorter than {STDLIB_MIN_CHARS} characters"] += 1
            continue
        documents.add(text, key)
    return documents


def _from_path(root: Path, column: str) -> Documents:
    documents = Documents(name=root.resolve().name)
    if not root.exists():
        raise DataError(
            f"there is no file or folder {root}: give --data stdlib, a path, or hf:NAME for a set of the hub"
        )
    named_alone = not root.is_dir()
    for key in [""] if named_alone else _files(root):
        path = root / key
        suffix = kind_of(path)
        if suffix in ROW_SUFFIXES or (named_alone and suffix == ".json"):
            for (text,) in read_rows(path, [column], option=_OPTION):
                documents.add(text)
        elif suffix in TEXT_SUFFIXES or named_alone:
            documents.add(_read_text(path), key)
        else:
            documents.skipped["other kind of file"] += 1
    return documents


def _from_hub(source: str, column: str, cache: Path, progress: bool) -> Documents:
    documents = Documents(name=source)
    for (text,) in read_hub(source, [column], option=_OPTION, cache=cache, progress=progress):
        documents.add(text)
    return documents


def _files(root: Path, skipped_folders: frozenset[str] = frozenset()) -> list[str]:
    """Returns the relative POSIX paths of the files below a folder, sorted, without what is hidden by a leading dot."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skipped_folders]
        prefix = "" if folder == str(root) else Path(folder).relative_to(root).as_posix() + "/"
        found += [prefix + name for name in names if not name.startswith(".")]
    return sorted(found)


def _read_text(path: Path) -> str:
    raw = read_bytes(path)
    n_control = len(raw) - len(raw.translate(None, CONTROL_BYTES)) + raw.count("\N{REPLACEMENT CHARACTER}".encode())
    if n_control > MAX_CONTROL_SHARE * len(raw):
        share = f"{n_control / len(raw):.0%} control or replacement characters"
        raise DataError(
            f"{path} looks binary ({share}): give UTF-8 text with --data, or take the file out of the folder"
        )
    text = read_text(raw, path)
    if "\0" in text:
        raise DataError(f"{path} contains NUL, which separates documents: remove it before giving the file to --data")
    return text
