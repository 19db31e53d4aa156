"""Scores and continuations without the harness, then the harness itself on a task of our own, where it is installed."""

import importlib
import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, build, generation
from crossover.benchmarks.cli import main
from crossover.benchmarks.trained.scoring import complete, encode_pair, loglikelihoods, windows
from crossover.train.data.tokenizer import BytesTokenizer, Tokenizer, open_tokenizer

pytestmark = pytest.mark.quick

BYTES = BytesTokenizer()


@pytest.fixture(params=["mamba", "transformer", "gpt2"])
def lm(request: pytest.FixtureRequest) -> LanguageModel:
    lm = build(request.param, d_model=24, n_layers=2).eval()
    with torch.no_grad():
        lm.embedding.weight.mul_(5)  # far from uniform
    return lm


def ids(n: int) -> list[int]:
    return torch.randint(256, (n,)).tolist()


def bpe(tmp_path: Path) -> Tokenizer:
    return open_tokenizer("bpe:300", ["the cat sat on the mat, the cat sat on the hat"] * 20, cache=tmp_path)


@pytest.mark.parametrize("chunk_len", [3, 2048])
def test_a_score_is_the_sum_of_token_losses(chunk_len: int, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generation, "default_chunk_len", lambda _: chunk_len)
    pairs = [(ids(n), ids(m)) for n, m in [(1, 1), (7, 3), (2, 11), (5, 1), (19, 4)]]
    scores = loglikelihoods(lm, pairs, batch_size=2)
    for (context, continuation), (nats, _) in zip(pairs, scores, strict=True):
        tokens = torch.tensor([context + continuation])
        losses = lm.token_losses(tokens[:, :-1], tokens[:, 1:])[0, -len(continuation) :]
        assert nats == pytest.approx(-losses.sum().item(), rel=1e-5)


def test_only_the_most_likely_continuation_is_greedy(lm: LanguageModel) -> None:
    context = ids(6)
    best = lm.generate(torch.tensor([context]), max_new_tokens=4, temperature=0)[0, 6:].tolist()
    others = [[*best[:i], (best[i] + 1) % 256, *best[i + 1 :]] for i in range(4)]
    flags = [flag for _, flag in loglikelihoods(lm, [(context, other) for other in [best, *others]])]
    assert flags == [True, False, False, False, False]


def test_an_empty_continuation_is_no_answer(lm: LanguageModel) -> None:
    (empty, greedy), (other, _) = loglikelihoods(lm, [(ids(3), []), (ids(2), ids(2))])
    assert empty == -math.inf < other
    assert not greedy


def test_as_many_rows_as_have_some_thousand_tokens_score_the_same(lm: LanguageModel) -> None:
    pairs = [(ids(n), ids(m)) for n, m in [(1, 1), (7, 3), (2, 11)]]
    for (nats, greedy), (same, also) in zip(
        loglikelihoods(lm, pairs, batch_size=None), loglikelihoods(lm, pairs, batch_size=1), strict=True
    ):
        assert nats == pytest.approx(same, rel=1e-5)
        assert greedy == also


def test_contexts_lose_their_beginning(lm: LanguageModel) -> None:
    context, continuation = ids(30), ids(4)
    ((nats, _),) = loglikelihoods(lm, [(context, continuation)], max_len=9)
    ((expected, _),) = loglikelihoods(lm, [(context[-6:], continuation)])
    assert nats == pytest.approx(expected)
    with pytest.raises(ValueError, match="a continuation of 10 tokens is longer than max_len=9"):
        loglikelihoods(lm, [(context, ids(10))], max_len=9)


@pytest.mark.parametrize("n", [0, 1, 4, 5, 8, 11])
@pytest.mark.parametrize("max_len", [None, 1, 4])
def test_windows_predict_every_token_once_from_the_tokens_before(n: int, max_len: int | None) -> None:
    text = list(range(100, 100 + n))
    pairs = list(windows(text, 7, max_len))
    assert [token for _, predicted in pairs for token in predicted] == text
    whole = [7, *text]
    for context, predicted in pairs:
        both = context + predicted
        assert any(whole[i : i + len(both)] == both for i in range(len(whole)))
        assert context
        assert max_len is None or len(both) - 1 <= max_len
    if max_len is not None and n > max_len:
        assert len(pairs[-1][0]) + len(pairs[-1][1]) - 1 == max_len, "the last window has all the context that fits"


@pytest.mark.parametrize(
    ("context", "continuation"),
    [
        ("the cat", " sat on"), ("the cat ", "sat on"), ("", "the"), ("  ", "the"), ("é", "é"),
        ("th", "e"), ("the ca", "t sat on"), ("t", "he cat"), ("the cat s", "at"), ("the cat", ""), ("", ""),
    ],
)  # fmt: skip
def test_pairs_are_the_tokens_of_the_whole_text(context: str, continuation: str, tmp_path: Path) -> None:
    for tokenizer in (BYTES, bpe(tmp_path)):
        first, second = encode_pair(tokenizer, context, continuation)
        whole = tokenizer.encode(context + continuation).tolist()
        assert first + second in (whole, [tokenizer.separator, *whole])
        assert first
        assert bool(second) == bool(continuation)
        # what is scored holds all of the continuation, and no token of the context alone but its spaces
        n_context = len(context.rstrip(" ").encode()) if continuation else len(context.encode())
        assert tokenizer.n_bytes(whole) - tokenizer.n_bytes(second) <= n_context
        assert not second or tokenizer.n_bytes(whole) - tokenizer.n_bytes(second[1:]) > n_context


def test_greedy_decoding_takes_no_token_that_the_tokenizer_lacks(lm: LanguageModel) -> None:
    context = ids(6)
    best = lm.generate(torch.tensor([context]), 3, temperature=0, vocab_size=200)[0, 6:].tolist()
    assert loglikelihoods(lm, [(context, best)], vocab_size=200)[0][1]
    assert max(best) < 200


def test_spaces_go_to_the_continuation() -> None:
    assert encode_pair(BYTES, "ab  ", "c") == (list(b"ab"), list(b"  c"))


def test_completions_are_greedy_and_end_before_the_first_stop(lm: LanguageModel) -> None:
    prompt = "def f("
    start = torch.tensor([list(prompt.encode())])
    new = lm.generate(start, max_new_tokens=24, temperature=0)[0, len(prompt) :].tolist()
    new = new[: new.index(BYTES.separator)] if BYTES.separator in new else new
    whole = BYTES.decode(new)
    assert complete(lm, BYTES, prompt, max_new_tokens=24) == whole
    assert len(whole) > 3
    stop = whole[3:5]
    assert complete(lm, BYTES, prompt, stops=["never", stop], max_new_tokens=24) == whole[: whole.index(stop)]
    with pytest.raises(ValueError, match="leave no room"):
        complete(lm, BYTES, prompt, max_new_tokens=24, max_len=24)


def test_completions_end_with_the_document() -> None:
    lm = build("mamba", d_model=8, n_layers=1, tie_embeddings=False)
    with torch.no_grad():
        lm.output_weight.zero_()  # all tokens alike, so that the first is taken: the separator
    assert complete(lm, BYTES, "x") == ""


def test_without_the_harness_its_command_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for words in (["lm_eval", "--help"], ["lm_eval", "--batch_size", "auto"]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.startswith("crossover: lm_eval is the Language Model Evaluation Harness: pip install lm-eval")
        assert error.count("\n") == 1


def test_the_command_of_the_harness_knows_our_models(tmp_path: Path) -> None:
    stand_in = {
        "__init__.py": "",
        "__main__.py": "import sys\nfrom .api.registry import known\n"
        "def cli_evaluate(): print(sys.argv, {name: cls.__name__ for name, cls in known.items()})\n",
        "api/__init__.py": "",
        "api/model.py": "class LM: pass\n",
        "api/registry.py": "known = {}\ndef register_model(name): return lambda cls: known.setdefault(name, cls)\n",
    }
    for name, code in stand_in.items():
        path = tmp_path / "lm_eval" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)
    command = [sys.executable, "-m", "crossover.benchmarks.cli", "lm_eval", "--tasks", "piqa"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True)
    assert done.stdout.strip() == "['lm_eval', '--tasks', 'piqa'] {'crossover': 'CrossoverLM'}", done.stderr


@pytest.fixture
def harness(tmp_path: Path) -> Any:
    pytest.importorskip("lm_eval", reason="needs the extra [eval]")
    adapter: Any = importlib.import_module("crossover.benchmarks.trained.lm_eval")
    build("gpt2", d_model=24, n_layers=2, max_positions=24).save_pretrained(tmp_path / "model")
    return adapter.CrossoverLM(tmp_path / "model", device="cpu", batch_size="3")


def test_the_harness_gets_scores_of_texts(harness: Any, tmp_path: Path) -> None:
    requests = [SimpleNamespace(args=args) for args in [("the cat", " sat"), ("", "x"), ("a " * 30, "b")]]
    scores = harness.loglikelihood(requests)
    assert [flag for _, flag in scores] == [False] * 3
    text = "a text of more than two windows of twenty-four tokens"
    (whole,) = harness.loglikelihood_rolling([SimpleNamespace(args=(text,))])
    tokens = torch.tensor([[0, *text.encode()]])
    first = -harness.lm.token_losses(tokens[:, :24], tokens[:, 1:25]).sum().item()
    assert whole < first < 0
    (answer,) = harness.generate_until([SimpleNamespace(args=("q", {"until": "\n", "max_gen_toks": 5}))])
    assert len(answer) <= 5
    for words in ("auto", "auto:4", 3):
        again = type(harness)(tmp_path / "model", device="cpu", batch_size=words)
        assert [nats for nats, _ in again.loglikelihood(requests)] == pytest.approx([nats for nats, _ in scores])
    with pytest.raises(ValueError, match="batch_size=0 must be a whole number of at least 1, or auto"):
        type(harness)(tmp_path / "model", device="cpu", batch_size=0)
    with pytest.raises(ValueError, match="decodes greedily"):
        harness.generate_until([SimpleNamespace(args=("q", {"do_sample": True}))])


def test_the_harness_runs_a_task(harness: Any, tmp_path: Path) -> None:
    lm_eval: Any = importlib.import_module("lm_eval")
    docs: list[dict[str, Any]] = [
        {"q": "the cat", "choices": ["sat", "sut"]},
        {"q": "on the", "choices": ["mit", "mat", "mut"]},
    ]
    (tmp_path / "docs.jsonl").write_text("\n".join(map(json.dumps, docs)))
    (tmp_path / "choice.yaml").write_text(
        "task: choice\ndataset_path: json\noutput_type: multiple_choice\ntest_split: train\n"
        f"dataset_kwargs: {{data_files: {tmp_path}/docs.jsonl}}\n"
        "doc_to_text: '{{q}}'\ndoc_to_choice: choices\ndoc_to_target: 0\nmetric_list: [{metric: acc}]\n"
    )
    registry: Any = importlib.import_module("lm_eval.tasks")
    tasks = registry.TaskManager(include_path=str(tmp_path), include_defaults=False)
    results: Any = lm_eval.simple_evaluate(model=harness, tasks=["choice"], task_manager=tasks, bootstrap_iters=0)
    correct = []
    for doc, sample in zip(docs, results["samples"]["choice"], strict=True):
        # the harness puts a space before each choice
        expected = loglikelihoods(harness.lm, [encode_pair(BYTES, doc["q"], f" {choice}") for choice in doc["choices"]])
        assert [nats for nats, _ in sample["filtered_resps"]] == pytest.approx([nats for nats, _ in expected])
        correct.append(max(expected) == expected[0])
    assert results["results"]["choice"]["acc,none"] == pytest.approx(sum(correct) / 2)
