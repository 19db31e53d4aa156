"""Checks the compiled step of every decoder on this machine, against the model's modules in float64."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ...archs import Decoder, LanguageModel, available, build
from ...kernels.compare import relative_error
from .checks import FLOORS, Check, explained, finite

__all__ = ["DECODE", "decode_checks"]

DECODE = "decode"
"""What the compiled step is called where operations have names."""

_PROMPT, _LENGTH = 5, 12


def decode_checks() -> Iterator[Check]:
    """Decodes some tokens with every decoder: a line for each precision, of the worst of all models."""
    for dtype in (torch.float32, torch.bfloat16):
        where: dict[str, Any] = {
            "op": DECODE,
            "backend": "cpu",
            "device": "cpu",
            "dtype": str(dtype).removeprefix("torch."),
        }
        found: list[tuple[float, float, str]] = []  # error, allowed, architecture
        try:
            for arch in available():
                found.append((*_errors(arch, dtype), arch))
        except Exception as error:  # whatever a broken kernel raises is what is looked for
            yield Check(**where, **explained(error))
            continue
        error, allowed, arch = max(found, key=lambda entry: entry[0] / entry[1])
        is_ok = error <= allowed
        yield Check(
            **where,
            outputs=finite(error),
            allowed=allowed,
            status="ok" if is_ok else "failed",
            reason=None if is_ok else f"logits of {arch} are off by {error:.1e}, allowed {allowed:.1e}",
        )


@torch.no_grad()
def _errors(arch: str, dtype: torch.dtype) -> tuple[float, float]:
    """The relative error of a small model's compiled step, and what it may be: twice what its modules lose."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = build(arch, d_model=24, n_layers=2, vocab_size=19).eval().to(dtype)
        tokens = torch.randint(19, (2, _LENGTH))
    exact = copy.deepcopy(lm).double()
    expected = exact(tokens, exact.init_state(2, _LENGTH)).logits[:, _PROMPT:]
    by_modules = lm(tokens, lm.init_state(2, _LENGTH)).logits[:, _PROMPT:]
    allowed = 2 * relative_error(by_modules, expected) + FLOORS[dtype]
    return relative_error(_compiled(lm, tokens), expected), allowed


def _compiled(lm: LanguageModel, tokens: Tensor) -> Tensor:
    decoder = Decoder(lm, lm.prefill(tokens[:, :_PROMPT], lm.init_state(2, _LENGTH))[1])
    logits = torch.stack([decoder(step) for step in tokens[:, _PROMPT:].unbind(1)], 1)
    if decoder.why is not None:
        raise RuntimeError(f"no compiled step of {lm.config.pattern}: {decoder.why}")
    return logits
