"""Continues prompts with the model of a run folder, a checkpoint or a saved model, and prints text as it comes.

A model that has learned pairs, as every encoder-decoder has, takes a prompt as a source and writes its target.
"""

import codecs
import functools
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...archs import LanguageModel, Seq2Seq, open_pretrained
from ...archs.generation import NO_TOKEN
from ...files import read_json
from ...train.checkpoint import newest
from ...train.data.tokenizer import BytesTokenizer, Tokenizer, load_tokenizer
from ...train.plugins import explaining
from ...train.runtime import choose_device
from ...train.verdict import apply_verdict
from .options import GenerateConfig

__all__ = ["Printer", "generate", "homes_of", "opening", "tokenizer_of", "weights_of"]


def generate(config: GenerateConfig) -> int:
    """Prints each prompt and its continuation, or the target of each source; returns 0, or 1 if logits are not finite.

    Raises:
        ValueError: if the folder holds no model, or no tokenizer for it; if a prompt is no text, or there is none for a
            model that needs a source; if a text of --stop is not one token.
    """
    apply_verdict()
    weights = weights_of(config.folder)
    device = choose_device(config.device)
    with opening(config.folder, weights):
        lm = open_pretrained(weights, device=device).eval()
    tokenizer = tokenizer_of(config.folder, weights, lm.config.vocab_size)
    texts = _prompts(config)
    stops = [_token(tokenizer, text) for text in config.stop]
    reads_source = lm.config.kind == "seq2seq" or _learned(config.folder, weights) == "pairs"
    openings, write = (_sources if reads_source else _prompts_of)(lm, texts, tokenizer, config.prefill_chunk)
    printer = Printer(openings, tokenizer, silent={tokenizer.separator} - set(stops) if config.stop_at_end else set())
    try:
        write(
            max_new_tokens=config.max_new_tokens,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            repetition_penalty=config.repetition_penalty,
            stop_tokens=[*stops, tokenizer.separator] if config.stop_at_end else stops,
            on_token=printer,
            generator=torch.Generator(device=device).manual_seed(config.seed),
            vocab_size=tokenizer.vocab_size,
        )
    except FloatingPointError as error:
        print(f"crossover: {config.folder}: {error}", file=sys.stderr)
        return 1
    finally:  # Ctrl-C too keeps what there is
        printer.finish()
    return 0


_Opened = tuple[list[str], Callable[..., object]]
"""The text printed before each continuation, and the model's `generate`, which lacks only what all models share."""


def _sources(
    lm: LanguageModel | Seq2Seq, texts: Sequence[str], tokenizer: Tokenizer, prefill_chunk: int | None
) -> _Opened:
    if not texts:
        raise ValueError("this model writes a target for a source: give a source as PROMPT or with --prompt-file")
    # a source ends and a target begins as in training (train/objectives/pairs.py)
    end = tokenizer.separator
    sources = [torch.from_numpy(np.append(tokenizer.encode(text), end)) for text in texts]
    own = {"start_token": end} if lm.config.kind == "seq2seq" else {"prefill_chunk": prefill_chunk}
    return [""] * len(texts), functools.partial(lm.generate, sources, **own)


def _prompts_of(
    lm: LanguageModel | Seq2Seq, texts: Sequence[str], tokenizer: Tokenizer, prefill_chunk: int | None
) -> _Opened:
    texts, end = texts or [""], tokenizer.separator
    # an empty prompt is the start of a document
    prompts = [torch.from_numpy(tokenizer.encode(text)) if text else torch.tensor([end]) for text in texts]
    titles = [f"==> prompt {i} <==\n" if len(texts) > 1 else "" for i in range(1, len(texts) + 1)]
    openings = [title + text for title, text in zip(titles, texts, strict=True)]
    return openings, functools.partial(lm.generate, prompts, prefill_chunk=prefill_chunk)


class Printer:
    """Prints texts that grow side by side one after the other: the first that has not ended appears as it grows.

    A character may take several tokens; it is printed when its last byte is there. Bytes that are no UTF-8, as
    untrained models write, become U+FFFD.
    """

    def __init__(self, openings: Sequence[str], tokenizer: Tokenizer, *, silent: set[int]) -> None:
        """Takes what each text begins with, and the tokens that end a text without being part of it."""
        self._tokenizer, self._silent = tokenizer, silent
        self._decoders = [codecs.getincrementaldecoder("utf-8")(errors="replace") for _ in openings]
        self._waiting = list(openings)
        self._current = 0
        self._print()

    def __call__(self, step: int, tokens: Tensor) -> None:
        """Takes one token of each text, as LanguageModel.generate calls it."""
        found = tokens.tolist()
        for i, token in enumerate(found):
            if token != NO_TOKEN and token not in self._silent:
                self._waiting[i] += self._decoders[i].decode(self._tokenizer.to_bytes([token]))
        while found[self._current] == NO_TOKEN and self._current + 1 < len(found):
            self._next()
        self._print()

    def finish(self) -> None:
        """Prints the rest of every text."""
        while self._current + 1 < len(self._waiting):
            self._next()
        self._end_text()

    def _next(self) -> None:
        self._end_text()
        self._current += 1

    def _end_text(self) -> None:
        self._waiting[self._current] += self._decoders[self._current].decode(b"", final=True) + "\n"
        self._print()

    def _print(self) -> None:
        sys.stdout.write(self._waiting[self._current])
        sys.stdout.flush()
        self._waiting[self._current] = ""


def _prompts(config: GenerateConfig) -> list[str]:
    """The texts given, in the order of the command line, files last."""
    texts = [_read_stdin() if text == "-" else text for text in config.prompt]
    for path in config.prompt_file:
        try:
            texts.append(path.read_bytes().decode())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a prompt: byte {error.start} is not UTF-8") from error
    return texts


def _read_stdin() -> str:
    if sys.stdin is None:
        raise ValueError("standard input, which - reads, is closed: give the prompt itself or --prompt-file")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise ValueError(f"standard input is not a prompt: byte {error.start} is not UTF-8") from error


def _token(tokenizer: Tokenizer, text: str) -> int:
    """The one token of a text."""
    ids = tokenizer.encode(text)
    if len(ids) != 1:
        raise ValueError(f"--stop {text!r} is {len(ids)} tokens of {tokenizer.name}: give texts of one token each")
    return int(ids[0])


def weights_of(folder: Path) -> Path:
    """The folder with the model itself."""
    if (folder / "model.safetensors").exists():
        return folder
    checkpoint = newest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if checkpoint is None:
        raise ValueError(f"{folder} holds no model: give a run folder with checkpoints, or one with model.safetensors")
    return checkpoint


def homes_of(folder: Path, weights: Path) -> tuple[Path, ...]:
    """The folders that may tell more of a model: the one asked for, its own, and its run's where it is a checkpoint."""
    return (folder, weights, *weights.parents[:2])


def opening(folder: Path, weights: Path) -> AbstractContextManager[None]:
    """A block that opens a model, in which the message about an unknown part says what to import."""
    otherwise = "; a part of your own needs the --import MODULE that registers it"
    return explaining(*homes_of(folder, weights), otherwise=otherwise)


def _learned(folder: Path, weights: Path) -> str | None:
    """The objective of the run that a model is of; None where no run.json tells."""
    for home in homes_of(folder, weights):
        if (home / "run.json").exists():
            return read_json(home / "run.json").get("objective", {}).get("kind")
    return None


def tokenizer_of(folder: Path, weights: Path, vocab_size: int) -> Tokenizer:
    """The tokenizer saved beside the model, in its run folder, or bytes where the vocabulary is theirs.

    Raises:
        ValueError: if there is none, or the model has fewer tokens than it. More are common, and never drawn.
    """
    for home in homes_of(folder, weights):
        if (home / "tokenizer.json").exists():
            tokenizer = load_tokenizer(home)
            if tokenizer.vocab_size > vocab_size:
                raise ValueError(
                    f"{home / 'tokenizer.json'} has {tokenizer.vocab_size} tokens and the model {vocab_size}: it is not"
                    " the model's"
                )
            return tokenizer
    if vocab_size == BytesTokenizer().vocab_size:
        return BytesTokenizer()
    raise ValueError(f"{folder} has no tokenizer.json, and {vocab_size} tokens are not plain bytes")
