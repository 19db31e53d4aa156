import json
from pathlib import Path

import pytest
import torch
from crossover.archs import LanguageModel, build
from crossover.archs.hf import from_hf, to_hf
from crossover.benchmarks.cli import main
from safetensors.torch import load_file

pytestmark = pytest.mark.quick


def model(**options: object) -> LanguageModel:
    return build("mamba", d_model=20, n_layers=2, d_state=5, **options)


def test_there_and_back_keeps_every_bit_and_says_what_the_model_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours, theirs, back = (tmp_path / name for name in ("ours", "theirs", "back"))
    lm = model()
    lm.save_pretrained(ours)
    assert main(["convert", str(ours), str(theirs)]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == f"{ours} -> {theirs}, ours to Hugging Face"
    assert f"{lm.n_params:,} parameters (float32): 2 layers of mamba, d_model 20, 256 tokens" in shown[1]
    assert json.loads((theirs / "config.json").read_text())["model_type"] == "mamba"
    assert main(["convert", str(theirs), str(back)]) == 0
    assert "Hugging Face to ours" in capsys.readouterr().out
    again = LanguageModel.from_pretrained(back).state_dict()
    assert all(torch.equal(again[name], value) for name, value in lm.state_dict().items())


def test_dtypes_survive_both_ways(tmp_path: Path) -> None:
    lm = model(dtype=torch.bfloat16)
    lm.backbone.norm.float()
    to_hf(lm, tmp_path / "a")
    assert main(["convert", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    assert main(["convert", str(tmp_path / "b"), str(tmp_path / "c")]) == 0
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in "ac")
    assert {name: t.dtype for name, t in first.items()} == {name: t.dtype for name, t in last.items()}
    assert all(torch.equal(first[name], last[name]) for name in first)


def test_a_run_folder_gives_its_newest_checkpoint_and_its_tokenizer(tmp_path: Path) -> None:
    from crossover.train.checkpoint import save as save_checkpoint
    from crossover.train.config import OptimConfig
    from crossover.train.optim import adamw

    run, lm = tmp_path / "run", model()
    for step in (1, 2):
        with torch.no_grad():
            lm.get_parameter("backbone.norm.weight").fill_(step)
        save_checkpoint(run / "checkpoints", step, model=lm, optimizer=adamw(lm, OptimConfig()), state={})
    (run / "tokenizer.json").write_text('{"model": {"vocab": {}}}')
    assert main(["convert", str(run), str(tmp_path / "out")]) == 0
    assert from_hf(tmp_path / "out").get_parameter("backbone.norm.weight").unique().tolist() == [2.0]
    assert (tmp_path / "out/tokenizer.json").read_text() == (run / "tokenizer.json").read_text()


def test_a_note_that_tokens_are_bytes_stays_behind(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "ours")
    (tmp_path / "ours/tokenizer.json").write_text('{"type": "bytes"}')
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "theirs")]) == 0
    assert not (tmp_path / "theirs/tokenizer.json").exists()


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    model().save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(target)]) == 2
    assert capsys.readouterr().err == f"crossover: {target} is not empty: give a new folder\n"
    assert [path.name for path in target.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "holds no model"),
        ({"model_type": "t5"}, 'unknown model_type="t5"'),
        ({"d_model": 4, "pattern": ["mamba"]}, "holds no model"),
    ],
)
def test_a_source_that_is_no_model_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: dict[str, object] | None, message: str
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["convert", str(tmp_path), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_model_that_hugging_face_lacks_leaves_nothing_behind(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build("s4d", d_model=16, n_layers=1).save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert "no model of Hugging Face's has layers ['s4d+mlp']" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_is_refused_in_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build("encdec", d_model=16, n_layers=2, vocab_size=9).save_pretrained(tmp_path / "ours")
    assert main(["convert", str(tmp_path / "ours"), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.count("holds an encoder-decoder where a model of one sequence is needed\n") == 1
    assert not (tmp_path / "out").exists()
