"""Reads and writes checkpoint folders of Hugging Face's: config.json and safetensors, without their library.

Nothing in a folder is executed. What cannot be converted without changing the logits is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ...files import give_usual_mode
from ..config import ModelConfig
from ..layers import RMSNorm
from ..model import LanguageModel
from ..registry import FFNS, MIXERS, nearest
from .families import FAMILIES, Family
from .layout import Tensors

_OWN_TYPE = "crossover.archs.hf.register makes transformers load it under a type of its own"
_FREE = re.compile(r"\.(dt_min|dt_max|chunk_len|balance_weight|inner_norm_eps)$")
"""Options of initialization, training and speed, which a trained model's logits do not depend on, and one that follows
from others."""


def from_hf(folder: str | Path, *, device: torch.device | str | None = None) -> LanguageModel:
    """Reads a checkpoint of Hugging Face's or of mamba_ssm's, with every tensor in the dtype of the file.

    BERT's two segments become one: the embedding of the first is added to the positions. Token ids of config.json
    (bos, eos, pad) have no place in a model here.

    Args:
        folder: holds config.json of a `model_type` of FAMILIES with a language-model head, and the tensors in
            model.safetensors, in several files with an index, or in pytorch_model.bin.
        device: where the model goes; None means the CPU.

    Raises:
        ValueError: if the architecture or one of its options does not exist here, or tensors are missing, unexpected or
            of another shape: one message names them all.
    """
    folder = Path(folder)
    values = _plain(_read_json(folder / "config.json"))
    family = _family(folder, values)
    lm, problems = _skeleton(family, values)
    if problems:
        raise ValueError(f"{folder}: no {family.model_type} here has {', '.join(problems)}")
    tensors = _canonical(family, _read_tensors(folder))
    if problems := _misfits(family, lm, tensors):
        raise ValueError(f"{folder}: the tensors do not fit config.json: {'; '.join(problems)}")
    unpacked = family.unpack(tensors)
    # copied: tensors of a file are not aligned, and matrix products round by alignment
    state = {
        ours: unpacked[theirs].clone(memory_format=torch.contiguous_format)
        for ours, theirs in tensor_names(family, lm).items()
    }
    lm.load_state_dict(state, assign=True)
    return lm if device is None else lm.to(device)


def to_hf(lm: LanguageModel, folder: str | Path) -> None:
    """Writes config.json and model.safetensors, which transformers' `from_pretrained` loads; `from_hf` reverses it.

    Raises:
        ValueError: if no architecture of FAMILIES computes the same; the message says what is in the way.
    """
    family, values = _expressed(lm)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: value.contiguous() for name, value in _stored(family, lm).items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    give_usual_mode(folder / "model.safetensors")
    config = {"architectures": [family.architecture], "model_type": family.model_type, **_nested(values)}
    config["dtype"] = str(lm.embedding.weight.dtype).removeprefix("torch.")
    # the defaults would stop generation at tokens that mean something else here
    config |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def tensor_names(family: Family, lm: LanguageModel) -> dict[str, str]:
    """Our parameters -> theirs, as `family.unpack` names them."""
    names = {}
    for name in lm.state_dict():
        key, layer = name, ""
        if inside := re.fullmatch(r"backbone\.blocks\.(\d+)\.(\w+)\.(.*)", name):
            layer, part, rest = inside.groups()
            key = f"{part}.{rest}"
            if part in ("mixer", "ffn"):
                key = f"{_kind(getattr(lm.backbone.blocks[int(layer)], part))}.{rest}"
        module, _, parameter = key.rpartition(".")
        theirs = family.tensors[key] if key in family.tensors else f"{family.tensors[module]}.{parameter}"
        names[name] = theirs.format(i=layer)
    return names


def _stored(family: Family, lm: LanguageModel) -> Tensors:
    """The tensors of a file: of a model on the meta device their names and shapes."""
    state = lm.state_dict()
    return family.pack({theirs: state[ours] for ours, theirs in tensor_names(family, lm).items()})


def _canonical(family: Family, tensors: Tensors) -> Tensors:
    """The tensors under the names that `save_pretrained` gives them, without what does not matter."""
    if not any(name.startswith(family.prefix) for name in tensors):  # saved without the head
        tensors = {
            name if name.startswith(("lm_head.", "cls.")) else family.prefix + name: tensors[name] for name in tensors
        }
    for pattern, today in family.renamed.items():
        tensors = {re.sub(pattern, today, name): value for name, value in tensors.items()}
    return family.trim({name: value for name, value in tensors.items() if not re.search(family.ignored, name)})


def _misfits(family: Family, lm: LanguageModel, tensors: Tensors) -> list[str]:
    """Every way in which the tensors are not those of the model, in words; drops a copy of a tied head."""
    expected = _stored(family, lm)
    head, embedding = (f"{family.tensors[name]}.weight" for name in ("head", "embedding"))
    problems = []
    if lm.config.tie_embeddings and head in tensors and embedding in tensors:
        copy = tensors.pop(head)
        if not torch.equal(copy, tensors[embedding]):
            problems.append(f"{head} is not the embedding, though the two are tied")
    problems += [f"{name} is missing" for name in expected if name not in tensors]
    problems += [f"{name} is not expected" for name in tensors if name not in expected]
    for name, value in expected.items():
        if name in tensors and tensors[name].shape != value.shape:
            problems.append(f"{name} is {tuple(tensors[name].shape)} and should be {tuple(value.shape)}")
    return problems


def _skeleton(family: Family, values: Mapping[str, Any]) -> tuple[LanguageModel, list[str]]:
    """The model of a config.json, on the meta device, and every option that it does not follow, in words."""
    problems = [
        f"{name}={json.dumps(value)}"
        for name, only in {**family.required, "quantization_config": None}.items()
        if (value := _look_up(values, name, only)) != only and (value or only)  # null and [] both mean nothing
    ]
    complete = dict(values) | {name: _look_up(values, name, o.default) for name, o in family.options.items()}
    found = dict(family.constants)
    for name, option in family.options.items():
        value = complete[name]
        if option.values is not None and value not in option.values:
            problems.append(f"{name}={json.dumps(value)}")
        elif value not in (None, "auto"):
            found |= dict.fromkeys(option.paths, value if option.values is None else option.values[value])
    layers = family.layers(complete)
    with torch.device("meta"):
        lm = LanguageModel(_config(found, layers))
    ours = _describe(lm)
    for path, name in family.implied.items():
        if ours.get(path) is not None and complete.get(name, ours[path]) != ours[path]:
            problems.append(f"{name}={json.dumps(complete[name])} ({path} is {ours[path]})")
    return lm, problems


def _config(found: Mapping[str, Any], layers: Sequence[str]) -> ModelConfig:
    """Options by dotted path, of the layers that there are, as a ModelConfig."""
    used = {f"mixer.{e.partition('+')[0]}" for e in layers} | {f"ffn.{e.partition('+')[2]}" for e in layers}
    kept = {path: value for path, value in found.items() if "." not in path or path.rpartition(".")[0] in used}
    return ModelConfig(pattern=_period(layers), **_nested(kept))


def _describe(lm: LanguageModel) -> dict[str, Any]:
    """Every option of a model by its dotted path, with what was left open filled in as its layers were built.

    Raises:
        ValueError: if layers of one kind differ.
    """
    sections = ("pattern", "mixer", "ffn", "bias")
    found = {f.name: getattr(lm.config, f.name) for f in dataclasses.fields(lm.config) if f.name not in sections}
    entries = []
    for block in lm.backbone.blocks:
        parts = {"mixer": block.mixer} | ({} if block.ffn is None else {"ffn": block.ffn})
        entries.append("+".join(map(_kind, parts.values())))
        for part, module in parts.items():
            for name, value in _options(module).items():
                path = f"{part}.{_kind(module)}.{name}"
                if found.setdefault(path, value) != value:
                    raise ValueError(
                        f"layers differ in {path} ({found[path]} and {value}), which no checkpoint can say"
                    )
    return found | {"pattern": _period(entries)}


def _options(module: Any) -> dict[str, Any]:
    """Options of a mixer or an ffn as it was built, and two that are none: n_heads of any mixer, and inner_norm_eps."""
    options = dataclasses.asdict(module.config)
    built = ("n_heads", "n_kv_heads", "head_dim", "dt_rank")
    options |= {name: getattr(module, name) for name in built if hasattr(module, name)}
    if "d_ff" in options:
        down = module.down_proj
        options["d_ff"] = (down.weight if isinstance(down, nn.Linear) else down).shape[-1]
    eps = {norm.eps for norm in module.modules() if isinstance(norm, RMSNorm)}
    return options | {"inner_norm_eps": eps.pop() if len(eps) == 1 else None}


def _expressed(lm: LanguageModel) -> tuple[Family, dict[str, Any]]:
    """The family that computes what the model does, and its options of config.json."""
    ours = _describe(lm)
    kinds = set(re.findall(r"\w+", " ".join(ours["pattern"])))
    families = [family for family in FAMILIES.values() if kinds <= family.kinds]
    attempts = [(_problems(family, ours, values := _values(family, ours)), family, values) for family in families]
    if not attempts:
        raise ValueError(f"no model of Hugging Face's has layers {list(ours['pattern'])}: {_OWN_TYPE}")
    problems, family, values = min(attempts, key=lambda attempt: len(attempt[0]))
    if problems:
        raise ValueError(
            f"Hugging Face's {family.model_type}, the nearest to this model, cannot have {', '.join(problems)}:"
            f" {_OWN_TYPE}"
        )
    return family, values


def _values(family: Family, ours: Mapping[str, Any]) -> dict[str, Any]:
    """Options of config.json that come as near to the model as the family can, by dotted path."""
    values: dict[str, Any] = {}
    for name, option in family.options.items():
        given = [ours[path] for path in option.paths if ours.get(path) is not None]
        if option.values is not None:
            given = [theirs for value in given for theirs, same in option.values.items() if same == value]
        if given:
            # transformers insists on whole numbers
            values[name] = int(given[0]) if type(option.default) is int else given[0]
    for path, name in family.implied.items():
        if ours.get(path) is not None:
            values.setdefault(name, ours[path])
    layers = [ours["pattern"][i % len(ours["pattern"])] for i in range(ours["n_layers"])]
    return values | family.places(layers)


def _problems(family: Family, ours: Mapping[str, Any], values: Mapping[str, Any]) -> list[str]:
    """The options that would be lost, in words: those of which these values, read again, say something else."""
    try:
        lm, problems = _skeleton(family, _nested(values))
    except ValueError as error:
        return [str(error)]
    back = _describe(lm)
    return problems + [
        f"{path}={list(value) if path == 'pattern' else value}"
        for path, value in ours.items()
        if not _FREE.search(path) and value != back.get(path)
    ]


def _kind(module: nn.Module) -> str:
    """The name of a mixer's or an ffn's class in a pattern."""
    names = {cls: name for name, cls in (*MIXERS.items(), *FFNS.items())}
    return names[type(module)]  # pyright: ignore[reportArgumentType]


def _period(layers: Sequence[str]) -> tuple[str, ...]:
    """The fewest layers that repeat to all of them."""
    n = next(n for n in range(1, len(layers) + 1) if all(e == layers[i % n] for i, e in enumerate(layers)))
    return tuple(layers[:n])


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a.b": 1} -> {"a": {"b": 1}}."""
    nested: dict[str, Any] = {}
    for path, value in flat.items():
        *sections, name = path.split(".")
        inner = nested
        for section in sections:
            inner = inner.setdefault(section, {})
        inner[name] = value
    return nested


def _look_up(values: Mapping[str, Any], path: str, default: Any) -> Any:
    """The value at a dotted path."""
    for name in path.split("."):
        if not isinstance(values, Mapping) or name not in values:
            return default
        values = values[name]
    return values


def _family(folder: Path, values: Mapping[str, Any]) -> Family:
    model_type = values.get("model_type")
    if model_type not in FAMILIES:
        hint = nearest(str(model_type), FAMILIES)
        raise ValueError(f"{folder} holds a model of unknown model_type={json.dumps(model_type)}{hint}")
    return FAMILIES[model_type]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json of today, made of one of mamba_ssm's or of older versions."""
    if "model_type" not in values and {"d_model", "n_layer"} <= values.keys():
        return _from_mamba_ssm(values)
    if values.get("model_type") == "llama" and "rope_parameters" not in values:
        rope = dict(values.get("rope_scaling") or {})
        rope["rope_type"] = rope.pop("rope_type", rope.pop("type", "default"))
        theta = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
        return values | {"rope_parameters": rope | theta}
    return values


def _from_mamba_ssm(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of mamba_ssm's MambaConfig under Hugging Face's names."""
    ssm = dict(values.get("ssm_cfg") or {})
    is_second = ssm.pop("layer", "Mamba1") == "Mamba2"
    multiple = values.get("pad_vocab_size_multiple", 8)
    found: dict[str, Any] = {
        "model_type": "mamba2" if is_second else "mamba",
        "hidden_size": values["d_model"],
        "num_hidden_layers": values["n_layer"],
        "vocab_size": math.ceil(values.get("vocab_size", 50277) / multiple) * multiple,
        "tie_word_embeddings": values.get("tie_embeddings", True),
    }
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_min": "time_step_min"}
    names |= {"dt_max": "time_step_max", "dt_rank": "time_step_rank", "bias": "use_bias", "conv_bias": "use_conv_bias"}
    if is_second:
        found |= {"n_groups": 1}
        names |= {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit"}
    found |= {theirs: ssm.pop(name) for name, theirs in names.items() if name in ssm}
    rest = {name: values[name] for name in ("rms_norm", "d_intermediate", "attn_layer_idx") if name in values}
    return found | rest | {"ssm_cfg": {name: value for name, value in ssm.items() if name != "chunk_size"}}


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: if there is none.
    """
    try:
        # infinity as transformers writes it
        values = json.loads(path.read_bytes(), object_hook=lambda d: float(d["__float__"]) if "__float__" in d else d)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a folder with a saved model") from error
    except ValueError as error:
        raise ValueError(f"{path} is not JSON ({error})") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return values


def _read_tensors(folder: Path) -> Tensors:
    """All tensors of a folder.

    Raises:
        ValueError: if there are none, or a file is damaged or absent.
    """
    tensors: Tensors = {}
    for path in _files(folder):
        try:
            if path.suffix == ".safetensors":
                tensors |= load_file(path)
            else:  # mamba_ssm's only format; tensors alone are unpickled
                tensors |= torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, SafetensorError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"cannot read the tensors of {path} ({error})") from error
    return tensors


def _files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        if (folder / f"{name}.index.json").exists():
            shards = _read_json(folder / f"{name}.index.json").get("weight_map", {}).values()
            return [folder / Path(shard).name for shard in sorted(set(shards))]
    raise ValueError(f"{folder} has no model.safetensors, nor an index of several, nor a pytorch_model.bin")
