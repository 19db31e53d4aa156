"""Writes comparison folders in the formats of the trainer and the context benchmark, with numbers from formulas."""

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from crossover.benchmarks.context.cell import Cell, Status
from crossover.train.score import BITS_PER_BYTE, Score

LABELS = {"transformer": "Transformer", "s4d": "S4D", "mamba": "Mamba", "jamba": "Jamba", "lstm": "LSTM"}
ARCHS = tuple(LABELS)
CONTEXT = (128, 512, 2048, 8192)
ACCURACY = Score(name="accuracy", unit="accuracy", words="share of right answers", better="higher")
REFERENCES = {"zlib": 1.86, "xz": 1.47}

# final bits per byte, training tokens/s at 128 tokens and its fall with length, seconds factor, state bytes
_QUALITY = {"transformer": 2.31, "s4d": 2.55, "mamba": 2.12, "jamba": 2.18, "lstm": 2.62}
_SPEED = {"transformer": 40e3, "s4d": 31e3, "mamba": 24e3, "jamba": 20e3, "lstm": 9e3}
_ACTIVE = {"jamba": 0.62}

SETTINGS: dict[str, Any] = {
    "tokens_per_batch": 8192,
    "prompts": 1,
    "decode_tokens": 32,
    "time_box": 2.0,
    "min_repeats": 3,
    "timeout": 300.0,
    "memory_limit": 3 * 2**30,
    "precision": "fp32",
    "device": "cpu",
    "threads": 2,
    "allocator": "freed memory is kept for reuse (glibc mallopt), for every model alike",
}


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=1))


def append_line(path: Path, text: str) -> None:
    with path.open("a") as file:
        file.write(text)


def corpus(digest: str = "c0ffee" * 10 + "abcd") -> dict[str, Any]:
    return {
        "name": "stdlib of Python 3.11.7",
        "digest": digest,
        "n_documents": 533,
        "n_train_documents": 506,
        "n_val_documents": 27,
        "train_bytes": 9_880_000,
        "val_bytes": 520_000,
        "train_tokens": 9_880_000,
        "val_tokens": 520_000,
        "reference_bits_per_byte": REFERENCES,
    }


def write_run(
    folder: Path,
    arch: str,
    *,
    seed: int = 0,
    steps: int = 600,
    n_params: int | None = None,
    status: str = "done",
    digest: str | None = None,
    seq_len: int = 512,
    eval_tokens: int = 65_536,
    score: Score | None = None,
) -> Path:
    """Writes one finished (or otherwise ended) run.

    Without a score it is one of a version that knew bits per byte alone. Where more is better, the value is the share
    of 10 bits per byte that the model saves.
    """
    home = folder / f"{arch}-s{seed}"
    i = ARCHS.index(arch)
    n_params = n_params or (1_000_000 + 2_900 * i if i % 2 == 0 else 1_000_000 - 2_900 * i)
    tokens_per_step = 8 * seq_len
    tag, key = (score or BITS_PER_BYTE).tag, (score or BITS_PER_BYTE).key
    provenance = {
        "git_commit": "0123456789abcdef0123456789abcdef01234567",
        "git_dirty": False,
        "command": f"python -m crossover.train --name {arch}-s{seed}",
        "python": "3.11.7",
        "torch": "2.13.0+cpu",
        "platform": "Linux-6.1-x86_64",
        "cpu": "AMD EPYC 9R45",
        "device": "cpu",
        "threads": 2,
        "precision": "fp32",
        "started": "2026-03-02T10:11:12+00:00",
        "hostname_hash": "89abcdef0123",
        "peak_memory_method": "resident set",
    }
    facts = {
        "arch": arch,
        "label": LABELS[arch],
        "seed": seed,
        "n_params": n_params,
        "n_active_params": int(n_params * _ACTIVE.get(arch, 1)),
        "flops_per_token": 6.1e6 * (1 + 0.1 * i),
        "state_bytes": seq_len * 2048 if arch == "transformer" else 98_304 * (1 + i % 3),
    }
    train: dict[str, Any] = {
        "steps": steps,
        "batch_size": 8,
        "seq_len": seq_len,
        "grad_accumulation": 1,
        "precision": "auto",
    }
    train |= {"eval_tokens": eval_tokens, "final_eval_tokens": 262_144}
    optim = {"lr": 1e-3 * (1 + i), "schedule": "cosine", "warmup": 0.05, "weight_decay": 0.1, "clip": 1.0}
    data = {"source": "stdlib", "tokenizer": "bytes", "packing": "concat"}
    write_json(
        home / "run.json",
        {
            "name": home.name,
            **facts,
            "config": {"name": home.name, "seed": seed, "optim": optim, "train": train, "data": data},
            "model": {"d_model": 64 * (2 + i % 3), "n_layers": 4 + 2 * (i % 2)},
            "corpus": corpus(digest or corpus()["digest"]),
            "provenance": provenance,
            **({"score": score.to_dict(), "objective": {"kind": "invented", "rate": 0.15}} if score else {}),
        },
    )
    lines, speed = [], _SPEED[arch] * 0.9
    for step in range(0, steps + 1, max(1, steps // 12)):
        seconds = step * tokens_per_step / speed
        value = _QUALITY[arch] + 0.013 * seed + (8 - _QUALITY[arch]) * math.exp(-6.5 * (step / steps) ** 0.55)
        here = {"step": step, "tokens": step * tokens_per_step, "seconds": seconds}
        if step:
            lines.append({**here, "train/loss": value * math.log(2), "train/lr": 1e-3, "perf/tokens_per_second": speed})
        shown = 1 - value / 10 if score and score.better == "higher" else value
        lines.append({**here, "val/loss": value * math.log(2), tag: shown})
        lines.append({"step": step, "sample": "def f(x):\n    return x"})
    (home / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    last = [line for line in lines if "val/loss" in line][-1]
    write_json(
        home / "result.json",
        {
            **facts,
            "status": status,
            "error": None if status == "done" else "the loss is nan",
            **({"score": score.name} if score else {}),
            key: last[tag],
            "val_loss": last["val/loss"],
            "tokens": last["tokens"],
            "steps": steps,
            "train_seconds": last["seconds"],
            "tokens_per_second": speed,
            "peak_bytes": 400_000_000,
            "precision": "fp32",
            "device": "cpu",
            "backend": {"linear_cross_entropy": ["torch"], "attention" if i % 3 == 0 else "selective_scan": ["torch"]},
            "corpus_digest": corpus()["digest"],
            **({"position_bits_per_byte": _positions(arch, seq_len)} if score in (None, BITS_PER_BYTE) else {}),
            "sample": f"def {arch}(self, name):\n    <b>if</b> name is None:\n        return self.{arch}\x00s\n",
        },
    )
    return home


def _positions(arch: str, seq_len: int) -> list[dict[str, Any]]:
    bounds = (0, *(2**k for k in range((4 * seq_len).bit_length())))
    rows = []
    for start, stop in pairwise(bounds):
        value = _QUALITY[arch] + 3.5 * (stop**-0.55)
        if arch == "transformer" and start >= seq_len:
            value += 0.8 * math.log2(stop / seq_len)
        rows.append({"start": start, "stop": stop, "bits_per_byte": value, "n_tokens": 100 * (stop - start)})
    return rows


def cell(arch: str, phase: str, context_len: int, *, status: Status | None = None, **changes: Any) -> Cell:
    """One context cell; the Transformer's training slows down beyond some hundred tokens and overflows at 8,192."""
    is_attention = arch in ("transformer", "jamba")
    slow = 1 + context_len / (500 if arch == "transformer" else 4000) if is_attention else 1.0
    speed = {"train": 1.0, "prefill": 3.1}.get(phase, 0.012) * _SPEED[arch] / slow
    overflows = arch in ("transformer", "lstm") and phase == "train" and context_len >= 8192
    status = status or ("out_of_memory" if overflows else "done")
    state = context_len * (2048 if arch == "transformer" else 256) if is_attention else 98_304
    measured = {
        "tokens_per_second": speed,
        "spread": (speed * 0.96, speed * 1.05),
        "repeats": 7,
        "peak_bytes": int(2e8 + slow * (1e8 if phase == "train" else 2e7)),
        "peak_method": "resident set",
        "state_bytes": state,
        "backend": {"attention": ["torch"]},
    }
    values: dict[str, Any] = {
        "arch": arch,
        "label": LABELS[arch],
        "phase": phase,
        "context_len": context_len,
        "n_params": 1_000_000,
        "n_active_params": 1_000_000,
        "batch_size": max(1, 8192 // context_len) if phase == "train" else 1,
        "dtype": "fp32",
        "status": status,
        "error": None if status == "done" else "can't allocate memory",
        "model": {},
        "settings": SETTINGS,
        "provenance": {"cpu": "AMD EPYC 9R45", "device": "cpu", "torch": "2.13.0+cpu", "git_commit": "0123456789ab"},
        **(measured if status == "done" else {}),
    }
    return Cell(**{**values, **changes})


def append_cells(folder: Path, *cells: Cell) -> None:
    """Adds lines to the context.jsonl of a folder."""
    for cell in cells:
        append_line(folder / "context.jsonl", json.dumps(cell.to_dict()) + "\n")


def write_comparison(
    folder: Path,
    *,
    archs: Sequence[str] = ARCHS,
    seeds: int = 2,
    context: Sequence[int] = CONTEXT,
    score: Score | None = None,
) -> Path:
    """Writes a whole comparison as `crossover compare` leaves it, without its report."""
    folder.mkdir(parents=True, exist_ok=True)
    for arch in archs:
        for seed in range(seeds):
            write_run(folder, arch, seed=seed, score=score)
    (folder / "context.jsonl").unlink(missing_ok=True)
    phases = ("decode", "prefill", "train")
    append_cells(folder, *[cell(arch, phase, L) for L in context for arch in archs for phase in phases])
    config = {"archs": list(archs), "params": 1_000_000, "seeds": seeds, "context": list(context)}
    provenance = {"command": "crossover compare", "cpu": "AMD EPYC 9R45", "device": "cpu"}
    info = {"config": config, "labels": LABELS, "provenance": provenance, "failures": {}}
    write_json(folder / "compare.json", info)
    return folder


LENGTHS = (100, 300)
QUALITY: dict[str, dict[int, Sequence[float]]] = {
    "transformer": {100: (2.00, 2.10, 2.05), 300: (2.00, 2.10, 2.05)},
    "mamba": {100: (1.80, 1.91, 1.84), 300: (1.90, 2.10, 1.97)},
    "lstm": {100: (2.30, 2.41, 2.34), 300: (1.92, 1.99, 1.99)},
}
"""Bits per byte by seed. At 100 Mamba is best; at 300 the LSTM is, by the mean, and Mamba level with it."""
SPEEDS = {"transformer": (100.0, 50.0), "mamba": (99.0, 80.0), "lstm": (40.0, 92.0)}
STATE = {"transformer": (1000, 3000), "mamba": (500, 500), "lstm": (250, 250)}


def write_winners(
    folder: Path,
    *,
    seeds: int = 3,
    quality: Mapping[str, Mapping[int, Sequence[float]]] = QUALITY,
    speeds: Mapping[str, Sequence[float]] = SPEEDS,
) -> Path:
    """Writes a comparison with known winners, ties and crossings: of a speed for each of LENGTHS, and of quality."""
    for arch, by_length in quality.items():
        for length, values in by_length.items():
            for seed, value in enumerate(values[:seeds]):
                home = write_run(folder / "made", arch, seed=seed, seq_len=length)
                home = home.rename(folder / f"{arch}-l{length}-s{seed}")
                result = json.loads((home / "result.json").read_text())
                write_json(home / "result.json", result | {"val_bits_per_byte": value, "tokens": 614_400})
                info = json.loads((home / "run.json").read_text())
                info["config"]["train"]["batch_size"] = 2400 // length
                write_json(home / "run.json", info)
    for arch in quality:
        for i, length in enumerate(LENGTHS):
            speed = speeds[arch][i]
            rate: dict[str, Any] = {"tokens_per_second": speed, "spread": (0.97 * speed, 1.03 * speed)}
            memory: dict[str, Any] = {"peak_bytes": 2**20 * (1 + i), "state_bytes": STATE[arch][i]}
            append_cells(folder, *[cell(arch, phase, length, **rate, **memory) for phase in ("train", "decode")])
    config = {"archs": list(quality), "seeds": seeds, "seq_len": list(LENGTHS), "context": list(LENGTHS)}
    write_json(folder / "compare.json", {"config": config})
    return folder
