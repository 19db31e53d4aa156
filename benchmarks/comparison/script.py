"""The main job from Python."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ...train import plugins
from ...train.command_line import understand
from .options import CompareConfig

__all__ = ["compare"]


def compare(**options: Any) -> Path:
    """Does what `crossover compare` does, with its options as keyword arguments, and returns the folder of the results.

        from crossover.benchmarks import compare, load_results

        if __name__ == "__main__":  # measurements run in processes of their own
            folder = compare(archs=["mamba", "lstm"], params="300k", steps=50, context=[128, 512], out="runs/small")
            rows = load_results(folder)

    Args:
        options: --seq-len is seq_len=256, an option with several values takes a list, --fresh is fresh=True, and one
            with a dot is in a dict, as in data={"source": "texts/", "column": "body"}. `import_` names modules.

    Returns:
        The folder. What did not finish is said on standard error and in the results.

    Raises:
        ValueError: before any work is done, if an option does not exist or the comparison cannot be run.
        KeyboardInterrupt: if it was stopped; the same call goes on from there.
    """
    from .compare import compare as run

    words = list(_words(options))
    config = understand(CompareConfig, plugins.take(words), prog="compare")
    code = run(config, command=["crossover", "compare", *words])
    if code > 128:
        raise KeyboardInterrupt
    return config.out


def _words(options: Mapping[str, Any], path: str = "--") -> Iterator[str]:
    """The words of a command line that say the same."""
    for name, value in options.items():
        option = path + name.rstrip("_").replace("_", "-")
        if isinstance(value, Mapping):
            yield from _words(value, f"{option}.")
        elif isinstance(value, bool):
            yield option if value else option.replace("--", "--no-", 1)
        elif isinstance(value, list | tuple) and name in ("import_", "set"):  # options that are repeated
            yield from (word for entry in value for word in (option, str(entry)))
        elif value is not None:
            yield from (option, *map(str, value if isinstance(value, list | tuple) else [value]))
