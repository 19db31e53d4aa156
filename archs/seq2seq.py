"""Models that read one sequence, the source, and write another, the target: `lm(source, target)`.

An encoder turns the source into one vector per token. The decoder is a language model of the target some of whose
layers read these vectors (archs/mixers/cross_attention.py): the source is part of their state, so that the backbone
and decoding are those of every other model.

The Transformer of Vaswani et al. 2017 (arXiv:1706.03762) is the pattern ["attention", "cross_attention+mlp"]: its
decoder layer has three residual branches, and each of our layers one or two. A layer of the paper is two of n_layers.

The model of Bahdanau et al. 2014 (arXiv:1409.0473) is ["lstm", "additive_attention"]. It differs from the paper in
what the query is: there the state s[i-1], which has read the context c[i-1], and so the target is read one token after
the other. Here it is the output of a recurrent layer that has read target tokens only, and c[i] goes to the layers
above, as in Wu et al. 2016 (arXiv:1609.08144): all contexts are computed at once. The logits see what the paper's do:
the last token, the state and the context, which the residual stream sums up.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from ..kernels import ops
from . import generation
from .config import ModelConfig, Seq2SeqConfig
from .inputs import check_count, check_lengths, check_tokens
from .mixers.cross_attention import Reader
from .model import Backbone, LanguageModel, LMLoss, LMOutput, read_config, write_pretrained
from .state import State, States
from .weights import built_with

__all__ = ["Seq2Seq", "Seq2SeqConfig", "model_of", "open_pretrained"]


class Seq2Seq(nn.Module):
    """Source and target tokens in, logits of the next target token out.

    Both share the embedding. Sources of different lengths are padded at their end, with any token, and `source_len`,
    (B,) int64, says how long each is; None means that nothing is padded. Targets are padded at their end too, and need
    no lengths: no token sees what follows it, and -100 among `targets` is not counted.
    """

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = Backbone(config.encoder)
        self.decoder = LanguageModel(config)

    def forward(
        self, source: Tensor, target: Tensor, *, source_len: Tensor | None = None, targets: Tensor | None = None
    ) -> LMOutput | LMLoss:
        """Logits after each of the target tokens given the source, or the loss of targets; no state.

        Args:
            source: (B, S) int64.
            target: the target tokens read, (B, T) int64: a start token, then all but the last.
            source_len: (B,) int64, each from 1 to S.
            targets: the tokens to be predicted, (B, T) int64; -100 is not counted.

        Raises:
            ValueError: if an input has another shape, dtype or device than the others demand, or a token is not in the
                vocabulary.
        """
        h, aux_loss = self._read(source, source_len)
        check_tokens(target, name="target")
        if len(target) != len(source):
            raise ValueError(f"target has {len(target)} rows and source {len(source)}: give each source its target")
        out = self.decoder(target, self._state(h, source_len), targets=targets)
        if targets is None:
            return LMOutput(out.logits, None, aux_loss + out.aux_loss)
        return LMLoss(out.loss, aux_loss + out.aux_loss)

    def loss(
        self, source: Tensor, target: Tensor, targets: Tensor, *, source_len: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats per target token, and the auxiliary loss: as LanguageModel.loss, of `forward`."""
        out = self(source, target, source_len=source_len, targets=targets)
        return out.loss, out.aux_loss

    def encode(self, source: Tensor, source_len: Tensor | None = None, *, max_len: int) -> States:
        """Reads the source, (B, S): the decoder's state before the first of at most `max_len` target tokens."""
        h, _ = self._read(source, source_len)
        return self._state(h, source_len, self.init_state(len(source), max_len, n_source=0))

    def decode(self, target: Tensor, state: Sequence[State]) -> LMOutput:
        """Logits, (B, T, V), after each of the next target tokens, (B, T), and the state after them.

        The state is that of `encode` or of an earlier call: any split of a target gives the logits of the whole.
        """
        return self.decoder(target, state)

    def prefill(self, target: Tensor, state: Sequence[State], *, chunk_len: int | None = None) -> tuple[Tensor, States]:
        """Reads the given beginning of a target, (B, T), into a state of `encode`, as LanguageModel.prefill does."""
        return self.decoder.prefill(target, state, chunk_len=chunk_len)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        n_source: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> States:
        """A state as large as that of sources of `n_source` tokens (None means max_len) and targets of `max_len`."""
        weight = self.decoder.embedding.weight
        like = {"device": device or weight.device, "dtype": dtype or ops.product_dtype(weight)}
        state = self.decoder.init_state(batch_size, max_len, **like)
        if n_source is not None:
            for i, block in enumerate(self.decoder.backbone.blocks):
                if isinstance(block.mixer, Reader):
                    state[i] = block.mixer.init_state(batch_size, n_source, **like)
        return state

    @overload
    def generate(self, source: Tensor, max_new_tokens: int = 64, *args: Any, **options: Any) -> Tensor: ...
    @overload
    def generate(
        self, source: Sequence[Tensor | Sequence[int]], max_new_tokens: int = 64, *args: Any, **options: Any
    ) -> list[Tensor]: ...
    @generation.takes_sampling
    @torch.inference_mode()
    def generate(
        self,
        source: generation.Prompts,
        max_new_tokens: int = 64,
        *args: Any,
        source_len: Tensor | None = None,
        start_token: int = 0,
        **options: Any,
    ) -> Tensor | list[Tensor]:
        """Writes a target for each source by sampling.

        Args:
            source: (B, S) int64, or a list of rows, (S,) each, of any lengths: in one batch they give what they would
                alone. S is at least 1.
            max_new_tokens: longest target.
            args: the first options of generation.Sampling.
            source_len: (B,) int64, for a padded tensor only.
            start_token: what the decoder reads first, as in training.
            options: options of generation.Sampling by name, such as temperature=0.8. A repetition penalty is on the
                tokens that the target holds, not on those of the source, and a source is always read whole.

        Returns:
            The targets without the start token: for a tensor (B, T) int64, where targets that ended before others are
            filled up with the first of stop_tokens, or with -1 where there is none; for a list a list, in which each
            target ends with the token that ended it.

        Raises:
            ValueError: for an empty source, an option out of its range, or prefill_chunk.
        """
        check_count("max_new_tokens", max_new_tokens)
        sampling = generation.Sampling(*args, **options)
        if sampling.prefill_chunk is not None:
            raise ValueError("an encoder reads a source as a whole: leave prefill_chunk out")
        rows = generation.rows_of(source, self.decoder.embedding.weight.device)
        padded = pad_sequence(rows, batch_first=True)
        if not isinstance(source, Tensor):
            source_len = _lengths(rows)
        first = padded.new_full((len(padded), 1), start_token)
        state = self.encode(padded, source_len, max_len=max_new_tokens)
        new = generation.extend(self.decoder, first, state, max_new_tokens, sampling)
        if isinstance(source, Tensor):
            return generation.filled(new, sampling.stop_tokens)
        return generation.without_padding(new)

    def resize_embeddings(self, vocab_size: int) -> None:
        """See LanguageModel.resize_embeddings: source and target share their tokens."""
        self.decoder.resize_embeddings(vocab_size)
        self.config = dataclasses.replace(self.config, vocab_size=vocab_size)
        self.encoder.config = self.config.encoder

    @property
    def n_params(self) -> int:
        """All parameters, shared ones once."""
        return sum(p.numel() for p in self.parameters())

    @property
    def n_active_params(self) -> int:
        """Parameters that one source token and one target token use together."""
        inactive = sum(block.ffn.n_inactive_params for block in self.encoder.blocks if block.ffn is not None)
        return self.n_params - inactive - (self.decoder.n_params - self.decoder.n_active_params)

    def flops_per_token(self, context_len: float, n_source: int) -> float:
        """Forward FLOPs of one target token with `context_len` before it, for a source that has been read."""
        return self.decoder.flops_per_token(context_len) + n_source * sum(r.flops_per_pair() for r in self._readers())

    def source_flops(self, n_source: int) -> float:
        """Forward FLOPs of reading a source: the encoder, and the keys and values of all readers."""
        by_token = sum(block.ffn.flops_per_token() for block in self.encoder.blocks if block.ffn is not None)
        by_token += sum(reader.flops_per_source_token() for reader in self._readers())
        return n_source * by_token + sum(block.mixer.sequence_flops(n_source) for block in self.encoder.blocks)

    def mean_flops_per_token(self, seq_len: int, n_source: int | None = None) -> float:
        """Forward FLOPs of a target of `seq_len` tokens and its source, for each token of the target.

        Counted as in LanguageModel. A source of `n_source` tokens (None means seq_len) is paid for by the target.
        """
        n_source = seq_len if n_source is None else n_source
        reading = n_source * sum(reader.flops_per_pair() for reader in self._readers())
        return self.decoder.mean_flops_per_token(seq_len) + reading + self.source_flops(n_source) / seq_len

    def training_flops_per_token(self, seq_len: int, n_source: int | None = None) -> float:
        """FLOPs of forward and backward: the backward pass costs twice the forward."""
        return 3 * self.mean_flops_per_token(seq_len, n_source)

    def save_pretrained(self, folder: str | Path) -> None:
        """See LanguageModel.save_pretrained."""
        write_pretrained(self, folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str | None = None) -> Self:
        """See LanguageModel.from_pretrained."""
        config = read_config(folder)
        if not isinstance(config, Seq2SeqConfig):
            raise ValueError(f"{folder} holds a model of one sequence where an encoder-decoder is needed")
        return built_with(lambda: cls(config), Path(folder) / "model.safetensors").to(device)

    def _readers(self) -> Iterator[Reader]:
        return (block.mixer for block in self.decoder.backbone.blocks if isinstance(block.mixer, Reader))

    def _read(self, source: Tensor, source_len: Tensor | None) -> tuple[Tensor, Tensor]:
        """The encoder's output, (B, S, D), and its auxiliary loss."""
        check_tokens(source, name="source")
        starts = None
        if source_len is not None:  # padding is a document of its own, which the source does not see
            check_lengths("source_len", source_len, source)
            starts = torch.arange(source.shape[1], device=source.device) == source_len[:, None]
        h, _, aux_loss = self.encoder(self.decoder.embed(source, name="source"), starts=starts)
        return h, aux_loss

    def _state(self, h: Tensor, source_len: Tensor | None, state: States | None = None) -> States:
        """The decoder's state, with the source in its readers.

        Without a given `state` nothing else has one, as in training.
        """
        backbone = self.decoder.backbone
        n_states = len(backbone.blocks) + (backbone.positions is not None)
        before = States([None] * n_states) if state is None else state
        for i, block in enumerate(backbone.blocks):
            if isinstance(block.mixer, Reader):
                before[i] = block.mixer.read(h, source_len)
        return before


def model_of(config: ModelConfig) -> LanguageModel | Seq2Seq:
    """A new model of the class that the config describes."""
    return Seq2Seq(config) if isinstance(config, Seq2SeqConfig) else LanguageModel(config)


def open_pretrained(folder: str | Path, *, device: torch.device | str | None = None) -> LanguageModel | Seq2Seq:
    """Reads what `save_pretrained` of either class wrote: the config tells which."""
    config = read_config(folder)
    return built_with(lambda: model_of(config), Path(folder) / "model.safetensors").to(device)


def _lengths(rows: Sequence[Tensor]) -> Tensor | None:
    """Tokens of each row, (n,) int64; None where all have as many, and nothing is padded."""
    lengths = [len(row) for row in rows]
    return torch.tensor(lengths, device=rows[0].device) if len({*lengths}) > 1 else None
