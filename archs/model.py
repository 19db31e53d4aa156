"""Block, Backbone and LanguageModel: the same for every architecture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
import torch.nn.functional as F
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

from ..kernels import ops
from .config import ModelConfig
from .ffn import FFN
from .layers import RMSNorm
from .mixer import Mixer, State


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) where there is an ffn: pre-norm, one residual stream."""

    def __init__(self, config: ModelConfig, mixer: str, ffn: str | None) -> None:
        super().__init__()
        # GPT-2's rule: residual branches shrink with the square root of their number
        scale = sum(1 if f is None else 2 for _, f in config.layers) ** -0.5
        cls, options = config.mixer_of(mixer)
        self.mixer_norm = RMSNorm(config.d_model, config.norm_eps)
        self.mixer: Mixer = cls(config.d_model, options, residual_scale=scale)
        self.ffn: FFN | None = None
        if ffn is not None:
            cls, options = config.ffn_of(ffn)
            self.ffn_norm = RMSNorm(config.d_model, config.norm_eps)
            self.ffn = cls(config.d_model, options, residual_scale=scale)

    def forward(
        self, x: Tensor, state: State | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, State | None, Tensor | None]:
        """(B, L, D) -> (B, L, D), the mixer's next state, and the ffn's auxiliary loss or None."""
        y, state = self.mixer(self.mixer_norm(x), state, starts=starts)
        x = x + y
        if self.ffn is None:
            return x, state, None
        y, aux = self.ffn(self.ffn_norm(x))
        return x + y, state, aux


class Backbone(nn.Module):
    """Blocks and a final norm: (B, L, D) -> (B, L, D). No embedding, so it drops into any experiment."""

    blocks: Sequence[Block]  # an nn.ModuleList, typed as what iterating it gives

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(  # pyright: ignore[reportAttributeAccessIssue]
            Block(config, mixer, ffn) for mixer, ffn in config.layers
        )
        self.norm = RMSNorm(config.d_model, config.norm_eps)

    def forward(
        self, x: Tensor, state: list[State] | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, list[State] | None, Tensor]:
        """Runs every block.

        Args:
            x: (B, L, D).
            state: one state per block, as `init_state` and this method return it; None keeps none.
            starts: (B, L) bool, True at the first token of a document.

        Returns:
            y, (B, L, D), the states after the last token (None in gives None out), and the sum of the auxiliary losses,
            a scalar.
        """
        aux_loss = x.new_zeros((), dtype=torch.promote_types(x.dtype, torch.float32))
        states: list[Any] = []
        for i, block in enumerate(self.blocks):
            x, after, aux = block(x, None if state is None else state[i], starts=starts)
            states.append(after)
            aux_loss = aux_loss if aux is None else aux_loss + aux
        return self.norm(x), None if state is None else states, aux_loss

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[State]:
        """An empty state for each block; the device and dtype are the parameters' unless given."""
        weight = self.norm.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        return [block.mixer.init_state(batch_size, max_len, device=device, dtype=dtype) for block in self.blocks]


class LMOutput(NamedTuple):
    """What a language model returns."""

    logits: Tensor
    """(B, L, V)."""
    state: list[State] | None
    """One per block, or None where none was given."""
    aux_loss: Tensor
    """Sum of the blocks' auxiliary losses, a scalar."""


class LanguageModel(nn.Module):
    """Embedding, backbone and output projection: tokens in, logits of the next token out."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.backbone = Backbone(config)
        self.head = nn.Linear(config.d_model, config.vocab_size, bias=False)
        # GPT-2's 0.02 is hardly larger than Adam's first steps at these widths, which then overwrite it
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        if config.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, state: list[State] | None = None, *, starts: Tensor | None = None) -> LMOutput:
        """Logits of the token after each of `tokens`, (B, L) int64; state and starts are as in Backbone.forward."""
        x, state, aux_loss = self.backbone(self.embedding(tokens), state, starts=starts)
        return LMOutput(self.head(x), state, aux_loss)

    def loss(self, tokens: Tensor, targets: Tensor, *, starts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy in nats per token, and the auxiliary loss to be added to it, both scalars.

        Args:
            tokens: (B, L) int64.
            targets: the next tokens, (B, L) int64; -100 is not counted.
            starts: (B, L) bool, True at the first token of a document.
        """
        x, _, aux_loss = self.backbone(self.embedding(tokens), starts=starts)
        loss, _ = ops.linear_cross_entropy(x.flatten(0, 1), self.head.weight, targets.flatten())
        return loss, aux_loss

    def token_losses(self, tokens: Tensor, targets: Tensor, *, starts: Tensor | None = None) -> Tensor:
        """Cross-entropy of every token by itself in nats, (B, L) float32: for curves over the position."""
        logits = self(tokens, starts=starts).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), reduction="none").view_as(targets)

    def init_state(
        self,
        batch_size: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> list[State]:
        """An empty state for `batch_size` sequences of at most `max_len` tokens; `nbytes` of each is its memory."""
        return self.backbone.init_state(batch_size, max_len, device=device, dtype=dtype)

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
        """Forward and backward: the backward pass costs twice the forward."""
        return 3 * self.mean_flops_per_token(seq_len)

    def _other_flops(self) -> float:
        ffns = sum(block.ffn.flops_per_token() for block in self.backbone.blocks if block.ffn is not None)
        return ffns + 2.0 * self.head.weight.numel()

    @torch.inference_mode()
    def generate(
        self,
        prompt: Tensor,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each prompt by sampling: one prefill, then one token at a time.

        Args:
            prompt: (B, L) int64, L at least 1.
            max_new_tokens: tokens to add.
            temperature: divides the logits; 0 always takes the most likely token.
            top_k: samples among this many most likely tokens.
            top_p: samples among the fewest tokens that hold this much probability (arXiv:1904.09751).
            generator: source of randomness; None means PyTorch's global one.

        Returns:
            (B, L + max_new_tokens) int64.
        """
        if prompt.shape[1] == 0:
            raise ValueError("the prompt is empty: generation needs at least one token to start from")
        state = self.init_state(len(prompt), prompt.shape[1] + max_new_tokens)
        tokens, step = [prompt], prompt
        for _ in range(max_new_tokens):
            logits, state, _ = self(step, state)
            step = _sample(logits[:, -1], temperature, top_k, top_p, generator)
            tokens.append(step)
        return torch.cat(tokens, dim=1)

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes model.safetensors and config.json, from which `from_pretrained` rebuilds the model."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_model(self, str(folder / "model.safetensors"))
        (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, device: torch.device | str | None = None) -> Self:
        """Reads what `save_pretrained` wrote. Nothing in it is executed."""
        config = ModelConfig.from_dict(json.loads((Path(folder) / "config.json").read_text()))
        model = cls(config)
        load_model(model, str(Path(folder) / "model.safetensors"))
        return model if device is None else model.to(device)


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator | None
) -> Tensor:
    """Draws one token per row from logits, (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        lowest = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < lowest, float("-inf"))
    if top_p is not None:
        probs, order = logits.softmax(-1).sort(-1, descending=True)
        outside = probs.cumsum(-1) - probs >= top_p  # the token that crosses top_p is still inside
        logits = logits.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
