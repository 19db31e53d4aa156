"""Names, options and sizes."""

import csv
import re
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from crossover.archs import PUBLISHED, Mixer, ModelConfig, available, build, configure, presets, register_mixer
from crossover.archs.presets import PRESETS, TOLERANCE, count_params, find, register_preset
from crossover.archs.registry import MIXERS

everything = pytest.mark.parametrize("name", [*available(), *available("encoder")])


@pytest.mark.parametrize(
    ("n_params", "vocab_size"), [(300_000, 256), (1_000_000, 256), (7_777_777, 4096), (40_000_000, 4096)]
)
@everything
def test_sized_models_have_the_parameters_asked_for(name: str, n_params: int, vocab_size: int) -> None:
    config = configure(name, n_params=n_params, vocab_size=vocab_size)
    assert abs(build(config, device="meta").n_params / n_params - 1) <= TOLERANCE
    assert config.n_layers % len(config.period) == 0


@everything
def test_counting_on_meta_equals_counting_weights(name: str) -> None:
    config = configure(name, d_model=32, n_layers=24)
    distinct = {p.data_ptr(): p.numel() for p in build(config).parameters()}
    assert count_params(config) == sum(distinct.values())


@pytest.mark.quick
def test_given_sizes_are_kept_and_the_rest_is_solved() -> None:
    config = configure("transformer", n_params=2_000_000, n_layers=3, d_model=192)
    assert (config.n_layers, config.d_model) == (3, 192)
    assert count_params(config) == pytest.approx(2_000_000, rel=TOLERANCE)


@pytest.mark.parametrize("n_params", [300_000, 999_999, 250_000_000])
@pytest.mark.parametrize("name", ["mamba", "lstm"])  # which have no ffn whose width would be solved too
def test_the_width_is_the_nearest_and_found_by_counting_few_models(
    name: str, n_params: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[ModelConfig] = []
    monkeypatch.setattr(presets, "count_params", lambda config: counted.append(config) or count_params(config))
    chosen = configure(name, n_params=n_params, n_layers=2, vocab_size=64).d_model
    assert len(counted) <= 10
    near = [configure(name, d_model=d, n_layers=2, vocab_size=64) for d in (chosen - 4, chosen, chosen + 4)]
    assert min(near, key=lambda config: abs(count_params(config) - n_params)).d_model == chosen


def test_an_unreachable_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"mamba cannot be sized to 1,000 parameters within 2%: the nearest is [\d,]+"):
        configure("mamba", n_params=1000)


@pytest.mark.quick
def test_options_go_to_whatever_has_them() -> None:
    config = configure("jamba", n_heads=2, d_state=4, top_k=1, tie_embeddings=False, norm_eps=1e-6)
    assert config.mixer["attention"]["n_heads"] == 2
    assert config.mixer["attention"]["rope"] is False
    assert config.mixer["mamba"]["d_state"] == 4
    assert config.ffn["moe"] == {"n_experts": 4, "top_k": 1}
    assert (config.tie_embeddings, config.norm_eps) == (False, 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mambo", {}, "unknown architecture 'mambo'; did you mean 'mamba'?"),
        ("gpt2-124", {}, "unknown architecture 'gpt2-124'; did you mean 'gpt2-124m'?"),
        ("mamba", {"d_sate": 3}, "mamba has no option 'd_sate'; did you mean 'd_state'?"),
        ("mamba", {"n_heads": 3}, "mamba has no option 'n_heads'"),
        ("mamba", {"mixer": 3}, "mamba: model.mixer=3 must be a table"),
        ("mamba", {"ffn": {"mlp": 3}}, "mamba: model.ffn.mlp=3 must be a table"),
        ("transformer", {"n_heads": 7, "d_model": 64}, "d_model=64 is not divisible by n_heads=7"),
        ("jamba", {"moe_offset": 2}, "moe_offset=2 must be at least 0 and below moe_every=2"),
    ],
)
def test_a_wrong_name_or_option_says_what_is_right(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        build(name, **options)


def test_jamba_has_the_published_layout() -> None:
    layers = configure("jamba", n_layers=32).layers
    assert [i for i, (mixer, _) in enumerate(layers) if mixer == "attention"] == [4, 12, 20, 28]
    assert [i for i, (_, ffn) in enumerate(layers) if ffn == "moe"] == list(range(1, 32, 2))


# counted in the checkpoints on the Hugging Face hub
PARAMETERS = {
    "gpt2-124m": 124_439_808,
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "llama-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
    "jamba-v0.1": 51_570_323_328,
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_models_have_their_parameters(name: str) -> None:
    assert build(name, device="meta").n_params == PARAMETERS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_names_tell_the_size(name: str) -> None:
    assert find(name) == PRESETS[PUBLISHED[name][0]]
    if match := re.search(r"-([0-9.]+)([mb])$", name):
        size = float(match[1]) * {"m": 1e6, "b": 1e9}[match[2]]
        assert count_params(configure(name)) == pytest.approx(size, rel=0.05)


def test_options_go_over_those_of_a_published_model() -> None:
    config = configure("mamba-130m", n_layers=2, vocab_size=300)
    assert (config.d_model, config.n_layers, config.vocab_size) == (768, 2, 300)


def test_jamba_uses_12_of_its_52_billion_parameters() -> None:
    assert build("jamba-v0.1", device="meta").n_active_params == pytest.approx(12.1e9, rel=0.01)


MIB, GIB = 2**20, 2**30


def held(name: str, context_len: int, **options: Any) -> int:
    """Bytes of the state of one sequence whose activations have 16 bits."""
    lm = build(name, device="meta", **options)
    return sum(state.nbytes for state in lm.init_state(1, context_len, dtype=torch.bfloat16))


@pytest.mark.parametrize(
    ("n_layers", "n_kv_heads", "size"),
    [
        (32, 32, 128 * GIB),  # Llama 2 7B
        (32, 8, 32 * GIB),  # Mistral 7B, Mixtral 8x7B, Llama 3.1 8B
        (56, 8, 56 * GIB),  # Mixtral 8x22B
        (88, 8, 88 * GIB),  # Mistral Large 2
        (80, 8, 80 * GIB),  # Llama 3.1 70B
        (126, 8, 126 * GIB),  # Llama 3.1 405B
        (126, 16, 252 * GIB),  # as it was published, with twice the heads
        (4, 8, 4 * GIB),  # attention of Nemotron-H 8B and of the Mamba-2-Hybrid 8B
    ],
)
def test_caches_of_256k_tokens_have_the_published_size(n_layers: int, n_kv_heads: int, size: int) -> None:
    options = {"d_model": 64, "n_layers": n_layers, "n_heads": n_kv_heads, "n_kv_heads": n_kv_heads, "head_dim": 128}
    assert held("transformer", 256 * 1024, **options) == size


def test_states_of_published_models_have_the_published_size() -> None:
    assert held("llama-7b", 256 * 1024) == 128 * GIB
    assert held("llama-3-8b", 256 * 1024) == 32 * GIB
    # 28 Mamba layers: 16 states in 32 bits and 3 inputs in 16 bits for each of 8192 channels
    of_mamba = 28 * 8192 * (16 * 4 + 3 * 2)
    assert held("jamba-v0.1", 256 * 1024) == 4 * GIB + of_mamba
    assert of_mamba / MIB == pytest.approx(15.3, abs=0.05)
    large = {"n_layers": 72, "d_model": 8192, "n_heads": 64, "n_kv_heads": 8}  # Jamba 1.5 Large
    assert held("jamba", 256 * 1024, **large) == 9 * GIB + held("jamba", 0, **large)
    assert held("mamba-2.8b", 256 * 1024) / MIB == pytest.approx(21.9, abs=0.05)
    # 64 layers: 128 states in 32 bits for each of 5120 channels, and a window of 3 inputs of these and of B and C
    assert held("mamba2-2.7b", 256 * 1024) == 160 * MIB + 64 * (5120 + 2 * 128) * 3 * 2


def test_bidirectional_makes_an_encoder_of_every_layer() -> None:
    config = configure("jamba", bidirectional=True, n_heads=2, d_state=4)
    assert config.mixer["attention"] == {"rope": False, "n_heads": 2, "causal": False}
    cls, options = config.mixer_of("mamba")
    assert cls is MIXERS["bidirectional"]
    assert options.of == "mamba"
    assert (options.options["d_state"], options.options["inner_norm"]) == (4, True)
    assert config.layers == configure("jamba").layers


@pytest.mark.parametrize("name", ["transformer", "mamba"])
def test_encoders_are_sized_like_decoders(name: str) -> None:
    lm = build(name, n_params=1_000_000, bidirectional=True, device="meta")
    assert abs(lm.n_params / 1e6 - 1) <= TOLERANCE


def test_jamba_offsets_are_free() -> None:
    layers = configure("jamba", n_layers=12, attention_every=3, attention_offset=0, moe_every=2, moe_offset=0).layers
    assert [i for i, (mixer, _) in enumerate(layers) if mixer == "attention"] == [0, 3, 6, 9]
    assert [i for i, (_, ffn) in enumerate(layers) if ffn == "moe"] == [0, 2, 4, 6, 8, 10]


def test_learning_rates_are_those_that_the_recorded_search_found() -> None:
    found: dict[str, dict[float, float]] = {}
    for folder in ("cpu-study/small", "cpu-presets"):
        with (Path(__file__).parents[2] / "results" / folder / "tuning/trials.csv").open() as file:
            for row in csv.DictReader(file):
                if row["steps"] == "150":  # the last round
                    found.setdefault(row["arch"], {})[float(row["lr"])] = float(row["val_bits_per_byte"])
    for name, preset in PRESETS.items():
        rates = found.get(name)
        if rates is None:
            assert "not tuned" in (preset.make.__doc__ or "")
            continue
        assert preset.learning_rate == min(rates, key=rates.__getitem__)
        # the list reaches beyond the winner on both sides
        assert min(rates) < preset.learning_rate < max(rates)
    assert found.keys() == set(available())


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_is(name: str) -> None:
    assert build(name, device="meta").n_params > 0
    assert PRESETS[name].label
    assert PRESETS[name].summary.startswith(PRESETS[name].label)


def test_a_registered_mixer_can_stand_in_a_pattern() -> None:
    def identity() -> type[Mixer]:
        class Identity(Mixer):
            Config = MIXERS["lstm"].Config

            def forward(self, x, state=None, *, starts=None):
                return x, state

        return Identity

    register_mixer("identity", identity())
    try:
        assert build(ModelConfig(d_model=8, n_layers=2, vocab_size=5, pattern=("identity+mlp",))).n_params > 0
        register_mixer("identity", identity())  # its module was read again
        with pytest.raises(ValueError, match="there is a mixer named 'identity' already"):
            register_mixer("identity", MIXERS["lstm"])
    finally:
        del MIXERS["identity"]
    with pytest.raises(ValueError, match="not an identifier"):
        register_mixer("a+b", identity())
    for no_mixer in (3, MIXERS["lstm"].Config, Mixer):
        with pytest.raises(ValueError, match="is no mixer: a subclass of Mixer with a dataclass Config"):
            register_mixer("sound", cast("Any", no_mixer))
    with pytest.raises(ValueError, match="is no function that gives fields of a ModelConfig"):
        register_preset("sound", cast("Any", {"pattern": ("lstm",)}))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: build(configure("mamba", d_model=8, n_layers=1), d_model=16), "options d_model beside a config"),
        (lambda: build(configure("mamba", d_model=8, n_layers=1), n_params=9_000), "options n_params beside a config"),
        (lambda: build(cast("Any", None)), "from a name such as 'mamba', or a ModelConfig, not NoneType"),
        (lambda: build("mamba", n_params=-3), "n_params=-3 must be a whole number of at least 1"),
    ],
)
def test_what_no_model_can_be_built_from_is_refused(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
