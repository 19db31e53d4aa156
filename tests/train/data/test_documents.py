import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from crossover.train.data.cache import DataError
from crossover.train.data.documents import Documents, cut_into_blocks, read_documents, split_documents
from hypothesis import given
from hypothesis import strategies as st


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    return folder


def write(folder: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return folder


def rows(*values: object) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


def read(source: Path | str, cache: Path, column: str = "text") -> Documents:
    return read_documents(str(source), column=column, cache=cache)


# stdlib


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    code = "def f(x):\n    return x  # " + "-" * 64 + "\n"
    files: dict[str, str | bytes] = {f"pkg/mod{i}.py": f"# {i}\n{code}" for i in range(40)}
    files |= {f"{skipped}/a.py": f"# {skipped}\n{code}" for skipped in ("test", "pkg/tests", "idlelib/idle_test")}
    files |= {f"{skipped}/a.py": f"# {skipped}\n{code}" for skipped in ("lib2to3", "encodings", "site-packages")}
    files |= {
        "dist-packages/deep/a.py": f"# dist\n{code}",
        "notes.txt": f"not Python\n{code}",
        "short.py": "x = 1\n",
        "latin.py": f"# é\n{code}".encode("latin-1"),
        "nul.py": f"# \0\n{code}",
        "pkg/zz_copy.py": f"# 3\n{code}",
    }
    root = write(tmp_path / "lib", files)
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(root))
    return root


def test_stdlib_keeps_source_files_and_says_what_it_dropped(library: Path, cache: Path) -> None:
    documents = read("stdlib", cache)
    assert documents.texts.keys() == {f"pkg/mod{i}.py" for i in range(40)}
    assert documents.skipped == {
        "shorter than 64 characters": 1,
        "not UTF-8": 1,
        "contains NUL": 1,
        "duplicate": 1,
    }
    assert documents.texts["pkg/mod7.py"] == (library / "pkg/mod7.py").read_bytes().decode()


def test_the_real_standard_library_is_several_megabytes_and_needs_no_datasets(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # importing it would raise
    texts = read("stdlib", cache).texts
    assert sum(map(len, texts.values())) > 4_000_000
    assert "typing.py" in texts
    assert not any({"test", "tests", "encodings", "site-packages"} & set(key.split("/")) for key in texts)
    assert not any("\0" in text for text in texts.values())


def test_the_standard_library_holds_out_about_the_fraction_of_its_text(cache: Path) -> None:
    train, val = split_documents(read("stdlib", cache).texts, 0.05)
    share = sum(map(len, val)) / sum(map(len, train + val))
    assert 0.03 < share < 0.1
    assert max(map(len, val)) < 0.4 * sum(map(len, val))  # no single file decides the validation loss


# split

numbers = st.integers(0, 10**6).map(str)
names = st.sets(numbers, min_size=40, max_size=60)


@given(names, numbers)
def test_adding_a_document_moves_no_other(keys: set[str], added: str) -> None:
    texts = {key: f"text of {key}" for key in keys}
    train, val = split_documents(texts, 0.5)
    more_train, more_val = split_documents(texts | {added: f"text of {added}"}, 0.5)
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)


@given(names)
def test_each_document_is_in_exactly_one_split_in_an_order_that_ignores_the_order_of_reading(keys: set[str]) -> None:
    texts = {key: f"text of {key}" for key in sorted(keys)}
    train, val = split_documents(texts, 0.3)
    assert sorted(train + val) == sorted(texts.values())
    assert split_documents(dict(reversed(texts.items())), 0.3) == (train, val)


def test_a_larger_fraction_holds_out_the_same_documents_and_more() -> None:
    texts = {str(i): f"text {i}" for i in range(400)}
    small, large = split_documents(texts, 0.05)[1], split_documents(texts, 0.2)[1]
    assert set(small) < set(large)
    assert 10 <= len(small) <= 30
    assert 60 <= len(large) <= 100


@pytest.mark.parametrize("val_fraction", [1e-9, 1 - 1e-9])
def test_both_splits_have_a_document_whatever_the_fraction(val_fraction: float) -> None:
    train, val = split_documents({"a": "one", "b": "two", "c": "three"}, val_fraction)
    assert train
    assert val


@pytest.mark.parametrize("val_fraction", [0.0, 1.0, -1.0, float("nan")])
def test_a_fraction_outside_of_0_and_1_is_refused(val_fraction: float) -> None:
    with pytest.raises(DataError, match=r"--data\.val-fraction"):
        split_documents({"a": "one", "b": "two"}, val_fraction)


# one long document


@given(st.text("ab \n", min_size=0, max_size=3000))
def test_blocks_join_to_the_text_and_stay_below_their_size(text: str) -> None:
    blocks = list(cut_into_blocks(text))
    assert "".join(blocks) == text
    assert all(0 < len(block) <= 256 for block in blocks if text)


def test_blocks_end_at_blank_lines_where_there_are_any() -> None:
    text = "word " * 20 + "\n"
    text = (text + "\n") * 500
    blocks = list(cut_into_blocks(text))
    assert len(blocks) >= 16
    assert all(block.endswith("\n\n") for block in blocks)


@pytest.mark.quick
def test_one_large_text_file_is_split_by_blocks(tmp_path: Path, cache: Path) -> None:
    play = "".join(f"Speaker {i}:\nWords of the speech number {i}.\n\n" for i in range(30_000))
    path = write(tmp_path, {"play.log": play}) / "play.log"
    documents = read(path, cache)
    assert "".join(documents.texts.values()) == play
    assert max(map(len, documents.texts.values())) <= 64 * 1024
    train, val = split_documents(documents.texts, 0.05)
    assert 0 < len(val) < len(train)


# paths


def test_a_folder_gives_one_document_per_text_file_and_per_row(tmp_path: Path, cache: Path) -> None:
    from datasets import Dataset

    root = write(
        tmp_path / "data",
        {
            "a.txt": "first\r\nfile\n",
            "deep/er/b.MD": "second file",
            "rows.jsonl": rows({"text": "row one", "n": 1}, {"text": "row two", "n": 2}, {"text": "row one", "n": 3}),
            "picture.png": b"\x89PNG\xff",
            "package.json": "{}",
            "empty.py": "  \n",
            ".git/config.txt": "hidden",
            ".hidden.txt": "hidden",
        },
    )
    Dataset.from_dict({"text": ["row three", "ro\0w", ""]}).to_parquet(root / "more.parquet")
    documents = read(root, cache)
    assert sorted(documents.texts.values()) == ["first\r\nfile\n", "row one", "row three", "row two", "second file"]
    assert documents.skipped == {"other kind of file": 2, "duplicate": 1, "empty": 2, "contains NUL": 1}
    assert documents.name == "data"
    assert "deep/er/b.MD" in documents.texts


def test_rows_come_from_the_column_that_was_asked_for(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, {"a.jsonl": rows({"title": "t1", "body": "b1"}, {"title": "t2", "body": "b2"})}) / "a.jsonl"
    assert list(read(path, cache, "body").texts.values()) == ["b1", "b2"]


def test_a_json_array_can_be_given_as_one_file(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, {"a.json": json.dumps([{"text": "one"}, {"text": "two"}])}) / "a.json"
    assert list(read(path, cache).texts.values()) == ["one", "two"]


def test_rows_keep_their_split_when_others_are_inserted_before_them(tmp_path: Path, cache: Path) -> None:
    texts = [f"row number {i}" for i in range(60)]
    before = write(tmp_path, {"a.jsonl": rows(*({"text": text} for text in texts))}) / "a.jsonl"
    train, val = split_documents(read(before, cache).texts, 0.3)
    after = write(tmp_path, {"b.jsonl": rows({"text": "new"}, *({"text": text} for text in texts))}) / "b.jsonl"
    more_train, more_val = split_documents(read(after, cache).texts, 0.3)
    assert set(train) <= set(more_train)
    assert set(val) <= set(more_val)


def test_a_changed_file_of_rows_is_never_served_stale(tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "a.jsonl"
    for text in ("old text", "new text"):  # the same size and time stamp, which is what `datasets` looks at
        path.write_text(rows({"text": text}, {"text": "same"}))
        os.utime(path, (1, 1))
        assert list(read(path, cache).texts.values()) == [text, "same"]


def test_one_repeated_line_is_as_much_text_as_any_other(tmp_path: Path, cache: Path) -> None:
    text = "the same line again and again\n" * 15_000
    (tmp_path / "a.txt").write_text(text)
    documents = read(tmp_path / "a.txt", cache)
    assert "".join(documents.texts.values()) == text
    assert all(split_documents(documents.texts, 0.05))


# what is refused

CASES: dict[str, tuple[str, str | bytes, str]] = {
    "empty": ("a.txt", "", r"a\.txt has no documents .*1 empty.*--data"),
    "blank": ("a.txt", " \n \n", r"a\.txt has no documents .*1 empty.*--data"),
    "binary": ("a.bin", bytes(range(256)) * 20, r"a\.bin looks binary \(\d+% control"),
    "mangled": ("a.txt", "\ufffd\ufffdx" * 50, r"a\.txt looks binary .*replacement"),
    "utf-16": ("a.txt", "plain words".encode("utf-16"), r"a\.txt looks binary"),
    "latin-1": ("a.txt", "caf\xe9 ".encode("latin-1") * 9, r"a\.txt is not UTF-8 \(byte 0xe9 at offset 3\).*iconv"),
    "one NUL": ("a.txt", "words and words " * 20 + "\0", r"a\.txt contains NUL.*remove"),
    "empty rows": ("a.jsonl", "", r"a\.jsonl is empty.*--data"),
    "no rows": ("a.jsonl", "[]", r"a\.jsonl is empty.*--data"),
    "broken rows": ("a.jsonl", '{"text": "x"\n', r"line 1 of .*a\.jsonl is not JSON \(.*delimiter.*--data"),
    "not Parquet": ("a.parquet", b"PK\3\4 not at all", r"cannot read .*a\.parquet as Parquet \(.*magic bytes"),
    "other column": (
        "a.jsonl",
        rows({"title": "t", "body": "b"}),
        r"a\.jsonl has no column 'text' \(--data\.column\); known are body, title",
    ),
    "rows without text": (
        "a.jsonl",
        rows({"text": "a"}, {"body": "b"}, {"body": "c"}),
        r"a\.jsonl has 2 of 3 rows without text in column 'text'.*--data\.column",
    ),
    "numbers": ("a.jsonl", rows({"text": 1}, {"text": 2}), r"has 2 of 2 rows without text in column 'text'"),
}


@pytest.mark.parametrize("case", CASES)
def test_unusable_files_are_refused_in_one_sentence_with_the_remedy(case: str, tmp_path: Path, cache: Path) -> None:
    name, content, message = CASES[case]
    with pytest.raises(DataError, match=message) as error:
        read(write(tmp_path, {name: content}) / name, cache)
    assert "\n" not in str(error.value)


def test_one_bad_file_in_a_folder_is_named(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "data", {"a.txt": "good words", "deep/b.txt": b"caf\xe9 au lait"})
    with pytest.raises(DataError, match=r"deep/b\.txt is not UTF-8"):
        read(root, cache)


def test_a_pipe_is_not_waited_for(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "data", {"a.txt": "good words"})
    for name in ("b.txt", "b.jsonl", "b.parquet", "b.txt.gz"):
        os.mkfifo(root / name)
        with pytest.raises(DataError, match=rf"{name} is a pipe or a device: write .* to a file"):
            read(root, cache)
        (root / name).unlink()


def test_the_name_of_a_file_is_any_bytes(tmp_path: Path, cache: Path) -> None:
    root = write(tmp_path / "data", {"a.txt": "some words", os.fsdecode(b"\xff.txt"): "other words"})
    train, held_out = split_documents(read(root, cache).texts, 0.5)
    assert sorted(train + held_out) == ["other words", "some words"]


def test_a_folder_without_text_says_what_it_left_out(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"no documents .*2 other kind of file"):
        read(write(tmp_path / "data", {"a.png": b"1", "b.zip": b"2"}), cache)


@pytest.mark.quick
def test_a_missing_path_is_refused_with_the_alternatives(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*nowhere: give --data stdlib, a path, or hf:NAME"):
        read(tmp_path / "nowhere", cache)


def test_a_text_of_one_short_block_cannot_be_split(tmp_path: Path, cache: Path) -> None:
    path = write(tmp_path, {"a.txt": "a few words"}) / "a.txt"
    with pytest.raises(DataError, match="only one document"):
        split_documents(read(path, cache).texts, 0.05)


# the hub


@pytest.mark.parametrize(
    ("source", "expected"),
    [("hf:owner/name", ("owner/name", None)), ("hf:owner/name:en", ("owner/name", "en")), ("hf:name", ("name", None))],
)
def test_a_hub_source_is_loaded_by_name_and_config(
    source: str, expected: tuple[str, str | None], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    calls: list[tuple[str, str | None, dict[str, str]]] = []

    def load_dataset(name: str, config: str | None, **options: str) -> datasets.Dataset:
        calls.append((name, config, options))
        return datasets.Dataset.from_dict({"text": ["one", "two", "two"]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    documents = read(source, cache)
    assert calls == [(*expected, {"split": "train", "cache_dir": str(cache / "datasets")})]
    assert list(documents.texts.values()) == ["one", "two"]
    assert documents.name == source


def test_a_hub_source_without_a_network_is_refused_in_one_sentence(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"cannot load the hub's data set owner/name \(.*\): check .*--data") as error:
        read("hf:owner/name:en", cache)
    assert "\n" not in str(error.value)


def test_the_cause_of_a_failed_hub_load_is_unwrapped(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from datasets.exceptions import DatasetGenerationError

    def load_dataset(*_: object, **__: object) -> None:
        raise DatasetGenerationError("An error occurred") from ValueError("shard 3 is cut short.")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(DataError, match=r"owner/name \(shard 3 is cut short\): check"):
        read("hf:owner/name", cache)


def test_a_hub_source_needs_a_name(cache: Path) -> None:
    with pytest.raises(DataError, match="hf:NAME"):
        read("hf:", cache)


def test_progress_bars_are_off_away_from_a_terminal(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    table = datasets.Dataset.from_dict({"text": ["one", "two"]})
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    for terminal in (True, False):
        monkeypatch.setattr(sys, "stderr", SimpleNamespace(isatty=lambda terminal=terminal: terminal, write=len))
        read_documents("hf:name", column="text", cache=cache, progress=True)
        assert datasets.are_progress_bars_disabled() is not terminal


@pytest.mark.parametrize(("n", "fraction"), [(3, 0.3), (57, 0.01), (57, 0.2), (57, 0.45), (57, 0.7)])
def test_a_split_for_tuning_leaves_that_of_validation_alone(n: int, fraction: float) -> None:
    texts = {f"file {i}": f"text of {i}" for i in range(n)}
    train, val = split_documents(texts, fraction)
    fewer, tuning = split_documents(texts, fraction, "tuning")
    assert fewer
    assert tuning
    if fraction < 0.5:
        assert [*tuning, *fewer] == train
    assert not set(val) & {*fewer} or fraction > 0.5
    assert not set(val) & set(tuning) or fraction > 0.5
    # a document added moves none of the others into another split
    _, more = split_documents(texts | {"another": "text of another"}, fraction, "tuning")
    if n > 3 and fraction in (0.2, 0.45):
        assert set(more) - {"text of another"} == set(tuning)


def test_two_documents_are_too_few_for_three_splits() -> None:
    with pytest.raises(DataError, match="only two documents"):
        split_documents({"a": "one", "b": "two"}, 0.3, "tuning")
