"""Options of the benchmark commands: frozen dataclasses that import nothing heavy, so that `--help` is fast."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from ..train.config import Count
from .harness.format import format_bytes

__all__ = [
    "ARCHS",
    "ByteSize",
    "CompareConfig",
    "ContextConfig",
    "ConvertConfig",
    "DoctorConfig",
    "GenerateConfig",
    "KernelsConfig",
    "LearningRateConfig",
    "MeasureConfig",
    "ReportConfig",
    "parse_bytes",
]

ARCHS = ("transformer", "s4d", "mamba", "jamba", "lstm")

Precision = Literal["auto", "fp32", "bf16"]

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


def parse_bytes(text: str) -> int:
    """Reads a size such as 3GiB, 512MiB or 2e9 (KiB, MiB, GiB are powers of 1024; kB, MB, GB of 1000)."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]*)?(?:e[0-9]+)?)\s*([kmgt]i?|)b?", text.strip().lower())
    if match is None:
        raise ValueError(f"'{text}' is not a size in bytes; write it like 3GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2]])


ByteSize = Annotated[
    int,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="SIZE",
        instance_from_str=lambda words: parse_bytes(words[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [format_bytes(value).replace(" ", "")],
    ),
]


def _check_positive(config: object, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        for number in value if isinstance(value, tuple) else (value,):
            if not (math.isfinite(number) and number > 0):
                raise ValueError(f"--{name.replace('_', '-')} must be positive, got {number}")


def _check_archs(archs: tuple[str, ...]) -> None:
    if not archs:
        raise ValueError("--archs names no architecture")
    if len(set(archs)) < len(archs):
        raise ValueError(f"--archs names an architecture twice: {' '.join(archs)}")


def _check_context(context: tuple[int, ...], tokens_per_batch: int | None, *, option: str = "--context") -> None:
    if not context:
        raise ValueError(f"{option} names no length")
    if min(context) <= 0:
        raise ValueError(f"{option} must be positive lengths in tokens, got {min(context)}")
    if list(context) != sorted(set(context)):
        raise ValueError(f"{option} must be increasing lengths in tokens, got {' '.join(map(str, context))}")
    if tokens_per_batch is not None and tokens_per_batch < context[-1]:
        raise ValueError(
            f"--tokens-per-batch {tokens_per_batch} is less than the longest --context, {context[-1]}, so the lengths "
            "would not train on equally many tokens"
        )


@dataclass(frozen=True, kw_only=True)
class MeasureConfig:
    """How a cell (one architecture at one context length) is measured; part of the identity of a result."""

    tokens_per_batch: int | None = None
    """Tokens in one training step at every length, as a batch of tokens // length sequences; the longest --context when
    not given."""

    prompts: int = 1
    """Sequences read at once in prefill and continued at once in decode."""

    decode_tokens: int = 32
    """Tokens generated one at a time in each repeat of the decode measurement."""

    time_box: float = 0.5
    """Seconds spent on the repeats of one phase, longer where --min-repeats take longer."""

    min_repeats: int = 3
    """Fewest repeats of a phase after its warm-up; training whose warm-up step alone takes longer than --time-box needs
    only 2."""

    timeout: float = 300.0
    """Seconds after which a phase is stopped and recorded as a timeout."""

    memory_limit: ByteSize = 3 * 2**30
    """Most memory a measurement may allocate (RLIMIT_DATA on the CPU, allocator limit on CUDA); more is recorded as
    out of memory. The Python process itself takes about 0.3 GiB of it."""

    def __post_init__(self) -> None:
        _check_positive(self, "prompts", "decode_tokens", "time_box", "min_repeats", "timeout", "memory_limit")
        if self.tokens_per_batch is not None:
            _check_positive(self, "tokens_per_batch")
        if self.memory_limit < 2**29:
            raise ValueError(
                f"--memory-limit {format_bytes(self.memory_limit)} is too little for Python and torch: give 512MiB"
            )


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Train every architecture at one budget, measure them against the context length, write the report.

    The defaults are a demo for two CPU cores: some minutes, under 4 GiB, no download. Finished runs and measurements of
    the same settings are kept, so the same command goes on where it stopped.
    """

    archs: tuple[str, ...] = ARCHS
    """Architectures; the first is the baseline that the report compares the others with."""

    params: Count = 1_000_000
    """Parameters of every model, reached within 2 % (1M, 500k)."""

    seeds: int = 1
    """Runs per architecture, with seeds 0, 1, ..."""

    steps: int = 450
    """Optimizer steps of every run."""

    batch_size: int = 4
    """Sequences per step."""

    seq_len: int = 256
    """Tokens per training sequence."""

    context: tuple[int, ...] = (128, 512, 2048, 8192)
    """Context lengths in tokens at which speed and memory are measured."""

    eval_tokens: Count = 8_192
    """Held-out tokens read by one validation on the way, always the same ones; the final one reads eight times more."""

    position_len: int | None = None
    """Longest length at which loss by position is evaluated; 4 x --seq-len when not given."""

    data: str = "stdlib"
    """'stdlib' (the running Python's standard library), a file or folder, or hf:NAME[:CONFIG]."""

    column: str = "text"
    """Column that holds the text in JSONL, Parquet or hub data."""

    tokenizer: str = "bytes"
    """'bytes', 'bpe:SIZE', or a tokenizer.json."""

    out: Path = Path("runs/compare")
    """Folder of the comparison."""

    precision: Precision = "auto"
    """Arithmetic of training and measurements; 'auto' takes the fastest that is safe on this device."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    jobs: int | None = None
    """Runs trained at once, which share the CPU threads; when not given, one per thread on the CPU and one on CUDA.
    Small models train faster side by side than with more threads each."""

    threads: int | None = None
    """CPU threads in all; all cores when not given."""

    measure: Annotated[MeasureConfig, tyro.conf.arg(name="")] = field(default_factory=MeasureConfig)

    fresh: bool = False
    """Move what is in --out aside and start over."""

    def __post_init__(self) -> None:
        _check_archs(self.archs)
        _check_context(self.context, self.measure.tokens_per_batch)
        _check_positive(self, "params", "seeds", "steps", "batch_size", "seq_len", "eval_tokens")
        _check_positive(self, *(name for name in ("threads", "jobs") if getattr(self, name) is not None))
        if self.position_len is not None and self.position_len < self.seq_len:
            raise ValueError(f"--position-len {self.position_len} is shorter than --seq-len {self.seq_len}")


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """Measure training, prefill and decode speed, peak memory and state size at each context length."""

    archs: tuple[str, ...] = ARCHS
    """Architectures; the first is the baseline that the report compares the others with."""

    params: Count = 1_000_000
    """Parameters of every model, reached within 2 % (1M, 500k)."""

    context: tuple[int, ...] = (128, 512, 2048, 8192)
    """Context lengths in tokens."""

    vocab_size: int = 256
    """Vocabulary of the models; tokens are drawn at random."""

    out: Path = Path("runs/context")
    """Folder that gets context.jsonl, context.csv and the report."""

    precision: Precision = "auto"
    """Arithmetic; 'auto' takes the fastest that is safe on this device."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    threads: int | None = None
    """CPU threads in all; all cores when not given."""

    measure: Annotated[MeasureConfig, tyro.conf.arg(name="")] = field(default_factory=MeasureConfig)

    fresh: bool = False
    """Move what is in --out aside and start over."""

    def __post_init__(self) -> None:
        _check_archs(self.archs)
        _check_context(self.context, self.measure.tokens_per_batch)
        _check_positive(self, "params", "vocab_size")
        if self.threads is not None:
            _check_positive(self, "threads")


@dataclass(frozen=True, kw_only=True)
class LearningRateConfig:
    """Try several peak learning rates per architecture under one rule and say which is best.

    The rule: same steps, same data in the same order, same schedule; the lowest validation bits per byte wins. The rate
    is thus chosen on the same held-out text that `crossover compare` reports, for every architecture alike. A winner at
    the end of the list means that the list is too short.
    """

    archs: tuple[str, ...] = ARCHS
    """Architectures to tune."""

    rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3, 8e-3)
    """Peak learning rates to try."""

    params: Count = 1_000_000
    """Parameters of every model, reached within 2 % (1M, 500k)."""

    seeds: int = 1
    """Runs per rate, with seeds 0, 1, ...; the mean over seeds decides."""

    steps: int = 400
    """Optimizer steps of every run."""

    batch_size: int = 4
    """Sequences per step."""

    seq_len: int = 256
    """Tokens per training sequence."""

    eval_tokens: Count = 65_536
    """Held-out tokens read by one validation, always the same ones."""

    data: str = "stdlib"
    """'stdlib' (the running Python's standard library), a file or folder, or hf:NAME[:CONFIG]."""

    column: str = "text"
    """Column that holds the text in JSONL, Parquet or hub data."""

    tokenizer: str = "bytes"
    """'bytes', 'bpe:SIZE', or a tokenizer.json."""

    out: Path = Path("runs/lr")
    """Folder that gets the runs and lr.csv."""

    precision: Precision = "auto"
    """Arithmetic of training; 'auto' takes the fastest that is safe on this device."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    jobs: int | None = None
    """Runs trained at once, which share the CPU threads; when not given, one per thread on the CPU and one on CUDA.
    Small models train faster side by side than with more threads each."""

    threads: int | None = None
    """CPU threads in all; all cores when not given."""

    fresh: bool = False
    """Move what is in --out aside and start over."""

    def __post_init__(self) -> None:
        _check_archs(self.archs)
        if not self.rates:
            raise ValueError("--rates names no learning rate")
        if len(set(self.rates)) < len(self.rates):
            raise ValueError(f"--rates names a rate twice: {' '.join(map(str, self.rates))}")
        _check_positive(self, "rates", "params", "seeds", "steps", "batch_size", "seq_len", "eval_tokens")
        _check_positive(self, *(name for name in ("threads", "jobs") if getattr(self, name) is not None))


@dataclass(frozen=True, kw_only=True)
class KernelsConfig:
    """Time each operation on the CPU against plain PyTorch, torch.compile and the definition, and models against peers.

    The contestants of a row take turns, so that whatever else the machine does hits all alike. Small whole models are
    compared with those of Hugging Face's transformers where it is installed (pip install 'crossover[hf]').
    """

    ops: tuple[str, ...] = ()
    """Operations; all when not given."""

    lengths: tuple[int, ...] = (256, 1024, 4096)
    """Sequence lengths of the selective scan, in tokens; other operations are timed at one of their own, at most the
    longest of these."""

    batch_size: int = 8
    """Sequences."""

    channels: int = 512
    """Channels of every operation."""

    threads: int | None = None
    """Most CPU threads; all cores when not given. Every row is measured with one thread as well."""

    time_box: float = 1.5
    """Seconds spent on the repeats of one row. The definition is left out where one repeat would take twice as long."""

    compile_box: float = 75.0
    """Seconds that torch.compile may take in all; what comes later is left out. 0 leaves out all."""

    models: bool = True
    """Whether whole models are timed against Hugging Face's, too."""

    out: Path = Path("runs/kernels")
    """Folder that gets kernels.jsonl, a line as each row is measured, and kernels.md."""

    def __post_init__(self) -> None:
        _check_context(self.lengths, None, option="--lengths")
        _check_positive(self, "batch_size", "channels", "time_box")
        if self.channels % 16:
            raise ValueError(f"--channels must be a multiple of 16, got {self.channels}")
        if self.threads is not None:
            _check_positive(self, "threads")


@dataclass(frozen=True, kw_only=True)
class DoctorConfig:
    """Check every operation on this machine: each backend and dtype, values and gradients, in under a minute.

    A backend that fails is switched off for training and measurements here, until the doctor is run again or versions
    change. The exit code is 1 if something failed.
    """

    ops: tuple[str, ...] = ()
    """Operations; all when not given."""

    json: Path | None = None
    """File that gets the same as JSON."""


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """Rebuild the report of a folder from its files: report.html, report.md, context.csv, quality.csv, summary.json."""

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Folder of a comparison, or of runs."""


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
    the model reads a source and writes a target (encdec, seq2seq), each prompt is a source, and the targets alone are
    printed, one after the other.
    """

    folder: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="DIR")]
    """Run folder, checkpoint folder or saved model."""

    prompt: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="PROMPT ...")] = ()
    """Texts to continue, or sources; - reads one from standard input. Without any, a model begins a document, unless it
    reads sources."""

    prompt_file: tuple[Path, ...] = ()
    """Files in UTF-8, each a prompt from its first to its last byte, the newline at its end included."""

    max_new_tokens: int = 200
    """Most tokens to add to each prompt, or in a target."""

    temperature: float = 0.8
    """Sampling temperature; 0 takes the most likely token."""

    top_k: int | None = None
    """Sample among this many most likely tokens."""

    top_p: float | None = 0.95
    """Sample among the most likely tokens that together have this probability."""

    repetition_penalty: float = 1.0
    """Makes tokens that the text (of a target: without its source) already holds less likely: 1 does nothing, 1.2 is
    usual."""

    stop: tuple[str, ...] = ()
    """Texts, each of them one token, that end a continuation or a target when the model writes them."""

    stop_at_end: bool = True
    """Whether a continuation ends where the model ends the document, and a target where the model ends it."""

    prefill_chunk: int = 2048
    """Tokens of each prompt that are read at once; fewer need less memory. A source is always read whole."""

    seed: int = 0
    """Seed of the sampling."""

    device: str = "auto"
    """'auto', 'cpu' or 'cuda'."""

    def __post_init__(self) -> None:
        _check_positive(self, "max_new_tokens", "prefill_chunk")
        if self.top_k is not None:
            _check_positive(self, "top_k")
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(f"--repetition-penalty must be positive, got {self.repetition_penalty}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"--temperature must be 0 or more, got {self.temperature}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p must be in (0, 1], got {self.top_p}")
