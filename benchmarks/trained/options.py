"""Options of the commands of this room. Nothing heavy is imported, so that `--help` is fast."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ...options import Length, Positive, Range, check

__all__ = ["ConvertConfig", "GenerateConfig"]


@dataclass(frozen=True, kw_only=True)
class ConvertConfig:
    """Turn a Hugging Face checkpoint into a model of ours, or one of ours into Hugging Face's.

    The direction follows from SRC. Every tensor keeps its values and its dtype; what the other side cannot compute is
    refused.
    """

    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SRC")]
    """Folder of a Hugging Face checkpoint (gpt2, llama, mamba, mamba2, jamba, bert; or of mamba_ssm), or a run folder,
    checkpoint folder or saved model of ours."""

    target: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DST")]
    """Folder that gets the converted model; must be empty or new."""


@dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Continue prompts with a trained model; text appears as it comes, and Ctrl-C keeps what there is.

    Several prompts go in one batch and are printed one after the other. The printed text begins with the prompt. Where
    the model has learned to write a target for a source (--objective pairs), each prompt is a source, and the targets
    alone are printed, one after the other.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder, checkpoint folder or saved model."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """Texts to continue, or sources; - reads one from standard input. Without any, a model begins a document, unless it
    reads sources."""

    prompt_file: tuple[Path, ...] = ()
    """Files in UTF-8, each a prompt from its first to its last byte, the newline at its end included."""

    max_new_tokens: Length = 200
    """Most tokens to add to each prompt, or in a target."""

    temperature: Annotated[float, Range(0)] = 0.8
    """Sampling temperature; 0 takes the most likely token."""

    top_k: Length | None = None
    """Sample among this many most likely tokens."""

    top_p: Annotated[float | None, Range(above=0, at_most=1)] = 0.95
    """Sample among the most likely tokens that together have this probability."""

    repetition_penalty: Positive = 1.0
    """Makes tokens that the text (of a target: without its source) already holds less likely: 1 does nothing, 1.2 is
    usual."""

    stop: tuple[str, ...] = ()
    """Texts, each of them one token, that end a continuation or a target when the model writes them."""

    stop_at_end: bool = True
    """Whether a continuation ends where the model ends the document, and a target where the model ends it."""

    prefill_chunk: Length | None = None
    """Tokens of each prompt that are read at once; fewer need less memory. When not given, 2048, and fewer of more than
    4 prompts. A source is always read whole."""

    seed: Annotated[int, Range(0, below=2**63)] = 0
    """Seed of the sampling."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    def __post_init__(self) -> None:
        check(self, "--")
