"""Hugging Face's names of the parts of each architecture: a table of options and one of tensors per `model_type`.

Every table is read in both directions. Options are dotted paths of ModelConfig, where the part after "mixer." or "ffn."
is the kind of layer, as in the tensor tables.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..config import ModelConfig
from . import layout
from .layout import Tensors


@dataclass(frozen=True)
class Option:
    """An option of config.json and what it is called here."""

    default: Any
    """The value that Hugging Face takes where config.json has none, and by which its type is known; None and "auto" are
    whole numbers that follow from others."""
    path: str
    """Our option that it stands for."""
    also: str | None = None
    """A second option of ours that it stands for."""
    values: Mapping[Any, Any] | None = None
    """Their value -> ours, where they differ; others are not supported."""

    @property
    def paths(self) -> tuple[str, ...]:
        """All of our options that it stands for."""
        return (self.path,) if self.also is None else (self.path, self.also)


def _words(text: str) -> frozenset[str]:
    """The words of a text."""
    return frozenset(text.split())


HARMLESS = _words(
    """
    _name_or_path _commit_hash _attn_implementation _attn_implementation_autoset _experts_implementation
    architectures attn_implementation auto_map dtype finetuning_task initializer_factor initializer_range model_type
    name_or_path prefix problem_type task_specific_params tokenizer_class torch_dtype torchscript transformers_version
    use_bfloat16 id2label label2id num_labels _num_labels
    bos_token_id cls_token_id decoder_start_token_id eos_token_id mask_token_id pad_token_id sep_token_id unk_token_id
    chunk_size_feed_forward gradient_checkpointing output_attentions output_hidden_states output_past return_dict
    use_cache use_return_dict
    assistant_confidence_threshold assistant_lookbehind bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size encoder_repetition_penalty epsilon_cutoff eta_cutoff
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length max_new_tokens
    min_length no_repeat_ngram_size num_assistant_tokens num_assistant_tokens_schedule num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate suppress_tokens
    target_lookbehind temperature top_k top_p typical_p
    """
)
"""Options of any config.json on which the logits of a trained model do not depend: where it comes from, tokens that a
tokenizer adds, labels of other heads, how weights were drawn, how memory is saved, and the options of generation."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture of Hugging Face's."""

    model_type: str
    architecture: str
    """The class with the language-model head."""
    prefix: str
    """Prefix that the names of that class have and those of the class without the head lack."""
    layers: Callable[[Mapping[str, Any]], list[str]]
    """config.json -> an entry "mixer+ffn" for each layer."""
    places: Callable[[Sequence[str]], dict[str, Any]] = lambda layers: {}
    """The reverse of `layers`: options of config.json that give these layers, as far as there are any."""
    default_places: Mapping[str, int] = field(default_factory=dict)
    """The options that `layers` reads besides the number of layers, and their defaults."""
    options: Mapping[str, Option]
    """Their options that are options here."""
    constants: Mapping[str, Any] = field(default_factory=dict)
    """Our options that they do not have, and what they compute."""
    required: Mapping[str, Any] = field(default_factory=dict)
    """Their options that we do not have: the only value that we compute, which is also their default."""
    implied: Mapping[str, str] = field(default_factory=dict)
    """Options that our layers fix by themselves -> their option, which must agree."""
    harmless: frozenset[str] = frozenset()
    """Their options, besides HARMLESS, on which the logits of a trained model do not depend."""
    tensors: Mapping[str, str]
    """Our parameter or module -> theirs; {i} is the layer."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Regular expressions of names that other versions use -> today's."""
    ignored: str = r"(?!)"
    """Regular expression of tensors that make no difference to the logits."""
    computed: Mapping[str, Callable[[Tensor, ModelConfig], bool]] = field(default_factory=dict)
    """Regular expressions of tensors that follow from the config, and whether one is what follows."""
    copies: Mapping[str, str] = field(default_factory=dict)
    """Tensors that are another one where the embedding is tied -> that one. Where it is not and one of the two is
    absent, they are the same all the same."""
    reading: Callable[[dict[str, Any], Tensors], dict[str, Any]] = lambda values, tensors: values
    """Options of config.json as they are to be read beside the tensors."""
    writing: Callable[[dict[str, Any]], dict[str, Any]] = dict
    """The reverse of `reading`."""
    unpack: Callable[[Tensors], Tensors] = dict
    """Tensors as stored -> one tensor for each parameter of ours, under the names of the table."""
    pack: Callable[[Tensors], Tensors] = dict
    """The reverse of `unpack`."""

    @property
    def known(self) -> frozenset[str]:
        """Every option of config.json that is understood, by its dotted path."""
        sections = (self.options, self.default_places, self.required, self.implied.values(), self.harmless, HARMLESS)
        return frozenset(name for section in sections for name in section)

    @property
    def kinds(self) -> frozenset[str]:
        """The mixers and ffns that the tensor table knows."""
        return frozenset(re.match(r"\w+", name)[0] for name in self.tensors if "." in name)  # pyright: ignore[reportOptionalSubscript]


def _always(entry: str, n_layers: str) -> Callable[[Mapping[str, Any]], list[str]]:
    """All layers alike; `n_layers` is the option that counts them."""
    return lambda config: [entry] * config[n_layers]


def _is_inverse_frequency(found: Tensor, config: ModelConfig) -> bool:
    """Whether a tensor holds the rotation's frequencies, which older versions stored, also in half precision."""
    exponents = torch.arange(found.numel(), dtype=torch.float64) / found.numel()
    base = config.mixer["attention"].get("rope_theta", 10_000.0)
    return torch.allclose(found.flatten().double(), base**-exponents, rtol=0.01, atol=1e-6)


def _is_causal_mask(found: Tensor, config: ModelConfig) -> bool:
    """Whether a tensor is a triangle of ones of the longest context, as older versions stored it."""
    size = config.max_positions
    return found.shape[-2:] == (size, size) and bool((found == torch.ones_like(found).tril()).all())


def _counts(found: Tensor, config: ModelConfig) -> bool:
    """Whether a tensor counts the positions of the longest context."""
    return torch.equal(found.flatten().long(), torch.arange(config.max_positions or 0))


_ABSENT: dict[str, Any] = {"is_encoder_decoder": False, "pruned_heads": {}, "quantization_config": None}
"""What no model here has, whatever its family."""

_ATTENTION = {
    "num_attention_heads": Option(32, "mixer.attention.n_heads"),
    "num_key_value_heads": Option(None, "mixer.attention.n_kv_heads"),
}
_SELF_ATTENTION = {
    "attention.q_proj": "model.layers.{i}.self_attn.q_proj",
    "attention.k_proj": "model.layers.{i}.self_attn.k_proj",
    "attention.v_proj": "model.layers.{i}.self_attn.v_proj",
    "attention.out_proj": "model.layers.{i}.self_attn.o_proj",
}

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    layers=_always("attention+mlp", "num_hidden_layers"),
    options={
        "hidden_size": Option(4096, "d_model"),
        "num_hidden_layers": Option(32, "n_layers"),
        "vocab_size": Option(32000, "vocab_size"),
        "rms_norm_eps": Option(1e-6, "norm_eps"),
        "tie_word_embeddings": Option(False, "tie_embeddings"),
        **_ATTENTION,
        "head_dim": Option(None, "mixer.attention.head_dim"),
        "attention_bias": Option(False, "mixer.attention.bias"),
        "rope_parameters.rope_theta": Option(10_000.0, "mixer.attention.rope_theta"),
        "intermediate_size": Option(11008, "ffn.mlp.d_ff"),
        "mlp_bias": Option(False, "ffn.mlp.bias"),
    },
    required={
        **_ABSENT,
        "hidden_act": "silu",
        "rope_parameters.rope_type": "default",
        "rope_parameters.partial_rotary_factor": 1.0,
    },
    harmless=_words("attention_dropout max_position_embeddings max_sequence_length pretraining_tp"),
    tensors={
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "backbone.norm": "model.norm",
        "mixer_norm": "model.layers.{i}.input_layernorm",
        "ffn_norm": "model.layers.{i}.post_attention_layernorm",
        **_SELF_ATTENTION,
        "mlp.gate_proj": "model.layers.{i}.mlp.gate_proj",
        "mlp.up_proj": "model.layers.{i}.mlp.up_proj",
        "mlp.down_proj": "model.layers.{i}.mlp.down_proj",
    },
    computed={r"\.rotary_emb\.inv_freq$": _is_inverse_frequency},
)


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    layers=_always("attention+mlp", "n_layer"),
    options={
        "n_embd": Option(768, "d_model"),
        "n_layer": Option(12, "n_layers"),
        "vocab_size": Option(50257, "vocab_size"),
        "n_positions": Option(1024, "max_positions"),
        "layer_norm_epsilon": Option(1e-5, "norm_eps"),
        "tie_word_embeddings": Option(True, "tie_embeddings"),
        "n_head": Option(12, "mixer.attention.n_heads"),
        "n_inner": Option(None, "ffn.mlp.d_ff"),
        "activation_function": Option(
            "gelu_new",
            "ffn.mlp.activation",
            values={"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
        ),
    },
    constants={"norm": "layernorm", "bias": True, "positions": "learned", "mixer.attention.rope": False},
    required={**_ABSENT, "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False}
    | {"add_cross_attention": False},
    harmless=_words(
        """
        attn_pdrop embd_pdrop resid_pdrop n_ctx n_special predict_special_tokens reorder_and_upcast_attn
        summary_activation summary_first_dropout summary_proj_to_labels summary_type summary_use_proj
        """
    ),
    tensors={
        "embedding": "transformer.wte",
        "head": "lm_head",
        "backbone.positions": "transformer.wpe",
        "backbone.norm": "transformer.ln_f",
        "mixer_norm": "transformer.h.{i}.ln_1",
        "ffn_norm": "transformer.h.{i}.ln_2",
        "attention.q_proj": "transformer.h.{i}.attn.c_attn.q",
        "attention.k_proj": "transformer.h.{i}.attn.c_attn.k",
        "attention.v_proj": "transformer.h.{i}.attn.c_attn.v",
        "attention.out_proj": "transformer.h.{i}.attn.c_proj",
        "mlp.up_proj": "transformer.h.{i}.mlp.c_fc",
        "mlp.down_proj": "transformer.h.{i}.mlp.c_proj",
    },
    computed={r"\.attn\.bias$": _is_causal_mask},
    ignored=r"\.attn\.masked_bias$",  # what is added to scores that a mask hides
    unpack=layout.unpack_gpt2,
    pack=layout.pack_gpt2,
)


_BERT_LAYER = "bert.encoder.layer.{i}"


def _without_an_empty_segment(values: dict[str, Any], tensors: Tensors) -> dict[str, Any]:
    """A model without segments is written as one with a single one, of zeros, because BERTs have at least one."""
    found = tensors.get(layout.BERT_SEGMENTS)
    is_empty = found is not None and len(found) == 1 and not found.any()
    return values | {"type_vocab_size": 0} if is_empty and values.get("type_vocab_size") == 1 else values


BERT = Family(
    model_type="bert",
    architecture="BertForMaskedLM",
    prefix="bert.",
    layers=_always("attention+mlp", "num_hidden_layers"),
    options={
        "hidden_size": Option(768, "d_model"),
        "num_hidden_layers": Option(12, "n_layers"),
        "vocab_size": Option(30522, "vocab_size"),
        "type_vocab_size": Option(2, "segments"),
        "max_position_embeddings": Option(512, "max_positions"),
        "layer_norm_eps": Option(1e-12, "norm_eps"),
        "tie_word_embeddings": Option(True, "tie_embeddings"),
        "num_attention_heads": Option(12, "mixer.attention.n_heads"),
        "intermediate_size": Option(3072, "ffn.mlp.d_ff"),
    },
    constants={
        "norm": "layernorm",
        "prenorm": False,
        "bias": True,
        "positions": "learned",
        "head": "mlm",
        "mixer.attention.rope": False,
        "mixer.attention.causal": False,
        "ffn.mlp.activation": "gelu",
    },
    required={
        **_ABSENT,
        "hidden_act": "gelu",
        "is_decoder": False,
        "add_cross_attention": False,
        "position_embedding_type": "absolute",
    },
    harmless=_words(
        """
        attention_probs_dropout_prob classifier_dropout directionality hidden_dropout_prob
        pooler_fc_size pooler_num_attention_heads pooler_num_fc_layers pooler_size_per_head pooler_type
        """
    ),
    tensors={
        "embedding": "bert.embeddings.word_embeddings",
        "segments": "bert.embeddings.token_type_embeddings",
        "head": "cls.predictions.decoder",
        "head.bias": layout.BERT_BIAS,
        "transform.0": "cls.predictions.transform.dense",
        "transform.2": "cls.predictions.transform.LayerNorm",
        "backbone.positions": "bert.embeddings.position_embeddings",
        "backbone.norm": "bert.embeddings.LayerNorm",
        "mixer_norm": f"{_BERT_LAYER}.attention.output.LayerNorm",
        "ffn_norm": f"{_BERT_LAYER}.output.LayerNorm",
        "attention.q_proj": f"{_BERT_LAYER}.attention.self.query",
        "attention.k_proj": f"{_BERT_LAYER}.attention.self.key",
        "attention.v_proj": f"{_BERT_LAYER}.attention.self.value",
        "attention.out_proj": f"{_BERT_LAYER}.attention.output.dense",
        "mlp.up_proj": f"{_BERT_LAYER}.intermediate.dense",
        "mlp.down_proj": f"{_BERT_LAYER}.output.dense",
    },
    renamed={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    # what says whether one text follows another has no part in the logits
    ignored=r"^bert\.pooler\.|^cls\.seq_relationship\.",
    computed={r"^bert\.embeddings\.position_ids$": _counts},
    copies={layout.BERT_DECODER_BIAS: layout.BERT_BIAS},
    reading=_without_an_empty_segment,
    writing=lambda values: values | {"type_vocab_size": max(1, values["type_vocab_size"])},
    unpack=layout.unpack_bert,
    pack=layout.pack_bert,
)


def _mamba(path: str) -> dict[str, str]:
    """The tensors of a Mamba or Mamba-2 mixer at `path`."""
    names = {p: p for p in ("in_proj", "x_proj", "dt_proj", "out_proj", "A_log", "D")}
    names |= {"conv_weight": "conv1d.weight", "conv_bias": "conv1d.bias", "dt_bias": "dt_proj.bias"}
    return {ours: f"{path}.{theirs}" for ours, theirs in names.items()}


_MAMBA_MODEL = {
    "embedding": "backbone.embeddings",
    "head": "lm_head",
    "backbone.norm": "backbone.norm_f",
    "mixer_norm": "backbone.layers.{i}.norm",
}
_MAMBA_RENAMED = {r"^backbone\.embedding\.": "backbone.embeddings."}  # as mamba_ssm says
_MAMBA_REQUIRED: dict[str, Any] = {
    **_ABSENT,
    "hidden_act": "silu",
    "use_bias": False,
    "use_conv_bias": True,
    # of mamba_ssm, and of checkpoints that were converted from it
    "rms_norm": True,
    "d_intermediate": 0,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "ssm_cfg": {},
}
# d_inner, d_model, intermediate_size and n_layer repeat what others say, and the shapes of the tensors decide
_MAMBA_HARMLESS = _words(
    """
    d_inner d_model fused_add_norm intermediate_size n_layer norm_before_gate pad_vocab_size_multiple
    rescale_prenorm_residual residual_in_fp32 time_step_floor time_step_init_scheme time_step_scale
    use_associative_scan use_mambapy
    """
)

MAMBA = Family(
    model_type="mamba",
    architecture="MambaForCausalLM",
    prefix="backbone.",
    layers=_always("mamba", "num_hidden_layers"),
    options={
        "hidden_size": Option(768, "d_model"),
        "num_hidden_layers": Option(32, "n_layers"),
        "vocab_size": Option(50280, "vocab_size"),
        "layer_norm_epsilon": Option(1e-5, "norm_eps"),
        "tie_word_embeddings": Option(True, "tie_embeddings"),
        "state_size": Option(16, "mixer.mamba.d_state"),
        "conv_kernel": Option(4, "mixer.mamba.d_conv"),
        "expand": Option(2, "mixer.mamba.expand"),
        "time_step_rank": Option("auto", "mixer.mamba.dt_rank"),
        "time_step_min": Option(1e-3, "mixer.mamba.dt_min"),
        "time_step_max": Option(1e-1, "mixer.mamba.dt_max"),
    },
    required=_MAMBA_REQUIRED,
    harmless=_MAMBA_HARMLESS,
    tensors=_MAMBA_MODEL | {f"mamba.{k}": v for k, v in _mamba("backbone.layers.{i}.mixer").items()},
    renamed=_MAMBA_RENAMED,
    unpack=layout.unpack_mamba,
    pack=layout.pack_mamba,
)

MAMBA2 = Family(
    model_type="mamba2",
    architecture="Mamba2ForCausalLM",
    prefix="backbone.",
    layers=_always("mamba2", "num_hidden_layers"),
    options={
        "hidden_size": Option(4096, "d_model"),
        "num_hidden_layers": Option(64, "n_layers"),
        "vocab_size": Option(32768, "vocab_size"),
        "layer_norm_epsilon": Option(1e-5, "norm_eps"),
        "tie_word_embeddings": Option(False, "tie_embeddings"),
        "state_size": Option(128, "mixer.mamba2.d_state"),
        "conv_kernel": Option(4, "mixer.mamba2.d_conv"),
        "expand": Option(2, "mixer.mamba2.expand"),
        "head_dim": Option(64, "mixer.mamba2.head_dim"),
        "n_groups": Option(8, "mixer.mamba2.n_groups"),
        "time_step_min": Option(1e-3, "mixer.mamba2.dt_min"),
        "time_step_max": Option(1e-1, "mixer.mamba2.dt_max"),
    },
    required=_MAMBA_REQUIRED | {"time_step_limit": [0.0, float("inf")]},
    harmless=_MAMBA_HARMLESS | {"chunk_size", "time_step_rank"},
    implied={"mixer.mamba2.n_heads": "num_heads", "mixer.mamba2.inner_norm_eps": "layer_norm_epsilon"},
    tensors=_MAMBA_MODEL
    | {f"mamba2.{k}": v for k, v in _mamba("backbone.layers.{i}.mixer").items()}
    | {"mamba2.dt_bias": "backbone.layers.{i}.mixer.dt_bias", "mamba2.norm": "backbone.layers.{i}.mixer.norm"},
    renamed=_MAMBA_RENAMED,
    unpack=layout.unpack_mamba,
    pack=layout.pack_mamba,
)


_JAMBA_PLACES = {
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
}


def _jamba_layers(config: Mapping[str, Any]) -> list[str]:
    places = range(config["num_hidden_layers"])
    attention = [i % config["attn_layer_period"] == config["attn_layer_offset"] for i in places]
    experts = [i % config["expert_layer_period"] == config["expert_layer_offset"] for i in places]
    has_experts = config["num_experts"] > 1  # a single one is an MLP
    return [
        ("attention" if attention[i] else "mamba") + ("+moe" if has_experts and experts[i] else "+mlp") for i in places
    ]


def _jamba_places(layers: Sequence[str]) -> dict[str, Any]:
    places: dict[str, Any] = {}
    for kind, found in (
        ("attn", [entry.startswith("attention") for entry in layers]),
        ("expert", [entry.endswith("moe") for entry in layers]),
    ):
        # a period longer than the model has the kind once or never
        for period in range(1, len(layers) + 2):
            offset = found.index(True) if any(found) else period - 1
            if [i % period == offset for i in range(len(layers))] == found:
                places |= {f"{kind}_layer_period": period, f"{kind}_layer_offset": offset}
                break
    return places if any(entry.endswith("moe") for entry in layers) else places | {"num_experts": 1}


JAMBA = Family(
    model_type="jamba",
    architecture="JambaForCausalLM",
    prefix="model.",
    layers=_jamba_layers,
    places=_jamba_places,
    default_places=_JAMBA_PLACES,
    options={
        "hidden_size": Option(4096, "d_model"),
        "num_hidden_layers": Option(32, "n_layers"),
        "vocab_size": Option(65536, "vocab_size"),
        "rms_norm_eps": Option(1e-6, "norm_eps"),
        "tie_word_embeddings": Option(False, "tie_embeddings"),
        **_ATTENTION,
        "num_key_value_heads": Option(8, "mixer.attention.n_kv_heads"),
        "mamba_d_state": Option(16, "mixer.mamba.d_state"),
        "mamba_d_conv": Option(4, "mixer.mamba.d_conv"),
        "mamba_expand": Option(2, "mixer.mamba.expand"),
        "mamba_dt_rank": Option("auto", "mixer.mamba.dt_rank"),
        "intermediate_size": Option(14336, "ffn.mlp.d_ff", also="ffn.moe.d_ff"),
        "num_experts": Option(16, "ffn.moe.n_experts"),
        "num_experts_per_tok": Option(2, "ffn.moe.top_k"),
    },
    constants={"mixer.attention.rope": False, "mixer.mamba.inner_norm": True},
    required={
        **_ABSENT,
        "hidden_act": "silu",
        "mamba_conv_bias": True,
        "mamba_proj_bias": False,
        "mamba_inner_layernorms": True,
        "sliding_window": None,
    },
    harmless=_words(
        """
        attention_dropout calc_logits_for_entire_prompt max_position_embeddings n_ctx num_logits_to_keep
        output_router_logits router_aux_loss_coef use_associative_scan use_mamba_kernels use_mambapy
        """
    ),
    implied={"mixer.mamba.inner_norm_eps": "rms_norm_eps"},
    tensors={
        "embedding": "model.embed_tokens",
        "head": "lm_head",
        "backbone.norm": "model.final_layernorm",
        "mixer_norm": "model.layers.{i}.input_layernorm",
        "ffn_norm": "model.layers.{i}.pre_ff_layernorm",
        **_SELF_ATTENTION,
        **{f"mamba.{k}": v for k, v in _mamba("model.layers.{i}.mamba").items()},
        "mamba.dt_norm": "model.layers.{i}.mamba.dt_layernorm",
        "mamba.B_norm": "model.layers.{i}.mamba.b_layernorm",
        "mamba.C_norm": "model.layers.{i}.mamba.c_layernorm",
        "mlp.gate_proj": "model.layers.{i}.feed_forward.gate_proj",
        "mlp.up_proj": "model.layers.{i}.feed_forward.up_proj",
        "mlp.down_proj": "model.layers.{i}.feed_forward.down_proj",
        "moe.router": "model.layers.{i}.feed_forward.router",
        "moe.gate_up_proj": "model.layers.{i}.feed_forward.experts.gate_up_proj",
        "moe.down_proj": "model.layers.{i}.feed_forward.experts.down_proj",
    },
    unpack=layout.unpack_jamba,
    pack=layout.pack_jamba,
)

FAMILIES: dict[str, Family] = {f.model_type: f for f in (GPT2, LLAMA, MAMBA, MAMBA2, JAMBA, BERT)}
"""Every `model_type` that can be converted."""
