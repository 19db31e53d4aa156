"""Whole models against Hugging Face's, with the same weights: full forward passes in float32.

Weights have standard deviation 0.15: with the usual 0.02 all logits are tiny and errors hide.
"""

import pytest
import torch
from crossover.archs import LanguageModel, ModelConfig

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")

V = 37


def randomize(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1 and not name.endswith("A_log"):
                p.normal_(std=0.15)
    return model.eval()


def compare(theirs: torch.nn.Module, config: ModelConfig, names: dict[str, str]) -> None:
    """Copies weights by our name -> their name (or names, where kinds of layers differ), and compares logits."""
    ours, source = LanguageModel(config).eval(), randomize(theirs).state_dict()
    state = {}
    for name, value in ours.state_dict().items():
        layer = name.split(".")[2] if name.startswith("backbone.blocks.") else ""
        rest = name.removeprefix(f"backbone.blocks.{layer}.") if layer else name
        (theirs_name,) = [n for n in names[rest].format(i=layer).split(" or ") if n in source]
        state[name] = source[theirs_name].reshape(value.shape)
    ours.load_state_dict(state)
    tokens = torch.randint(V, (2, 23))
    with torch.no_grad():
        expected, actual = theirs(tokens).logits, ours(tokens).logits
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_transformer_is_llama() -> None:
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=V, hidden_size=48, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6,
            num_key_value_heads=2, rms_norm_eps=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    ours = ModelConfig(
        d_model=48, n_layers=3, vocab_size=V, pattern=("attention+mlp",), tie_embeddings=False,
        mixer={"attention": {"n_heads": 6, "n_kv_heads": 2}}, ffn={"mlp": {"d_ff": 72}},
    )  # fmt: skip
    compare(
        theirs,
        ours,
        {
            "embedding.weight": "model.embed_tokens.weight",
            "head.weight": "lm_head.weight",
            "backbone.norm.weight": "model.norm.weight",
            "mixer_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "ffn_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
            "mixer.out_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
        }
        | {f"mixer.{p}_proj.weight": f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkv"}
        | {f"ffn.{p}_proj.weight": f"model.layers.{{i}}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")},
    )


MAMBA = {
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "dt_bias": "dt_proj.bias",
    "A_log": "A_log",
    "D": "D",
}
MAMBA |= {f"{p}.weight": f"{p}.weight" for p in ("in_proj", "x_proj", "dt_proj", "out_proj")}


def test_mamba_is_mamba() -> None:
    theirs = transformers.MambaForCausalLM(
        transformers.MambaConfig(
            vocab_size=V, hidden_size=40, state_size=7, num_hidden_layers=3, conv_kernel=3, expand=2,
            time_step_rank=5, layer_norm_epsilon=1e-5, tie_word_embeddings=True,
        )
    )  # fmt: skip
    ours = ModelConfig(
        d_model=40, n_layers=3, vocab_size=V, pattern=("mamba",),
        mixer={"mamba": {"d_state": 7, "d_conv": 3, "dt_rank": 5}},
    )  # fmt: skip
    compare(
        theirs,
        ours,
        {
            "embedding.weight": "backbone.embeddings.weight",
            "head.weight": "backbone.embeddings.weight",
            "backbone.norm.weight": "backbone.norm_f.weight",
            "mixer_norm.weight": "backbone.layers.{i}.norm.weight",
        }
        | {f"mixer.{a}": f"backbone.layers.{{i}}.mixer.{b}" for a, b in MAMBA.items()},
    )


def test_jamba_is_jamba() -> None:
    layer = "model.layers.{i}"
    theirs = transformers.JambaForCausalLM(
        transformers.JambaConfig(
            vocab_size=V, hidden_size=32, intermediate_size=56, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, num_experts=3, num_experts_per_tok=2, expert_layer_period=2, expert_layer_offset=1,
            attn_layer_period=4, attn_layer_offset=2, mamba_d_state=6, mamba_d_conv=4, mamba_dt_rank=3,
            use_mamba_kernels=False, rms_norm_eps=1e-6, tie_word_embeddings=False,
        )
    )  # fmt: skip
    ours = ModelConfig(
        d_model=32, n_layers=4, vocab_size=V, tie_embeddings=False, norm_eps=1e-6,
        pattern=("mamba+mlp", "mamba+moe", "attention+mlp", "mamba+moe"),
        mixer={
            "mamba": {"d_state": 6, "dt_rank": 3, "inner_norm": True},
            "attention": {"n_heads": 4, "n_kv_heads": 2, "rope": False},
        },
        ffn={"mlp": {"d_ff": 56}, "moe": {"n_experts": 3, "top_k": 2, "d_ff": 56}},
    )  # fmt: skip
    compare(
        theirs,
        ours,
        {
            "embedding.weight": "model.embed_tokens.weight",
            "head.weight": "lm_head.weight",
            "backbone.norm.weight": "model.final_layernorm.weight",
            "mixer_norm.weight": "model.layers.{i}.input_layernorm.weight",
            "ffn_norm.weight": "model.layers.{i}.pre_ff_layernorm.weight",
            "ffn.router.weight": "model.layers.{i}.feed_forward.router.weight",
            "ffn.gate_up_proj": "model.layers.{i}.feed_forward.experts.gate_up_proj",
            "ffn.down_proj": "model.layers.{i}.feed_forward.experts.down_proj",
        }
        | {f"mixer.{a}": f"model.layers.{{i}}.mamba.{b}" for a, b in MAMBA.items()}
        | {f"mixer.{p}_norm.weight": f"model.layers.{{i}}.mamba.{p.lower()}_layernorm.weight" for p in ("dt", "B", "C")}
        | {f"mixer.{p}_proj.weight": f"model.layers.{{i}}.self_attn.{p}_proj.weight" for p in "qkv"}
        | {f"ffn.{p}_proj.weight": f"model.layers.{{i}}.feed_forward.{p}_proj.weight" for p in ("gate", "up", "down")}
        | {"mixer.out_proj.weight": f"{layer}.mamba.out_proj.weight or {layer}.self_attn.o_proj.weight"},
    )
