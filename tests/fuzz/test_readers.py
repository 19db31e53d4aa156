"""Every reader is fed files that were changed at random: it gives the right value, or one line that says what is wrong.

`make fuzz` draws about 10,000 of them. A file is changed in its bytes (flipped, cut, repeated, filled with what is odd)
or, where it is JSON or TOML, in its values. Whatever a file holds, a reader ends within SECONDS and MEMORY; of files
with digests it never gives another value.
"""

import contextlib
import copy
import gzip
import json
import os
import resource
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from crossover.archs import build, configure, open_pretrained
from crossover.archs.hf import from_hf, to_hf
from crossover.benchmarks.report.results import budget_checks, crossovers_of, load_comparison, quality
from crossover.benchmarks.report.write import write_report
from crossover.files import read_json, read_json_lines
from crossover.train.checkpoint import newest, read_state
from crossover.train.command_line import read_run_file
from crossover.train.config import DataConfig, ModelSpec
from crossover.train.data import load_corpus
from crossover.train.data.documents import read_documents
from crossover.train.data.tokenizer import load_tokenizer, open_tokenizer
from crossover.train.objectives.pairs import load_pairs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ..benchmarks.fake_runs import write_comparison

pytestmark = [pytest.mark.fuzz, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

ROOT = Path(__file__).parents[2]
MORE = int(os.environ.get("FUZZ", "1"))
SECONDS = 60
MEMORY = 2 * 2**30

ODD_BYTES = [
    b"", b"\0", b"\0" * 64, b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", "\u2028".encode(), "\x85".encode(), b"\xed\xa0\xbd",
    b"[" * 20_000, b'{"a":' * 20_000, b"9" * 5000, b"1e400", b"-1", b"NaN", b"Infinity", b"null", b"true", b'"\\ud83d"',
    b"{}", b"[]", b'"', b",", b"=", b"\\", b"<script>", b"](javascript:", b"\x1b[31m", b"\xc3\x28",
]  # fmt: skip
ODD_VALUES: list[Any] = [
    None, True, False, 0, -1, 1, 8.5, -0.0, 1e-300, 1e300, 2**31, 2**63, 10**30, "", "x", "0", "1M",
    "\u2028\x00", "\ud83d", "a" * 3000, [], [None], [[]], {}, {"a": 1}, [1, 2, 3], ["x"], "../../x", "mamba", "text",
]  # fmt: skip


def fuzzed(examples: int) -> Callable[[Callable[..., None]], Callable[..., None]]:
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    return settings(max_examples=examples * MORE, suppress_health_check=checks)


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Ends what takes too long or too much memory with an error that no reader raises."""

    def late(*_: object) -> None:
        raise AssertionError(f"took more than {SECONDS} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    with open("/proc/self/status") as status:
        held = next(1024 * int(line.split()[1]) for line in status if line.startswith("VmData"))
    before = signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_DATA, (held + MEMORY, hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
        signal.signal(signal.SIGALRM, before)


NOTHING = object()
shares = st.floats(0, 1)


def judged(read: Callable[[], Any]) -> Any:
    """What a reader gives; NOTHING if it refuses in one line."""
    try:
        with bounded():
            return read()
    except (ValueError, OSError) as error:
        refusal = error
    assert not isinstance(refusal, UnicodeError | json.JSONDecodeError | pa.ArrowException), repr(refusal)
    assert 0 < len(str(refusal)) < 2000, repr(refusal)
    assert "\n" not in str(refusal), repr(refusal)
    return NOTHING


@st.composite
def changes(draw: st.DrawFn) -> Callable[[bytes], bytes]:
    """A function that changes some bytes."""
    kinds = st.sampled_from(["flip", "flip", "cut", "insert", "insert", "repeat", "remove", "replace"])
    steps = [
        (
            draw(kinds),
            draw(st.floats(0, 1)),
            draw(st.floats(0, 1)),
            draw(st.integers(0, 7)),
            draw(st.sampled_from(ODD_BYTES)),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]

    def change(raw: bytes) -> bytes:
        for kind, at, to, bit, odd in steps:
            i, j = sorted((int(at * len(raw)), int(to * len(raw))))
            j = min(j, i + 200)
            match kind:
                case "flip" if i < len(raw):
                    raw = raw[:i] + bytes([raw[i] ^ (1 << bit)]) + raw[i + 1 :]
                case "cut":
                    raw = raw[:i]
                case "insert":
                    raw = raw[:i] + odd + raw[i:]
                case "repeat":
                    raw = raw[:j] + raw[i:j] + raw[j:]
                case "remove":
                    raw = raw[:i] + raw[j:]
                case "replace":
                    raw = raw[:i] + odd + raw[j:]
        return raw

    return change


@st.composite
def swaps(draw: st.DrawFn) -> Callable[[Any], Any]:
    """A function that changes values of nested tables and lists: others in their place, more, or fewer."""
    kinds = st.sampled_from(["swap", "swap", "drop", "add", "bury"])
    step = st.tuples(st.lists(shares, min_size=1, max_size=6), kinds, st.sampled_from(ODD_VALUES))
    steps = draw(st.lists(step, min_size=1, max_size=2))

    def change(value: Any) -> Any:
        for path, kind, drawn in steps:
            odd = copy.deepcopy(drawn)
            inner = value
            for i, place in enumerate(path):
                keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
                if not keys:
                    break
                key = keys[min(int(place * len(keys)), len(keys) - 1)]
                if i + 1 == len(path) or not isinstance(inner[key], dict | list) or not inner[key]:
                    if kind == "drop":
                        del inner[key]
                    elif kind == "add" and isinstance(inner, dict):
                        inner[f"{key}x"] = odd
                    else:
                        for _ in range(900 if kind == "bury" else 0):
                            odd = [odd]
                        inner[key] = odd
                    break
                inner = inner[key]
        return value

    return change


def changed(path: Path, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool) -> None:
    """Changes a file in its bytes or, where it is JSON, in its values."""
    raw = path.read_bytes()
    if by_value and path.suffix in (".json", ".jsonl"):
        lines = (
            [json.loads(line) for line in raw.split(b"\n") if line] if path.suffix == ".jsonl" else [json.loads(raw)]
        )
        whole = swap(lines)
        path.write_text("\n".join(json.dumps(line) for line in whole) + "\n")
    else:
        path.write_bytes(change(raw))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


@contextlib.contextmanager
def copy_of(folder: Path, place: Path) -> Iterator[Path]:
    """A copy of a folder, or a file, to be damaged."""
    copy = place / f"copy-{folder.name}"
    shutil.copytree(folder, copy) if folder.is_dir() else shutil.copy(folder, copy)
    try:
        yield copy
    finally:
        shutil.rmtree(copy) if copy.is_dir() else copy.unlink()


by_value = st.booleans()


def one_of(paths: list[Path], share: float) -> Path:
    return sorted(paths)[min(int(share * len(paths)), len(paths) - 1)]


# run files


@fuzzed(12)
@given(changes(), shares)
def test_run_files(place: Path, change: Callable[[bytes], bytes], share: float) -> None:
    source = one_of(list((ROOT / "configs").glob("*.toml")), share)
    path = place / source.name
    path.write_bytes(change(source.read_bytes()))
    run = judged(lambda: read_run_file(path))
    if run is not NOTHING:
        judged(lambda: run.model.configure(256))


@fuzzed(8)
@given(st.sampled_from(["mamba", "jamba", "transformer", "s4", "gated_deltanet", "encdec"]), st.data())
def test_options_of_models(preset: str, data: st.DataObject) -> None:
    config = configure(preset).to_dict()
    options = json.loads(json.dumps({key: config[key] for key in config if key != "vocab_size"}))
    change = data.draw(swaps())
    values = change([options])
    spec = judged(lambda: ModelSpec(preset="custom", options=values[0] if values else {}))
    if spec is NOTHING:
        return
    made = judged(lambda: spec.configure(256))
    if made is not NOTHING:
        judged(lambda: build(made, device="meta"))


# data

ROWS = [
    {"text": f"Text {i} of the café, {i * i} words.\n", "n": i, "source": f"s{i}", "target": f"t{i}"} for i in range(30)
]


def rows_file(place: Path, kind: str) -> Path:
    path = place / f"rows{kind}"
    if kind == ".parquet":
        pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path)
    elif kind in (".csv", ".tsv"):
        mark = "," if kind == ".csv" else "\t"
        lines = [mark.join(ROWS[0]), *(mark.join(f'"{value}"' for value in row.values()) for row in ROWS)]
        path.write_text("\n".join(lines))
    elif kind == ".json":
        path.write_text(json.dumps(ROWS))
    elif kind == ".jsonl.gz":
        path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS).encode()))
    elif kind == ".txt":
        path.write_text("".join(row["text"] + "\n" for row in ROWS) * 3)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


@fuzzed(14)
@given(
    st.sampled_from([".jsonl", ".json", ".csv", ".tsv", ".txt", ".parquet", ".jsonl.gz"]), changes(), swaps(), by_value
)
def test_data_files(
    place: Path, kind: str, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool
) -> None:
    path = rows_file(place, kind)
    changed(path, change, swap, by_value)
    documents = judged(lambda: read_documents(str(path), column="text", cache=place))
    assert documents is NOTHING or all(isinstance(text, str) and text.encode() for text in documents.texts.values())
    if kind != ".txt":
        judged(lambda: load_pairs(DataConfig(source=str(path), cache=place / "cache")))


@fuzzed(8)
@given(shares, changes(), swaps(), by_value)
def test_prepared_corpora(
    place: Path, share: float, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool
) -> None:
    source = rows_file(place, ".jsonl")
    config = DataConfig(source=str(source), cache=place / "corpora", val_fraction=0.3)
    first = load_corpus(config)
    train, summary = np.array(first.train), first.summary()
    path = one_of(list((place / "corpora").glob("corpora/*/*")), share)  # what damage is left adds up
    changed(path, change, swap, by_value)
    again = load_corpus(config)
    np.testing.assert_array_equal(again.train, train)
    assert again.summary() == summary


@pytest.fixture(scope="module")
def tokenizer(place: Path) -> Path:
    texts = [row["text"] for row in ROWS]
    open_tokenizer("bpe:280", texts, cache=place).save(place / "tokenizer.json")
    return place / "tokenizer.json"


@fuzzed(12)
@given(changes(), swaps(), by_value)
def test_tokenizers(
    place: Path, tokenizer: Path, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool
) -> None:
    with copy_of(tokenizer, place) as path:
        changed(path, change, swap, by_value)
        found = judged(lambda: load_tokenizer(path))
        if found is not NOTHING:
            judged(lambda: found.decode(found.encode("naïve café\n" * 3)))


# what runs leave


@fuzzed(10)
@given(changes(), swaps(), by_value)
def test_metrics(place: Path, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool) -> None:
    with copy_of(ROOT / "results/cpu-zlib/metrics.jsonl", place) as path:
        whole = set(map(json.dumps, read_json_lines(path)))
        changed(path, change, swap, by_value)
        found = judged(lambda: read_json_lines(path))
        assert found is NOTHING or len(found) > 0 or path.stat().st_size < 4000
        if not by_value and found is not NOTHING:  # a change of three places costs few lines, unless it cuts
            assert len(whole - set(map(json.dumps, found))) <= 5 or path.stat().st_size < 0.9 * 95_000


@fuzzed(12)
@given(shares, changes(), swaps(), by_value)
def test_checkpoints(
    place: Path, share: float, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool
) -> None:
    with copy_of(ROOT / "tests/fixtures/format-1/interrupted/checkpoints", place) as folder:
        (step,) = folder.iterdir()
        files = {path.name: path.read_bytes() for path in step.iterdir()}
        path = one_of(list(step.iterdir()), share)
        changed(path, change, swap, by_value)
        with warnings.catch_warnings():
            found = judged(lambda: newest(folder))
        if found is not NOTHING:
            assert found == step
            assert {p.name: p.read_bytes() for p in step.iterdir() if p.name != "manifest.json"} == {
                name: raw for name, raw in files.items() if name != "manifest.json"
            }
            assert read_state(step)["step"] == 5


@pytest.fixture(scope="module")
def saved(place: Path) -> Path:
    build("jamba", d_model=8, n_layers=8, vocab_size=11).save_pretrained(place / "saved")
    return place / "saved"


@fuzzed(12)
@given(shares, changes(), swaps(), by_value)
def test_saved_models(
    place: Path, saved: Path, share: float, change: Callable[[bytes], bytes], swap: Callable[[Any], Any], by_value: bool
) -> None:
    with copy_of(saved, place) as folder:
        changed(one_of(list(folder.iterdir()), share), change, swap, by_value)
        lm = judged(lambda: open_pretrained(folder))
        assert lm is NOTHING or all(p.is_floating_point() for p in lm.parameters())


@pytest.fixture(scope="module")
def theirs(place: Path) -> Path:
    for preset in ("gpt2", "mamba", "transformer"):
        to_hf(build(preset, d_model=16, n_layers=2, vocab_size=11), place / "theirs" / preset)
    return place / "theirs"


@fuzzed(12)
@given(st.sampled_from(["gpt2", "mamba", "transformer"]), shares, changes(), swaps(), by_value)
def test_folders_of_hugging_face(
    place: Path,
    theirs: Path,
    preset: str,
    share: float,
    change: Callable[[bytes], bytes],
    swap: Callable[[Any], Any],
    by_value: bool,
) -> None:
    with copy_of(theirs / preset, place) as folder:
        changed(one_of(list(folder.iterdir()), share), change, swap, by_value)
        lm = judged(lambda: from_hf(folder))
        assert lm is NOTHING or judged(lambda: lm(torch.zeros(1, 3, dtype=torch.int64))) is not None


@pytest.fixture(scope="module")
def comparison(place: Path) -> Path:
    return write_comparison(place / "comparison", archs=["transformer", "mamba"], seeds=1, context=(128, 512))


def numbers_of(folder: Path) -> Any:
    found = load_comparison(folder)
    return quality(found), crossovers_of(found), budget_checks(found)


@fuzzed(12)
@given(shares, changes(), swaps(), by_value, st.integers(0, 99))
def test_comparisons(
    place: Path,
    comparison: Path,
    share: float,
    change: Callable[[bytes], bytes],
    swap: Callable[[Any], Any],
    by_value: bool,
    lot: int,
) -> None:
    with copy_of(comparison, place) as folder:
        changed(one_of([p for p in folder.rglob("*.json*") if p.is_file()], share), change, swap, by_value)
        judged(lambda: numbers_of(folder) if lot else write_report(folder))
        if (folder / "summary.json").exists():
            read_json(folder / "summary.json")
