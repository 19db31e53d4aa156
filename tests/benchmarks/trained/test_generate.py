import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, Seq2Seq, available, build
from crossover.archs.generation import NO_TOKEN
from crossover.benchmarks.cli import main
from crossover.benchmarks.trained.generate import Printer
from crossover.files import write_json
from crossover.kernels import dispatch
from crossover.train.data.tokenizer import BytesTokenizer
from crossover.train.verdict import store_verdict

pytestmark = pytest.mark.quick

Capture = pytest.CaptureFixture[str]


def save(folder: Path, vocab_size: int = 256) -> str:
    build("mamba", d_model=16, n_layers=1, vocab_size=vocab_size).save_pretrained(folder)
    return str(folder)


def printed(capsys: Capture, *words: str) -> str:
    """Returns what `crossover generate` prints, after it has succeeded."""
    assert main(["generate", *words]) == 0
    return capsys.readouterr().out


def refused(capsys: Capture, *words: str) -> str:
    """The line that `crossover generate` ends with."""
    assert main(["generate", *words]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_a_saved_model_continues_a_prompt(tmp_path: Path, capsys: Capture) -> None:
    text = printed(capsys, save(tmp_path), "def naïve(", "--max-new-tokens", "8", "--device", "cpu")
    assert text.startswith("def naïve(")
    assert len(text) > len("def naïve(\n")


def test_the_seed_decides_the_text(tmp_path: Path, capsys: Capture) -> None:
    words = [save(tmp_path), "a", "--max-new-tokens", "16", "--temperature", "1", "--seed"]
    texts = [printed(capsys, *words, seed) for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]


def test_every_option_of_sampling_reaches_the_model(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(LanguageModel, "generate", lambda self, prompt, **options: calls.append((prompt, options)))
    save(tmp_path)
    words = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.7", "--stop", ";", "\n"]
    words += ["--repetition-penalty", "1.3", "--prefill-chunk", "5", "--no-stop-at-end"]
    printed(capsys, str(tmp_path), "ab", *words)
    ((prompt, options),) = calls
    assert [row.tolist() for row in prompt] == [[97, 98]]
    given = {name: options[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty", "prefill_chunk")}
    assert given == {"temperature": 0.5, "top_k": 4, "top_p": 0.7, "repetition_penalty": 1.3, "prefill_chunk": 5}
    assert (options["max_new_tokens"], options["stop_tokens"]) == (7, [59, 10])


def test_an_empty_prompt_begins_a_document(tmp_path: Path, capsys: Capture) -> None:
    words = [save(tmp_path), "--max-new-tokens", "4", "--no-stop-at-end"]
    assert len(printed(capsys, *words)) > 1
    assert printed(capsys, *words) == printed(capsys, *words, "")


def test_prompts_come_from_arguments_standard_input_and_files(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prompt").write_text("from a file\n", encoding="utf-8")
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe"))
    words = ["one", "-", "--prompt-file", str(tmp_path / "prompt"), "--max-new-tokens", "1"]
    text = printed(capsys, save(tmp_path), *words)
    prompts = enumerate(("one", "from a pipe", "from a file\n"), start=1)
    places = [text.index(f"==> prompt {i} <==\n{prompt}") for i, prompt in prompts]
    assert places == sorted(places)


def test_a_run_folder_gives_its_newest_checkpoint_and_its_tokenizer(tmp_path: Path, capsys: Capture) -> None:
    from crossover.train.checkpoint import save as save_checkpoint
    from crossover.train.config import OptimConfig
    from crossover.train.optim import adamw

    lm = build("mamba", d_model=16, n_layers=1)
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, model=lm, optimizer=adamw(lm, OptimConfig()), state={})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"type": "bytes"}))
    assert printed(capsys, str(tmp_path), "x = ", "--max-new-tokens", "4").startswith("x = ")


def test_what_the_doctor_has_switched_off_stays_off(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatch, "_switched_off", {})
    store_verdict(["rms_norm"], {("rms_norm", "cpu"): "broken"})
    printed(capsys, save(tmp_path), "x", "--max-new-tokens", "1")
    assert dispatch.switched_off() == {("rms_norm", "cpu"): "broken"}


def test_ctrl_c_keeps_what_there_is(tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: LanguageModel, prompt: object, *, on_token: Printer, **options: object) -> None:
        on_token(0, torch.tensor([ord("c"), ord("x")]))
        raise KeyboardInterrupt

    monkeypatch.setattr(LanguageModel, "generate", interrupted)
    assert main(["generate", save(tmp_path), "ab", "yy"]) == 130
    assert capsys.readouterr().out == "==> prompt 1 <==\nabc\n==> prompt 2 <==\nyyx\n"


every_reader = pytest.mark.parametrize("name", available("seq2seq"))


def save_reader(folder: Path, name: Any) -> tuple[str, Seq2Seq]:
    """The folder of a model of pairs, untrained, with weights large enough for its targets to differ."""
    lm: Seq2Seq = build(name, d_model=16, n_layers=2)
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.5 * torch.randn_like(p))
    lm.save_pretrained(folder)
    return str(folder), lm


def test_a_decoder_that_learned_pairs_takes_its_prompt_as_a_source(tmp_path: Path, capsys: Capture) -> None:
    folder, lm = save_reader(tmp_path, "mamba")
    write_json(tmp_path / "run.json", {"objective": {"kind": "pairs"}})
    read = torch.tensor([[*b"abc", 0]])
    target = lm.generate(read, 9, temperature=0, stop_tokens=[0])[0, read.shape[1] :]
    expected = bytes(token for token in target.tolist() if token).decode(errors="replace") + "\n"
    assert printed(capsys, folder, "abc", "--max-new-tokens", "9", "--temperature", "0", "--device", "cpu") == expected


@every_reader
def test_of_a_source_only_the_target_is_printed(name: str, tmp_path: Path, capsys: Capture) -> None:
    folder, lm = save_reader(tmp_path, name)
    words = ["--max-new-tokens", "9", "--temperature", "0", "--device", "cpu"]
    expected = []
    for text in ("abc", "", "naïve"):  # a source ends with the separator, and a target begins with it, as in training
        target = lm.generate(torch.tensor([[*text.encode(), 0]]), 9, temperature=0, start_token=0, stop_tokens=[0])
        expected.append(bytes(token for token in target[0].tolist() if token).decode(errors="replace") + "\n")
    assert len({*expected}) > 1
    assert printed(capsys, folder, "abc", *words) == expected[0]
    assert printed(capsys, folder, "abc", "", "naïve", *words) == "".join(expected)


def test_a_target_ends_where_the_model_ends_it_unless_told_otherwise(tmp_path: Path, capsys: Capture) -> None:
    folder, lm = save_reader(tmp_path, "encdec")
    decoder = lm.decoder
    with torch.no_grad():  # the separator is the likeliest token by far, whatever was read
        decoder.embedding.weight[0] *= 10
        decoder.backbone.blocks[-1].get_parameter("ffn_norm.bias").add_(100 * decoder.embedding.weight[0])
    lm.save_pretrained(folder)
    words = ["--max-new-tokens", "5", "--temperature", "0"]
    assert printed(capsys, folder, "ab", *words) == "\n"
    assert printed(capsys, folder, "ab", *words, "--no-stop-at-end") == "\0" * 5 + "\n"


def test_every_option_of_sampling_reaches_an_encoder_decoder(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = save_reader(tmp_path, "seq2seq")
    calls = []
    monkeypatch.setattr(Seq2Seq, "generate", lambda self, source, **options: calls.append((source, options)))
    words = ["--max-new-tokens", "7", "--temperature", "0.5", "--top-k", "4", "--top-p", "0.7", "--stop", ";"]
    printed(capsys, folder, "ab", *words, "--repetition-penalty", "1.3")
    ((source, options),) = calls
    assert [row.tolist() for row in source] == [[97, 98, 0]]
    given = {name: options[name] for name in ("temperature", "top_k", "top_p", "repetition_penalty", "start_token")}
    assert given == {"temperature": 0.5, "top_k": 4, "top_p": 0.7, "repetition_penalty": 1.3, "start_token": 0}
    assert (options["max_new_tokens"], options["stop_tokens"]) == (7, [59, 0])


def test_an_encoder_decoder_without_a_source_says_what_to_give(tmp_path: Path, capsys: Capture) -> None:
    folder, _ = save_reader(tmp_path, "encdec")
    assert "writes a target for a source: give a source as PROMPT or with --prompt-file" in refused(capsys, folder)


def steps(*texts: bytes) -> Iterator[torch.Tensor]:
    """Calls `on_token` as for continuations of bytes."""
    for n in range(max(map(len, texts))):
        yield torch.tensor([text[n] if n < len(text) else NO_TOKEN for text in texts])


def test_a_character_is_printed_when_its_last_byte_is_there(capsys: Capture) -> None:
    printer = Printer(["ü"], BytesTokenizer(), silent=set())
    shown = [capsys.readouterr().out]
    for n, tokens in enumerate(steps("é€!".encode() + b"\xe2\x82")):
        printer(n, tokens)
        shown.append(capsys.readouterr().out)
    printer.finish()
    assert shown == ["ü", "", "é", "", "", "€", "!", "", ""]
    assert capsys.readouterr().out == "\N{REPLACEMENT CHARACTER}\n"


def test_texts_are_printed_in_turn_and_the_current_one_at_once(capsys: Capture) -> None:
    printer = Printer(["a", "- b", "- c"], BytesTokenizer(), silent={0})
    shown = [capsys.readouterr().out]
    for n, tokens in enumerate(steps(b"1\0", b"234567", b"89")):
        printer(n, tokens)
        shown.append(capsys.readouterr().out)
    printer.finish()
    assert shown == ["a", "1", "", "\n- b234", "5", "6", "7"]
    assert capsys.readouterr().out == "\n- c89\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x", "--stop", "ab"], "--stop 'ab' is 2 tokens of bytes: give texts of one token each"),
        (["--prompt-file", "latin-1"], "latin-1 is not a prompt: byte 1 is not UTF-8"),
        (["--prompt-file", "nowhere"], "nowhere: No such file or directory"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    words: list[str], message: str, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("latin-1").write_bytes("né".encode("latin-1"))
    assert message in refused(capsys, save(tmp_path), *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--top-k", "0"], "--top-k=0 must be at least 1"),
        (["--top-p", "0"], "--top-p=0.0 must be more than 0"),
        (["--repetition-penalty", "-1"], "--repetition-penalty=-1.0 must be more than 0"),
        (["--prefill-chunk", "0"], "--prefill-chunk=0 must be at least 1"),
    ],
)
def test_values_out_of_range_are_refused(words: list[str], message: str, capsys: Capture) -> None:
    assert refused(capsys, "folder", "x", *words) == f"crossover: {message}\n"


def test_standard_input_that_is_closed_is_no_prompt(
    tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", None)
    assert "standard input, which - reads, is closed" in refused(capsys, save(tmp_path), "-")


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path, capsys: Capture) -> None:
    error = refused(capsys, save(tmp_path, vocab_size=300), "x")
    assert "no tokenizer.json, and 300 tokens are not plain bytes" in error


def test_a_folder_without_a_model_is_refused(tmp_path: Path, capsys: Capture) -> None:
    assert "holds no model" in refused(capsys, str(tmp_path), "x")


def test_help_says_what_every_option_means(capsys: Capture) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["generate", "--help"])
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    options = (
        "--prompt-file --max-new-tokens --temperature --top-k --top-p --repetition-penalty --stop --stop-at-end "
        "--prefill-chunk --seed --device"
    )
    assert [option for option in options.split() if option not in text] == []
    assert "- reads one from standard input" in text
    assert "each prompt is a source, and the targets alone are printed" in text


def test_a_model_with_more_tokens_than_its_tokenizer_writes_only_what_that_has(tmp_path: Path, capsys: Capture) -> None:
    save(tmp_path, vocab_size=303)
    BytesTokenizer().save(tmp_path / "tokenizer.json")
    for temperature in ("0", "100"):
        words = ["x", "--max-new-tokens", "64", "--temperature", temperature, "--top-p", "1", "--no-stop-at-end"]
        assert printed(capsys, str(tmp_path), *words).startswith("x")
    save(tmp_path, vocab_size=200)
    error = refused(capsys, str(tmp_path), "x")
    assert "tokenizer.json has 256 tokens and the model 200: it is not the model's" in error


def test_a_model_of_weights_that_are_no_numbers_fails_in_one_line(tmp_path: Path, capsys: Capture) -> None:
    lm = build("mamba", d_model=16, n_layers=1)
    torch.nn.init.constant_(lm.embedding.weight, float("nan"))
    lm.save_pretrained(tmp_path)
    assert main(["generate", str(tmp_path), "x"]) == 1
    assert capsys.readouterr().err == (
        f"crossover: {tmp_path}: the model's logits are not finite: its weights, or what it makes of this prompt, are"
        " beyond float range\n"
    )
