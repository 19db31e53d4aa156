"""The `crossover` command. Importing it, and `--help`, load nothing heavier than the parser."""

import importlib.util
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg, subcommand

from ..train.command_line import understand
from ..train.plugins import take
from ..train.streams import lasting_streams, one_line_warnings
from .comparison.options import CompareConfig
from .context.options import ContextConfig
from .operations.options import DoctorConfig, KernelsConfig
from .recall.options import RecallConfig
from .report.options import ReportConfig
from .trained.options import ConvertConfig, GenerateConfig

__all__ = ["main"]

_DESCRIPTION = (
    "At which context length does which sequence model win? Trains Transformer, S4D, Mamba, Jamba and LSTM language "
    "models at equal budgets, measures them against the context length, and writes one report."
)


@dataclass(frozen=True)
class _Train:
    """Train one model; has its own options: crossover train --help."""


@dataclass(frozen=True)
class _LmEval:
    """Score one of our models with the Language Model Evaluation Harness, whose options it takes; needs [eval]."""


@dataclass(frozen=True)
class _Bench:
    """Measure one thing: speed and memory against context length, recall, or operations against their peers."""

    what: Annotated[
        Annotated[ContextConfig, subcommand("context")]
        | Annotated[RecallConfig, subcommand("recall")]
        | Annotated[KernelsConfig, subcommand("kernels")],
        arg(name=""),
    ]


_Command = (
    Annotated[CompareConfig, subcommand("compare")]
    | Annotated[_Train, subcommand("train")]
    | Annotated[_Bench, subcommand("bench")]
    | Annotated[ReportConfig, subcommand("report")]
    | Annotated[GenerateConfig, subcommand("generate")]
    | Annotated[ConvertConfig, subcommand("convert")]
    | Annotated[_LmEval, subcommand("lm_eval")]
    | Annotated[DoctorConfig, subcommand("doctor")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    0 done, 1 something failed, 2 a request that cannot be met (one line on stderr), 129, 130 or 143 stopped.
    """
    lasting_streams()
    typed = list(sys.argv[1:] if argv is None else argv)
    try:
        words = take(typed)
        if words[:1] == ["train"]:
            from ..train.__main__ import main as train

            return train(words[1:], prog="crossover train")
        if words[:1] == ["lm_eval"]:
            return _lm_eval(words)
        parsed = understand(_Command, words, prog="crossover", description=_DESCRIPTION)
        with one_line_warnings():
            return _run(parsed.what if isinstance(parsed, _Bench) else parsed, ["crossover", *typed])
    except ValueError as error:
        print(f"crossover: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"crossover: {error.filename or 'the system'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ncrossover: stopped", file=sys.stderr)
        return 130


def _lm_eval(words: list[str]) -> int:
    """Runs the command of the harness, which reads the command line itself and then knows our models."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError("lm_eval is the Language Model Evaluation Harness: pip install lm-eval")
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    from .trained import lm_eval  # noqa: F401  # registers --model crossover

    sys.argv = words
    cli_evaluate()
    return 0


def _run(command: object, words: Sequence[str]) -> int:
    match command:
        case CompareConfig():
            from .comparison.compare import compare

            return compare(command, command=words)
        case ContextConfig():
            from .comparison.compare import bench_context

            return bench_context(command, command=words)
        case RecallConfig():
            from .recall.bench import bench_recall

            return bench_recall(command, command=words)
        case KernelsConfig():
            from .operations.bench import bench_kernels

            return bench_kernels(command, command=words)
        case DoctorConfig():
            from .operations.doctor import doctor

            return doctor(command)
        case ReportConfig(folders=folders, out=out, baseline=baseline):
            from .report.write import write_between, write_report

            print(
                write_between(folders, out, baseline=baseline) if out else write_report(folders[0], baseline=baseline)
            )
            return 0
        case GenerateConfig():
            from .trained.generate import generate

            return generate(command)
        case ConvertConfig():
            from .trained.convert import convert

            return convert(command)
        case _:
            raise AssertionError(f"no command handles {type(command).__name__}")


if __name__ == "__main__":
    sys.exit(main())
