"""Pairs of a source and a target, from the file to the result of a run."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from crossover.archs import ModelConfig, build
from crossover.archs.seq2seq import Seq2SeqConfig
from crossover.files import read_json, read_json_lines
from crossover.train.checkpoint import newest
from crossover.train.config import DataConfig, ModelSpec, ObjectiveSpec, OptimConfig, RunConfig, TrainConfig
from crossover.train.data import DataError
from crossover.train.evaluate import evaluate
from crossover.train.learner import Learner, accumulate_gradients
from crossover.train.objectives.next_token import Tokens
from crossover.train.objectives.pairs import PairData, Pairs, PairTokens, load_pairs
from crossover.train.runtime import choose_precision
from crossover.train.trainer import Trainer
from safetensors.torch import load_file

CPU = torch.device("cpu")


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
    return path


def load(path: Path, **options: Any) -> PairData:
    return load_pairs(DataConfig(source=str(path), **{"val_fraction": 0.25, **options}))


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two hundred words with letters that also take two bytes, and their reversals."""
    draw = np.random.Generator(np.random.Philox(0))
    words = ["".join(draw.choice(list("abcé"), size=draw.integers(1, 6))) for _ in range(200)]
    rows = [{"source": word, "target": word[::-1]} for word in words]
    return write(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", *rows)


@pytest.fixture
def corpus(file: Path) -> PairData:
    return load(file)


def config(tmp_path: Path, arch: str = "seq2seq", **train: Any) -> RunConfig:
    settings: dict[str, Any] = {
        **{"steps": 6, "batch_size": 4, "seq_len": 16, "precision": "fp32", "log_every": 1, "checkpoint_every": 3},
        **{"eval_every": 0, "eval_tokens": 64, "final_eval_tokens": 64, "sample_tokens": 4},
    }
    return RunConfig(
        name="run",
        out=tmp_path,
        model=ModelSpec(preset=arch, d_model=32, n_layers=2),
        objective=ObjectiveSpec(kind="pairs"),
        optim=OptimConfig(lr=3e-3),
        train=TrainConfig(**(settings | train)),
    )


def objective(corpus: PairData, run: RunConfig | None = None, seed: int = 0, **train: Any) -> Pairs:
    return Pairs(corpus, seed=seed, train=TrainConfig(**train) if run is None else run.train)


def texts(corpus: PairData) -> set[tuple[str, str]]:
    pairs = (*corpus.train, *corpus.val)
    return {tuple(corpus.tokenizer.decode(ids[:-1]) for ids in pair) for pair in pairs}  # pyright: ignore[reportReturnType]


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe:260"])
def test_pairs_come_back_as_they_were_written(tokenizer: str, file: Path) -> None:
    corpus, rows = load(file, tokenizer=tokenizer), [json.loads(line) for line in file.read_text().splitlines()]
    assert texts(corpus) == {(row["source"], row["target"]) for row in rows}
    assert all(ids[-1] == corpus.separator for pair in corpus.train for ids in pair)
    assert len(corpus.train) + len(corpus.val) + corpus.skipped["duplicate"] == len(rows)
    assert 0.1 < len(corpus.val) / corpus.n_documents < 0.4
    targets = [target for _, target in corpus.val]
    assert corpus.n_tokens[1] == sum(map(len, targets)) - 1
    assert corpus.val_bytes == sum(map(corpus.tokenizer.n_bytes, targets)) - 1
    assert corpus.summary()["n_train_documents"] == len(corpus.train)


def test_a_digest_says_whether_pairs_are_the_same(file: Path, tmp_path: Path) -> None:
    rows = file.read_text().splitlines()
    assert load(write(tmp_path / "a.jsonl", *rows[::-1])).digest == load(file).digest
    swapped = [{"source": row["target"], "target": row["source"]} for row in map(json.loads, rows)]
    assert load(write(tmp_path / "b.jsonl", *swapped)).digest != load(file).digest


def test_pairs_that_teach_nothing_are_dropped_and_counted_and_other_keys_left_alone(tmp_path: Path) -> None:
    a, b = {"source": "", "target": "x"}, {"source": "y\u2028", "target": " ", "id": 3}
    bad = {"source": "z\0", "target": "z"}, {"source": "z", "target": ""}
    corpus = load(write(tmp_path / "pairs.jsonl", a, "", json.dumps(b, ensure_ascii=False), a, *bad))
    assert texts(corpus) == {("", "x"), ("y\u2028", " ")}
    assert corpus.skipped == {"duplicate": 1, "contains NUL": 1, "empty": 1}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", r"line 2 of .*pairs\.jsonl is not JSON"),
        ("[1]", r"line 2 of .*pairs\.jsonl is not an object with named columns"),
        ('{"source": "x"}', r"has 1 of 2 rows without text in column 'target', the first is row 2.*--objective\.set"),
        ('{"source": "x", "target": 3}', r"1 of 2 rows without text in column 'target'"),
    ],
)
def test_a_line_that_is_no_pair_is_named(row: str, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", {"source": "a", "target": "b"}, row)
    with pytest.raises(DataError, match=message):
        load(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*none\.jsonl \(No such file or directory\)"):
        load(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes('{"source": "é"}'.encode("latin-1"))
    with pytest.raises(DataError, match=r"latin\.jsonl is not UTF-8"):
        load(tmp_path / "latin.jsonl")
    with pytest.raises(DataError, match="holds no pairs"):
        load_pairs(DataConfig())


def test_pairs_stand_in_the_columns_that_are_named(tmp_path: Path) -> None:
    path = tmp_path / "pairs.csv"
    path.write_text('question,answer,n\n"a, b",yes,1\nb,"no\nno",2\n')
    corpus = load_pairs(DataConfig(source=str(path)), ("question", "answer"))
    assert texts(corpus) == {("a, b", "yes"), ("b", "no\nno")}


def test_a_batch_is_padded_to_its_longest_texts(corpus: PairData) -> None:
    pairs = [(np.array([1, 2, 3, 0]), np.array([5, 0])), (np.array([4, 0]), np.array([6, 7, 8, 9, 0]))]
    batch = objective(corpus).collate(pairs)
    assert isinstance(batch, PairTokens)
    assert batch.source.tolist() == [[1, 2, 3, 0], [4, 0, 0, 0]]
    assert batch.source_len.tolist() == [4, 2]
    assert batch.target.tolist() == [[0, 5, 0, 0, 0], [0, 6, 7, 8, 9]]
    assert batch.targets.tolist() == [[5, 0, -100, -100, -100], [6, 7, 8, 9, 0]]
    assert batch.counts == {"loss": 7, "aux_loss": 7}


def test_a_decoder_reads_a_pair_as_one_sequence(corpus: PairData) -> None:
    pairs, lm = objective(corpus), build("mamba", d_model=16, n_layers=2, vocab_size=256)
    pairs.prepare(lm)
    rows = [(np.array([1, 2, 3, 0]), np.array([5, 0])), (np.array([4, 0]), np.array([6, 7, 8, 9, 0]))]
    batch = pairs.collate(rows)
    assert isinstance(batch, Tokens)
    assert batch.tokens.tolist() == [[1, 2, 3, 0, 5, 0], [4, 0, 6, 7, 8, 9]]
    assert batch.targets.tolist() == [[-100, -100, -100, 5, 0, -100], [-100, 6, 7, 8, 9, 0]]
    assert batch.counts == {"loss": 7, "aux_loss": 7}
    alone = [pairs.terms(lm, pairs.collate([row]))["loss"].item() * len(row[1]) for row in rows]
    assert pairs.terms(lm, batch)["loss"].item() == pytest.approx(sum(alone) / 7, rel=1e-5)


def test_the_pairs_of_a_step_are_a_function_of_seed_and_step(corpus: PairData) -> None:
    places = {id(pair): i for i, pair in enumerate(corpus.train)}

    def ids(step: int = 2, seed: int = 1, batch_size: int = 30) -> list[int]:
        return [places[id(pair)] for pair in objective(corpus, seed=seed, batch_size=batch_size).rows(step)]

    assert ids() == ids()
    assert ids(batch_size=7) == ids()[:7]
    assert ids() != ids(step=3)
    assert ids() != ids(seed=2)
    assert len(set(ids())) > 15


def test_held_out_pairs_fill_a_number_of_target_tokens(corpus: PairData) -> None:
    pairs = objective(corpus)
    assert len(pairs.held_out(1)) == 1
    assert len(pairs.held_out(10**6)) == len(corpus.val)
    some = pairs.held_out(40)
    assert sum(len(target) for _, target in some) <= 40
    assert sum(len(target) for _, target in corpus.val[: len(some) + 1]) > 40


@pytest.mark.parametrize("n_parts", [2, 3])
def test_parts_of_a_batch_give_the_gradient_of_the_whole(n_parts: int, corpus: PairData) -> None:
    lm, pairs = build("seq2seq", d_model=16, n_layers=2, vocab_size=256), objective(corpus, batch_size=12)
    rows = sorted(pairs.rows(0), key=lambda pair: len(pair[1]))  # unequal parts
    found = []
    for n in (1, n_parts):
        parts = [pairs.collate(rows[i : i + 12 // n]) for i in range(0, 12, 12 // n)]
        lm.zero_grad()
        means = accumulate_gradients(Learner(lm, pairs), pairs, parts, precision=choose_precision("fp32", CPU))
        found.append([*means.values(), *(p.grad.clone() for p in lm.parameters() if p.grad is not None)])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("rows_at_once", [1, 4, 100])
def test_validation_is_the_mean_over_target_tokens_of_pairs_alone(rows_at_once: int, corpus: PairData) -> None:
    lm: Any = build("encdec", d_model=16, n_layers=2, vocab_size=256)
    rows, pairs, nats = corpus.val[:9], objective(corpus), 0.0
    precision = choose_precision("fp32", CPU)
    found = evaluate(Learner(lm, pairs), pairs, rows, precision=precision, rows_at_once=rows_at_once)
    for source, target in rows:
        read = torch.tensor([[0, *target[:-1]]])
        logits = lm(torch.from_numpy(source.astype(np.int64))[None], read).logits[0].log_softmax(-1)
        nats -= logits[torch.arange(len(target)), torch.from_numpy(target.astype(np.int64))].sum().item()
    n_bytes = sum(len(target) for _, target in rows)  # tokens are bytes
    assert found["bytes"] == n_bytes
    assert found["loss"] == pytest.approx(nats / n_bytes, rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(nats / n_bytes / np.log(2), rel=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("arch", ["encdec", "seq2seq", "mamba"])
def test_a_run_on_pairs_leaves_what_every_run_leaves(arch: str, tmp_path: Path, corpus: PairData) -> None:
    run = config(tmp_path, arch, grad_accumulation=2, seq_len=20)
    pairs = objective(corpus, run)
    assert Trainer(run, pairs).fit().exit_code == 0
    record, result = read_json(run.directory / "run.json"), read_json(run.directory / "result.json")
    assert result["tokens"] == sum(len(target) for step in range(6) for _, target in pairs.rows(step))
    assert result["status"] == "done"
    assert result["val_bits_per_byte"] < 10
    assert " -> " in result["sample"]
    assert RunConfig.from_dict(record["config"]) == run
    lm: Any = build(ModelConfig.from_dict(record["model"]), device="meta")
    n_target, n_source = corpus.mean_lengths()
    if arch == "mamba":
        n_tokens = n_source + n_target - 1
        assert record["flops_per_token"] * n_target == pytest.approx(lm.training_flops_per_token(n_tokens) * n_tokens)
    else:
        assert record["flops_per_token"] == lm.training_flops_per_token(n_target, n_source)
    assert record["n_params"] == lm.n_params
    assert record["corpus"] == corpus.summary()


def test_a_resumed_run_is_the_run_that_was_never_stopped(tmp_path: Path, corpus: PairData) -> None:
    def run(out: str, steps: int) -> dict[str, Any]:
        settings = config(tmp_path / out, steps=steps, checkpoint_every=2)
        settings = dataclasses.replace(settings, optim=OptimConfig(lr=3e-3, schedule="constant"))
        result = Trainer(settings, objective(corpus, settings)).fit().result
        latest = newest(settings.directory / "checkpoints")
        assert latest is not None
        return {"tokens": result["tokens"], "loss": result["val_loss"]} | load_file(latest / "model.safetensors")

    whole, part = run("whole", 6), run("parts", 4)
    assert part["tokens"] < whole["tokens"]
    torch.testing.assert_close(run("parts", 6), whole, rtol=0, atol=0)


@pytest.mark.parametrize("arch", ["seq2seq", "lstm"])
def test_a_model_learns_to_reverse(arch: str, tmp_path: Path, corpus: PairData) -> None:
    run = config(tmp_path, arch, seq_len=20, steps=60, batch_size=32, log_every=60, checkpoint_every=0)
    result = Trainer(run, objective(corpus, run)).fit().result
    first = read_json_lines(run.directory / "metrics.jsonl")[0]["train/loss"]
    assert result["val_loss"] < 0.3 * first


def start(run: RunConfig, corpus: PairData) -> Trainer:
    return Trainer(run, objective(corpus, run))


def test_a_text_longer_than_seq_len_is_refused(tmp_path: Path, corpus: PairData) -> None:
    longest = max(len(ids) for pair in corpus.train for ids in pair)
    with pytest.raises(DataError, match=rf"has a text of {longest} tokens with what ends it, more than"):
        start(config(tmp_path, seq_len=longest - 1), corpus)
    start(config(tmp_path, seq_len=longest), corpus)
    together = max(len(source) + len(target) - 1 for source, target in (*corpus.train, *corpus.val))
    with pytest.raises(DataError, match=rf"has a pair of {together} tokens with what ends it, more than"):
        start(config(tmp_path, "lstm", seq_len=together - 1), corpus)
    start(config(tmp_path, "lstm", seq_len=together), corpus)


def test_an_encoder_learns_no_pairs(tmp_path: Path, corpus: PairData) -> None:
    with pytest.raises(ValueError, match="writes nothing: train a causal model or an encoder-decoder"):
        start(config(tmp_path, "bert"), corpus)


def test_a_model_with_a_source_can_be_described_by_its_pattern() -> None:
    options = ('pattern=["cross_attention+mlp"]', 'source.pattern=["lstm"]', "source.n_layers=3")
    found = ModelSpec(preset="custom", d_model=16, n_layers=2, set=options).configure(300)
    expected = {"d_model": 16, "n_layers": 2, "vocab_size": 300, "pattern": ("cross_attention+mlp",)}
    assert found == Seq2SeqConfig(**expected, source={"pattern": ("lstm",), "n_layers": 3})  # pyright: ignore[reportArgumentType]
