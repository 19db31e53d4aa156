"""Checkpoints that are whole or absent: written aside, synced, and published by one rename.

checkpoints/step-00000500/ has model.safetensors and config.json (what LanguageModel.from_pretrained reads),
optimizer.safetensors, trainer.json, carried.safetensors where states are carried from step to step, and manifest.json
with the size and SHA-256 of each, checked at load because no tensor format notices a flipped byte. Nothing is pickled,
so loading runs no code.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import os
import re
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ..archs.weights import read_tensors, weights_for
from ..files import FormatError, give_usual_mode, read_json, sync, write_json
from .carry import Carried

__all__ = ["CheckpointError", "newest", "prune", "read_state", "restore", "save", "verify"]

_FILES = {"model.safetensors", "config.json", "optimizer.safetensors", "trainer.json"}
_NAME = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint is incomplete or damaged; the message names the file."""


def save(
    root: Path,
    step: int,
    *,
    model: Any,
    optimizer: torch.optim.Optimizer,
    state: Mapping[str, Any],
    carried: Carried | None = None,
    keep: int = 2,
) -> Path:
    """Publishes root/step-XXXXXXXX and then removes all but the `keep` newest.

    Args:
        root: folder of the checkpoints of one run.
        step: number of updates done.
        model: has save_pretrained(directory).
        optimizer: its groups name their parameters (`param_names`).
        state: JSON values for trainer.json; the step and the random number generators are added.
        carried: states that the next step goes on from.
        keep: number of checkpoints to keep, at least 2.

    Raises:
        OSError: if the checkpoint cannot be written; the earlier ones are untouched and nothing is left behind.
    """
    assert keep >= 2, "the newest checkpoint must not be the only one"
    root.mkdir(parents=True, exist_ok=True)
    final = root / f"step-{step:08d}"
    temporary = root / f"{final.name}.tmp-{os.getpid()}"
    temporary.mkdir()
    try:
        model.save_pretrained(temporary)
        tensors = {"optimizer": _optimizer_tensors(optimizer)}
        if carried is not None:
            tensors["carried"] = carried.tensors()
        for name, values in tensors.items():
            safetensors.torch.save_file(values, temporary / f"{name}.safetensors")
            give_usual_mode(temporary / f"{name}.safetensors")
        write_json(temporary / "trainer.json", {"step": step, **state, "rng": _rng()})
        files = sorted(path for path in temporary.iterdir() if path.is_file())
        for path in files:
            sync(path)
        manifest = {path.name: {"bytes": path.stat().st_size, "sha256": _sha256(path)} for path in files}
        write_json(temporary / "manifest.json", {"step": step, "files": manifest})
        sync(temporary)
        if final.exists():  # the same step again, after a resume
            shutil.rmtree(final)
        os.rename(temporary, final)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"cannot write the checkpoint {final}: {error}; earlier checkpoints are whole") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync(root)
    prune(root, keep)
    return final


def prune(root: Path, keep: int) -> None:
    """Removes all but the `keep` newest checkpoints, and what a writer that was killed has left.

    A run directory has one writer, so that nobody is at work on it.
    """
    for old in (*_published(root)[keep:], *root.glob("*.tmp-*")):
        shutil.rmtree(old) if old.is_dir() else old.unlink()


def newest(root: Path) -> Path | None:
    """Returns the newest whole checkpoint below `root`, or None where none was ever published.

    Newer but damaged ones are renamed to step-XXXXXXXX.damaged, with a warning.

    Raises:
        CheckpointError: if every checkpoint there is damaged: a run never starts again silently.
        FormatError: if the newest was written by a newer version.
    """
    damaged: dict[Path, CheckpointError] = {}
    for path in _published(root):
        try:
            verify(path)
        except CheckpointError as error:
            damaged[path] = error
            continue
        for bad, error in damaged.items():
            warnings.warn(f"{error}; continuing from the older {path.name}", RuntimeWarning, stacklevel=2)
            suffixes = itertools.chain([""], (f"-{n}" for n in itertools.count(2)))
            names = (bad.with_name(f"{bad.name}.damaged{suffix}") for suffix in suffixes)
            bad.rename(next(name for name in names if not name.exists()))
        return path
    if damaged:
        reasons = "; ".join(map(str, damaged.values()))
        raise CheckpointError(
            f"{reasons}: no checkpoint is whole; to train again, remove the run directory or choose another --name"
        )
    return None


def read_state(path: Path) -> dict[str, Any]:
    """Returns trainer.json of a checkpoint: what `save` was given as `state`, with "step" and "rng"."""
    return read_json(path / "trainer.json")


def restore(path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, carried: Carried | None = None) -> None:
    """Loads weights, optimiser state, what is carried and torch's random number generators from a checkpoint.

    Call it last, because building a model draws random numbers. Generators of GPUs that are not here are left out.

    Raises:
        CheckpointError: if the checkpoint is of another model.
    """
    _load_model(model, path)
    _load_optimizer(optimizer, path)
    if carried is not None:
        try:
            carried.load(read_tensors(path / "carried.safetensors"))
        except ValueError as error:
            raise CheckpointError(str(error)) from None
    rng = read_state(path)["rng"]
    torch.set_rng_state(_decode(rng["torch"]))
    for index, text in enumerate(rng["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_decode(text), index)


def verify(path: Path) -> None:
    """Checks a checkpoint against its manifest.

    Raises:
        CheckpointError: naming the first file that is missing, has another size or another SHA-256.
    """
    manifest_path = path / "manifest.json"
    try:
        manifest = read_json(manifest_path)
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        if missing := sorted(_FILES - files.keys()):
            raise ValueError(f"it lists no {missing[0]}")
    except OSError as error:
        raise CheckpointError(f"{manifest_path} cannot be read ({error.strerror})") from None
    except FormatError:  # it is whole, and not ours to judge
        raise
    except (ValueError, KeyError, TypeError, AttributeError):
        raise CheckpointError(f"{manifest_path} is damaged") from None
    for name, (size, digest) in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{file} is missing")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes instead of {size}")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} is damaged (its SHA-256 is not the one in manifest.json)")


def _published(root: Path) -> list[Path]:
    """Lists the published checkpoints, newest first."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, reverse=True)]


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}/{key}": value.detach().contiguous()
        for group in optimizer.param_groups
        for name, parameter in zip(group["param_names"], group["params"], strict=True)
        for key, value in optimizer.state[parameter].items()
    }


def _load_model(model: nn.Module, path: Path) -> None:
    try:
        tensors = weights_for(model, path / "model.safetensors")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def _load_optimizer(optimizer: torch.optim.Optimizer, path: Path) -> None:
    try:
        tensors = read_tensors(path / "optimizer.safetensors")
    except ValueError as error:
        raise CheckpointError(str(error)) from None
    states: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, field = key.rpartition("/")
        states.setdefault(name, {})[field] = tensor
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    if states and set(states) != set(names):
        first = sorted(set(states).symmetric_difference(names))[0]
        raise CheckpointError(f"{path / 'optimizer.safetensors'} is of another model (first difference: {first})")
    groups = optimizer.state_dict()["param_groups"]
    indices = [index for group in groups for index in group["params"]]
    state = {index: states[name] for index, name in zip(indices, names, strict=True) if name in states}
    optimizer.load_state_dict({"state": state, "param_groups": groups})  # puts each tensor on its parameter's device


def _rng() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"torch": _encode(torch.get_rng_state()), "cuda": [_encode(state) for state in cuda]}


def _encode(state: Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode("ascii")


def _decode(text: str) -> Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.uint8).copy())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
