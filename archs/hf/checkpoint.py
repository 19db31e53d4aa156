"""Reads and writes checkpoint folders of Hugging Face's: config.json and safetensors, without their library.

Nothing in a folder is executed. What cannot be converted without changing the logits is refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...files import give_usual_mode, parse_json
from ...options import nearest
from ..config import ModelConfig
from ..layers import RMSNorm
from ..model import LanguageModel
from ..registry import FFNS, MIXERS
from ..weights import misfits, read_tensors
from .families import FAMILIES, Family
from .layout import Tensors

_OWN_TYPE = "crossover.archs.hf.register makes transformers load it under a type of its own"
_MOST_LAYERS = 2**12
_LONGEST = 60  # characters of a value in a message
_FREE = re.compile(r"\.(dt_min|dt_max|chunk_len|balance_weight|inner_norm_eps)$")
"""Options of initialization, training and speed, which a trained model's logits do not depend on, and one that follows
from others."""


def from_hf(folder: str | Path, *, device: torch.device | str | None = None) -> LanguageModel:
    """Reads a checkpoint of Hugging Face's or of mamba_ssm's, with every tensor in the dtype of the file.

    Every option of config.json is followed, known to make no difference to the logits, or refused; every tensor is
    used, equal to what it would be computed as, or refused, but for BERT's pooler and its head for the next sentence.
    Token ids of config.json (bos, eos, pad) have no place in a model here.

    Args:
        folder: holds config.json of a `model_type` of FAMILIES with a language-model head, and the tensors in
            model.safetensors, in several files with an index, or in pytorch_model.bin.
        device: where the model goes; None means the CPU.

    Raises:
        ValueError: if a file cannot be read, the architecture or one of its options does not exist here, or tensors are
            missing, unexpected, of another shape or no floats: one line, which names what is wrong.
    """
    folder = Path(folder)
    values = _plain(_read_json(folder / "config.json"))
    family = _family(folder, values)
    if problems := _unknown(family, values):
        raise ValueError(f"{folder}: no {family.model_type} here has {', '.join(problems)}")
    tensors = _canonical(family, _read_files(folder), folder)
    try:
        lm, problems = _skeleton(family, family.reading(values, tensors))
    except ValueError as error:
        raise ValueError(f"{folder}: config.json describes no model ({error})") from None
    if problems:
        raise ValueError(f"{folder}: no {family.model_type} here has {', '.join(problems)}")
    problems = _settle(family, lm, tensors)
    misfit = misfits(_stored(family, lm), tensors)
    if problems := "; ".join([*problems, misfit] if misfit else problems):
        raise ValueError(f"{folder}: the tensors do not fit config.json: {problems}")
    unpacked = family.unpack(tensors)
    lm.load_state_dict(
        {ours: unpacked[theirs].contiguous() for ours, theirs in tensor_names(family, lm).items()}, assign=True
    )
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
    config = {"architectures": [family.architecture], "model_type": family.model_type}
    config |= _nested(family.writing(values))
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


def _canonical(family: Family, tensors: Tensors, folder: Path) -> Tensors:
    """The tensors under the names that `save_pretrained` gives them, without what does not matter.

    Raises:
        ValueError: if two names of one version are one of another.
    """
    names = {name: name for name in tensors if not re.search(family.ignored, name)}
    if not any(name.startswith(family.prefix) for name in names):  # saved without the head
        names = {n: n if n.startswith(("lm_head.", "cls.")) else family.prefix + n for n in names}
        names = {n: today for n, today in names.items() if not re.search(family.ignored, today)}
    for pattern, today in family.renamed.items():
        names = {n: re.sub(pattern, today, name) for n, name in names.items()}
    found: Tensors = {}
    for stored, name in names.items():
        if name in found:
            raise ValueError(f"{folder}: the tensors do not fit config.json: {name} is there under two names")
        found[name] = tensors[stored]
    return found


def _settle(family: Family, lm: LanguageModel, tensors: Tensors) -> list[str]:
    """Takes out tensors that say what others say, or what is computed; in words, those that say something else."""
    head, embedding = (f"{family.tensors[name]}.weight" for name in ("head", "embedding"))
    problems = []
    for copy, original in {head: embedding, **family.copies}.items():
        if lm.config.tie_embeddings and copy in tensors:
            value = tensors.pop(copy)
            if not torch.equal(value, tensors.setdefault(original, value)):
                problems.append(f"{copy} is not {original}, though the two are tied")
        elif (
            copy in family.copies and not lm.config.tie_embeddings
        ):  # of an untied head, of which some versions store one
            for name, other in ((copy, original), (original, copy)):
                if name not in tensors and other in tensors:
                    tensors[name] = tensors[other]
    for pattern, is_computed in family.computed.items():
        for name in [name for name in tensors if re.search(pattern, name)]:
            if not is_computed(tensors.pop(name), lm.config):
                problems.append(f"{name} is not what the model computes")
    return problems


def _unknown(family: Family, values: Mapping[str, Any]) -> list[str]:
    """Every option of a config.json that a model here cannot follow, in words."""
    understood = family.known
    nested = {name.partition(".")[0] for name in understood if "." in name}
    flat = {name: value for name, value in values.items() if name not in nested}
    for section in nested & values.keys():
        inner = values[section]
        flat |= {f"{section}.{n}": v for n, v in inner.items()} if isinstance(inner, dict) else {section: inner}
    choices = {name: option.values for name, option in family.options.items() if option.values is not None}
    defaults = {name: option.default for name, option in family.options.items()} | dict(family.default_places)
    problems = []
    for name, value in flat.items():
        if name in family.required:
            only = family.required[name]
            fits = value == only or not (value or only)  # null, false, [] and {} all mean nothing
        elif name in choices:
            fits = isinstance(value, str) and value in choices[name]
        elif name in defaults:
            fits = _has_type(value, defaults[name], at_least=0 if name.endswith("_offset") else 1)
        else:
            fits = name in understood or value is None
        if not fits:
            text = json.dumps(value)
            problems.append(f"{name}={text if len(text) <= _LONGEST else text[:_LONGEST] + ' ...'}")
    return problems


def _has_type(value: Any, default: Any, *, at_least: int) -> bool:
    """Whether a value of config.json is one that an option with this default takes."""
    if value is None or value == "auto":
        return default is None or default == "auto"
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, float):
        return isinstance(value, int | float) and math.isfinite(value) and value >= 0
    return isinstance(value, int) and at_least <= value < 2**31


def _skeleton(family: Family, values: Mapping[str, Any]) -> tuple[LanguageModel, list[str]]:
    """The model of a config.json, on the meta device, and every option that contradicts it, in words."""
    defaults = {name: option.default for name, option in family.options.items()} | dict(family.default_places)
    complete = dict(values) | {name: _look_up(values, name, default) for name, default in defaults.items()}
    found = dict(family.constants)
    for name, option in family.options.items():
        value = complete[name]
        if value not in (None, "auto"):
            found |= dict.fromkeys(option.paths, value if option.values is None else option.values[value])
    if (n := found["n_layers"]) > _MOST_LAYERS:
        raise ValueError(f"{n} layers are more than {_MOST_LAYERS}")
    layers = family.layers(complete)
    problems = []
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
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        hint = nearest(str(model_type), FAMILIES)
        raise ValueError(f"{folder} holds a model of unknown model_type={json.dumps(model_type)}{hint}")
    return family


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json of today, made of one of mamba_ssm's or of older versions."""
    if "model_type" not in values and {"d_model", "n_layer"} <= values.keys():
        return _from_mamba_ssm(values)
    if values.get("model_type") == "llama":
        return _with_rope_parameters(values)
    return values


def _with_rope_parameters(values: dict[str, Any]) -> dict[str, Any]:
    """A config.json that says all about rotation in `rope_parameters`, read as transformers reads the older ones."""
    outside = ("rope_parameters", "rope_scaling", "rope_theta", "partial_rotary_factor")
    rest = {name: value for name, value in values.items() if name not in outside}
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        return rest | {"rope_parameters": rope}
    rope = {name: values[name] for name in outside[2:] if values.get(name) is not None} | rope
    rope["rope_type"] = rope.pop("rope_type", rope.get("type", "default"))
    return rest | {"rope_parameters": {name: value for name, value in rope.items() if name != "type"}}


def _from_mamba_ssm(values: Mapping[str, Any]) -> dict[str, Any]:
    """The options of mamba_ssm's MambaConfig under Hugging Face's names."""
    rest = dict(values)
    ssm = rest.pop("ssm_cfg", None) or {}
    if not isinstance(ssm, dict):
        return rest | {"model_type": "mamba", "ssm_cfg": ssm}
    ssm = dict(ssm)
    is_second = ssm.pop("layer", "Mamba1") == "Mamba2"
    size, multiple = rest.pop("vocab_size", 50277), rest.pop("pad_vocab_size_multiple", 8)
    if all(isinstance(n, int) and n > 0 for n in (size, multiple)):
        size = -(-size // multiple) * multiple
    found: dict[str, Any] = {
        "model_type": "mamba2" if is_second else "mamba",
        "hidden_size": rest.pop("d_model"),
        "num_hidden_layers": rest.pop("n_layer"),
        "vocab_size": size,
        "tie_word_embeddings": rest.pop("tie_embeddings", True),
    }
    names = {"d_state": "state_size", "d_conv": "conv_kernel", "expand": "expand", "dt_min": "time_step_min"}
    names |= {"dt_max": "time_step_max", "dt_rank": "time_step_rank", "bias": "use_bias", "conv_bias": "use_conv_bias"}
    if is_second:
        found |= {"n_groups": 1}
        names |= {"headdim": "head_dim", "ngroups": "n_groups", "dt_limit": "time_step_limit"}
    found |= {theirs: ssm.pop(name) for name, theirs in names.items() if name in ssm}
    return rest | found | {"ssm_cfg": {name: value for name, value in ssm.items() if name != "chunk_size"}}


def _read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        ValueError: if there is none.
    """
    try:
        values = parse_json(path.read_bytes(), path, exact=False)
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror}): give a folder with a saved model") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not a JSON object")
    return _with_infinity(values)


def _with_infinity(value: Any) -> Any:
    """JSON values with the infinities that transformers writes as {"__float__": "Infinity"}."""
    if isinstance(value, list):
        return [_with_infinity(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    if value.get("__float__") in ("Infinity", "-Infinity"):
        return float(value["__float__"])
    return {name: _with_infinity(inner) for name, inner in value.items()}


def _read_files(folder: Path) -> Tensors:
    """All tensors of a folder.

    Raises:
        ValueError: if there are none, a file is damaged or absent, or two files hold a tensor of the same name.
    """
    tensors: Tensors = {}
    for path in _files(folder):
        found = read_tensors(path) if path.suffix == ".safetensors" else _unpickled(path)
        if twice := tensors.keys() & found.keys():
            raise ValueError(f"{path} holds {min(twice)}, and so does a file before it")
        tensors |= found
    return tensors


def _unpickled(path: Path) -> Tensors:
    """The tensors of a pickle, mamba_ssm's only format: torch's reader makes tensors and containers, and runs nothing.

    Raises:
        ValueError: if it holds anything else, or is damaged.
    """
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    except Exception:  # what damaged bytes raise, no list holds
        found = None
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{path} is damaged or holds more than tensors, and is not unpickled: use model.safetensors")
    return {name: value.clone() for name, value in found.items()}  # aligned, and with a storage of its own


def _files(folder: Path) -> list[Path]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            shards = _read_json(index).get("weight_map")
            if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
                raise ValueError(f"{index} has no table weight_map that names a file for each tensor")
            return [folder / Path(shard).name for shard in sorted(set(shards.values()))]
    raise ValueError(f"{folder} has no model.safetensors, nor an index of several, nor a pytorch_model.bin")
