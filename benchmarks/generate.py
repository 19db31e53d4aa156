"""Continues a prompt with the model of a run folder, a checkpoint or a saved model."""

from pathlib import Path

import torch

from ..archs import LanguageModel
from ..train.checkpoint import newest
from ..train.runtime import choose_device
from ..train.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from .config import GenerateConfig

__all__ = ["generate"]


def generate(config: GenerateConfig) -> str:
    """Returns the prompt and its continuation.

    Raises:
        ValueError: if the folder holds no model, or no tokenizer for it.
    """
    weights = _weights(config.folder)
    device = choose_device(config.device)
    lm = LanguageModel.from_pretrained(weights, device=device).eval()
    tokenizer = _tokenizer(config.folder, weights, lm.config.vocab_size)
    prompt = torch.from_numpy(tokenizer.encode(config.prompt))[None].to(device)
    if prompt.shape[1] == 0:
        prompt = torch.tensor([[tokenizer.separator]], device=device)  # as at the start of a document
    ids = lm.generate(
        prompt,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        generator=torch.Generator(device=device).manual_seed(config.seed),
    )
    return tokenizer.decode(ids[0].cpu().numpy())


def _weights(folder: Path) -> Path:
    """The folder with the model itself."""
    if (folder / "model.safetensors").exists():
        return folder
    checkpoint = newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if checkpoint is None:
        raise ValueError(f"{folder} holds no model: give a run folder with checkpoints, or one with model.safetensors")
    return checkpoint


def _tokenizer(folder: Path, weights: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer saved beside the model, in its run folder, or bytes where the vocabulary is theirs."""
    for home in (folder, weights, *weights.parents[:2]):
        if (home / "tokenizer.json").exists():
            return load_tokenizer(home)
    if vocab_size == BytesTokenizer().vocab_size:
        return BytesTokenizer()
    raise ValueError(f"{folder} has no tokenizer.json, and {vocab_size} tokens are not plain bytes")
