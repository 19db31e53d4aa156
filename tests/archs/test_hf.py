"""Checkpoints of Hugging Face's: read, computed alike, written again bit for bit, and refused where they differ.

Weights have standard deviation 0.15: with the usual 0.02 all logits are tiny and errors hide.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, build
from crossover.archs.hf import FAMILIES, from_hf, to_hf
from safetensors.torch import load_file, save, save_file
from torch import Tensor

transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
transformers.utils.logging.disable_progress_bar()

V = 37
MAMBA = {"state_size": 7, "conv_kernel": 3}
JAMBA = {"num_attention_heads": 5, "intermediate_size": 36, "mamba_d_state": 6, "attn_layer_offset": 1} | {
    "attn_layer_period": 3, "mamba_d_conv": 3, "pad_token_id": None,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 42, "n_layer": 3, "n_head": 3, "n_positions": 41, "n_inner": 101}),
    "gpt2 untied": (
        "gpt2", {"n_embd": 42, "n_layer": 1, "n_head": 7, "n_positions": 41, "activation_function": "gelu",
        "tie_word_embeddings": False},
    ),
    "llama": ("llama", {"hidden_size": 42, "num_attention_heads": 7, "intermediate_size": 71, "head_dim": 10}),
    "llama, grouped, tied, with biases": (
        "llama", {"hidden_size": 42, "num_attention_heads": 6, "head_dim": 10, "num_key_value_heads": 2,
        "intermediate_size": 71, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
        "rms_norm_eps": 1e-3, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "mamba": ("mamba", {"hidden_size": 44, "time_step_rank": 5, **MAMBA}),
    "mamba untied": ("mamba", {"hidden_size": 20, "expand": 3, "tie_word_embeddings": False, **MAMBA}),
    "mamba2": ("mamba2", {"hidden_size": 45, "num_heads": 9, "head_dim": 10, "n_groups": 3, **MAMBA}),
    "mamba2 tied": (
        "mamba2", {"hidden_size": 20, "num_heads": 8, "head_dim": 5, "n_groups": 2, "tie_word_embeddings": True,
        **MAMBA},
    ),
    "jamba": ("jamba", {"hidden_size": 40, "num_experts": 3, **JAMBA}),
    "jamba without experts, tied": (
        "jamba", {"hidden_size": 20, "num_experts": 1, "tie_word_embeddings": True, **JAMBA, "num_hidden_layers": 2},
    ),
    "bert": (
        "bert", {"hidden_size": 42, "num_attention_heads": 3, "intermediate_size": 101, "max_position_embeddings": 41},
    ),
    "bert untied, of three segments": (
        "bert", {"hidden_size": 24, "num_attention_heads": 3, "intermediate_size": 35, "max_position_embeddings": 41,
        "type_vocab_size": 3, "tie_word_embeddings": False},
    ),
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": {"bos_token_id": None, "eos_token_id": None},
    "llama": {"num_hidden_layers": 2},
    "mamba": {"num_hidden_layers": 2},
    "mamba2": {"num_hidden_layers": 2, "chunk_size": 8},
    "jamba": {"num_hidden_layers": 4, "num_key_value_heads": 1},
    "bert": {"num_hidden_layers": 2},
}
AUTO: dict[str, Any] = dict.fromkeys(DEFAULTS, transformers.AutoModelForCausalLM) | {
    "bert": transformers.AutoModelForMaskedLM
}


def theirs(case: str) -> Any:
    """A model of transformers' with random weights."""
    model_type, options = CASES[case]
    config = transformers.AutoConfig.for_model(model_type, vocab_size=V, **(DEFAULTS[model_type] | options))
    model = AUTO[model_type].from_config(config)
    with torch.no_grad():
        for p in model.parameters():
            # vectors differ too, so that none is forgotten
            p.copy_(torch.randn_like(p) * 0.15 if p.dim() > 1 else p + 0.3 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint of a small Llama, to be damaged."""
    theirs("llama").save_pretrained(tmp_path)
    return tmp_path


def tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def edit(folder: Path, **options: Any) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | options))


def refused(folder: Path, message: str) -> None:
    """Fails unless the folder is refused in one line."""
    with pytest.raises(ValueError, match=message) as error:
        from_hf(folder)
    assert "\n" not in str(error.value)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert actual[name].dtype == value.dtype
        assert torch.equal(actual[name], value), name


@pytest.mark.parametrize("case", CASES)
def test_logits_and_files_are_theirs(case: str, tmp_path: Path) -> None:
    model_type, _ = CASES[case]
    model = theirs(case)
    model.save_pretrained(tmp_path / "theirs")
    ours = from_hf(tmp_path / "theirs").eval()
    tokens = torch.randint(V, (2, 37))
    with torch.no_grad():
        expected, actual = model(tokens).logits, ours(tokens).logits
        if model_type == "bert":
            segments = torch.randint(ours.config.segments, (2, 37))
            pairs, ours_of_pairs = model(tokens, token_type_ids=segments).logits, ours(tokens, segments=segments).logits
            assert (ours_of_pairs - pairs).abs().max() < 1e-5 * pairs.abs().max()
    assert (actual - expected).abs().max() < 1e-5 * expected.abs().max()

    to_hf(ours, tmp_path / "again")
    stored = tensors(tmp_path / "theirs")
    if "cls.predictions.decoder.bias" in stored:  # the one that counts in an untied head; the other is not used
        stored["cls.predictions.bias"] = stored["cls.predictions.decoder.bias"]
    assert_equal(tensors(tmp_path / "again"), stored)
    again, report = AUTO[model_type].from_pretrained(tmp_path / "again", output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        assert (again.eval()(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_gpt2_is_theirs_in_float64(tmp_path: Path) -> None:
    model = theirs("gpt2").double()  # the only family that Hugging Face computes in float64 throughout
    model.save_pretrained(tmp_path)
    tokens = torch.randint(V, (2, 37))
    with torch.no_grad():
        expected, actual = model(tokens).logits, from_hf(tmp_path).eval()(tokens).logits
    assert actual.dtype == torch.float64
    assert (actual - expected).abs().max() < 1e-12 * expected.abs().max()


@pytest.mark.quick
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("arch", ["gpt2", "transformer", "mamba", "mamba2", "jamba", "bert"])
def test_our_models_come_back_bit_for_bit(arch: str, dtype: torch.dtype, tmp_path: Path) -> None:
    fits = {"jamba": {"norm_eps": 1e-6, "n_experts": 3}}.get(arch, {})
    lm = build(arch, d_model=24, n_layers=3, vocab_size=V, dtype=dtype, **fits)  # pyright: ignore[reportArgumentType]
    lm.backbone.norm.float()  # files may mix dtypes
    to_hf(lm, tmp_path)
    again = from_hf(tmp_path)
    assert_equal(again.state_dict(), lm.state_dict())
    assert again.n_params == lm.n_params, "tied weights must stay one parameter"
    assert {p.data_ptr() % 64 for p in again.parameters()} == {0}, "matrix products round by alignment"
    again.save_pretrained(tmp_path / "ours")  # needs parameters with storage of their own
    assert LanguageModel.from_pretrained(tmp_path / "ours").config == again.config


@pytest.mark.parametrize("case", ["mamba", "jamba"])
def test_a_prefill_in_two_parts_equals_one_pass(case: str, tmp_path: Path) -> None:
    """transformers 5.23 loses its state where several tokens follow a cache, by 0.02 to 1.8 in these logits."""
    theirs(case).save_pretrained(tmp_path)
    ours, tokens = from_hf(tmp_path).eval(), torch.randint(V, (2, 37))
    with torch.no_grad():
        whole = ours(tokens).logits
        first, state, _ = ours(tokens[:, :20], ours.init_state(2, 37))
        second, _, _ = ours(tokens[:, 20:], state)
    assert (torch.cat([first, second], dim=1) - whole).abs().max() < 1e-5 * whole.abs().max()


def test_every_architecture_of_theirs_trains_on_as_ours(tmp_path: Path) -> None:
    theirs("jamba").save_pretrained(tmp_path)
    lm, tokens = from_hf(tmp_path), torch.randint(V, (2, 9))
    loss, aux = lm.loss(tokens, tokens)
    (loss + aux).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in lm.parameters())


def test_shards_are_read_together(tmp_path: Path) -> None:
    model = theirs("jamba")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_equal(from_hf(tmp_path / "shards").state_dict(), from_hf(tmp_path / "whole").state_dict())


def test_names_of_other_versions_and_copies_of_a_tied_head_are_understood(tmp_path: Path) -> None:
    for case in ("gpt2", "bert"):
        theirs(case).save_pretrained(tmp_path / case)
    gpt2, bert = tensors(tmp_path / "gpt2"), tensors(tmp_path / "bert")
    expected = {case: from_hf(tmp_path / case).state_dict() for case in ("gpt2", "bert")}
    old = {name.removeprefix("transformer."): value for name, value in gpt2.items()}  # saved without the head
    old |= {"h.0.attn.bias": torch.ones(1, 1, 41, 41).tril(), "lm_head.weight": old["wte.weight"].clone()}
    save_file(old, tmp_path / "gpt2/model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
           for n, v in bert.items()}  # fmt: skip
    old |= {"bert.pooler.dense.bias": torch.zeros(42), "cls.seq_relationship.bias": torch.zeros(2)}
    save_file(old, tmp_path / "bert/model.safetensors")
    for case, state in expected.items():
        assert_equal(from_hf(tmp_path / case).state_dict(), state)


def test_older_llamas_say_their_rotary_base_elsewhere(folder: Path) -> None:
    values = json.loads((folder / "config.json").read_text())
    del values["rope_parameters"]
    (folder / "config.json").write_text(json.dumps(values | {"rope_theta": 77.0, "rope_scaling": None}))
    assert from_hf(folder).config.mixer["attention"]["rope_theta"] == 77.0
    edit(folder, rope_scaling={"type": "linear", "factor": 2.0})
    with pytest.raises(ValueError, match=r'rope_parameters\.rope_type="linear"'):
        from_hf(folder)


@pytest.mark.parametrize("layer", ["Mamba1", "Mamba2"])
def test_mamba_ssm_checkpoints_are_read(layer: str, tmp_path: Path) -> None:
    arch = "mamba" if layer == "Mamba1" else "mamba2"
    options = {"d_state": 5, "head_dim": 6, "n_groups": 2} if arch == "mamba2" else {"d_state": 5}
    lm = build(arch, d_model=24, n_layers=2, vocab_size=40, **options)  # pyright: ignore[reportArgumentType]
    to_hf(lm, tmp_path)
    stored = tensors(tmp_path)
    stored["backbone.embedding.weight"] = stored.pop("backbone.embeddings.weight")
    stored["lm_head.weight"] = stored["backbone.embedding.weight"]
    (tmp_path / "model.safetensors").unlink()
    torch.save(stored, tmp_path / "pytorch_model.bin")
    ssm = {"layer": layer, "d_state": 5} | ({"headdim": 6, "ngroups": 2} if arch == "mamba2" else {})
    (tmp_path / "config.json").write_text(
        json.dumps({"d_model": 24, "n_layer": 2, "vocab_size": 35, "ssm_cfg": ssm, "rms_norm": True})
    )
    assert_equal(from_hf(tmp_path).state_dict(), lm.state_dict())  # 35 tokens, padded to a multiple of 8
    edit(tmp_path, attn_layer_idx=[1], ssm_cfg=ssm | {"rmsnorm": False})
    with pytest.raises(ValueError, match=r'attn_layer_idx=\[1\], ssm_cfg={"rmsnorm": false}'):
        from_hf(tmp_path)


def test_a_pickle_that_runs_code_is_not_run(folder: Path, tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "sprung",))

    (folder / "model.safetensors").unlink()
    torch.save({"x": Trap()}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is damaged or holds more than tensors, and is not unp"):
        from_hf(folder)
    assert not (tmp_path / "sprung").exists()


def test_all_options_that_we_lack_are_named_at_once(folder: Path) -> None:
    edit(folder, hidden_act="relu", rope_parameters={"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0})
    with pytest.raises(
        ValueError, match=r'hidden_act="relu", rope_parameters\.factor=8\.0, rope_parameters\.rope_type="llama3"$'
    ):
        from_hf(folder)


@pytest.mark.parametrize(
    ("case", "options", "message"),
    [
        ("mamba2", {"time_step_limit": [0.0, 0.1]}, r"time_step_limit=\[0\.0, 0\.1\]"),
        ("mamba2", {"num_heads": 10}, r"num_heads=10 \(mixer\.mamba2\.n_heads is 9\)"),
        ("mamba2", {"layer_norm_epsilon": 1e-6}, r"layer_norm_epsilon=1e-06 \(mixer\.mamba2\.inner_norm_eps is 1e-05"),
        ("mamba", {"use_bias": True, "use_conv_bias": False}, "use_bias=true, use_conv_bias=false"),
        ("jamba", {"sliding_window": 100}, "sliding_window=100"),
        ("bert", {"is_decoder": True, "hidden_act": "gelu_new"}, 'hidden_act="gelu_new", is_decoder=true'),
        ("gpt2", {"activation_function": "relu"}, 'activation_function="relu"'),
        ("gpt2", {"quantization_config": {"bits": 4}}, "quantization_config"),
    ],
)
def test_options_that_change_the_logits_are_refused(
    case: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **options)
    with pytest.raises(ValueError, match=message):
        from_hf(tmp_path)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_option_of_a_config_is_known_harmless_or_refused(model_type: str, tmp_path: Path) -> None:
    family, path = FAMILIES[model_type], tmp_path / "config.json"
    mine = transformers.AutoConfig.for_model(model_type).to_dict()
    path.write_text(json.dumps(mine))
    refused(tmp_path, "has no model")  # only the tensors are lacking: every option that they write is understood
    sizes = [name for name, option in family.options.items() if "." not in name and option.values is None]
    wrong: list[tuple[str, Any]] = [("attention_sink", 4), ("initialiser_range", 0.02), ("is_encoder_decoder", True)]
    wrong += [(name, value) for name in sizes for value in ("8", [8], -1, float("nan"))]
    wrong += [(name, None) for name in sizes if family.options[name].default not in (None, "auto")]
    wrong += [(name, -1 if name.endswith("_offset") else 0) for name in family.default_places]
    for name, value in wrong:
        path.write_text(json.dumps(mine | {name: value}))
        refused(tmp_path, f"no {model_type} here has {name}=")
    (n_layers,) = (name for name, option in family.options.items() if option.path == "n_layers")
    path.write_text(json.dumps(mine | {n_layers: 10**9}))
    (tmp_path / "model.safetensors").write_bytes(save({"x": torch.zeros(1)}))
    refused(tmp_path, "1000000000 layers are more than")


OLDER = {
    "gpt2": {"n_ctx": 41, "summary_type": "cls_index", "task_specific_params": {"text-generation": {"max_length": 50}}},
    "bert": {"directionality": "bidi", "pooler_type": "first_token_transform", "gradient_checkpointing": False},
    "mamba": {"d_inner": 88, "d_model": 44, "n_layer": 2, "fused_add_norm": True, "rms_norm": True, "ssm_cfg": {}},
    "mamba2": {"norm_before_gate": True, "time_step_scale": 1.0, "rms_norm": True},
    "jamba": {"calc_logits_for_entire_prompt": False, "num_logits_to_keep": 1, "mamba_inner_layernorms": True},
    "llama": {"max_sequence_length": 2048, "torch_dtype": "float16", "top_p": 0.9, "sliding_window": None},
}


@pytest.mark.parametrize("case", OLDER)
def test_options_of_older_versions_that_say_nothing_more_are_known(case: str, tmp_path: Path) -> None:
    theirs(case).save_pretrained(tmp_path)
    edit(tmp_path, **OLDER[case])
    from_hf(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"rope_scaling": {"rope_type": "default", "rope_theta": 77.0}},
        {"rope_scaling": {"type": "default"}, "rope_theta": 77.0},
        {"rope_parameters": {"rope_type": "default"}, "rope_theta": 77.0},
        {"rope_theta": 77.0},
    ],
)
def test_rotation_that_is_described_twice_is_what_transformers_makes_of_it(
    options: dict[str, Any], folder: Path
) -> None:
    edit(folder, **options)
    expected = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = torch.randint(V, (1, 9))
    with torch.no_grad():
        assert (from_hf(folder).eval()(tokens).logits - expected(tokens).logits).abs().max() < 1e-4


def test_an_unknown_model_type_is_refused_with_the_nearest(folder: Path) -> None:
    edit(folder, model_type="lama")
    with pytest.raises(ValueError, match=r'unknown model_type="lama"; did you mean \'llama\'\?'):
        from_hf(folder)


def test_all_tensors_that_do_not_fit_are_named_at_once(folder: Path) -> None:
    stored = tensors(folder)
    del stored["model.norm.weight"]
    stored |= {"model.extra": torch.zeros(1), "lm_head.weight": torch.zeros(V, 41)}
    save_file(stored, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"do not fit") as error:
        from_hf(folder)
    for problem in (
        "model.norm.weight is missing",
        "model.extra is not expected",
        "lm_head.weight is (37, 41) and should be (37, 42)",
    ):
        assert problem in str(error.value)


def test_a_head_that_is_not_the_tied_embedding_is_refused(tmp_path: Path) -> None:
    theirs("gpt2").save_pretrained(tmp_path)
    save_file(tensors(tmp_path) | {"lm_head.weight": torch.zeros(V, 42)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"lm_head\.weight is not transformer\.wte\.weight, though the two"):
        from_hf(tmp_path)


def test_a_damaged_or_absent_file_is_named(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (b"", b"not a header", whole[:40], whole[:-1]):
        (folder / "model.safetensors").write_bytes(damaged)
        refused(folder, r"model\.safetensors is damaged")
    (folder / "model.safetensors").unlink()
    for damaged in (b"", b"no pickle", b"PK\x03\x04 no archive", b"\x80\x02}q\x00."):
        (folder / "pytorch_model.bin").write_bytes(damaged)
        refused(folder, r"pytorch_model\.bin is damaged")
    (folder / "pytorch_model.bin").unlink()
    refused(folder, r"has no model\.safetensors")
    index = folder / "model.safetensors.index.json"
    for shards in ({}, {"weight_map": ["a"]}, {"weight_map": {"a": 1}}):
        index.write_text(json.dumps(shards))
        refused(folder, r"index\.json has no table weight_map")
    (folder / "a.safetensors").write_bytes(whole)
    (folder / "b.safetensors").write_bytes(whole)
    index.write_text(json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}))
    refused(folder, r"b\.safetensors holds lm_head\.weight, and so does a file before it")
    (folder / "b.safetensors").unlink()
    refused(folder, r"cannot read .*b\.safetensors")
    for text in ("{", "[]", '{"a": 1, "a": 2}'):
        (folder / "config.json").write_text(text)
        refused(folder, r"config\.json is not")
    (folder / "config.json").unlink()
    refused(folder, r"cannot read .*config\.json")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.bool])
def test_weights_that_are_no_plain_floats_are_refused(dtype: torch.dtype, folder: Path) -> None:
    stored = tensors(folder)
    save_file(stored | {"lm_head.weight": stored["lm_head.weight"].to(dtype)}, folder / "model.safetensors")
    refused(folder, rf"lm_head\.weight is of {str(dtype).removeprefix('torch.')}")


def test_a_stored_tensor_that_the_model_computes_must_be_what_it_computes(tmp_path: Path) -> None:
    """Versions of some years ago stored them."""
    size = 41  # of the longest context
    computed = {
        "llama": {"model.layers.0.self_attn.rotary_emb.inv_freq": 1e4 ** -(torch.arange(5) / 5)},
        "gpt2": {"h.1.attn.bias": torch.ones(1, 1, size, size).tril().byte(), "h.1.attn.masked_bias": torch.ones(())},
        "bert": {"bert.embeddings.position_ids": torch.arange(size)[None]},
    }
    for case, old in computed.items():
        path = tmp_path / case
        theirs(case).save_pretrained(path)
        stored = {n.removeprefix("transformer."): v for n, v in tensors(path).items()}
        expected = from_hf(path).state_dict()
        save_file(stored | old, path / "model.safetensors")
        assert_equal(from_hf(path).state_dict(), expected)
        name, value = next(iter(old.items()))
        save_file(stored | {name: value + 1}, path / "model.safetensors")
        refused(path, r"(inv_freq|attn\.bias|position_ids) is not what the model computes")


@pytest.mark.parametrize(
    ("arch", "options", "message"),
    [
        ("s4d", {}, r"no model of Hugging Face's has layers \['s4d\+mlp'\]"),
        ("transformer", {"window": 5}, r"llama, .* cannot have mixer\.attention\.window=5:"),
        ("transformer", {"pattern": ("attention+mlp", "attention+moe")}, r"jamba, .* mixer\.attention\.rope=True"),
        ("samba", {}, r"jamba, .* mixer\.mamba\.inner_norm=False"),
        ("mamba", {"expand": 1.5}, r"mamba, .* cannot have mixer\.mamba\.expand=1\.5:"),
        ("mamba", {"pattern": ("mamba", "mamba+mlp")}, r"layers|pattern="),
        ("mamba2", {"norm_eps": 1e-6}, r"mamba2, .* cannot have layer_norm_epsilon=1e-06"),
        ("gpt2", {"head_dim": 6, "n_heads": 3}, r"gpt2, .* cannot have mixer\.attention\.head_dim=6:"),
        ("bert", {"head": "linear"}, r"bert, .* cannot have head=linear:"),
    ],
)
def test_what_hugging_face_lacks_is_refused_by_name(
    arch: str, options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    lm = build(arch, d_model=24, n_layers=2, vocab_size=V, **options)
    with pytest.raises(ValueError, match=message):
        to_hf(lm, tmp_path / "out")
    assert not (tmp_path / "out").exists()
