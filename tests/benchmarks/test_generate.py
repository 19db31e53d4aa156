import json
from pathlib import Path

import pytest
from crossover.archs import build
from crossover.benchmarks.config import GenerateConfig
from crossover.benchmarks.generate import generate


def save(folder: Path, vocab_size: int = 256) -> Path:
    build("mamba", d_model=16, n_layers=1, vocab_size=vocab_size).save_pretrained(folder)
    return folder


def test_a_saved_model_continues_a_prompt(tmp_path: Path) -> None:
    text = generate(GenerateConfig(folder=save(tmp_path), prompt="def naïve(", max_new_tokens=8, device="cpu"))
    assert text.startswith("def naïve(")
    assert len(text) > len("def naïve(")


def test_the_seed_decides_the_text(tmp_path: Path) -> None:
    save(tmp_path)

    def text(seed: int) -> str:
        return generate(GenerateConfig(folder=tmp_path, prompt="a", max_new_tokens=16, temperature=1, seed=seed))

    assert text(1) == text(1)
    assert text(1) != text(2)


def test_an_empty_prompt_starts_a_document(tmp_path: Path) -> None:
    assert len(generate(GenerateConfig(folder=save(tmp_path), prompt="", max_new_tokens=4))) > 0


def test_a_run_folder_gives_its_newest_checkpoint_and_its_tokenizer(tmp_path: Path) -> None:
    from crossover.train.checkpoint import save as save_checkpoint
    from crossover.train.config import OptimConfig
    from crossover.train.optim import adamw

    lm = build("mamba", d_model=16, n_layers=1)
    for step in (1, 2):
        save_checkpoint(tmp_path / "checkpoints", step, model=lm, optimizer=adamw(lm, OptimConfig()), state={})
    (tmp_path / "tokenizer.json").write_text(json.dumps({"type": "bytes"}))
    assert generate(GenerateConfig(folder=tmp_path, prompt="x = ", max_new_tokens=4)).startswith("x = ")


def test_a_model_without_its_tokenizer_is_refused(tmp_path: Path) -> None:
    save(tmp_path, vocab_size=300)
    with pytest.raises(ValueError, match=r"no tokenizer\.json, and 300 tokens are not plain bytes"):
        generate(GenerateConfig(folder=tmp_path, prompt="x"))


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no model"):
        generate(GenerateConfig(folder=tmp_path, prompt="x"))
