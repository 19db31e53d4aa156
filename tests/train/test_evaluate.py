import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from crossover.archs import LanguageModel, build
from crossover.train.config import DataConfig, TrainConfig
from crossover.train.data import Corpus, document_windows, load_corpus, val_windows
from crossover.train.evaluate import evaluate, evaluating
from crossover.train.learner import Learner
from crossover.train.objectives import next_token
from crossover.train.objectives.next_token import NextToken, buckets
from crossover.train.runtime import Interrupted, Precision
from crossover.train.score import bits_per_byte

pytestmark = pytest.mark.quick


class Judge:
    """An untrained model with an objective that only judges it."""

    def __init__(self, corpus: Corpus, arch: str = "lstm", *, precision: str = "fp32", rows_at_once: int = 8) -> None:
        self.model = build(arch, d_model=16, n_layers=1, vocab_size=corpus.tokenizer.vocab_size)
        torch.nn.init.normal_(self.model.embedding.weight)  # an untrained model predicts everything alike
        self.objective, self.rows_at_once = NextToken(corpus, seed=0, train=TrainConfig(sample_tokens=40)), rows_at_once
        self.precision = Precision(precision, "for the test")

    def validate(self, windows: np.ndarray, **options: Any) -> dict[str, float]:
        options = {"precision": self.precision, "rows_at_once": self.rows_at_once} | options
        return evaluate(Learner(self.model, self.objective), self.objective, list(windows), **options)

    def by_position(self, windows: np.ndarray) -> list[dict[str, Any]]:
        with evaluating(self.model, self.precision):
            return self.objective.by_position(self.model, windows)

    def examine(self) -> dict[str, Any]:
        def judge(rows: Sequence[Any], *, rows_at_once: int, what: str) -> dict[str, float]:
            self.read.append((len(rows), len(rows[0]) - 1))
            learner = Learner(self.model, self.objective)
            return evaluate(learner, self.objective, rows, precision=self.precision, rows_at_once=rows_at_once)

        self.read: list[tuple[int, int]] = []
        with evaluating(self.model, self.precision):
            return self.objective.examine(self.model, judge=judge, poll=lambda: None)

    def sample(self) -> str:
        with evaluating(self.model, self.precision):
            return self.objective.sample(self.model)


def token_nats(model: LanguageModel, windows: np.ndarray) -> torch.Tensor:
    """Nats of every predicted token, one window at a time."""
    rows = []
    with torch.no_grad():
        for row in torch.from_numpy(windows):
            logits = model(row[None, :-1]).logits[0]
            rows.append(F.cross_entropy(logits, row[1:], reduction="none"))
    return torch.stack(rows)


def test_bits_per_byte_of_a_uniform_guess_over_bytes_is_eight() -> None:
    assert bits_per_byte(100 * math.log(256), 100) == pytest.approx(8.0)


def test_validation_is_the_mean_over_all_tokens_also_with_a_smaller_last_batch(corpus: Corpus) -> None:
    windows = val_windows(corpus, 24, 24 * 7)
    judge = Judge(corpus, rows_at_once=3)  # batches of 3, 3 and 1
    nats = token_nats(judge.model, windows)
    found = judge.validate(windows)
    assert found["loss"] == pytest.approx(nats.mean().item(), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)  # a token is a byte
    assert found["bytes"] == 24 * 7


def test_bits_per_byte_divide_by_the_bytes_of_the_tokens(text_folder: Path, tmp_path: Path) -> None:
    config = DataConfig(source=str(text_folder), val_fraction=0.25, tokenizer="bpe:300", cache=tmp_path)
    corpus = load_corpus(config)
    windows = val_windows(corpus, 16, 160)
    judge = Judge(corpus)
    n_bytes = sum(len(corpus.tokenizer.to_bytes(row[1:])) for row in windows)
    assert n_bytes > 1.2 * windows[:, 1:].size
    expected = token_nats(judge.model, windows).sum().item() / math.log(2) / n_bytes
    assert judge.validate(windows)["bits_per_byte"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("length", "expected"),
    [
        (1, [(0, 1)]),
        (2, [(0, 1), (1, 2)]),
        (8, [(0, 1), (1, 2), (2, 4), (4, 8)]),
        (9, [(0, 1), (1, 2), (2, 4), (4, 8), (8, 9)]),
    ],
)
def test_buckets_double_and_cover_every_position_once(length: int, expected: list[tuple[int, int]]) -> None:
    assert buckets(length) == expected


@pytest.mark.parametrize("rows", [1, 3])
def test_loss_by_position_is_that_of_the_tokens_in_each_bucket(corpus: Corpus, rows: int) -> None:
    windows = val_windows(corpus, 40, 40 * 4)
    judge = Judge(corpus)
    judge.objective.train = TrainConfig(batch_size=rows, seq_len=40)
    nats = token_nats(judge.model, windows)
    table = judge.by_position(windows)
    assert [(entry["start"], entry["stop"]) for entry in table] == buckets(40)
    for entry in table:
        part = nats[:, entry["start"] : entry["stop"]]
        assert entry["n_tokens"] == part.numel()
        assert entry["bits_per_byte"] == pytest.approx(part.mean().item() / math.log(2), rel=1e-5)


def test_positions_add_up_to_the_validation(corpus: Corpus) -> None:
    windows = val_windows(corpus, 40, 40 * 4)
    judge = Judge(corpus)
    table = judge.by_position(windows)
    mean = sum(entry["bits_per_byte"] * entry["n_tokens"] for entry in table) / windows[:, 1:].size
    assert mean == pytest.approx(judge.validate(windows)["bits_per_byte"], rel=1e-5)


@pytest.mark.parametrize("reset", [True, False])
def test_a_reset_model_does_not_see_the_document_before(corpus: Corpus, reset: bool) -> None:
    windows = val_windows(corpus, 32, 32)
    windows[0, 8] = corpus.separator
    changed = windows.copy()
    changed[0, 2] += 1
    judge = Judge(corpus)
    judge.objective.packing = "reset" if reset else "concat"
    later = [judge.by_position(each)[-1] for each in (windows, changed)]  # positions 16 to 32
    assert (later[0] == later[1]) is reset


def test_inputs_targets_and_starts_are_aligned(corpus: Corpus) -> None:
    windows = np.array([[5, 0, 7, 8, 0]])
    batch = NextToken(corpus, seed=0, train=TrainConfig(), packing="reset").collate(list(windows))
    assert batch.tokens.tolist() == [[5, 0, 7, 8]]
    assert batch.targets.tolist() == [[0, 7, 8, 0]]
    assert batch.starts is not None
    assert batch.starts.tolist() == [[False, False, True, False]]
    assert NextToken(corpus, seed=0, train=TrainConfig()).collate(list(windows)).starts is None


def test_evaluating_leaves_mode_gradients_and_generators_alone(corpus: Corpus) -> None:
    judge = Judge(corpus)
    judge.model.train()
    before = torch.get_rng_state()
    judge.validate(val_windows(corpus, 16, 64))
    judge.by_position(val_windows(corpus, 16, 64))
    judge.sample()
    assert judge.model.training
    assert all(parameter.grad is None for parameter in judge.model.parameters())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_sample_depends_on_the_weights_only(corpus: Corpus) -> None:
    judge = Judge(corpus)
    first = judge.sample()
    torch.rand(3)
    assert judge.sample() == first
    torch.nn.init.normal_(judge.model.embedding.weight)
    assert judge.sample() != first


def test_evaluation_stops_between_batches_when_asked_to(corpus: Corpus) -> None:
    calls = []

    def poll() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted(2)

    judge = Judge(corpus, rows_at_once=1)
    with pytest.raises(Interrupted):
        judge.validate(val_windows(corpus, 16, 160), poll=poll)
    assert len(calls) == 3
    assert judge.model.training


def test_evaluation_runs_in_the_arithmetic_of_training(corpus: Corpus) -> None:
    windows = val_windows(corpus, 16, 64)
    judge = Judge(corpus, arch="transformer")
    exact, rounded = (judge.validate(windows, precision=Precision(name, ""))["loss"] for name in ("fp32", "bf16"))
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.02)  # 8 bits


@pytest.fixture(scope="module")
def books(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Ten held-out documents of 9,000 bytes and two of 40,000."""
    folder = tmp_path_factory.mktemp("books")
    rng = np.random.default_rng(0)
    for i in range(24):
        n_words = 40_000 // 5 if i in (3, 17) else 1_800
        text = " ".join(f"{word:04d}" for word in rng.integers(0, 10_000, n_words))
        (folder / f"{i}.txt").write_text(text)
    return load_corpus(DataConfig(source=str(folder), val_fraction=0.5, cache=tmp_path_factory.mktemp("cache")))


def test_held_out_documents_are_read_at_every_length(books: Corpus) -> None:
    judge = Judge(books, "gpt2")
    judge.model = build("gpt2", d_model=16, n_layers=1, vocab_size=256, max_positions=3000)
    judge.objective.train = TrainConfig(seq_len=96, position_len=0, lengths=(30, 96, 1000, 5000, 20_000))
    found = judge.examine()
    status = {entry["context_len"]: entry["status"] for entry in found["by_length"]}
    assert status == {
        30: "done", 96: "done", 1000: "done", 5000: "beyond_positions", 20_000: "beyond_positions"
    }  # fmt: skip
    for entry in found["by_length"]:
        assert (entry["bits_per_byte"] is None) == (entry["status"] != "done")
    windows, n_documents = document_windows(books, 1000, max_tokens=2**16, min_documents=8)
    nats = token_nats(judge.model, windows)
    entry = found["by_length"][2]
    assert entry["bits_per_byte"] == pytest.approx(nats.mean().item() / math.log(2), rel=1e-5)
    assert (entry["n_documents"], entry["n_bytes"]) == (n_documents, nats.numel())
    assert [entry["context_len"] for entry in found["context_cut"]] == [96]  # 48 tokens are too few


def test_a_length_of_too_few_documents_or_bytes_is_refused_with_what_is_there(books: Corpus) -> None:
    judge = Judge(books)
    judge.objective.train = TrainConfig(seq_len=30_000, position_len=0, lengths=(30_000,))
    found = judge.examine()
    n_long = sum(len(text) >= 30_000 for text in bytes(books.val).split(b"\0"))
    assert 0 < n_long < 8
    assert found["by_length"] == [
        {
            "context_len": 30_000, "bits_per_byte": None, "n_documents": n_long, "n_bytes": 30_000 * n_long,
            "status": "too_little_text",
        }
    ]  # fmt: skip
    assert found["context_cut"] == []
    assert judge.read == []


def test_cutting_the_context_scores_the_same_bytes(books: Corpus) -> None:
    judge = Judge(books)
    judge.objective.train = TrainConfig(seq_len=260, position_len=0, lengths=(260,))
    cuts = judge.examine()["context_cut"]
    assert [entry["context_len"] for entry in cuts] == [260, 130, 65]
    windows, _ = document_windows(books, 260, max_tokens=2**16, min_documents=8)
    assert {entry["n_bytes"] for entry in cuts} == {windows[:, 1:].size}
    assert judge.read == [(len(windows) * parts, 260 // parts) for parts in (1, 2, 4)]
    halves = np.concatenate([windows[:, :131], windows[:, 130:]])
    expected = token_nats(judge.model, halves).mean().item() / math.log(2)
    assert cuts[1]["bits_per_byte"] == pytest.approx(expected, rel=1e-5)
    assert cuts[1]["bits_per_byte"] != pytest.approx(cuts[0]["bits_per_byte"], rel=1e-6)


@pytest.mark.parametrize("arch", ["transformer", "mamba", "s4"])
@pytest.mark.parametrize("packing", ["concat", "reset"])
def test_a_long_text_read_in_parts_has_the_loss_of_the_whole(
    corpus: Corpus, arch: str, packing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge = Judge(corpus, arch)
    judge.objective.packing = packing
    judge.objective.train = TrainConfig(batch_size=1, seq_len=16)
    windows = val_windows(corpus, 150, 300)
    whole = judge.validate(windows)["loss"], judge.by_position(windows)
    monkeypatch.setattr(next_token, "_AT_ONCE", 37)
    calls = []
    judge.model.backbone.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[1]))
    parts = judge.validate(windows)["loss"], judge.by_position(windows)
    assert max(calls) == 37
    assert parts[0] == pytest.approx(whole[0], rel=1e-5)
    for entry, expected in zip(parts[1], whole[1], strict=True):
        assert entry == pytest.approx(expected, rel=1e-4)
