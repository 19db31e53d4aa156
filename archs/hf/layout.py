"""Parameters that Hugging Face stores in another shape, in parts or joined: `unpack` reads them, `pack` writes them."""

from __future__ import annotations

import re
from collections import defaultdict

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_CONVOLUTION = re.compile(r"\.conv1d\.weight$")
_LINEAR = re.compile(r"\.c_(attn|proj|fc)\.weight$")

BERT_SEGMENTS = "bert.embeddings.token_type_embeddings.weight"
BERT_BIAS = "cls.predictions.bias"
BERT_DECODER_BIAS = "cls.predictions.decoder.bias"
_BERT_DECODER = "cls.predictions.decoder.weight"


def unpack_mamba(tensors: Tensors) -> Tensors:
    """Weights of the short convolution are (E, 1, K) there and (E, K) here."""
    return {name: value.squeeze(1) if _CONVOLUTION.search(name) else value for name, value in tensors.items()}


def pack_mamba(tensors: Tensors) -> Tensors:
    """The reverse of `unpack_mamba`."""
    return {name: value.unsqueeze(1) if _CONVOLUTION.search(name) else value for name, value in tensors.items()}


def unpack_gpt2(tensors: Tensors) -> Tensors:
    """Weights of projections are (in, out) there, and `c_attn` makes queries, keys and values: c_attn.q, .k and .v."""
    unpacked: Tensors = {}
    for name, value in tensors.items():
        value = value.t() if _LINEAR.search(name) else value
        if c_attn := re.fullmatch(r"(.*\.c_attn)\.(\w+)", name):
            for part, weight in zip("qkv", value.chunk(3), strict=True):
                unpacked[f"{c_attn[1]}.{part}.{c_attn[2]}"] = weight.clone()  # parameters must not share storage
        else:
            unpacked[name] = value
    return unpacked


def pack_gpt2(tensors: Tensors) -> Tensors:
    """The reverse of `unpack_gpt2`."""
    joined: dict[str, list[Tensor]] = defaultdict(list)
    for name, value in tensors.items():  # q, k and v come in this order, as in the table
        joined[re.sub(r"\.c_attn\.[qkv]\.", ".c_attn.", name)].append(value)
    packed = {name: torch.cat(parts) if len(parts) > 1 else parts[0] for name, parts in joined.items()}
    return {name: value.t() if _LINEAR.search(name) else value for name, value in packed.items()}


def unpack_bert(tensors: Tensors) -> Tensors:
    """The bias of an untied head is that of its projection; a tied one has the other name alone."""
    return tensors | {BERT_BIAS: tensors[BERT_DECODER_BIAS]} if BERT_DECODER_BIAS in tensors else dict(tensors)


def pack_bert(tensors: Tensors) -> Tensors:
    """The reverse of `unpack_bert`; a model without segments gets one, of zeros."""
    packed = dict(tensors)
    if _BERT_DECODER in packed:
        packed[BERT_DECODER_BIAS] = packed[BERT_BIAS].clone()  # a file holds no shared storage
    if BERT_SEGMENTS not in packed:
        packed[BERT_SEGMENTS] = torch.zeros_like(packed["bert.embeddings.word_embeddings.weight"][:1])
    return packed


def unpack_jamba(tensors: Tensors) -> Tensors:
    """Experts lie in the file one by one; here they are stacked, the gate above the up-projection."""
    unpacked: Tensors = {}
    experts: dict[str, dict[tuple[str, int], Tensor]] = defaultdict(dict)
    for name, value in unpack_mamba(tensors).items():
        if expert := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            experts[expert[1]][expert[3], int(expert[2])] = value
        else:
            unpacked[name] = value
    for path, parts in experts.items():
        n = range(len(parts) // 3)
        unpacked[f"{path}.gate_up_proj"] = torch.stack([torch.cat([parts["gate", e], parts["up", e]]) for e in n])
        unpacked[f"{path}.down_proj"] = torch.stack([parts["down", e] for e in n])
    return unpacked


def pack_jamba(tensors: Tensors) -> Tensors:
    """The reverse of `unpack_jamba`."""
    packed: Tensors = {}
    for name, value in pack_mamba(tensors).items():
        if stack := re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj", name):
            kinds = stack[2].split("_")
            for e, expert in enumerate(value):
                for kind, weight in zip(kinds, expert.chunk(len(kinds)), strict=True):
                    packed[f"{stack[1]}.{e}.{kind}_proj.weight"] = weight.clone()  # a file holds no shared storage
        else:
            packed[name] = value
    return packed
