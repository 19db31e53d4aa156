"""Losses of short runs, to be compared bit for bit before and after a change that should not touch them.

    python tests/losses.py > before.json           # three steps of every decoder preset and of encdec-1m, in float32
    python tests/losses.py --against before.json   # says what differs; exit code 1 if anything does

With `--smoke runs/smoke` the runs of a finished `make smoke` are read too. Bits agree on one machine only; across
machines float32 agrees to some 1e-5, which tests/test_fixtures.py holds against tests/fixtures/losses.json.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FIXTURES = Path(__file__).with_name("fixtures")
TEXT = FIXTURES / "format-1/text"
PAIRS = FIXTURES / "format-1/pairs.jsonl"

RATES = {
    **dict.fromkeys(("transformer", "gpt2", "mamba3", "gated_deltanet", "samba"), "2e-3"),
    **dict.fromkeys(("mamba", "mamba2"), "4e-3"),
    **dict.fromkeys(("jamba", "lstm"), "8e-3"),
    **dict.fromkeys(("s4", "s4d", "h3"), "1.6e-2"),
}
"""Peak learning rates of decoder presets when losses.json was recorded; they have been tuned again."""


def preset_losses(names: list[str] | None = None) -> dict[str, list[float]]:
    """Training losses of three steps, then the held-out loss, of runs by name; all of them unless `names` are given."""
    from crossover.archs import available

    short = ["--train.steps", "3", "--train.threads", "1", "--train.precision", "fp32", "--train.log-every", "1"]
    quick = ["--train.sample-tokens", "0", "--train.position-len", "0", "--train.final-eval-tokens", "512"]
    size = ["--params", "300k", "--train.batch-size", "4", "--train.seq-len", "64"]
    text = ["--data", str(TEXT), "--data.val-fraction", "0.3"]
    runs = {name: ["--model.preset", name, *size, *text, "--optim.lr", RATES[name]] for name in available()}
    pairs = ["--data", str(PAIRS), "--train.batch-size", "8", "--data.val-fraction", "0.2"]
    runs["encdec-1m"] = [str(ROOT / "configs/encdec-1m.toml"), *pairs]
    with tempfile.TemporaryDirectory() as out:
        cache = ["--data.cache", f"{out}/cache", "--out", out]
        return {
            name: _trained([*words, *short, *quick, *cache, "--name", name], Path(out) / name)
            for name, words in runs.items()
            if names is None or name in names
        }


def _trained(words: list[str], directory: Path) -> list[float]:
    from crossover.train.__main__ import main

    with contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    assert code == 0, (words, code)
    return run_losses(directory)


def run_losses(directory: Path) -> list[float]:
    """Training and held-out losses of a run directory, in the order in which they were written."""
    lines = (directory / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    records = [json.loads(line) for line in lines if line]
    return [value for record in records for key in ("train/loss", "val/loss") if (value := record.get(key)) is not None]


def main() -> int:
    """Prints the losses, or what differs from those of a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="file that this program wrote")
    parser.add_argument("--smoke", type=Path, help="folder of a finished `make smoke`")
    given = parser.parse_args()
    found: dict[str, Any] = {"presets": preset_losses()}
    if given.smoke:
        found["smoke"] = {path.parent.name: run_losses(path.parent) for path in sorted(given.smoke.glob("*/run.json"))}
    if given.against is None:
        import torch
        from crossover.train.record import cpu_model

        print(json.dumps({"cpu": cpu_model(), "torch": torch.__version__, **found}, indent=1))
        return 0
    before = json.loads(given.against.read_text())
    differing = [
        f"{kind}: {name}: {before[kind].get(name)} -> {values}"
        for kind, runs in found.items()
        for name, values in runs.items()
        if before[kind].get(name) != values
    ]
    print("\n".join(differing) or f"equal bit for bit: {', '.join(f'{len(v)} {k}' for k, v in found.items())}")
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
