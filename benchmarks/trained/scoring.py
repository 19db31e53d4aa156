"""Likelihoods of texts after others, and greedy continuations: what evaluation harnesses ask of a language model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ...archs import LanguageModel
from ...archs.generation import NO_TOKEN
from ...train.data.tokenizer import Tokenizer

__all__ = ["complete", "encode_pair", "loglikelihoods", "windows"]

Pair = tuple[list[int], list[int]]
"""Ids of a context, at least one, and of its continuation."""

_TOKENS_AT_ONCE = 1 << 14

_HEAD_TOKENS = 4096
"""Tokens whose logits are in memory at once."""


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Pair:
    """The tokens of both texts together, split before the first that holds a byte of the continuation.

    Spaces at the end of the context go to the continuation, as tokens have their space before the word. Where nothing
    is left before the split, the context is the separator of documents.
    """
    stripped = context.rstrip(" ")
    continuation = context[len(stripped) :] + continuation
    ids = tokenizer.encode(stripped + continuation)
    ends = tokenizer.bytes_per_token[ids].cumsum()
    split = int((ends <= len(stripped.encode())).sum()) if continuation else len(ids)
    return ids[:split].tolist() or [tokenizer.separator], ids[split:].tolist()


def windows(ids: list[int], prefix: int, max_len: int | None) -> Iterator[Pair]:
    """Splits a text into pairs that predict each token once and show at most `max_len` (None: all) to the model.

    The first token is predicted from `prefix`; every later window but the last one from the token before it, and the
    last one has as much context as fits.
    """
    size = max_len or len(ids)
    known = [prefix, *ids]
    for start in range(0, len(ids), max(size, 1)):
        stop = min(start + size, len(ids))
        yield known[max(0, stop - size) : start + 1], ids[start:stop]


@torch.inference_mode()
def loglikelihoods(
    lm: LanguageModel,
    pairs: Sequence[Pair],
    *,
    max_len: int | None = None,
    batch_size: int | None = 8,
    vocab_size: int | None = None,
) -> list[tuple[float, bool]]:
    """The log-probability in nats of each continuation, and whether greedy decoding gives just that.

    A continuation without tokens is no answer: it has no probability and is not greedy.

    Args:
        lm: a decoder, in evaluation mode.
        pairs: contexts and continuations; contexts lose their beginning where both are longer than max_len.
        max_len: most tokens that the model reads at once; None means all.
        batch_size: sequences of one forward pass. Shorter ones are padded on the right, which no causal model sees.
            None takes as many as make about 16,384 tokens.
        vocab_size: tokens of the tokenizer, beyond which greedy decoding takes none; None means all of the model.

    Raises:
        ValueError: if a continuation alone is longer than max_len.
    """
    device = lm.embedding.weight.device
    results: list[tuple[float, bool]] = [(-math.inf, False)] * len(pairs)
    ids = [context + continuation for context, continuation in pairs]
    order = sorted((i for i in range(len(pairs)) if pairs[i][1]), key=lambda i: -len(ids[i]))
    while order:
        n_rows = max(1, _TOKENS_AT_ONCE // len(ids[order[0]])) if batch_size is None else batch_size
        rows, order = order[:n_rows], order[n_rows:]
        inputs = [torch.tensor(ids[i][:-1] if max_len is None else ids[i][:-1][-max_len:]) for i in rows]
        sizes = [len(pairs[i][1]) for i in rows]
        if any(size > len(seen) for size, seen in zip(sizes, inputs, strict=True)):
            raise ValueError(f"a continuation of {max(sizes)} tokens is longer than max_len={max_len}")
        tokens = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(device)
        targets = torch.full_like(tokens, NO_TOKEN)
        for target, seen, i in zip(targets, inputs, rows, strict=True):
            wanted = pairs[i][1]
            target[len(seen) - len(wanted) : len(seen)] = target.new_tensor(wanted)
        scores, greedy = _score(lm, tokens, targets, vocab_size)
        for i, score, best in zip(rows, scores, greedy, strict=True):
            results[i] = (score.item(), bool(best))
    return results


def _score(lm: LanguageModel, tokens: Tensor, targets: Tensor, vocab_size: int | None) -> tuple[Tensor, Tensor]:
    """Log-probability of the targets of each row, (B,) float64, and whether each is the most likely token, (B,) bool.

    Texts are read in chunks: neither the outputs nor the logits of all tokens, (B, L), are ever in memory. Where a
    target is NO_TOKEN nothing is scored.
    """
    scores = torch.zeros(len(tokens), dtype=torch.float64, device=tokens.device)
    greedy = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    read = 0
    for x, _ in lm.hidden_in_chunks(tokens, lm.init_state(*tokens.shape)):
        of_chunk = targets[:, read : read + x.shape[1]]
        read += x.shape[1]
        row, at = (of_chunk != NO_TOKEN).nonzero(as_tuple=True)
        for rows, places in zip(row.split(_HEAD_TOKENS), at.split(_HEAD_TOKENS), strict=True):
            logits, wanted = lm.logits(x[rows, places]).float(), of_chunk[rows, places]
            found = logits.log_softmax(-1).gather(-1, wanted[:, None])[:, 0]
            scores.index_add_(0, rows, found.double())
            greedy[rows[logits[:, :vocab_size].argmax(-1) != wanted]] = False
    return scores, greedy


def complete(
    lm: LanguageModel,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    stops: Sequence[str] = (),
    max_new_tokens: int = 256,
    max_len: int | None = None,
) -> str:
    """The most likely continuation, token by token, up to the first of `stops` (left out) or the end of the document.

    The prompt loses its beginning where it and max_new_tokens are longer than max_len.

    Raises:
        ValueError: if max_new_tokens leave no room for the prompt.
    """
    if max_len is not None and max_new_tokens >= max_len:
        raise ValueError(f"max_new_tokens={max_new_tokens} leave no room for a prompt in max_len={max_len}")
    ids = tokenizer.encode(prompt).tolist() or [tokenizer.separator]
    ids = ids if max_len is None else ids[-(max_len - max_new_tokens) :]

    def holds_stop(row: int, new: Tensor) -> bool:
        text = tokenizer.decode(new.tolist())
        return any(stop in text for stop in stops)

    (tokens,) = lm.generate(
        [ids],
        max_new_tokens,
        temperature=0,
        vocab_size=tokenizer.vocab_size,
        stop_tokens=[tokenizer.separator],
        until=holds_stop if stops else None,
    )
    new = tokens[len(ids) :].tolist()
    text = tokenizer.decode(new[:-1] if new[-1:] == [tokenizer.separator] else new)
    return text[: min((text.index(stop) for stop in stops if stop in text), default=len(text))]
