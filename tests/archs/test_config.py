"""ModelConfig: data that round-trips, and errors with the dotted path."""

import json
from typing import Any

import pytest
from crossover.archs import ModelConfig, available, configure

BASE = {"d_model": 8, "n_layers": 3, "vocab_size": 5, "pattern": ["mamba+mlp", "attention"]}


def test_the_pattern_repeats_from_the_first_layer() -> None:
    assert ModelConfig.from_dict(BASE).layers == (("mamba", "mlp"), ("attention", None), ("mamba", "mlp"))


@pytest.mark.parametrize("name", available())
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
        ({"mixer": {"mamba": {"kind": "s4"}}}, r"unknown mixer 's4'"),
        ({"n_layers": 0}, r"model\.n_layers=0 must be at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(BASE | change)


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ValueError, match="lacks d_model, pattern"):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k not in ("d_model", "pattern")})
