import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crossover.train.data.cache import DataError
from crossover.train.data.tokenizer import BpeTokenizer, BytesTokenizer, load_tokenizer, open_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

pytestmark = pytest.mark.quick

TEXTS = [f"def name_{i}(value):\n    return value + {i}  # naïve café 漢字\n" for i in range(60)]
texts = st.text(st.characters(codec="utf-8"))


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> BpeTokenizer:
    tokenizer = open_tokenizer("bpe:300", TEXTS, cache=tmp_path_factory.mktemp("cache"))
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


def byte_level(separator: str | None = "<|endoftext|>") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=[separator] if separator else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@given(texts)
def test_bytes_are_utf8_and_come_back(text: str) -> None:
    tokenizer = BytesTokenizer()
    ids = tokenizer.encode(text)
    assert bytes(ids.tolist()) == text.encode() == tokenizer.to_bytes(ids)
    assert tokenizer.decode(ids) == text
    assert tokenizer.n_bytes(ids) == len(text.encode())


@given(texts)
def test_bpe_counts_exactly_the_utf8_bytes_of_any_text_and_gives_it_back(bpe: BpeTokenizer, text: str) -> None:
    ids = bpe.encode(text)
    assert bpe.n_bytes(ids) == len(text.encode())
    assert bpe.to_bytes(ids) == text.encode()
    assert bpe.decode(ids) == text
    assert bpe.separator not in ids


@given(st.lists(texts, max_size=5))
def test_encoding_several_texts_equals_encoding_each(bpe: BpeTokenizer, several: list[str]) -> None:
    together = list(bpe.encode_each(several))
    assert len(together) == len(several)
    for ids, text in zip(together, several, strict=True):
        np.testing.assert_array_equal(ids, bpe.encode(text))


def test_bytes_per_token_sum_to_n_bytes_and_a_separator_counts_one(bpe: BpeTokenizer) -> None:
    ids = np.append(bpe.encode(TEXTS[0]), bpe.separator)
    assert bpe.bytes_per_token.shape == (bpe.vocab_size,)
    assert bpe.bytes_per_token[ids].sum() == bpe.n_bytes(ids) == len(TEXTS[0].encode()) + 1
    assert bpe.n_bytes(ids.reshape(1, -1)) == bpe.n_bytes(ids)
    assert BytesTokenizer().n_bytes([0]) == bpe.n_bytes([bpe.separator]) == 1
    assert bpe.decode([bpe.separator]) == BytesTokenizer().decode([0]) == "\0"


def test_bytes_that_are_no_utf8_decode_to_replacement_characters() -> None:
    assert BytesTokenizer().decode([0x63, 0xC3, 0x28]) == "c\ufffd("


def test_special_tokens_quoted_in_a_text_are_ordinary_text(bpe: BpeTokenizer) -> None:
    text = "the token <|endoftext|> ends a text"
    assert bpe.separator not in bpe.encode(text)
    assert bpe.separator not in next(iter(bpe.encode_each([text])))
    assert bpe.decode(bpe.encode(text)) == text


def test_training_learns_merges_and_stays_within_the_size(bpe: BpeTokenizer) -> None:
    assert bpe.name == "bpe:300"
    assert 257 < bpe.vocab_size <= 300
    assert len(bpe.encode(TEXTS[0])) < 0.7 * len(TEXTS[0].encode())


def test_training_is_repeatable_and_cached_by_text_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_tokenizer("bpe:280", TEXTS, cache=tmp_path / "a")
    assert open_tokenizer("bpe:280", TEXTS, cache=tmp_path / "b").digest == first.digest
    assert open_tokenizer("bpe:290", TEXTS, cache=tmp_path / "a").digest != first.digest
    assert open_tokenizer("bpe:280", [t.upper() for t in TEXTS], cache=tmp_path / "a").digest != first.digest
    monkeypatch.setattr("crossover.train.data.tokenizer._train_bpe", lambda *_: pytest.fail("trained again"))
    assert open_tokenizer("bpe:280", TEXTS, cache=tmp_path / "a").digest == first.digest


@pytest.mark.parametrize("spec", ["bytes", "bpe:280"])
def test_a_saved_tokenizer_is_the_same_tokenizer(spec: str, tmp_path: Path) -> None:
    tokenizer = open_tokenizer(spec, TEXTS, cache=tmp_path / "cache")
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path / "tokenizer.json", tmp_path):
        loaded = load_tokenizer(path)
        assert (loaded.digest, loaded.vocab_size, loaded.separator) == (
            tokenizer.digest,
            tokenizer.vocab_size,
            tokenizer.separator,
        )
        np.testing.assert_array_equal(loaded.encode(TEXTS[5]), tokenizer.encode(TEXTS[5]))


@pytest.mark.parametrize("separator", ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>"])
def test_a_file_brings_its_own_separator(separator: str, tmp_path: Path) -> None:
    byte_level(separator).save(str(tmp_path / "mine.json"))
    tokenizer = open_tokenizer(str(tmp_path / "mine.json"), TEXTS, cache=tmp_path)
    assert tokenizer.separator == byte_level(separator).token_to_id(separator)
    assert tokenizer.name == "mine.json"


def test_padding_truncation_and_added_special_tokens_of_a_file_are_not_applied(tmp_path: Path) -> None:
    hf = byte_level()
    hf.enable_truncation(4)
    hf.enable_padding(length=64)
    hf.add_tokens([AddedToken("café", normalized=False)])
    hf.save(str(tmp_path / "mine.json"))
    tokenizer = load_tokenizer(tmp_path / "mine.json")
    ids = tokenizer.encode("a café and more")
    assert tokenizer.to_bytes(ids) == "a café and more".encode()
    assert tokenizer.vocab_size == 281
    assert tokenizer.bytes_per_token[280] == len("café".encode())


@pytest.mark.parametrize("spec", ["bpe:", "bpe:big", "bpe:256", "bpe:-5", "bpe:1e9", "bpe:2000000"])
def test_a_vocabulary_size_out_of_range_is_refused(spec: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"from 257 to 1000000, for example bpe:4096"):
        open_tokenizer(spec, TEXTS, cache=tmp_path)


def refused(path: Path, message: str) -> None:
    with pytest.raises(DataError, match=message) as error:
        load_tokenizer(path)
    assert "--tokenizer bytes" in str(error.value)
    assert "\n" not in str(error.value)


def test_files_that_are_no_tokenizer_are_refused(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere.json", r"cannot read the tokenizer .*nowhere\.json \(No such file")
    path = tmp_path / "t.json"
    for content in (b"not json", b"\xff\xfe", b"[1]", b"{}", b'{"model": {"type": "BPE"}}', b'{"format": 2}'):
        path.write_bytes(content)
        refused(path, r"t\.json (is not a tokenizer\.json|is not JSON|is not UTF-8|holds a list|has format 2)")


def _with(change: Callable[[dict[str, Any]], object]) -> str:
    values = json.loads(byte_level().to_str())
    change(values)
    return json.dumps(values)


@pytest.mark.parametrize(
    "content",
    [
        _with(lambda values: values["model"]["merges"].append(["nothing", "known"])),
        _with(lambda values: values["model"].update(vocab={"a": -1})),
        _with(lambda values: values["model"].update(type="Unknown")),
        _with(lambda values: values["model"]["vocab"].update(far=2**31)),
        _with(lambda values: values.update(decoder={"type": "Sequence", "decoders": 3})),
        _with(lambda values: values.update(added_tokens=[{"id": 1}])),
    ],
)
def test_a_tokenizer_that_the_library_cannot_use_is_refused_like_any_other(content: str, tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(content)
    refused(tmp_path / "t.json", r"t\.json ")


@pytest.mark.parametrize("damage", [b"", b"{}", b"half"])
def test_a_damaged_tokenizer_in_the_cache_is_made_again(damage: bytes, tmp_path: Path) -> None:
    digest = open_tokenizer("bpe:280", TEXTS, cache=tmp_path).digest
    (path,) = tmp_path.glob("tokenizers/*/tokenizer.json")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] if damage == b"half" else damage)
    assert open_tokenizer("bpe:280", TEXTS, cache=tmp_path).digest == digest
    assert path.read_bytes() == whole


def test_a_file_without_a_separator_is_refused(tmp_path: Path) -> None:
    byte_level(None).save(str(tmp_path / "t.json"))
    refused(tmp_path / "t.json", r"t\.json has no token to separate documents \(one of <\|endoftext\|>")


def test_a_file_that_is_not_byte_level_is_refused(tmp_path: Path) -> None:
    words = Tokenizer(models.WordPiece({"[UNK]": 0, "def": 1, "##s": 2, "</s>": 3}, unk_token="[UNK]"))
    words.decoder = decoders.WordPiece()
    words.save(str(tmp_path / "words.json"))
    refused(tmp_path / "words.json", r"words\.json is not byte-level")
    sentence = Tokenizer(models.BPE({"\u2581a": 0, "</s>": 1}, []))
    sentence.save(str(tmp_path / "sentence.json"))
    refused(tmp_path / "sentence.json", r"sentence\.json is not byte-level")
    sentence.decoder = decoders.ByteLevel()
    sentence.save(str(tmp_path / "sentence.json"))
    refused(tmp_path / "sentence.json", r"sentence\.json is not byte-level \(token '\u2581a'\)")


def test_a_normalizer_that_changes_text_shows_in_the_bytes(tmp_path: Path) -> None:
    hf = byte_level()
    hf.normalizer = normalizers.Lowercase()
    hf.save(str(tmp_path / "t.json"))
    tokenizer = load_tokenizer(tmp_path / "t.json")
    assert tokenizer.n_bytes(tokenizer.encode("Word")) == 4
    assert tokenizer.to_bytes(tokenizer.encode("Word")) == b"word"


def test_the_saved_bpe_file_is_an_ordinary_tokenizer_json(bpe: BpeTokenizer, tmp_path: Path) -> None:
    bpe.save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["type"] == "BPE"
    assert Tokenizer.from_file(str(tmp_path / "tokenizer.json")).decode(bpe.encode(TEXTS[0]).tolist()) == TEXTS[0]
