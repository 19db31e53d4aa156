"""Continues prompts with a decoder: the prompt in chunks, then token by token; and that step as a CUDA graph.

The contract of mixers does the work: chunks equal the full pass, and a left-padded row equals the row alone. Targets of
a source (seq2seq.py) are written by the same loop, from a state that has read it.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from ..options import Positive, Range, check
from .decoding import Decoder
from .inputs import check_count
from .registry import nearest
from .state import State, States

if TYPE_CHECKING:
    from .model import LanguageModel

__all__ = [
    "NO_TOKEN",
    "DecodeGraph",
    "OnToken",
    "Prompts",
    "Sampling",
    "Until",
    "default_chunk_len",
    "extend",
    "filled",
    "generate",
    "rows_of",
    "step_in_place",
    "takes_sampling",
    "without_padding",
]

Function = TypeVar("Function", bound=Callable[..., Any])

CHUNK_LEN, TOKENS_AT_ONCE, LEAST_CHUNK_LEN = 2048, 8192, 256
"""Tokens of one prompt, and of all together, that keep a device busy at bounded memory; and the fewest of one that
repay what a mixer does once for a chunk."""

_Count = Annotated[int, Range(1)]

NO_TOKEN = -1
"""The token that stands for none, in rows that have ended."""

Prompts: TypeAlias = Tensor | Sequence[Tensor | Sequence[int]]
"""(B, L) int64, or a list of rows that may differ in length."""

OnToken: TypeAlias = Callable[[int, Tensor], object]
"""A function that is called with the number of the step, from 0, and the token of each row, (B,) int64."""

Until: TypeAlias = Callable[[int, Tensor], bool]
"""A function of the number of a row and the tokens drawn for it so far, (n,) int64: whether the row ends with them."""


@dataclass(frozen=True)
class Sampling:
    """The options of every `generate`: how a continuation is drawn and where it ends.

    What is set of vocab_size, repetition_penalty, temperature, top_k and top_p applies in this order.

    Args:
        temperature: divides the logits; 0 always takes the most likely token.
        top_k: draws among this many most likely tokens; None means all.
        top_p: draws among the fewest tokens that hold this much probability (arXiv:1904.09751); None means all.
        generator: source of randomness, unused at temperature 0; None means PyTorch's global one.
        vocab_size: draws among the first this many tokens, those of the tokenizer where the model has more for the sake
            of round numbers; None means all.
        repetition_penalty: divides positive logits of tokens that the row already holds, prompt included, and
            multiplies negative ones (CTRL, arXiv:1909.05858, section 4.1, which leaves the sign out); 1 does nothing.
        stop_tokens: tokens that end the row in which they are drawn.
        until: called after every step with the number of each row that has not ended and the tokens drawn for it so
            far, (n,) int64; the row ends where it returns True.
        prefill_chunk: tokens of each prompt read at once, which bounds the memory of activations; None means 2048, and
            fewer of more than 4 prompts.
        on_token: called after every step with its number, from 0, and the token of each row, (B,) int64: -1 in rows
            that had ended before.

    Raises:
        ValueError: if a value is of another type or out of its range.
    """

    temperature: Annotated[float, Range(0)] = 1.0
    top_k: _Count | None = None
    top_p: Annotated[float, Range(above=0, at_most=1)] | None = None
    generator: torch.Generator | None = None
    _: KW_ONLY
    vocab_size: _Count | None = None
    repetition_penalty: Positive = 1.0
    stop_tokens: tuple[int, ...] = ()
    until: Until | None = None
    prefill_chunk: _Count | None = None
    on_token: OnToken | None = None

    def __post_init__(self) -> None:
        check(self)

    def draw(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """Draws one token for each row, (B,) int64. Nothing is read back from the device.

        Args:
            logits: (B, V).
            seen: (B, V) bool, True for the tokens that are penalized.
        """
        if self.temperature == 0:
            return self._allowed(logits, seen).argmax(-1)
        probs = self.probabilities(logits, seen)
        # the draw of torch.multinomial, which would first check its input on the host
        return (probs / torch.empty_like(probs).exponential_(generator=self.generator)).argmax(-1)

    def probabilities(self, logits: Tensor, seen: Tensor | None = None) -> Tensor:
        """The probabilities that `draw` follows at a temperature above 0, (B, V)."""
        logits = self._allowed(logits, seen)
        # the most likely token is at zero, which no temperature moves; the inverse of a smaller one would be infinite
        logits = (logits - logits.amax(-1, keepdim=True)) / max(self.temperature, torch.finfo(logits.dtype).tiny)
        if self.top_k is not None:
            kept, index = logits.topk(min(self.top_k, logits.shape[-1]))
            logits = torch.full_like(logits, -math.inf).scatter(-1, index, kept)
        probs = logits.softmax(-1)
        if self.top_p is None or self.top_p == 1:
            return probs
        ranked, order = probs.sort(-1, descending=True)
        likelier = F.pad(ranked[:, :-1].cumsum(-1), (1, 0))  # the token that crosses top_p is still inside
        inside = torch.zeros_like(probs).scatter(-1, order, ranked.where(likelier < self.top_p, 0.0))
        return inside / inside.sum(-1, keepdim=True)

    def _allowed(self, logits: Tensor, seen: Tensor | None) -> Tensor:
        """Logits in float32 or wider: those of seen tokens made less likely, those beyond vocab_size impossible."""
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if seen is not None and self.repetition_penalty != 1:
            penalized = torch.where(logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty)
            logits = torch.where(seen, penalized, logits)
        if self.vocab_size is not None and self.vocab_size < logits.shape[-1]:
            logits = F.pad(logits[:, : self.vocab_size], (0, logits.shape[-1] - self.vocab_size), value=-math.inf)
        return logits


def takes_sampling(function: Function) -> Function:
    """Lists the options of Sampling in the signature and the docstring of a function that passes *args, **options on.

    Calling it with a name that is in neither is a TypeError with the nearest one.
    """
    signature = inspect.signature(function)
    own = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    parameters = sorted([*own, *inspect.signature(Sampling).parameters.values()], key=lambda p: p.kind)
    known = [p.name for p in parameters if p.default is not p.empty]

    @functools.wraps(function)
    def with_known_options(*args: Any, **options: Any) -> Any:
        for name in options.keys() - signature.parameters.keys() - set(known):
            raise TypeError(f"{function.__name__}() has no option {name!r}{nearest(name, known)}")
        return function(*args, **options)

    described = inspect.cleandoc(Sampling.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    with_known_options.__doc__ = f"{inspect.cleandoc(function.__doc__ or '')}\n\nOptions:\n{described}"
    vars(with_known_options)["__signature__"] = signature.replace(parameters=parameters)
    return cast("Function", with_known_options)


@torch.inference_mode()
def generate(lm: LanguageModel, prompt: Prompts, max_new_tokens: int, sampling: Sampling) -> Tensor | list[Tensor]:
    """Continues each prompt: LanguageModel.generate says how."""
    check_count("max_new_tokens", max_new_tokens)
    tokens, starts = _batch(prompt, next(lm.parameters()).device)
    state = lm.init_state(len(tokens), tokens.shape[1] + max_new_tokens)
    new = extend(lm, tokens, state, max_new_tokens, sampling, starts=starts, penalized=tokens)
    if isinstance(prompt, Tensor):
        return torch.cat([tokens, filled(new, sampling.stop_tokens)], dim=1)
    rows = zip(rows_of(prompt, new.device), without_padding(new), strict=True)
    return [torch.cat([row, added]) for row, added in rows]


def extend(
    lm: LanguageModel,
    unread: Tensor,
    state: States,
    max_new_tokens: int,
    sampling: Sampling,
    *,
    starts: Tensor | None = None,
    penalized: Tensor | None = None,
) -> Tensor:
    """Reads tokens into a state, and draws those that follow one at a time.

    Rows that have ended leave the batch, so that the others go on faster.

    Args:
        lm: a decoder.
        unread: the tokens to begin with, (B, L) int64, L at least 1.
        state: what came before them; there must be room in it for them and max_new_tokens - 1 more.
        max_new_tokens: most tokens to draw for each row.
        sampling: how they are drawn, and where rows end.
        starts: (B, L) bool, True at the first token of a document.
        penalized: tokens that the repetition penalty is on from the first draw on, (B, n) int64; None means none.

    Returns:
        The tokens drawn, (B, n) int64, NO_TOKEN in rows that had ended before.

    Raises:
        ValueError: if the model has fewer tokens than sampling.vocab_size.
        FloatingPointError: if logits are not finite: at once on the CPU, elsewhere at the end.
    """
    if sampling.vocab_size is not None and sampling.vocab_size > lm.config.vocab_size:
        raise ValueError(
            f"vocab_size={sampling.vocab_size} is more than the {lm.config.vocab_size} tokens of the model: use its own"
            " tokenizer"
        )
    seen = None
    if sampling.repetition_penalty != 1:
        seen = unread.new_zeros(len(unread), lm.config.vocab_size, dtype=torch.bool)
        if penalized is not None:
            seen.scatter_(1, penalized, True)
    stops = unread.new_tensor(sampling.stop_tokens)
    rows = torch.arange(len(unread), device=unread.device)  # numbers of the rows in the batch
    new = unread.new_full((len(unread), max_new_tokens), NO_TOKEN)
    are_numbers = torch.ones((), dtype=torch.bool, device=unread.device)
    logits, state = lm.prefill(unread, state, starts=starts, chunk_len=sampling.prefill_chunk)
    decoder, step = Decoder(lm, state), unread[:, -1]
    calls_others = sampling.on_token is not None or sampling.until is not None
    for n in range(max_new_tokens):
        if n:
            logits = decoder(step, watch=calls_others)
        are_numbers = are_numbers & logits.amax(-1).isfinite().all()  # tokens may be impossible, but not all
        if logits.device.type == "cpu":  # where the host need not wait
            _require_numbers(are_numbers)
        step = sampling.draw(logits, seen)
        new[rows, n] = step
        if sampling.on_token is not None:
            sampling.on_token(n, new[:, n])
        if seen is not None:
            seen.scatter_(1, step[:, None], True)
        goes_on = _goes_on(rows, new[:, : n + 1], stops, sampling.until)
        if goes_on is not None and not goes_on.all():
            left = goes_on.nonzero().flatten()
            if not len(left):
                new = new[:, : n + 1]
                break
            rows, step, seen = rows[left], step[left], None if seen is None else seen[left]
            decoder.select(left)
    _require_numbers(are_numbers)
    return new


def _require_numbers(are_numbers: Tensor) -> None:
    if not are_numbers:
        raise FloatingPointError(
            "the model's logits are not finite: its weights, or what it makes of this prompt, are beyond float range"
        )


def _goes_on(rows: Tensor, new: Tensor, stops: Tensor, until: Until | None) -> Tensor | None:
    """Marks the rows that do not end with the last of their new tokens, (n,) bool; None where nothing could end one."""
    if not len(stops) and until is None:
        return None
    goes_on = torch.isin(new[rows, -1], stops, invert=True)
    if until is not None:
        for i in goes_on.nonzero().flatten().tolist():
            row = int(rows[i])
            goes_on[i] = not until(row, new[row])
    return goes_on


def filled(new: Tensor, stop_tokens: Sequence[int]) -> Tensor:
    """Replaces NO_TOKEN in what `extend` returns by the first of stop_tokens, if there is any."""
    return new.masked_fill(new == NO_TOKEN, stop_tokens[0]) if stop_tokens else new


def without_padding(new: Tensor) -> list[Tensor]:
    """The rows of what `extend` returns, each as far as it goes."""
    return [row[row != NO_TOKEN] for row in new]


def default_chunk_len(n_rows: int) -> int:
    """Tokens of each row that are read at once unless told otherwise: 2048, and fewer of more than 4 rows."""
    return min(CHUNK_LEN, max(LEAST_CHUNK_LEN, TOKENS_AT_ONCE // max(1, n_rows)))


def _batch(prompt: Prompts, device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The prompts as (B, L), left-padded, and where each begins, (B, L) bool, unless all are equally long."""
    if isinstance(prompt, Tensor):
        if prompt.dim() != 2:
            raise ValueError(f"a prompt tensor must be (B, L), not {tuple(prompt.shape)}: use prompt[None] for one row")
        if prompt.shape[1] == 0:
            raise ValueError(_EMPTY)
        return _whole(prompt).to(device), None
    rows = rows_of(prompt, device)
    longest = max(map(len, rows))
    tokens = torch.stack([torch.cat([row[:1].expand(longest - len(row)), row]) for row in rows])
    if all(len(row) == longest for row in rows):
        return tokens, None
    starts = torch.tensor([[t == longest - len(row) for t in range(longest)] for row in rows], device=device)
    return tokens, starts


def rows_of(prompt: Prompts, device: torch.device) -> list[Tensor]:
    """The prompts of a list or a tensor, (L,) int64 each.

    Raises:
        ValueError: if there is none, or one that is empty or not one row.
    """
    if not isinstance(prompt, Tensor | list | tuple):
        raise ValueError(f"prompts must be a tensor, (B, L), or a list of rows of tokens, not {type(prompt).__name__}")
    if not len(prompt):
        raise ValueError("the list of prompts is empty: generation needs at least one")
    return [_row(row, device) for row in prompt]


def _row(tokens: Tensor | Sequence[int], device: torch.device) -> Tensor:
    """One prompt of a list, (L,) int64."""
    if isinstance(tokens, str):
        raise ValueError(f"a prompt must be a row of tokens, not text: encode {tokens[:20]!r} by the tokenizer")
    row = torch.as_tensor(tokens)
    if row.dim() != 1:
        raise ValueError(f"a prompt of a list must be (L,), not {tuple(row.shape)}")
    if not len(row):
        raise ValueError(_EMPTY)
    return _whole(row).to(device)


def _whole(tokens: Tensor) -> Tensor:
    """Tokens of a prompt as int64."""
    if tokens.dtype.is_floating_point or tokens.dtype.is_complex or tokens.dtype == torch.bool:
        raise ValueError(f"a prompt must be whole numbers, not {str(tokens.dtype).removeprefix('torch.')}")
    return tokens.long()


_EMPTY = "the prompt is empty: generation needs at least one token to start from"


class DecodeGraph:
    """The one-token step of a decoder at fixed addresses: on a GPU captured once and replayed as a CUDA graph.

    At small batches decoding is bound by launching kernels one by one, which a graph does at once. Nothing in the step
    may depend on numbers that the host knows, so the state's plain numbers become tensors. Attention then computes over
    the whole cache, whatever is in it: `max_len` should be no larger than needed.

        logits, state = lm.prefill(prompt, lm.init_state(B, max_len))
        decode = DecodeGraph(lm, state)
        logits = decode(logits.argmax(-1))

    Elsewhere the same step runs without a graph. The weights must stay where they are, and the caller must not decode
    more than max_len tokens: no error can say so.
    """

    @torch.inference_mode()
    def __init__(self, lm: LanguageModel, state: Sequence[State]) -> None:
        """Takes a state over, as `init_state` or reading a prompt gave it."""
        self._lm = lm
        self._state = [_without_numbers(layer) for layer in state]
        first = next(iter(state[0].tensors().values()))
        self._tokens = torch.zeros(len(first), dtype=torch.int64, device=first.device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if first.is_cuda:
            with torch.cuda.device(first.device):  # streams and captures are of the current device
                self._warm_up()
                self._graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(self._graph):  # nothing runs yet, so the state stays as it is
                    self._logits = step_in_place(lm, self._tokens, self._state)

    @torch.inference_mode()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits after one token more of each row, (B,) -> (B, V); on a GPU the next call overwrites them."""
        self._tokens.copy_(tokens)
        if self._graph is None:
            return step_in_place(self._lm, self._tokens, self._state)
        self._graph.replay()
        return self._logits

    def _warm_up(self) -> None:
        """Compiles kernels and makes workspaces, which a capture cannot, on a copy of the state."""
        state = [layer.clone() for layer in self._state]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step_in_place(self._lm, self._tokens, state)
        torch.cuda.current_stream().wait_stream(side)


def step_in_place(lm: LanguageModel, tokens: Tensor, state: Sequence[State]) -> Tensor:
    """Logits after one token more of each row, (B,) -> (B, V); the tensors of `state` then hold the state after it.

    With no plain numbers in the state, every call does the same work on the same memory.
    """
    out = lm(tokens[:, None], list(state))
    for old, new in zip(state, out.state, strict=True):
        held = old.tensors()
        for name, value in new.tensors().items():
            if value is not held[name]:
                held[name].copy_(value)
    return out.logits[:, 0]


def _without_numbers(state: State) -> State:
    """Makes a tensor, (), of each plain number of a state."""
    device = next(iter(state.tensors().values())).device
    numbers = {name: value for name, value in vars(state).items() if isinstance(value, int)}
    return dataclasses.replace(state, **{name: torch.tensor(value, device=device) for name, value in numbers.items()})
