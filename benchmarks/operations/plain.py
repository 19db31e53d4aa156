"""Peers that need no install: a GPT and a stack of LSTMs as one writes them with PyTorch's own modules.

They compute what ours do, with the same weights.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...archs import LanguageModel

__all__ = ["PlainGPT", "PlainLSTM"]


class _Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with one projection for queries, keys and values."""

    def __init__(self, d_model: int, n_heads: int, d_ff: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.mixer_norm, self.ffn_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv_proj, self.out_proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.up_proj, self.down_proj = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        heads = self.qkv_proj(self.mixer_norm(x)).unflatten(-1, (3, self.n_heads, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # (B, H, L, P) each
        o = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out_proj(o.transpose(1, 2).flatten(2))
        return x + self.down_proj(F.gelu(self.up_proj(self.ffn_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    """GPT-2 with learned positions, a tied head and PyTorch's scaled_dot_product_attention."""

    def __init__(self, lm: LanguageModel) -> None:
        """Takes shapes and weights of our gpt2."""
        super().__init__()
        blocks: list[Any] = list(lm.backbone.blocks)
        assert lm.backbone.positions is not None
        d_model, (d_ff, _) = lm.config.d_model, blocks[0].ffn.up_proj.weight.shape
        self.embedding = nn.Embedding.from_pretrained(lm.embedding.weight.detach().clone(), freeze=False)
        self.positions = nn.Embedding.from_pretrained(lm.backbone.positions.weight.detach().clone(), freeze=False)
        self.blocks = nn.ModuleList(_Block(d_model, blocks[0].mixer.n_heads, d_ff) for _ in blocks)
        self.norm = nn.LayerNorm(d_model)
        weights = {f"norm.{name}": t for name, t in lm.backbone.norm.state_dict().items()}
        for i, block in enumerate(blocks):
            parts = {"mixer_norm": block.mixer_norm, "ffn_norm": block.ffn_norm, "out_proj": block.mixer.out_proj}
            parts |= {"up_proj": block.ffn.up_proj, "down_proj": block.ffn.down_proj}
            weights |= {
                f"blocks.{i}.{part}.{name}": t for part, m in parts.items() for name, t in m.state_dict().items()
            }
            projections = [getattr(block.mixer, f"{name}_proj").state_dict() for name in "qkv"]
            for name in ("weight", "bias"):
                weights[f"blocks.{i}.qkv_proj.{name}"] = torch.cat([p[name] for p in projections])
        self.load_state_dict(self.state_dict() | weights)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits, (B, L, V)."""
        x = self.embedding(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return F.linear(self.norm(x), self.embedding.weight)


class PlainLSTM(nn.Module):
    """Residual layers of nn.LSTM, each behind a norm and before a projection, and a tied head."""

    def __init__(self, lm: LanguageModel) -> None:
        """Takes shapes and weights of our lstm."""
        super().__init__()
        d_model = lm.config.d_model
        self.embedding = nn.Embedding.from_pretrained(lm.embedding.weight.detach().clone(), freeze=False)
        self.norms, self.lstms, self.projections = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.norm = nn.RMSNorm(d_model, eps=lm.config.norm_eps)
        self.norm.load_state_dict(lm.backbone.norm.state_dict())
        for block in lm.backbone.blocks:
            mixer: Any = block.mixer
            norm = nn.RMSNorm(d_model, eps=lm.config.norm_eps)
            norm.load_state_dict(block.mixer_norm.state_dict())
            lstm = nn.LSTM(d_model, mixer.d_inner, batch_first=True)
            weights = {"weight_ih_l0": mixer.in_proj.weight, "bias_ih_l0": mixer.in_proj.bias}
            weights |= {"weight_hh_l0": mixer.weight, "bias_hh_l0": torch.zeros_like(mixer.in_proj.bias)}
            lstm.load_state_dict(weights)
            projection = nn.Linear(mixer.d_inner, d_model, bias=False)
            projection.load_state_dict(mixer.out_proj.state_dict())
            for modules, module in ((self.norms, norm), (self.lstms, lstm), (self.projections, projection)):
                modules.append(module)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits, (B, L, V)."""
        x = self.embedding(tokens)
        for norm, lstm, projection in zip(self.norms, self.lstms, self.projections, strict=True):
            x = x + projection(lstm(norm(x))[0])
        return F.linear(self.norm(x), self.embedding.weight)
