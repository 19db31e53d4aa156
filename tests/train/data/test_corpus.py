import errno
import hashlib
import json
import lzma
import multiprocessing
import os
import shutil
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from crossover.train.config import DataConfig
from crossover.train.data import (
    Corpus,
    DataError,
    check_lengths,
    document_starts,
    document_windows,
    load_corpus,
    train_batch,
    val_windows,
)
from crossover.train.data.cache import cache_folder, locked, publish
from crossover.train.data.tokenizer import BytesTokenizer
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CROSSOVER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Sixty small text files."""
    root = tmp_path / "text"
    root.mkdir()
    for i in range(60):
        (root / f"{i}.txt").write_text(
            f"Document {i}: naïve café 漢字, " + "words and numbers " * (i % 7) + f"{i * i}.\n"
        )
    return root


def load(source: Path, *, val_fraction: float = 0.2, **options: Any) -> Corpus:
    return load_corpus(DataConfig(source=str(source), val_fraction=val_fraction, **options))


def stream(n_train: int, n_val: int = 64) -> Any:
    """A corpus whose tokens are their own positions, as far as windows look at one."""
    return SimpleNamespace(name="counting", train=np.arange(n_train), val=np.arange(n_val))


def documents_of(corpus: Corpus, tokens: np.ndarray) -> list[str]:
    cuts = np.flatnonzero(tokens == corpus.separator)
    return [corpus.tokenizer.decode(part[part != corpus.separator]) for part in np.split(tokens, cuts)]


# the corpus


@pytest.mark.quick
@pytest.mark.parametrize(("tokenizer", "dtype"), [("bytes", np.uint8), ("bpe:300", np.uint16)])
def test_the_streams_hold_every_document_once_between_separators(
    tokenizer: str, dtype: type[np.generic], folder: Path
) -> None:
    corpus = load(folder, tokenizer=tokenizer)
    assert isinstance(corpus.train, np.memmap)
    assert corpus.train.dtype == corpus.val.dtype == dtype
    train, val = documents_of(corpus, corpus.train), documents_of(corpus, corpus.val)
    assert sorted(train + val) == sorted(path.read_text() for path in folder.iterdir())
    assert (len(train), len(val)) == (corpus.n_train_documents, corpus.n_val_documents)
    assert corpus.n_documents == 60
    assert 4 <= corpus.n_val_documents <= 20


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:300"])
def test_byte_counts_are_those_of_the_tokens_and_the_same_for_every_tokenizer(tokenizer: str, folder: Path) -> None:
    corpus, plain = load(folder, tokenizer=tokenizer), load(folder)
    assert corpus.train_bytes == corpus.tokenizer.n_bytes(corpus.train) == len(plain.train)
    assert corpus.val_bytes == corpus.tokenizer.n_bytes(corpus.val) == len(plain.val)
    assert corpus.reference_bits_per_byte == plain.reference_bits_per_byte
    assert corpus.documents_digest == plain.documents_digest
    assert (corpus.digest == plain.digest) == (tokenizer == "bytes")


def test_references_compress_exactly_the_validation_bytes(folder: Path) -> None:
    corpus = load(folder)
    raw = corpus.val.tobytes()
    assert corpus.reference_bits_per_byte == {
        "zlib": 8 * len(zlib.compress(raw, 9)) / len(raw),
        "xz": 8 * len(lzma.compress(raw, preset=6)) / len(raw),
    }


def test_no_file_changes_its_split_when_files_are_added(folder: Path) -> None:
    before = load(folder)
    held_out = set(documents_of(before, before.val))
    for i in range(40):
        (folder / f"added-{i}.txt").write_text(f"A new text with the number {i}.")
    after = load(folder)
    assert after.digest != before.digest
    assert held_out <= set(documents_of(after, after.val))
    assert held_out.isdisjoint(documents_of(after, after.train))


def test_a_bpe_learns_from_training_documents_alone(folder: Path) -> None:
    secret = "abracadabra" * 3
    val = documents_of(corpus := load(folder), corpus.val)
    for path in folder.iterdir():
        if path.read_text() in val:
            path.write_text(path.read_text() + f" {secret}" * 20)
    tokenizer = load(folder, tokenizer="bpe:400").tokenizer
    assert len(tokenizer.encode(secret)) > 0.7 * len(secret)


def test_the_summary_is_json_and_names_what_a_result_must_say(folder: Path) -> None:
    (folder / "empty.txt").write_text("")
    corpus = load(folder, tokenizer="bpe:300")
    summary = json.loads(json.dumps(corpus.summary()))
    assert summary["name"] == "text"
    assert summary["digest"] == corpus.digest
    assert summary["tokenizer"]["name"] == "bpe:300"
    assert summary["tokenizer"]["vocab_size"] == corpus.tokenizer.vocab_size
    assert summary["train_tokens"] == len(corpus.train)
    assert summary["skipped"] == {"empty": 1}
    assert summary["reference_bits_per_byte"].keys() == {"zlib", "xz"}
    assert str(folder) not in json.dumps(summary)


# the cache


@pytest.mark.quick
def test_the_second_load_reads_the_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = load(folder)
    monkeypatch.setattr("crossover.train.data.corpus._write", lambda *_: pytest.fail("written again"))
    second = load(folder)
    assert second.summary() == first.summary()
    np.testing.assert_array_equal(second.train, first.train)


def test_a_changed_file_is_never_served_stale(folder: Path) -> None:
    before = load(folder)
    path = folder / "7.txt"
    stamp = path.stat().st_mtime
    path.write_text(path.read_text().replace("Document", "Tnemucod"))
    os.utime(path, (stamp, stamp))
    after = load(folder)
    assert after.digest != before.digest
    assert path.read_text() in documents_of(after, after.train) + documents_of(after, after.val)
    path.write_text(path.read_text().replace("Tnemucod", "Document"))
    assert load(folder).digest == before.digest


def test_digests_depend_on_documents_split_and_tokenizer_and_not_on_the_place(folder: Path, tmp_path: Path) -> None:
    digest = load(folder).digest
    assert load(folder, val_fraction=0.5).digest != digest
    assert load(folder, tokenizer="bpe:300").digest != digest
    assert load(folder.rename(tmp_path / "moved"), cache=tmp_path / "other").digest == digest


@pytest.mark.parametrize("name", ["train.npy", "val.npy", "corpus.json", "digests.json"])
@pytest.mark.parametrize("damage", ["short", "empty", "missing", "a bit", "{}"])
def test_a_corpus_damaged_on_disk_is_made_again(damage: str, name: str, folder: Path, cache: Path) -> None:
    first = load(folder)
    train, summary = np.array(first.train), first.summary()
    (path,) = (cache / "corpora").glob(f"*/{name}")
    raw, before = path.read_bytes(), path.stat()
    if damage == "missing":
        path.unlink()
    else:
        flipped = raw[:-20] + bytes([raw[-20] ^ 1]) + raw[-19:]
        path.write_bytes({"short": raw[: len(raw) // 2], "empty": b"", "a bit": flipped, "{}": b"{}"}[damage])
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # no clock tells
    again = load(folder)
    np.testing.assert_array_equal(again.train, train)
    assert again.summary() == summary


def test_a_prepared_corpus_is_read_from_a_cache_that_cannot_be_written(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load(folder, tokenizer="bpe:300").digest
    for path in cache.glob("*.lock"):
        path.unlink()
    monkeypatch.setattr("os.access", lambda path, mode: not mode & os.W_OK)
    monkeypatch.setattr("os.open", _read_only(os.open))
    assert load(folder, tokenizer="bpe:300").digest == first
    with pytest.raises(DataError, match=r"cannot use the cache folder .*Read-only file system.*--data\.cache"):
        load(folder, tokenizer="bpe:299")


def _read_only(function: Callable[..., int]) -> Callable[..., int]:
    def call(path: str, flags: int, *args: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(errno.EROFS, "Read-only file system")
        return function(path, flags, *args, **options)

    return call


def test_who_waits_for_another_process_says_so_and_finds_its_work(
    folder: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    digest = load(folder).digest
    target = cache / "corpora" / digest[:32]
    shutil.rmtree(target)
    leftover = target.with_name(f".{target.name}.1-00000000")
    leftover.mkdir()
    with locked(target, "corpus"):
        thread = threading.Thread(target=load, args=(folder,))
        thread.start()
        while "waiting for another process that makes the same corpus" not in capsys.readouterr().err:
            assert thread.is_alive()
    thread.join()
    assert list((cache / "corpora").iterdir()) == [target]


def test_without_a_home_the_cache_must_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CROSSOVER_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", lambda _: {}["nobody"])
    with pytest.raises(DataError, match=r"cannot use the cache folder ~/\.cache/crossover \(there is no home folder\)"):
        cache_folder(None)


def _digest(config: DataConfig) -> str:
    corpus = load_corpus(config)
    return corpus.digest + hashlib.sha256(corpus.train.tobytes()).hexdigest()


def test_processes_that_start_together_see_one_corpus(folder: Path, cache: Path) -> None:
    config = DataConfig(source=str(folder), tokenizer="bpe:300", cache=cache)
    with multiprocessing.get_context("spawn").Pool(3) as pool:
        assert len(set(pool.map(_digest, [config] * 3, chunksize=1))) == 1
    assert [path.name[0] for path in (cache / "corpora").iterdir()] != ["."]
    assert len(list((cache / "corpora").iterdir())) == 1


def test_the_cache_is_the_configured_folder_then_the_variables_then_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_folder(tmp_path / "mine") == tmp_path / "mine"
    assert cache_folder(None) == tmp_path / "cache"
    monkeypatch.delenv("CROSSOVER_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert cache_folder(None) == tmp_path / "caches/crossover"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative, which the standard says is to be passed over")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder(None) == tmp_path / "home/.cache/crossover"
    assert (tmp_path / "home/.cache/crossover").is_dir()


def test_a_cache_that_cannot_be_written_is_refused_with_the_option(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot use the cache folder .*--data\.cache or \$CROSSOVER_CACHE"):
        load(folder, cache=tmp_path / "file/cache")
    monkeypatch.setattr("os.access", lambda *_: False)
    with pytest.raises(DataError, match=r"cannot use the cache folder .*Permission denied"):
        load(folder)


def test_nothing_is_published_when_writing_fails(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("numpy.save", full)
    with pytest.raises(DataError, match=r"No space left on device.*--data\.cache"):
        load(folder)
    assert list((cache / "corpora").iterdir()) == []


def test_a_folder_is_on_the_disk_before_its_name_appears(tmp_path: Path, renamed: list[str]) -> None:
    with publish(tmp_path / "result") as draft:
        (draft / "a").write_text("text")
    assert renamed == ["result"]


def test_the_first_of_two_publishers_wins(tmp_path: Path) -> None:
    target = tmp_path / "made/result"
    with publish(target) as slow:
        with publish(target) as fast:
            (fast / "a").write_text("fast")
        (slow / "a").write_text("slow")
    assert (target / "a").read_text() == "fast"
    assert list(target.parent.iterdir()) == [target]


def test_a_tokenizer_that_changes_a_document_is_refused(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    load(folder, tokenizer="bpe:300").tokenizer.save(file)
    description = json.loads(file.read_text())
    file.write_text(json.dumps(description | {"normalizer": {"type": "NFC"}}))
    assert load(folder, tokenizer=str(file)).val_bytes == load(folder).val_bytes
    file.write_text(json.dumps(description | {"normalizer": {"type": "Lowercase"}}))
    with pytest.raises(DataError, match=r"mine\.json changes the text of the document that begins 'Document .*bytes"):
        load(folder, tokenizer=str(file))


# windows


@given(st.integers(0, 2**64), st.integers(0, 2**40), st.integers(1, 9), st.integers(1, 30))
def test_training_windows_are_contiguous_and_stay_inside(seed: int, step: int, batch_size: int, seq_len: int) -> None:
    batch = train_batch(stream(31), seed=seed, step=step, batch_size=batch_size, seq_len=seq_len)
    assert batch.shape == (batch_size, seq_len + 1)
    assert batch.dtype == np.int64
    assert (np.diff(batch) == 1).all()
    assert batch.min() >= 0
    assert batch.max() <= 30


def test_a_batch_is_a_pure_function_of_seed_and_step() -> None:
    def batch(**change: int) -> np.ndarray:
        options: dict[str, Any] = {"seed": 1, "step": 2, "batch_size": 8, "seq_len": 16} | change
        return train_batch(stream(100_000), **options)

    first = batch()
    np.random.seed(0)  # the global generator must not matter
    np.testing.assert_array_equal(batch(), first)
    for change in ({"seed": 4}, {"step": 4}):
        assert (batch(**change)[:, 0] != first[:, 0]).any()
    np.testing.assert_array_equal(batch(batch_size=20)[:8], first)
    assert len(set(batch(batch_size=200)[:, 0].tolist())) > 190


@pytest.mark.quick
def test_batches_are_the_same_on_every_machine() -> None:
    batch = train_batch(stream(1_000_000), seed=7, step=123, batch_size=4, seq_len=2)
    assert batch[:, 0].tolist() == [372452, 214552, 33980, 950851]


def test_every_start_is_drawn_equally_often() -> None:
    starts = train_batch(stream(14), seed=0, step=0, batch_size=30_000, seq_len=4)[:, 0]
    counts = np.bincount(starts, minlength=10)
    assert len(counts) == 10
    assert (abs(counts - 3000) < 250).all()  # five standard deviations


@given(st.integers(2, 400), st.integers(1, 60), st.integers(1, 500))
def test_validation_windows_predict_distinct_tokens_spread_over_the_whole_stream(
    n_val: int, seq_len: int, max_tokens: int
) -> None:
    corpus = stream(2, n_val)
    if n_val <= seq_len:
        with pytest.raises(DataError):
            val_windows(corpus, seq_len, max_tokens)
        return
    windows = val_windows(corpus, seq_len, max_tokens)
    assert windows.dtype == np.int64
    assert (np.diff(windows) == 1).all()
    assert windows.min() >= 0
    assert windows.max() < n_val
    targets = windows[:, 1:].ravel()
    assert (np.diff(targets) > 0).all()
    assert len(windows) == max(1, min(max_tokens // seq_len, (n_val - 1) // seq_len))
    if len(windows) > 1:
        assert windows[0, 0] == 0
        assert windows[-1, -1] == n_val - 1


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=20), min_size=1, max_size=3), st.integers(0, 3))
def test_documents_start_after_separators(rows: list[list[int]], separator: int) -> None:
    for row in rows:
        expected = [i > 0 and row[i - 1] == separator for i in range(len(row))]
        assert document_starts(np.array(row), separator).tolist() == expected
    length = min(map(len, rows))
    batch = np.array([row[:length] for row in rows])
    starts = document_starts(batch, separator)
    assert starts.dtype == bool
    for row, row_starts in zip(batch, starts, strict=True):
        np.testing.assert_array_equal(row_starts, document_starts(row, separator))


def test_starts_find_the_documents_of_a_real_batch(folder: Path) -> None:
    corpus = load(folder)
    batch = train_batch(corpus, seed=0, step=0, batch_size=4, seq_len=500)
    starts = document_starts(batch, corpus.separator)
    assert starts.sum() > 10
    assert (batch[starts] == ord("D")).all()  # each file begins with "Document"


# lengths


def test_a_split_shorter_than_a_window_is_refused_before_training() -> None:
    check_lengths(stream(11, 11), 10)
    for corpus, split in ((stream(10, 99), "training"), (stream(99, 10), "validation")):
        with pytest.raises(DataError, match=rf"{split} split of counting has 10 tokens.*--train\.seq-len"):
            check_lengths(corpus, 10)
    with pytest.raises(DataError, match="training split"):
        train_batch(stream(10), seed=0, step=0, batch_size=1, seq_len=10)


def test_a_text_too_short_to_split_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one sentence")
    with pytest.raises(DataError, match="only one document"):
        load(tmp_path / "a.txt")


def test_the_default_corpus_loads(cache: Path) -> None:
    corpus = load_corpus(DataConfig())
    assert corpus.name.startswith("stdlib (Python 3.")
    assert isinstance(corpus.tokenizer, BytesTokenizer)
    assert (corpus.train != 0).sum() == corpus.train_bytes - corpus.n_train_documents + 1
    assert 1 < corpus.reference_bits_per_byte["xz"] < corpus.reference_bits_per_byte["zlib"] < 3
    check_lengths(corpus, 8192)


@pytest.mark.quick
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    length=st.integers(1, 17),
    max_tokens=st.integers(1, 200),
    min_documents=st.integers(1, 5),
)
def test_windows_of_documents_follow_each_other_from_their_starts(
    lengths: list[int], length: int, max_tokens: int, min_documents: int
) -> None:
    texts = [[1 + 100 * i + t for t in range(n)] for i, n in enumerate(lengths)]  # a token tells document and place
    val = np.array([token for text in texts for token in [*text, 0]][:-1], dtype=np.int64)
    corpus: Any = SimpleNamespace(val=val, separator=0)
    windows, n_documents = document_windows(corpus, length, max_tokens=max_tokens, min_documents=min_documents)

    long = [i for i, n in enumerate(lengths) if n >= length]
    n_there = sum(n // length for n in lengths)
    assert windows.shape == (min(n_there, max(-(-max_tokens // length), min_documents)), length + 1)
    documents, places = np.divmod(windows[:, 1:] - 1, 100)
    assert (documents == documents[:, :1]).all()  # no window has two documents in it
    assert (np.diff(places, axis=1) == 1).all()
    assert (places[:, 0] % length == 0).all()
    assert len(np.unique(windows[:, 1])) == len(windows)
    for window, place in zip(windows, places[:, 0], strict=True):
        assert window[0] == (window[1] - 1 if place else 0)  # what is before a document is the separator
    counts = {i: int((documents[:, 0] == i).sum()) for i in long}
    assert n_documents == sum(map(bool, counts.values())) >= min(len(long), min_documents, len(windows))
    most = max(counts.values(), default=0)
    assert all(n >= min(most - 1, lengths[i] // length) for i, n in counts.items())
