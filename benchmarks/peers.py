"""Training steps of small models against Hugging Face's of the same sizes, each in a process of its own.

Theirs run as they come, and once more with the allocator setting that ours run with: glibc otherwise returns large
blocks to the system in every step, which costs some models most of their time.
"""

from __future__ import annotations

import importlib.util
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..archs import LanguageModel, build
from ..train.config import OptimConfig
from ..train.health import apply_verdict
from ..train.optim import adamw, set_learning_rate
from ..train.runtime import choose_precision, keep_freed_memory
from ..train.step import accumulate_gradients
from .context import events
from .processes import Fork, last_line
from .worker import repeat_in_time_box, timed

__all__ = ["model_rows"]

_CPU = torch.device("cpu")
_DEADLINE = 60.0
"""Seconds after which a model is left out."""
_PEERS = {"mamba": "MambaForCausalLM", "transformer": "LlamaForCausalLM"}
_SEQ_LEN = 512
_BATCH_SIZE = {"mamba": 1, "transformer": 8}  # more of Hugging Face's Mamba would not end within the deadline
_PRELOAD = ("crossover.benchmarks.peers", "torch._dynamo", "numba")


def model_rows(*, threads: int, time_box: float, logs: Path, n_params: int = 1_000_000) -> Iterator[dict[str, Any]]:
    """Measures our models and theirs, a row each; one row with the reason where transformers is not installed."""
    if importlib.util.find_spec("transformers") is None:
        yield {"model": None, "text": "whole models: transformers is not installed (pip install 'crossover[hf]')"}
        return
    for arch, peer in _PEERS.items():
        order = {
            "arch": arch,
            "n_params": n_params,
            "batch_size": _BATCH_SIZE[arch],
            "seq_len": _SEQ_LEN,
            "threads": threads,
            "time_box": time_box,
        }
        ours: float | None = None
        for who, keeps, how in (
            ("ours", True, ""),
            ("theirs", False, ", as it comes"),
            ("theirs", True, ", freed memory kept as in ours"),
        ):
            name = f"our {arch}" if who == "ours" else f"transformers {peer}{how}"
            log = logs / f"peer-{arch}-{who}-{'kept' if keeps else 'default'}.log"
            found = _measured_apart({**order, "who": who, "keeps_freed_memory": keeps}, log)
            speed = found.get("tokens_per_second")
            ratio = ours / speed if who == "theirs" and ours and speed else None
            ours = speed if who == "ours" else ours
            yield {"model": arch, "who": who, "name": name, **order, **found, "ratio": ratio, "text": ""} | {
                "text": _text(name, found, ratio, order)
            }


def _text(name: str, found: Mapping[str, Any], ratio: float | None, order: Mapping[str, Any]) -> str:
    size = f"B={order['batch_size']} L={order['seq_len']}"
    if found["error"] is not None:
        return f"{name}, {size}: {found['error']}"
    behind = "" if ratio is None else f"; ours trains {ratio:.2f} times as many"
    return f"{name}, {found['n_params']:,} parameters, {size}: {found['tokens_per_second']:,.0f} tokens/s{behind}"


def _measured_apart(order: Mapping[str, Any], log: Path) -> dict[str, Any]:
    """Runs `_work` in a process of its own and returns what it printed, or the reason why it printed nothing."""
    log.unlink(missing_ok=True)
    child = Fork(_work, dict(order), log=log, preload=_PRELOAD)
    found: dict[str, Any] | None = None
    begin = time.monotonic()
    try:
        for event in events(child, timeout=_DEADLINE):
            found = event or found
            if found is None and time.monotonic() - begin > _DEADLINE:
                raise TimeoutError
    except TimeoutError:
        child.kill()
        return {"error": f"no training step within {_DEADLINE:.0f} s"}
    except KeyboardInterrupt:
        child.kill()
        raise
    code = child.join()
    return found or {"error": f"failed with code {code}: {last_line(log)} (log: {log})"}


def _work(order: dict[str, Any]) -> None:
    if order["keeps_freed_memory"]:
        keep_freed_memory()
    torch.set_num_threads(order["threads"])
    torch.manual_seed(0)
    window = torch.randint(256, (order["batch_size"], order["seq_len"] + 1))
    lm = build(order["arch"], n_params=order["n_params"], vocab_size=256)
    if order["who"] == "ours":
        apply_verdict()
        step, model = _our_step(lm), lm
    else:
        model = _peer(order["arch"], lm)
        step = _their_step(model)
    step(window[:, :17])  # loads libraries and kernels
    seconds = [timed(_CPU, lambda: step(window))]
    if seconds[0] < order["time_box"]:  # a step longer than that is measured once
        seconds = repeat_in_time_box(
            lambda: timed(_CPU, lambda: step(window)), time_box=order["time_box"], min_repeats=3
        )
    n_tokens = order["batch_size"] * order["seq_len"]
    found = {
        "tokens_per_second": n_tokens / statistics.median(seconds),
        "repeats": len(seconds),
        "n_params": sum(p.numel() for p in model.parameters()),
        "error": None,
    }
    print(json.dumps(found), flush=True)


def _our_step(lm: LanguageModel) -> Callable[[Tensor], None]:
    config, precision = OptimConfig(), choose_precision("fp32", torch.device("cpu"))
    optimizer = adamw(lm, config)
    set_learning_rate(optimizer, 1e-4)

    def step(window: Tensor) -> None:
        batch = (window[:, :-1].contiguous(), window[:, 1:].contiguous(), None)
        accumulate_gradients(lm, [batch], precision=precision, clip=config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _their_step(model: Any) -> Callable[[Tensor], None]:
    config = OptimConfig()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step(window: Tensor) -> None:
        tokens = window[:, :-1].contiguous()
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _peer(arch: str, lm: LanguageModel) -> Any:
    """Hugging Face's model of our model's sizes, with weights of its own."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here is to be fetched
    import transformers

    config = lm.config
    common = {
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "tie_word_embeddings": config.tie_embeddings,
    }
    layer: Any = lm.backbone.blocks[0]
    if arch == "mamba":
        sizes = {"state_size": layer.mixer.config.d_state, "conv_kernel": layer.mixer.config.d_conv}
        sizes |= {"expand": layer.mixer.config.expand, "time_step_rank": layer.mixer.dt_rank}
        return transformers.MambaForCausalLM(transformers.MambaConfig(**common, **sizes)).train()
    heads = {"num_attention_heads": layer.mixer.n_heads, "num_key_value_heads": layer.mixer.n_kv_heads}
    sizes = {"intermediate_size": layer.ffn.gate_proj.out_features, "max_position_embeddings": _SEQ_LEN}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**common, **heads, **sizes)).train()
