"""Names, options and sizes."""

import csv
from pathlib import Path
from typing import Any

import pytest
from crossover.archs import Mixer, ModelConfig, available, build, configure, register_mixer
from crossover.archs.presets import PRESETS, TOLERANCE, count_params
from crossover.archs.registry import MIXERS


@pytest.mark.parametrize(
    ("n_params", "vocab_size"), [(300_000, 256), (1_000_000, 256), (7_777_777, 4096), (40_000_000, 4096)]
)
@pytest.mark.parametrize("name", available())
def test_sized_models_have_the_parameters_asked_for(name: str, n_params: int, vocab_size: int) -> None:
    config = configure(name, n_params=n_params, vocab_size=vocab_size)
    assert abs(build(config, device="meta").n_params / n_params - 1) <= TOLERANCE
    assert config.n_layers % len(config.period) == 0


@pytest.mark.parametrize("name", available())
def test_counting_on_meta_equals_counting_weights(name: str) -> None:
    config = configure(name, d_model=32, n_layers=24)
    distinct = {p.data_ptr(): p.numel() for p in build(config).parameters()}
    assert count_params(config) == sum(distinct.values())


def test_given_sizes_are_kept_and_the_rest_is_solved() -> None:
    config = configure("transformer", n_params=2_000_000, n_layers=3, d_model=192)
    assert (config.n_layers, config.d_model) == (3, 192)
    assert count_params(config) == pytest.approx(2_000_000, rel=TOLERANCE)


def test_an_unreachable_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"mamba cannot be sized to 1,000 parameters within 2%: the nearest is [\d,]+"):
        configure("mamba", n_params=1000)


def test_options_go_to_whatever_has_them() -> None:
    config = configure("jamba", n_heads=2, d_state=4, top_k=1, tie_embeddings=False, norm_eps=1e-6)
    assert config.mixer["attention"]["n_heads"] == 2
    assert config.mixer["attention"]["rope"] is False
    assert config.mixer["mamba"]["d_state"] == 4
    assert config.ffn["moe"] == {"n_experts": 4, "top_k": 1}
    assert (config.tie_embeddings, config.norm_eps) == (False, 1e-6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mambo", {}, "unknown architecture 'mambo'; did you mean 'mamba'?"),
        ("mamba", {"d_sate": 3}, "mamba has no option 'd_sate'; did you mean 'd_state'?"),
        ("mamba", {"n_heads": 3}, "mamba has no option 'n_heads'"),
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


def test_jamba_offsets_are_free() -> None:
    layers = configure("jamba", n_layers=12, attention_every=3, attention_offset=0, moe_every=2, moe_offset=0).layers
    assert [i for i, (mixer, _) in enumerate(layers) if mixer == "attention"] == [0, 3, 6, 9]
    assert [i for i, (_, ffn) in enumerate(layers) if ffn == "moe"] == [0, 2, 4, 6, 8, 10]


def test_learning_rates_are_those_that_the_recorded_search_found() -> None:
    with (Path(__file__).parents[2] / "results/cpu-demo/lr.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name, preset in PRESETS.items():
        rates = sorted((float(row["val_bits_per_byte"]), float(row["lr"])) for row in rows if row["arch"] == name)
        assert preset.learning_rate == rates[0][1]
        # the list reaches beyond the winner on both sides
        assert min(lr for _, lr in rates) < preset.learning_rate < max(lr for _, lr in rates)


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_builds_and_says_what_it_is(name: str) -> None:
    assert build(name, device="meta").n_params > 0
    assert PRESETS[name].label
    assert PRESETS[name].summary.startswith(PRESETS[name].label)


def test_a_registered_mixer_can_stand_in_a_pattern() -> None:
    class Identity(Mixer):
        Config = MIXERS["lstm"].Config

        def forward(self, x, state=None, *, starts=None):
            return x, state

    register_mixer("identity", Identity)
    try:
        assert build(ModelConfig(d_model=8, n_layers=2, vocab_size=5, pattern=("identity+mlp",))).n_params > 0
        with pytest.raises(ValueError, match="a mixer named 'identity' exists"):
            register_mixer("identity", Identity)
    finally:
        del MIXERS["identity"]
    with pytest.raises(ValueError, match="not an identifier"):
        register_mixer("a+b", Identity)
