"""What a user would run in the place of our models: those of other libraries, and plain PyTorch.

Each peer computes what ours does, with the same weights and without dropout, unless it says otherwise.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from ...archs import LanguageModel
from ...archs.hf import to_hf
from ...kernels import ops
from ...kernels.dispatch import record_backends
from ...train.config import OptimConfig
from .contestants import OURS
from .floors import matrices, reads_per_token
from .limits import reading
from .plain import PlainGPT, PlainLSTM
from .turns import Clock, Task, Work, Works, model_of, our_works, timing, window_of

__all__ = ["PEERS", "Peer", "works_of"]

INSTALL = {"transformers": "pip install 'crossover[hf]'", "mambapy": "pip install mambapy"}
"""How to get what peers need, by module."""


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another model that computes what one of ours does."""

    name: str
    arch: str
    """The architecture of ours."""
    build: Callable[[LanguageModel], nn.Module]
    """Makes it of ours."""
    loss: Callable[[Any, Tensor], Tensor]
    """Maps the model and a window of tokens, (B, L + 1) int64, to the mean loss."""
    needs: tuple[str, ...] = ()
    """Modules that must be installed."""
    decodes: bool = False
    """Whether it decodes too, as transformers' models do."""

    @property
    def missing(self) -> list[str]:
        """Commands that install what it lacks."""
        return [INSTALL[module] for module in self.needs if importlib.util.find_spec(module) is None]


def works_of(arch: str, n_params: int, who: str) -> Works:
    """What the process of a contestant does: of ours, or of a peer by its name."""
    return _works_of_ours(arch, n_params) if who == OURS else _works_of_peer(PEERS[who], n_params)


def _works_of_ours(arch: str, n_params: int) -> Works:
    """Training steps and tokens decoded; and what decoding is held against.

    "products" are the matrix products of a token alone, each a call of torch.mv; "read" reads as many bytes as a token
    must, and says how many those are.
    """
    ours = our_works(arch, n_params)

    def works(task: Task) -> tuple[Work, dict[str, Any]]:
        if task["work"] in ("train", "profile", "decode"):
            return _with_backends(*ours(task))
        lm = model_of(arch, n_params, task["length"] + 1)
        if task["work"] == "products":
            pairs = [(matrix, torch.randn(matrix.shape[1])) for matrix in matrices(lm)]
            return timing(lambda: [torch.mv(matrix, x) for matrix, x in pairs]), {"products": len(pairs)}
        reads = reads_per_token(lm, task["length"])
        n_read, read = reading(reads.total)

        def read_once(clock: Clock) -> float:
            return timing(read)(clock) * reads.total / n_read

        return read_once, {"weights": reads.weights, "state": reads.state}

    return works


def _with_backends(work: Work, facts: dict[str, Any]) -> tuple[Work, dict[str, Any]]:
    """Has it said, too, which backend ran for each operation, once it has."""

    def once(clock: Clock) -> float:
        if "backends" in facts:
            return work(clock)
        with record_backends() as used:
            seconds = work(clock)
        facts["backends"] = {name: list(backends) for name, backends in used.items()}
        return seconds

    return once, facts


def _works_of_peer(peer: Peer, n_params: int) -> Works:
    def works(task: Task) -> tuple[Work, dict[str, Any]]:
        model = peer.build(model_of(peer.arch, n_params, task["length"] + 1))
        facts = {"n_params": sum(p.numel() for p in model.parameters())}
        if task["work"] == "decode":
            return timing(decoding(model.eval(), task["length"])), facts
        step = training_step(model.train(), peer.loss)
        return timing(functools.partial(step, window_of(task))), facts

    return works


def training_step(model: nn.Module, loss: Callable[[Any, Tensor], Tensor]) -> Callable[[Tensor], None]:
    """Returns the training step of a peer on a window of tokens, (B, L + 1) int64, with our optimizer's options."""
    config = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(window: Tensor) -> None:
        loss(model, window).backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(model: Any, context_len: int) -> Callable[[], object]:
    """Decodes one token after so many with a model of transformers, the same again and again."""
    prompt = window_of({"batch_size": 1, "length": context_len - 1})  # which has one token more
    with torch.inference_mode():
        out = model(input_ids=prompt, use_cache=True)
    name = "past_key_values" if getattr(out, "past_key_values", None) is not None else "cache_params"
    cache = getattr(out, name)

    def step() -> None:
        with torch.inference_mode():
            model(input_ids=prompt[:, -1:], use_cache=True, **{name: cache})
        if name == "past_key_values":  # which would grow; a recurrent state does not
            cache.crop(-1)

    return step


def _of_logits(model: Any, window: Tensor) -> Tensor:
    return F.cross_entropy(model(window[:, :-1].contiguous()).flatten(0, 1), window[:, 1:].flatten())


def _of_transformers(model: Any, window: Tensor) -> Tensor:
    tokens = window[:, :-1].contiguous()  # which the model shifts itself
    return model(input_ids=tokens, labels=tokens, use_cache=False).loss


def _transformers(lm: LanguageModel, **options: Any) -> nn.Module:
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be fetched
    transformers: Any = importlib.import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        to_hf(lm, folder)
        model: nn.Module = transformers.AutoModelForCausalLM.from_pretrained(folder, **options)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


class _MambaPy(nn.Module):
    """mambapy's Mamba, which has no embedding of its own, with ours, and a tied head."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        mamba: Any = importlib.import_module("mambapy.mamba")
        mixer: Any = lm.backbone.blocks[0].mixer
        config = mamba.MambaConfig(
            d_model=lm.config.d_model,
            n_layers=lm.config.n_layers,
            dt_rank=mixer.dt_rank,
            d_state=mixer.config.d_state,
            rms_norm_eps=lm.config.norm_eps,
        )
        self.embedding = nn.Embedding.from_pretrained(lm.embedding.weight.detach().clone(), freeze=False)
        self.backbone: nn.Module = mamba.Mamba(config)
        self.norm = nn.RMSNorm(lm.config.d_model, eps=lm.config.norm_eps)
        self.norm.load_state_dict(lm.backbone.norm.state_dict())
        with tempfile.TemporaryDirectory() as folder:
            to_hf(lm, folder)  # whose names the package follows
            weights = load_file(Path(folder) / "model.safetensors")
        names = self.backbone.state_dict()
        self.backbone.load_state_dict({name: weights[f"backbone.{name}"] for name in names})

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits, (B, L, V)."""
        return F.linear(self.norm(self.backbone(self.embedding(tokens))), self.embedding.weight)


class _WithTheirDeltaRule(nn.Module):
    """Our model with the gated delta rule of transformers, in chunks, in the place of ours."""

    def __init__(self, lm: LanguageModel) -> None:
        super().__init__()
        self.lm = lm
        theirs: Any = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
        self._rule: Callable[..., Any] = theirs.torch_chunk_gated_delta_rule

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 -> logits, (B, L, V)."""
        with self._in_place_of_ours():
            return self.lm(tokens).logits

    @contextmanager
    def _in_place_of_ours(self) -> Iterator[None]:
        ours = ops.gated_delta_rule

        def rule(
            q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, **_: Any
        ) -> tuple[Tensor, Tensor | None]:
            scaled = q * k.shape[-1] ** 0.5  # which theirs divides by
            return self._rule(scaled, k, v, log_decay, beta, initial_state=None, output_final_state=False)

        ops.gated_delta_rule = rule  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            ops.gated_delta_rule = ours


def _hf(name: str, arch: str, *, decodes: bool = False, needs: tuple[str, ...] = (), **options: Any) -> Peer:
    """A model of transformers, with options of its config."""
    return Peer(
        name=name,
        arch=arch,
        build=functools.partial(_transformers, **options),
        loss=_of_transformers,
        needs=("transformers", *needs),
        decodes=decodes,
    )


PEERS = {
    peer.name: peer
    for peer in (
        _hf("HF Llama", "transformer", decodes=True),
        Peer(name="plain GPT", arch="gpt2", build=PlainGPT, loss=_of_logits),
        _hf("HF GPT-2", "gpt2", decodes=True),
        _hf("HF Mamba", "mamba", decodes=True),
        _hf("HF Mamba with mambapy", "mamba", needs=("mambapy",), use_mambapy=True),
        Peer(name="mambapy", arch="mamba", build=_MambaPy, loss=_of_logits, needs=("mambapy",)),
        _hf("HF Mamba-2", "mamba2", decodes=True),
        _hf("HF Jamba", "jamba"),
        Peer(name="torch.nn.LSTM", arch="lstm", build=PlainLSTM, loss=_of_logits),
        Peer(
            name="HF gated delta rule",
            arch="gated_deltanet",
            build=_WithTheirDeltaRule,
            loss=_of_logits,
            needs=("transformers",),
        ),
    )
}
"""Every peer by its name."""
