"""Our trained models in the Language Model Evaluation Harness; needs the extra [eval].

    crossover lm_eval --model crossover --model_args folder=runs/compare/mamba-s0 --tasks piqa

takes all options of the `lm_eval` command (`--device cpu` where there is no GPU), and `--import MODULE`; in Python it
is `lm_eval.simple_evaluate(model=CrossoverLM(folder), ...)`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]

from ...archs import LanguageModel
from ...train.runtime import choose_device
from .generate import opening, tokenizer_of, weights_of
from .scoring import complete, encode_pair, loglikelihoods, windows

__all__ = ["CrossoverLM"]


@register_model("crossover")
class CrossoverLM(LM):
    """A decoder of a run folder, a checkpoint or a saved model, with the tokenizer beside it."""

    def __init__(
        self,
        folder: str | Path,
        *,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str = "auto",
        max_len: int | None = None,
    ) -> None:
        """Loads the model.

        Args:
            folder: as in `crossover generate`.
            batch_size: sequences scored at once, or "auto", which makes it as many as have some thousand tokens.
            max_batch_size: given by the harness and not used.
            device: "auto", "cpu" or "cuda".
            max_len: most tokens shown at once, such as the length of training for a model that does not extrapolate;
                None means all, or the most that learned positions allow.

        Raises:
            ValueError: if the folder holds no model, no tokenizer for it, or an encoder, or a size is none.
        """
        super().__init__()
        folder = Path(folder)
        weights = weights_of(folder)
        self._device = choose_device(device)
        with opening(folder, weights):
            self.lm = LanguageModel.from_pretrained(weights, device=self._device).eval()
        self.lm.init_state(1, 1, device="meta")  # an encoder refuses
        self.tokenizer = tokenizer_of(folder, weights, self.lm.config.vocab_size)
        self.max_len = max_len or self.lm.config.max_positions
        self.batch_size = _batch_size(batch_size)

    def loglikelihood(self, requests: list[Any], **options: Any) -> list[tuple[float, bool]]:
        """Scores (context, continuation) of each request: nats, and whether the continuation is the greedy one."""
        return self._score([encode_pair(self.tokenizer, *request.args) for request in requests])

    def loglikelihood_rolling(self, requests: list[Any], **options: Any) -> list[float]:
        """Scores the text of each request in nats, each token from as many before it as max_len allows."""
        totals = []
        for request in requests:
            ids = self.tokenizer.encode(request.args[0]).tolist()
            parts = self._score(list(windows(ids, self.tokenizer.separator, self.max_len)))
            totals.append(sum(nats for nats, _ in parts))
        return totals

    def generate_until(self, requests: list[Any], **options: Any) -> list[str]:
        """Continues the prompt in (prompt, options) of each request greedily.

        Raises:
            ValueError: if a task asks for sampling.
        """
        texts = []
        for request in requests:
            prompt, wanted = request.args
            if wanted.get("do_sample", False):
                raise ValueError("this model decodes greedily: set do_sample to false in the task's generation_kwargs")
            until = wanted.get("until") or ()
            texts.append(
                complete(
                    self.lm,
                    self.tokenizer,
                    prompt,
                    stops=(until,) if isinstance(until, str) else until,
                    max_new_tokens=wanted.get("max_gen_toks", 256),
                    max_len=self.max_len,
                )
            )
        return texts

    def _score(self, pairs: list[tuple[list[int], list[int]]]) -> list[tuple[float, bool]]:
        return loglikelihoods(
            self.lm, pairs, max_len=self.max_len, batch_size=self.batch_size, vocab_size=self.tokenizer.vocab_size
        )


def _batch_size(given: int | str) -> int | None:
    """What `--batch_size` gives: a number, or None for "auto" and "auto:N"."""
    text = str(given)
    if text.partition(":")[0] == "auto":
        return None
    if not text.isdecimal() or not int(text):
        raise ValueError(f"batch_size={given} must be a whole number of at least 1, or auto")
    return int(text)
