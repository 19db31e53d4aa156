"""ModelConfig: data that round-trips, and errors with the dotted path."""

import json
from typing import Any

import pytest
from crossover.archs import PUBLISHED, ModelConfig, available, configure

pytestmark = pytest.mark.quick

BASE = {"d_model": 8, "n_layers": 3, "vocab_size": 5, "pattern": ["mamba+mlp", "attention"]}


def test_the_pattern_repeats_from_the_first_layer() -> None:
    assert ModelConfig.from_dict(BASE).layers == (("mamba", "mlp"), ("attention", None), ("mamba", "mlp"))


@pytest.mark.parametrize("name", [*available(), *available("encoder"), *PUBLISHED])
def test_a_config_survives_json(name: str) -> None:
    config = configure(name)
    assert ModelConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_modle": 8}, r"unknown key model\.d_modle; did you mean 'd_model'\?"),
        ({"pattern": []}, r"model\.pattern is empty"),
        ({"pattern": ["mambo"]}, r"unknown mixer 'mambo' in model\.pattern; did you mean 'mamba'\?"),
        ({"pattern": ["mamba+mpl"]}, r"unknown ffn 'mpl' in model\.pattern; did you mean 'mlp'\?"),
        ({"mixer": {"lstm": {}}}, r"model\.mixer\.lstm has options, but no layer"),
        ({"mixer": {"mamba": {"d_sate": 1}}}, r"model\.mixer\.mamba\.d_sate; did you mean 'd_state'\?"),
        ({"mixer": {"mamba": {"kind": "hyena"}}}, r"unknown mixer 'hyena' in model\.mixer\.mamba\.kind"),
        ({"mixer": {"mamba": {"kind": "bidirectional", "of": "hyena"}}}, r"unknown mixer 'hyena' in of"),
        (
            {"mixer": {"mamba": {"kind": "bidirectional", "options": {"d_sate": 1}}}},
            r"unknown option options\.d_sate; did you mean 'd_state'\?",
        ),
        ({"n_layers": 0}, r"model\.n_layers=0 must be at least 1"),
        ({"norm": "layer"}, r"unknown model\.norm='layer'; did you mean 'layernorm'\?"),
        ({"head": "nsp"}, r"unknown model\.head='nsp'; known are linear, mlm"),
        ({"positions": "learnt"}, r"unknown model\.positions='learnt'; did you mean 'learned'\?"),
        ({"positions": "learned"}, r"max_positions=None contradict each other"),
        ({"max_positions": 8}, r"model\.positions='none' and model\.max_positions=8 contradict each other"),
        ({"positions": "learned", "max_positions": 0}, r"model\.max_positions=0 must be at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(BASE | change)


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ValueError, match="lacks d_model, pattern"):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k not in ("d_model", "pattern")})


def test_biases_go_to_every_layer_that_has_the_option_and_says_nothing_else() -> None:
    ffn = {"mlp": {"bias": False}}
    config = ModelConfig.from_dict(BASE | {"pattern": ["mamba+mlp", "attention+moe"], "bias": True, "ffn": ffn})
    assert config.mixer_of("attention")[1].bias
    assert not config.ffn_of("mlp")[1].bias
    assert not ModelConfig.from_dict(BASE).mixer_of("attention")[1].bias
