"""ModelConfig: data that round-trips, and errors with the dotted path."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Annotated, Any

import pytest
from crossover.archs import FFNS, MIXERS, PUBLISHED, ModelConfig, available, configure
from crossover.archs.config import KINDS
from crossover.archs.mixers.cross_attention import READERS
from crossover.archs.mixers.mamba import Mamba, MambaConfig
from crossover.options import Range, from_plain

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


def test_tuples_among_options_are_written_as_lists_too(monkeypatch: pytest.MonkeyPatch) -> None:
    mixer = {
        "mamba": {"kind": "bidirectional", "of": "mamba", "options": {"d_state": 4}},
        "two": {"kind": "pair", "at": (4, [(8,)])},
    }
    monkeypatch.setitem(MIXERS, "pair", type("Pair", (Mamba,), {"Config": Pair}))
    config = ModelConfig.from_dict(BASE | {"pattern": ["mamba", "two"], "mixer": mixer})
    assert config.to_dict()["mixer"]["two"] == {"kind": "pair", "at": [4, [[8]]]}
    assert config.mixer == mixer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pair(MambaConfig):
    at: tuple[int, tuple[tuple[int]]] = (0, ((0,),))


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
            r"unknown key options\.d_sate; did you mean 'd_state'\?",
        ),
        (
            {"mixer": {"mamba": {"kind": "bidirectional", "options": {"d_state": 8.5}}}},
            r"^model\.mixer\.mamba\.options\.d_state=8\.5 must be a whole number$",
        ),
        (
            {"mixer": {"mamba": {"dt_min": 1, "dt_max": 0.1}}},
            r"^model\.mixer\.mamba\.dt_min=1\.0 must not be more than",
        ),
        ({"n_layers": 0}, r"model\.n_layers=0 must be at least 1"),
        ({"norm": "layer"}, r"^model\.norm='layer' must be one of 'rmsnorm', 'layernorm'$"),
        ({"head": "nsp"}, r"^model\.head='nsp' must be one of 'linear', 'mlm'$"),
        ({"positions": "learnt"}, r"^model\.positions='learnt' must be one of 'none', 'learned'$"),
        ({"positions": "learned"}, r"max_positions=None contradict each other"),
        ({"max_positions": 8}, r"model\.positions='none' and model\.max_positions=8 contradict each other"),
        ({"positions": "learned", "max_positions": 0}, r"model\.max_positions=0 must be at least 1"),
    ],
)
def test_a_mistake_is_named_with_its_path(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ModelConfig.from_dict(BASE | change)


def test_missing_keys_are_listed() -> None:
    with pytest.raises(ValueError, match=r"model\.d_model, model\.pattern are missing"):
        ModelConfig.from_dict({k: v for k, v in BASE.items() if k not in ("d_model", "pattern")})


def test_biases_go_to_every_layer_that_has_the_option_and_says_nothing_else() -> None:
    ffn = {"mlp": {"bias": False}}
    config = ModelConfig.from_dict(BASE | {"pattern": ["mamba+mlp", "attention+moe"], "bias": True, "ffn": ffn})
    assert config.mixer_of("attention")[1].bias
    assert not config.ffn_of("mlp")[1].bias
    assert not ModelConfig.from_dict(BASE).mixer_of("attention")[1].bias


WRONG: dict[str, list[Any]] = {"int": [0, -1, 2**40, 8.5, True, "many", [1], None], "float": [float("nan"), True, "x"]}


@pytest.mark.parametrize(("section", "kind"), [("mixer", n) for n in [*MIXERS, *READERS]] + [("ffn", n) for n in FFNS])
def test_every_option_of_every_layer_is_checked_when_the_configuration_is_made(section: str, kind: str) -> None:
    source = {"source": {"pattern": ["lstm"]}}
    base = BASE | {"pattern": ["cross_attention", f"mamba+{kind}" if section == "ffn" else kind]} | source
    for field in dataclasses.fields(({**MIXERS, **READERS} if section == "mixer" else FFNS)[kind].Config):
        wrong = {"str": [3, None, True, "nothing"], "bool": [1, "yes", None]}.get(str(field.type), WRONG["int"])
        if isinstance(field.default, float) or (isinstance(field.default, int) and "Width" in str(field.type)):
            wrong = [*WRONG["float"], float("inf"), -1]
        for value in wrong:
            if value is None and "None" in str(field.type):
                continue
            path = f"model.{section}.{kind}.{field.name}"
            with pytest.raises(ValueError, match=r"must be|is not a whole number|unknown mixer") as refused:
                ModelConfig.from_dict(base | {section: {kind: {field.name: value}}})
            assert str(refused.value).startswith((path, f"model.mixer.{kind}: unknown mixer")), refused.value
            assert "\n" not in str(refused.value)


@pytest.mark.parametrize("size", [{"d_model": 10**9}, {"n_layers": 10**7}, {"vocab_size": 10**12}, {"d_model": True}])
def test_sizes_that_no_machine_holds_are_refused_before_anything_is_made(size: dict[str, int]) -> None:
    (name,) = size
    with pytest.raises(ValueError, match=rf"^model\.{name}=\w+ must be"):
        ModelConfig.from_dict(BASE | size)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Odd:
    names: list[str] = dataclasses.field(default_factory=list)
    either: int | str = 1
    table: dict[str, Annotated[int, Range(1)]] = dataclasses.field(default_factory=dict)
    rates: tuple[float, ...] = ()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"names": ["a", "b"]}, Odd(names=["a", "b"])),
        ({"either": "1"}, Odd(either="1")),
        ({"either": 2}, Odd(either=2)),
        ({"table": {"a": 1, "b": "2k"}}, Odd(table={"a": 1, "b": 2000})),
        ({"rates": [1, 0.5]}, Odd(rates=(1.0, 0.5))),
        ({"names": ["a", 1]}, "x.names[1]=1 must be text"),
        ({"names": "ab"}, "x.names='ab' must be a list"),
        ({"either": 1.5}, "x.either=1.5 must be a whole number or text"),
        ({"table": {"a": 0}}, "x.table.a=0 must be at least 1"),
        ({"table": {"a": 10**22}}, f"x.table.a={10**22} must be a whole number that 64 bits hold"),
        ({"table": []}, "x.table=[] must be a table"),
        ({"rates": [float("inf")]}, "x.rates[0]=inf must be a finite number"),
        ({"rates": [-1e39]}, "x.rates[0]=-1e+39 must be a number that float32 holds, at most 3e+38"),
        ({"name": []}, "unknown key x.name; did you mean 'names'?"),
    ],
)
def test_fields_of_every_type_are_made_of_plain_values(values: Mapping[str, Any], expected: object) -> None:
    try:
        assert from_plain(Odd, values, "x.") == expected
    except ValueError as refused:
        assert str(refused) == expected  # noqa: PT017
