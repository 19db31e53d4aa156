"""Block, Backbone and LanguageModel: the same for every architecture."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, overload

import torch
import torch.nn.functional as F
from safetensors.torch import save_model
from torch import Tensor, nn

from ..files import give_usual_mode, read_json, write_json
from ..kernels import ops
from . import generation
from .config import ModelConfig
from .ffn import FFN
from .inputs import (
    check_count,
    check_features,
    check_targets,
    check_tokens,
    kept,
    marks_of,
    n_padding_after,
    starts_of,
    taken,
    turned,
)
from .layers import NORMS, LearnedPositions, linear, linear_flops
from .mixer import Mixer, State
from .state import States
from .step import Step
from .weights import built_with, check_described


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) where there is an ffn; norm(x + mixer(x)) and so on for post-norm."""

    def __init__(self, config: ModelConfig, mixer: str, ffn: str | None) -> None:
        super().__init__()
        # GPT-2's rule: residual branches shrink with the square root of their number
        scale = sum(1 if f is None else 2 for _, f in config.layers) ** -0.5
        cls, options = config.mixer_of(mixer)
        self.prenorm = config.prenorm
        self.mixer_norm = _norm(config)
        self.mixer: Mixer = cls(config.d_model, options, residual_scale=scale)
        self.ffn: FFN | None = None
        if ffn is not None:
            cls, options = config.ffn_of(ffn)
            self.ffn_norm = _norm(config)
            self.ffn = cls(config.d_model, options, residual_scale=scale)

    def forward(
        self, x: Tensor, state: State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, State | None, Tensor | None]:
        """(B, L, D) -> (B, L, D), the mixer's next state, and the ffn's auxiliary loss or None."""
        y, state = self.mixer(self.mixer_norm(x) if self.prenorm else x, state, starts=starts)
        x = x + y if self.prenorm else self.mixer_norm(x + y)
        if self.ffn is None:
            return x, state, None
        y, aux = self.ffn(self.ffn_norm(x) if self.prenorm else x)
        return x + y if self.prenorm else self.ffn_norm(x + y), state, aux

    def describe_step(self, step: Step, x: Tensor, state: State) -> Tensor:
        """`forward` for one token, (n_rows, D)."""
        y = step.through(self.mixer, step.norm(self.mixer_norm, x) if self.prenorm else x, state)
        x = step.add(x, y) if self.prenorm else step.norm(self.mixer_norm, step.add(x, y))
        if self.ffn is None:
            return x
        y = step.through(self.ffn, step.norm(self.ffn_norm, x) if self.prenorm else x)
        return step.add(x, y) if self.prenorm else step.norm(self.ffn_norm, step.add(x, y))


class Backbone(nn.Module):
    """Learned positions where the model has them, blocks, and a norm after them (before them for post-norm).

    (B, L, D) -> (B, L, D): no tokens, so it drops into any experiment.

        backbone = Backbone("mamba", d_model=64, n_layers=4)
        y, state, aux_loss = backbone(x)
        classifier = nn.Sequential(Features(backbone), nn.Linear(64, 10))
    """

    blocks: Sequence[Block]  # an nn.ModuleList, typed as what iterating it gives

    def __init__(self, config: ModelConfig | str, **options: Any) -> None:
        """Builds the backbone of a config, or of a name and options as in `build`.

        There is no vocabulary, so vocab_size and n_params, which counts it, are no options here.
        """
        super().__init__()
        self.config = config = _configured(config, options)
        self.blocks = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            Block(config, mixer, ffn) for mixer, ffn in config.layers
        )
        self.norm = _norm(config)
        self.positions: LearnedPositions | None = None
        if config.max_positions is not None:
            self.positions = LearnedPositions(config.max_positions, config.d_model)

    def forward(
        self,
        x: Tensor,
        state: Sequence[State | None] | None = None,
        *,
        starts: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, States | None, Tensor]:
        """Runs every block.

        Args:
            x: (B, L, D).
            state: a list of states, as `init_state` and this method return it; None keeps none.
            starts: (B, L) bool, True at the first token of a document; (1, L) for all rows alike.
            padding_mask: (B, L) bool, True at real tokens, for rows padded at either end with anything; (1, L) for all
                rows alike. Padding is a document of its own, before whose end all is forgotten, a given state too: a
                row that is read in parts has its padding in the first ones. What y holds at padding means nothing.

        Returns:
            y, (B, L, D), the states after the last token (None in gives None out; under a mask that is the last real
            token of each row, or nothing where a row has none), and the sum of the auxiliary losses, a scalar.

        Raises:
            ValueError: if an input has another shape, dtype or device than the others or the model demand.
        """
        check_features(x, self.config.d_model)
        self._check_per_sample()
        if starts is not None:
            starts = marks_of("starts", starts, x)
        if padding_mask is None:
            return self._run(x, state, starts)
        real = marks_of("padding_mask", padding_mask, x)
        if state is None or not x.shape[1]:
            return self._run(x, state, _either(starts, starts_of(real)))
        # padding at the beginning: then the last token is a real one, and leaves the state
        n_after = n_padding_after(real)
        starts = _either(None if starts is None else turned(starts, n_after), starts_of(turned(real, n_after)))
        y, after, aux_loss = self._run(turned(x, n_after), state, starts)
        assert after is not None
        return turned(y, -n_after), after.forget(~real.any(1)), aux_loss

    def features(self, x: Tensor, *, starts: Tensor | None = None, padding_mask: Tensor | None = None) -> Tensor:
        """The first thing that `forward` returns, y, (B, L, D): one tensor in, one out.

        The auxiliary loss of layers that have one (moe) is not in it: call the backbone where it is to be learned.
        """
        return self(x, starts=starts, padding_mask=padding_mask)[0]

    def _run(
        self, x: Tensor, given: Sequence[State | None] | None, starts: Tensor | None
    ) -> tuple[Tensor, States | None, Tensor]:
        aux_loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        mixers = self._stateful()
        before: list[Any] = [None] * len(mixers) if given is None else taken(given, mixers, x)
        after: list[Any] = []
        position = None
        if self.positions is not None:
            x, position = self.positions(x, before[-1], starts=starts)
        if not self.config.prenorm:
            x = self.norm(x)
        for i, block in enumerate(self.blocks):
            x, state, aux = block(x, before[i], starts=starts)
            after.append(state)
            aux_loss = aux_loss if aux is None else aux_loss + aux
        if self.positions is not None:
            after.append(position)
        x = self.norm(x) if self.config.prenorm else x
        return x, None if given is None else kept(after, mixers, given), aux_loss

    def describe_step(self, step: Step, x: Tensor, state: Sequence[Any]) -> Tensor:
        """`forward` for one token, (n_rows, D)."""
        if any(held is None for held in taken(state, self._stateful(), x)):
            raise ops.Unsupported("a layer keeps no state")
        if self.positions is not None:
            x = step.through(self.positions, x, state[-1])
        if not self.config.prenorm:
            x = step.norm(self.norm, x)
        for block, held in zip(self.blocks, state, strict=False):  # the state of positions comes last
            x = step.through(block, x, held)
        return step.norm(self.norm, x) if self.config.prenorm else x

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> States:
        """An empty state for each block, then one for learned positions where there are any.

        The device and dtype are the parameters' unless given; under autocast the dtype is that of its products, so that
        a cache of keys need not be converted whole for every token.

        Raises:
            ValueError: if the mixers are those of an encoder, or if max_len is more than max_positions.
        """
        check_count("batch_size", batch_size)
        check_count("max_len", max_len)
        weight = next(self.parameters())
        device, dtype = device or weight.device, dtype or ops.product_dtype(weight)
        states = [block.mixer.init_state(batch_size, max_len, device=device, dtype=dtype) for block in self.blocks]
        if self.positions is not None:
            states.append(self.positions.init_state(batch_size, max_len, device=device))
        return kept(states, self._stateful())

    def _check_per_sample(self) -> None:
        """ValueError where Opacus, known by the attribute that it gives parameters, would fail within a layer.

        Its hooks need modules from one tensor to one tensor, or without parameters of their own.
        """
        if not hasattr(self.norm.weight, "grad_sample"):
            return
        for module in [*self._stateful(), *(block.ffn for block in self.blocks)]:
            if module is not None and any(p.requires_grad for p in module.parameters(recurse=False)):
                raise ValueError(
                    "Opacus takes no gradient of single rows of a module with a state or a loss besides its output, as"
                    f" {type(module).__name__}: use a transformer, or torch.func.vmap over torch.func.grad"
                )

    def _stateful(self) -> list[Any]:
        """What keeps a state, in the order of the states."""
        mixers: list[Any] = [block.mixer for block in self.blocks]
        return mixers if self.positions is None else [*mixers, self.positions]


class Features(nn.Module):
    """A backbone as a module from one tensor to one tensor, (B, L, D) -> (B, L, D), for nn.Sequential and the like."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, x: Tensor) -> Tensor:
        """See Backbone.features."""
        return self.backbone.features(x)


class LMOutput(NamedTuple):
    """Output of a language model."""

    logits: Tensor
    """(B, L, V)."""
    state: Sequence[State] | None
    """The states after the last token, in the form of `init_state`; None where none were given."""
    aux_loss: Tensor
    """Sum of the blocks' auxiliary losses, a scalar."""


class LMLoss(NamedTuple):
    """Output of a language model that is given targets: no logits, which are never all in memory."""

    loss: Tensor
    """Mean cross-entropy in nats per token, a scalar."""
    aux_loss: Tensor
    """Sum of the blocks' auxiliary losses, to be added to the loss, a scalar."""
    state: Sequence[State | None] | None = None
    """See LMOutput.state."""


class TiedHead(nn.Module):
    """Output projection by the embedding's weight, with at most a bias of its own.

    It holds no second reference to the weight: however parameters are loaded, moved or sharded, they stay tied.
    """

    def __init__(self, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.bias = bias

    def forward(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., D) -> (..., V), for weight (V, D)."""
        return F.linear(x, weight, self.bias)

    def describe_step(self, step: Step, x: Tensor, weight: Tensor) -> Tensor:
        """`forward` for one token, (n_rows, D)."""
        return step.product(x, weight, self.bias)


class LanguageModel(nn.Module):
    """Embedding, backbone and output projection: tokens in, logits out.

    Decoders predict the next token; encoders predict the token itself where it was masked, so `targets` are -100 at all
    other places.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = whole_config(config, {})
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone = Backbone(config)
        # BERT's layer between the backbone and the projection (arXiv:1810.04805, the authors' code)
        self.transform: nn.Module = nn.Identity()
        if config.head == "mlm":
            layer = linear(config.d_model, config.d_model, bias=True)
            self.transform = nn.Sequential(layer, nn.GELU(), _norm(config))
        # drawn for a tied model too, so that a seed goes on to mean the same weights
        head = linear(config.d_model, config.vocab_size, bias=config.head == "mlm")
        self.head: nn.Linear | TiedHead = TiedHead(head.bias) if config.tie_embeddings else head
        self.segments = nn.Embedding(config.segments, config.d_model) if config.segments else None
        # GPT-2's 0.02 is hardly larger than Adam's first steps at these widths, which then overwrite it
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        if config.tie_embeddings:
            self.register_load_state_dict_pre_hook(_drop_copy_of_embedding)

    def forward(
        self,
        tokens: Tensor,
        state: Sequence[State | None] | None = None,
        *,
        starts: Tensor | None = None,
        padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        targets: Tensor | None = None,
    ) -> LMOutput | LMLoss:
        """Logits at each token, or the loss of targets.

        Args:
            tokens: (B, L) int64.
            state: as in Backbone.forward.
            starts: (B, L) bool, True at the first token of a document; (1, L) for all rows alike.
            padding_mask: (B, L) bool, True at real tokens, as in Backbone.forward; the targets of padding are not
                counted.
            segments: of which of the model's segments each token is, (B, L) int64; None means the first.
            targets: the tokens to be predicted, (B, L) int64: the next ones, or the masked ones; -100 is not counted.

        Raises:
            ValueError: if an input has another shape, dtype or device than the others or the model demand, or a token
                is not in the vocabulary.
        """
        x, state, aux_loss = self.hidden(tokens, state, starts=starts, padding_mask=padding_mask, segments=segments)
        if targets is None:
            return LMOutput(self.logits(x), state, aux_loss)
        if padding_mask is not None:
            check_targets(targets, x)
            targets = targets.masked_fill(~padding_mask, -100)
        return LMLoss(self.cross_entropy(x, targets), aux_loss, state)

    def hidden(
        self,
        tokens: Tensor,
        state: Sequence[State | None] | None = None,
        *,
        starts: Tensor | None = None,
        padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
    ) -> tuple[Tensor, States | None, Tensor]:
        """Runs the backbone over tokens, (B, L) int64: x, (B, L, D), the state after them, and the auxiliary loss."""
        return self.backbone(self.embed(tokens, segments), state, starts=starts, padding_mask=padding_mask)

    @torch.no_grad()
    def prefill(
        self,
        tokens: Tensor,
        state: Sequence[State | None],
        *,
        starts: Tensor | None = None,
        padding_mask: Tensor | None = None,
        segments: Tensor | None = None,
        chunk_len: int | None = None,
    ) -> tuple[Tensor, States]:
        """Reads a prompt into a state in chunks, so that no more memory is used than for one, however long it is.

            logits, state = lm.prefill(tokens, lm.init_state(len(tokens), max_len))

        No gradients are recorded.

        Args:
            tokens: (B, L) int64, L at least 1.
            state: what came before them, as `init_state` or an earlier call gave it.
            starts: as in `forward`.
            padding_mask: as in `forward`, for rows of different lengths.
            segments: as in `forward`.
            chunk_len: tokens of each row read at once; None means `generation.default_chunk_len`.

        Returns:
            The logits after the last token of each row, (B, V), under a mask after its last real one, and the state
            after it.

        Raises:
            ValueError: as in `forward`, if there are no tokens, or more than the state has room for.
        """
        check_tokens(tokens)
        real = None if padding_mask is None else marks_of("padding_mask", padding_mask, tokens)
        if real is not None:  # padding at the beginning: then the last token is a real one, in the last chunk
            n_after = n_padding_after(real)
            tokens, segments = turned(tokens, n_after), None if segments is None else turned(segments, n_after)
            starts = None if starts is None else turned(marks_of("starts", starts, tokens), n_after)
            starts = _either(starts, starts_of(turned(real, n_after)))
        chunks = self.hidden_in_chunks(tokens, state, starts=starts, segments=segments, chunk_len=chunk_len)
        last = collections.deque(chunks, maxlen=1)
        if not last:
            raise ValueError("there are no tokens to read, and so no logits after the last one: give at least 1")
        x, after = last.pop()
        return self.logits(x[:, -1]), after if real is None else after.forget(~real.any(1))

    def hidden_in_chunks(
        self,
        tokens: Tensor,
        state: Sequence[State | None],
        *,
        starts: Tensor | None = None,
        segments: Tensor | None = None,
        chunk_len: int | None = None,
    ) -> Iterator[tuple[Tensor, States]]:
        """As `hidden`, chunk by chunk: the x of each, (B, C, D), and the state after it; arguments as in `prefill`."""
        chunk_len = generation.default_chunk_len(len(tokens)) if chunk_len is None else chunk_len
        check_count("chunk_len", chunk_len, least=1)
        if starts is not None:
            starts = marks_of("starts", starts, tokens)
        before: Sequence[State | None] = state
        for i in range(0, tokens.shape[1], chunk_len):
            part = slice(i, i + chunk_len)
            # without starts some mixers have a faster way
            marks = None if starts is None or not starts[:, part].any() else starts[:, part]
            kinds = None if segments is None else segments[:, part]
            x, after, _ = self.hidden(tokens[:, part], before, starts=marks, segments=kinds)
            assert after is not None
            yield x, after
            before = after

    def embed(self, tokens: Tensor, segments: Tensor | None = None, *, name: str = "tokens") -> Tensor:
        """Vectors of tokens, (B, L) int64: (B, L, D), with those of their segments, (B, L) int64, if the model has any.

        Raises:
            ValueError: unless they are (B, L) and, where the CPU reads them, of the vocabulary.
        """
        check_tokens(tokens, name=name)
        try:
            x = self.embedding(tokens)
        except IndexError:  # of the CPU; elsewhere the host does not know the values
            raise _beyond_vocabulary(name, tokens, self.config.vocab_size) from None
        if self.segments is None:
            if segments is not None:
                raise ValueError("this model has no segments: build it with segments=2 for two kinds of tokens")
            return x
        if segments is None:
            return x + self.segments.weight[0]
        check_tokens(segments, name="segments")
        try:
            return x + self.segments(segments)
        except IndexError:
            raise ValueError(f"segments must be below {self.config.segments}, the segments of this model") from None

    def logits(self, x: Tensor) -> Tensor:
        """Makes logits of the x of `hidden`, or of some of its positions: (..., D) -> (..., V)."""
        x = self.transform(x)
        return self.head(x, self.embedding.weight) if isinstance(self.head, TiedHead) else self.head(x)

    def describe_step(self, step: Step, state: Sequence[State]) -> Tensor:
        """`forward` for one token: its logits, (n_rows, V)."""
        x = step.row(self.embedding, step.tokens)
        if self.segments is not None:
            x = step.add(x, step.row(self.segments, torch.zeros_like(step.tokens)))
        x = step.through(self.backbone, x, state)
        if type(self.transform) is not nn.Identity:
            raise ops.Unsupported("there is a layer before the output projection")
        if isinstance(self.head, TiedHead):
            return step.through(self.head, x, self.embedding.weight)
        return step.linear(self.head, x)

    def cross_entropy(self, x: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats of targets, (B, L) int64, given the x of `hidden`, (B, L, D); -100 is not counted.

        It equals that of `logits(x)`, which are never all in memory.
        """
        check_targets(targets, x)
        x, weight = self.transform(x).flatten(0, 1), self.output_weight
        if self.head.bias is not None:  # the bias is the weight of a channel that is always one
            x, weight = F.pad(x, (0, 1), value=1.0), torch.cat([weight, self.head.bias[:, None]], dim=1)
        try:
            loss, _ = ops.linear_cross_entropy(x, weight, targets.flatten())
        except IndexError:
            raise _beyond_vocabulary("targets", targets[targets != -100], self.config.vocab_size) from None
        return loss

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        *,
        starts: Tensor | None = None,
        padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats per token, and the auxiliary loss to be added to it, both scalars.

        They are `out.loss` and `out.aux_loss` of `out = self(tokens, targets=targets)`, which is how a wrapper of the
        model (DDP, FSDP2, torch.compile) must be called.
        """
        out = self(tokens, starts=starts, padding_mask=padding_mask, targets=targets)
        return out.loss, out.aux_loss

    def token_losses(self, tokens: Tensor, targets: Tensor, *, starts: Tensor | None = None) -> Tensor:
        """Cross-entropy of every token by itself in nats, (B, L) float32: for curves over the position."""
        logits = self(tokens, starts=starts).logits
        check_targets(targets, logits)
        try:
            losses = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none")
        except IndexError:
            raise _beyond_vocabulary("targets", targets[targets != -100], self.config.vocab_size) from None
        return losses.view_as(targets)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> States:
        """An empty state for `batch_size` sequences of at most `max_len` tokens; `nbytes` of each is its memory."""
        return self.backbone.init_state(batch_size, max_len, device=device, dtype=dtype)

    def resize_embeddings(self, vocab_size: int) -> None:
        """Gives the model another number of tokens, in the embedding, the head and the config.

        The first tokens keep their weights. Each new one gets the mean of the old ones, embedding, output weights and
        bias, so that it is about as likely as they are on the average, and no outlier before it is trained. The
        parameters are new ones: an optimizer must be made afterwards.

        Raises:
            ValueError: unless vocab_size is a whole number of at least 1.
        """
        check_count("vocab_size", vocab_size, least=1)
        self.embedding.weight = _resized(self.embedding.weight, vocab_size)
        self.embedding.num_embeddings = vocab_size
        if not isinstance(self.head, TiedHead):
            self.head.weight = _resized(self.head.weight, vocab_size)
            self.head.out_features = vocab_size
        if self.head.bias is not None:
            self.head.bias = _resized(self.head.bias, vocab_size)
        self.config = self.backbone.config = dataclasses.replace(self.config, vocab_size=vocab_size)

    @property
    def output_weight(self) -> Tensor:
        """Weight of the output projection, (V, D): the embedding itself in a tied model."""
        return self.embedding.weight if isinstance(self.head, TiedHead) else self.head.weight

    @property
    def n_params(self) -> int:
        """All parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_active_params(self) -> int:
        """Parameters that one token uses: all but the experts it is not routed to."""
        return self.n_params - sum(b.ffn.n_inactive_params for b in self.backbone.blocks if b.ffn is not None)

    def flops_per_token(self, context_len: float) -> float:
        """Forward FLOPs (a multiply-add is two) of one token with `context_len` tokens before it; training is 3 times.

        For an encoder it is the last token of a sequence, which sees as much as in a decoder; `mean_flops_per_token` is
        what a token of a whole sequence costs.

        Projections count twice their weights (the embedding lookup nothing, the head its product, tied or not), and
        each mixer adds what it does besides. Norms and activations are left out.
        """
        mixers = sum(block.mixer.flops_per_token(context_len) for block in self.backbone.blocks)
        return mixers + self._other_flops()

    def mean_flops_per_token(self, seq_len: int) -> float:
        """Forward FLOPs of a sequence of `seq_len` tokens, divided by its tokens."""
        by_kind: dict[str, float] = {}
        total = 0.0
        for (name, _), block in zip(self.config.layers, self.backbone.blocks, strict=True):
            if name not in by_kind:
                by_kind[name] = block.mixer.sequence_flops(seq_len)
            total += by_kind[name]
        return total / seq_len + self._other_flops()

    def training_flops_per_token(self, seq_len: int) -> float:
        """FLOPs of forward and backward: the backward pass costs twice the forward."""
        return 3 * self.mean_flops_per_token(seq_len)

    def _other_flops(self) -> float:
        ffns = sum(block.ffn.flops_per_token() for block in self.backbone.blocks if block.ffn is not None)
        return ffns + linear_flops(self.transform) + 2.0 * self.output_weight.numel()

    @overload
    def generate(self, prompt: Tensor, max_new_tokens: int = 64, *args: Any, **options: Any) -> Tensor: ...
    @overload
    def generate(
        self, prompt: Sequence[Tensor | Sequence[int]], max_new_tokens: int = 64, *args: Any, **options: Any
    ) -> list[Tensor]: ...
    @generation.takes_sampling
    def generate(
        self, prompt: generation.Prompts, max_new_tokens: int = 64, *args: Any, **options: Any
    ) -> Tensor | list[Tensor]:
        """Continues each prompt by sampling: the prompt in chunks, then one token at a time.

        Args:
            prompt: (B, L) int64, or a list of rows, (L,) each, of any lengths: in one batch they give what they would
                alone. L is at least 1.
            max_new_tokens: most tokens to add to each.
            args: the first options of generation.Sampling.
            options: options of generation.Sampling by name, such as temperature=0.8, top_p=0.95.

        Returns:
            For a tensor (B, L + n), where n is less than max_new_tokens only if all rows ended earlier, and rows that
            ended before others are filled up with the first of stop_tokens, or with -1 where there is none. For a list
            a list, in which each row ends with the token that ended it.

        Raises:
            ValueError: for an empty prompt, an option out of its range, or an encoder.
        """
        return generation.generate(self, prompt, max_new_tokens, generation.Sampling(*args, **options))

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json, from which `from_pretrained` rebuilds the model.

        Raises:
            ValueError: if the model was changed and its config does not describe it any more; nothing is written.
        """
        write_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Reads what `save_pretrained` wrote. Nothing in it is executed.

        Raises:
            ValueError: if it is an encoder-decoder, its configuration is not valid or of a newer version, or the
                weights are not of it.
        """
        config = read_config(folder)
        if config.kind == "seq2seq":
            raise ValueError(f"{folder} holds an encoder-decoder where a model of one sequence is needed")
        return built_with(lambda: cls(config), Path(folder) / "model.safetensors").to(device)


def write_pretrained(model: Any, folder: str | Path) -> None:
    """Writes a model's model.safetensors, and its config and the format of both as config.json.

    Raises:
        ValueError: if the model is not what its config describes; nothing is written.
    """
    check_described(model, lambda: type(model)(model.config))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_model(model, str(folder / "model.safetensors"))
    give_usual_mode(folder / "model.safetensors")
    write_json(folder / "config.json", model.config.to_dict())


def read_config(folder: str | Path) -> ModelConfig:
    """Reads the config of a saved model of any kind.

    Raises:
        ValueError: if a later version wrote it, in a format that is not known here, or it is not valid.
    """
    return ModelConfig.from_dict(read_json(Path(folder) / "config.json"))


def _resized(parameter: Tensor, n: int) -> nn.Parameter:
    """The first n entries, (n, ...), those beyond the end the mean of all."""
    old = parameter.detach()
    more = old.mean(0, keepdim=True).expand(max(0, n - len(old)), *old.shape[1:])
    return nn.Parameter(torch.cat([old[:n], more]), requires_grad=parameter.requires_grad)


def _either(starts: Tensor | None, more: Tensor) -> Tensor:
    return more if starts is None else starts | more


def _beyond_vocabulary(name: str, tokens: Tensor, vocab_size: int) -> ValueError:
    low, high = (int(value) for value in tokens.aminmax())
    return ValueError(
        f"{name} reach from {low} to {high}, and the vocabulary of the model from 0 to {vocab_size - 1}: use its own"
        " tokenizer"
    )


def _configured(config: ModelConfig | str, options: Mapping[str, Any]) -> ModelConfig:
    """The config itself, or that of a name and options."""
    if isinstance(config, str):
        from .presets import configure  # which builds models

        for name in ("vocab_size", "n_params"):
            if name in options:
                raise ValueError(f"a backbone has no vocabulary: give d_model and n_layers, and leave {name} out")
        config, options = configure(config, **options), {}
        if config.kind == "seq2seq":
            raise ValueError("an encoder-decoder has two backbones: build the model, and take its encoder or decoder")
    return whole_config(config, options)


def whole_config(config: ModelConfig, options: Mapping[str, Any]) -> ModelConfig:
    """The config itself; ValueError if it is none, or if there are options beside it."""
    if not isinstance(config, ModelConfig):
        raise ValueError(f"a model is built from a name such as 'mamba', or a ModelConfig, not {type(config).__name__}")
    if options:
        raise ValueError(f"options {', '.join(options)} beside a config: put them into it by dataclasses.replace")
    return config


def _norm(config: ModelConfig) -> nn.Module:
    """A norm of the residual stream."""
    return NORMS[config.norm](config.d_model, config.norm_eps)


def _drop_copy_of_embedding(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    _: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: Any,
) -> None:
    """Takes the embedding out of a state dict where it stands as the weight of a tied head, too, as others store it."""
    copy, embedding = state_dict.pop(f"{prefix}head.weight", None), state_dict.get(f"{prefix}embedding.weight")
    if copy is not None and (embedding is None or not torch.equal(copy, embedding)):
        errors.append(f"{prefix}head.weight is not the embedding, to which it is tied in this model")
