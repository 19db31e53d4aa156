"""ModelConfig: data that round-trips, and errors with the dotted path."""

import json
from typing import Any

import pytest
from crossover.archs import PUBLISHED, ModelConfig, available, configure
from crossover.archs.config import KINDS

pytestmark = pytest.mark.quick

BASE = {"d_model": 8, "n_layers": 3, "vocab_size": 5, "pattern": ["mamba+mlp", "attention"]}


def test_the_pattern_repeats_from_the_first_layer() -> None:
    assert ModelConfig.from_dict(BASE).layers == (("mamba", "mlp"), ("attention", None), ("mamba", "mlp"))


NAMES = [name for kind in KINDS for name in available(kind)]
CONFIGS = {name: configure(name) for name in [*NAMES, *PUBLISHED]}
CONFIGS["jamba in both directions"] = configure("jamba", bidirectional=True)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_config_is_written_as_json_values_from_which_an_equal_config_is_made(config: ModelConfig) -> None:
    values = config.to_dict()
    assert values == json.loads(json.dumps(values))
    again = ModelConfig.from_dict(values)
    assert (type(again), again) == (type(config), config)


def test_tuples_among_options_are_written_as_lists_too() -> None:
    mixer = {"mamba": {"kind": "bidirectional", "of": "mamba", "options": {"d_state": (4, [(8,)])}}}
    config = ModelConfig.from_dict(BASE | {"mixer": mixer})
    assert config.to_dict()["mixer"]["mamba"]["options"] == {"d_state": [4, [[8]]]}
    assert config.mixer == mixer


def test_what_to_dict_gives_is_the_callers_own() -> None:
    config = ModelConfig.from_dict(BASE | {"mixer": {"mamba": {"d_state": 4}}})
    config.to_dict()["mixer"]["mamba"]["d_state"] = 5
    assert config.mixer == {"mamba": {"d_state": 4}}


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
