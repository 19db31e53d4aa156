"""Turns checkpoints of Hugging Face's into models of ours and back: `crossover convert SRC DST`."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from ...archs import LanguageModel
from ...archs.hf import from_hf, to_hf
from ...files import read_json
from .generate import homes_of, opening, weights_of
from .options import ConvertConfig

__all__ = ["convert"]


def convert(config: ConvertConfig) -> int:
    """Converts, prints what the model is, and returns 0.

    A tokenizer.json goes along, unless it only says that tokens are bytes.

    Raises:
        ValueError: if the target holds files, the source holds no model, or the other side cannot compute the same.
    """
    source, target = config.source, config.target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not empty: give a new folder")
    to_theirs = _is_ours(source)
    print(f"{source} -> {target}, {'ours to Hugging Face' if to_theirs else 'Hugging Face to ours'}", flush=True)
    if to_theirs:
        weights = weights_of(source)
        with opening(source, weights):
            lm = LanguageModel.from_pretrained(weights)
        to_hf(lm, target)
        _copy_tokenizer(homes_of(source, weights), target)
    else:
        lm = from_hf(source)
        lm.save_pretrained(target)
        _copy_tokenizer((source,), target)
    print(_summary(lm))
    return 0


def _is_ours(source: Path) -> bool:
    """A run folder has no config.json of its own, and that of a saved model has a layer pattern."""
    file = source / "config.json"
    return not file.exists() or "pattern" in read_json(file)


def _copy_tokenizer(homes: Iterable[Path], target: Path) -> None:
    found = next((home / "tokenizer.json" for home in homes if (home / "tokenizer.json").exists()), None)
    if found is not None and "model" in read_json(found):
        shutil.copyfile(found, target / "tokenizer.json")


def _summary(lm: LanguageModel) -> str:
    config = lm.config
    dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in lm.parameters()})
    return (
        f"{lm.n_params:,} parameters ({' and '.join(dtypes)}): {config.n_layers} layers of"
        f" {', '.join(config.pattern)}, d_model {config.d_model}, {config.vocab_size:,} tokens"
    )
