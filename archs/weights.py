"""Tensors of safetensors files, and whether they are those of a model: the one reader of saved weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["built_with", "check_described", "read_tensors", "weights_for"]

M = TypeVar("M", bound=nn.Module)

_MOST_PROBLEMS = 8  # in one message
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)  # in which a model computes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, each in memory of its own: those of the file are not aligned, by which products round.

    Raises:
        ValueError: naming the file, if it cannot be read or is damaged.
    """
    try:
        return {name: tensor.clone() for name, tensor in load_file(path).items()}
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror or error})") from None
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({str(error).partition(chr(10))[0][:200]})") from None


def weights_for(model: nn.Module, path: Path) -> dict[str, Tensor]:
    """The parameters of a model from a file, by name, in the precision of the file.

    Raises:
        ValueError: if the file is damaged, or tensors are missing, unexpected, of another shape or no floats: one
            message names them, and of very many the first.
    """
    tensors = read_tensors(path)
    if problems := misfits(dict(model.named_parameters()), tensors):
        raise ValueError(f"{path}: the tensors are not those of the model: {problems}")
    return tensors


def built_with(build: Callable[[], M], path: Path) -> M:
    """A model with the parameters of a file, in their precision.

    It is built without memory first, so that a config of any size allocates no more than the file holds.

    Raises:
        ValueError: as `weights_for`.
    """
    with torch.device("meta"):
        model = build()
    model.load_state_dict(weights_for(model, path), assign=True)
    return model


def check_described(model: nn.Module, build: Callable[[], nn.Module]) -> None:
    """Raises a ValueError unless a model is what its config describes, so that a file of both is read as it is.

    Args:
        model: any of ours, changed by hand or not.
        build: makes one from the config.
    """
    with torch.device("meta"):
        expected = build()
    problems = misfits(dict(expected.named_parameters()), dict(model.named_parameters()))
    found = dict(model.named_modules())
    for name, wanted in expected.named_modules():
        # widths are those of the parameters; what else decides what is computed stands in options and in eps
        for key in () if problems else ("config", "eps", "prenorm"):
            mine, theirs = getattr(found.get(name), key, None), getattr(wanted, key, None)
            if not isinstance(found.get(name), type(wanted)):
                problems = f"{name} is a {type(found.get(name)).__name__} and should be a {type(wanted).__name__}"
            elif mine != theirs:
                problems = f"{name or 'the model'} has {key}={mine} and should have {theirs}"
    if problems:
        raise ValueError(
            f"the model is no longer what its config describes, and could not be read back: {problems}; build it from a"
            " config that has the change (resize_embeddings changes both), or save its state_dict()"
        )


def misfits(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """Every way in which tensors are not the expected ones, in words; empty where they are."""
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is not expected" for name in found if name not in expected]
    for name in expected:
        if name not in found:
            continue
        if found[name].shape != expected[name].shape:
            problems.append(f"{name} is {tuple(found[name].shape)} and should be {tuple(expected[name].shape)}")
        elif found[name].dtype not in _FLOATS:
            dtype = str(found[name].dtype).removeprefix("torch.")
            problems.append(f"{name} is of {dtype}, where a float of 16 bits or more is needed")
    hidden = len(problems) - _MOST_PROBLEMS
    return "; ".join(problems[:_MOST_PROBLEMS]) + (f"; and {hidden:,} more" if hidden > 0 else "")
