"""Decodes one token after another, by a compiled step where the model and the machine allow it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels import ops
from .state import State, States
from .step import Step, bypassed

if TYPE_CHECKING:
    from .model import LanguageModel

__all__ = ["COMPILED", "MODULES", "Decoder"]

COMPILED, MODULES = "compiled", "modules"
"""How a token is decoded: by one call of a compiled program, or by calling the model's modules."""


class Decoder:
    """Takes a state further, one token of each row at a time.

        logits, state = lm.prefill(prompt, lm.init_state(1, max_len))
        decoder = Decoder(lm, state)
        logits = decoder(logits.argmax(-1))

    On the CPU, where the model's matrices are read faster than Python calls its modules, the step is compiled
    (step.py): the weights stay where they are, and what training writes into them is seen. Where something would be
    bypassed, or is not known to the compiled step, the modules run, and `why` says so. Logits are the same to rounding.
    Nothing is recorded for autograd by a compiled step, so it is used without gradients only.

    Only writes through `parameter.data` may be missed, which PyTorch does not count: by what is made of a weight once
    for all tokens, such as decay rates. Write to the parameter itself under torch.no_grad().
    """

    def __init__(self, lm: LanguageModel, state: Sequence[State]) -> None:
        """Takes a state over, as `init_state` or reading a prompt gave it."""
        self._lm, self._state = lm, state if isinstance(state, States) else States(state)
        self._step: Step | None = None
        self._logits, self._dtype = torch.empty(0), torch.float32
        self._vocab_size = 0
        self._unsupported: str | None = None
        self.why: str | None = None
        """Why the model's modules ran for the last token; None where they did not."""

    @property
    def how(self) -> str:
        """COMPILED or MODULES: how the last token was decoded."""
        return COMPILED if self.why is None else MODULES

    @property
    def state(self) -> States:
        """The state after the last token."""
        if self._step is not None:
            self._step.write_numbers()
        return self._state

    def select(self, rows: Tensor) -> None:
        """Goes on with some rows, (n,) int64, with repeats allowed."""
        self._state, self._step, self._unsupported = self.state.select(rows), None, None

    def __call__(self, tokens: Tensor, *, watch: bool = True) -> Tensor:
        """Logits after one token more of each row: (B,) int64 -> (B, V).

        Args:
            tokens: the next of each row.
            watch: whether to look for what has changed of the model, or come between, since the last token. Where
                nothing of others has run since, it takes time for nothing.

        Raises:
            ValueError: as LanguageModel.forward.
        """
        if watch or self._step is None:
            self.prepare()
        if self._step is not None:
            self.why = self._misfit(self._step, tokens)
        if self._step is None or self.why is not None:
            return self._by_modules(tokens)
        ops.note("decode", COMPILED)
        self._step.tokens.copy_(tokens)
        self._step.run()
        return self._logits.clone() if self._dtype == torch.float32 else self._logits.to(self._dtype)

    def prepare(self) -> None:
        """Compiles the step, as the next token would do: unless it is compiled and nothing has changed."""
        self.why = _why_modules(self._lm)
        if self.why is None and self._step is not None and self._step.is_current():
            return
        self._state, self._step = self.state, None
        self.why = self.why or _why_elsewhere(self._lm) or self._unsupported
        if self.why is None:
            try:
                self._logits, self._step = self._described()
            except ops.Unsupported as error:
                self.why = self._unsupported = str(error)

    @torch.inference_mode(False)
    @torch.no_grad()
    def _described(self) -> tuple[Tensor, Step]:
        """The logits and the step that gives them: made of ordinary tensors, which any mode may write to."""
        weight = self._lm.embedding.weight
        self._dtype, self._vocab_size = weight.dtype, len(weight)
        step = Step(self._lm, self._state.n_rows)
        logits = step.through(self._lm, self._state)
        step.finish()
        return logits, step

    def _misfit(self, step: Step, tokens: Tensor) -> str | None:
        """Why the compiled step cannot take these tokens, if it cannot; then modules say what is wrong with them."""
        if step.n_left < 1:
            return "there is no room for a token"
        if tokens.shape != step.tokens.shape or tokens.dtype not in _WHOLE or not tokens.is_cpu:
            return f"tokens are not ({step.n_rows},) int64 on the CPU"
        numbers = tokens.tolist()
        if min(numbers) < 0 or max(numbers) >= self._vocab_size:
            return "a token is not of the vocabulary"
        return None

    def _by_modules(self, tokens: Tensor) -> Tensor:
        ops.note("decode", MODULES)
        out = self._lm(tokens[:, None], self.state)
        self._state, self._step = out.state, None
        return out.logits[:, 0]

    def __getstate__(self) -> dict[str, object]:
        """What a copy takes along: a compiled step has addresses, and belongs to this decoder."""
        return {**vars(self), "_state": self.state, "_step": None}


_WHOLE = (torch.int64, torch.int32)
"""Dtypes that tokens may have."""


def _why_modules(lm: LanguageModel) -> str | None:
    """Why the model's modules must run now, whatever they are; None where they need not."""
    if torch.is_grad_enabled() and any(p.requires_grad for p in lm.parameters()):
        return "gradients are recorded"
    if (backend := ops.forced_backend()) not in (None, "cpu"):
        return f"the {backend} backend is asked for"
    return ops.switched_off().get(("decode", "cpu")) or bypassed()


def _why_elsewhere(lm: LanguageModel) -> str | None:
    """Why no step is compiled for a model where it is; a compiled one notices that its weights have moved."""
    device = lm.embedding.weight.device
    return None if device.type == "cpu" else f"the model is on {device}"
