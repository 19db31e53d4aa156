"""What scripts import: measure, compare, load_results."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from crossover.archs import build
from crossover.benchmarks import compare, measure
from crossover.benchmarks.comparison import compare as command
from crossover.benchmarks.comparison.options import CompareConfig
from torch import Tensor, nn

pytestmark = pytest.mark.quick

QUICK: dict[str, Any] = {"time_box": 1e-9, "min_repeats": 2, "decode_tokens": 3, "precision": "fp32"}


class Gru(nn.Module):
    """A module from tokens to logits that knows nothing of this package."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.gru, self.head = nn.Embedding(19, 12), nn.GRU(12, 12, batch_first=True), nn.Linear(12, 19)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.gru(self.embedding(tokens))[0])


def theirs(family: str) -> nn.Module:
    """A small model of transformers'."""
    import transformers

    sizes: dict[str, Any] = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 2}
    if family == "mamba":
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, state_size=4, use_mambapy=False))
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **heads))


MODELS = {
    "ours": lambda: build("jamba", d_model=32, n_layers=2, vocab_size=19, attention_every=2, attention_offset=1),
    "llama": lambda: theirs("llama"),
    "mamba": lambda: theirs("mamba"),
    "encoder": lambda: build("bert", d_model=32, n_layers=1, vocab_size=19),
    "gru": Gru,
}


@pytest.mark.parametrize("phase", ["train", "prefill", "decode"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_from_tokens_to_logits_is_measured_and_left_as_it_was(name: str, phase: Any) -> None:
    if name in ("llama", "mamba"):
        pytest.importorskip("transformers")
    model = MODELS[name]().train()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    drawn = torch.random.get_rng_state()
    if phase == "decode" and name in ("encoder", "gru"):
        with pytest.raises(ValueError, match="decode needs the state that a model carries on"):
            measure(model, phase, 21, **QUICK)
        return
    found = measure(model, phase, 21, batch_size=3, **QUICK)
    assert found.batch_size == 3
    assert found.repeats == 2
    assert 0 < found.spread[0] <= found.tokens_per_second <= found.spread[1]
    assert found.peak_bytes >= sum(p.nbytes for p in model.parameters())
    assert bool(found.backend) == (name in ("ours", "encoder"))
    if name == "llama" and phase != "train":
        assert found.state_bytes == 2 * 2 * 21 * 8 * 4  # layers, keys and values, tokens, channels of a head, bytes
    assert model.training
    assert torch.equal(torch.random.get_rng_state(), drawn)
    assert torch.equal(next(model.parameters()).grad, torch.ones_like(first))  # pyright: ignore[reportArgumentType]
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        (Gru, {"phase": "trian"}, "phase='trian' is none of train, prefill, decode"),
        (Gru, {"context_len": 0}, "context_len=0 must be at least 1"),
        (Gru, {"batch_size": 0}, "batch_size=0 must be at least 1"),
        (lambda: nn.Linear(3, 3), {}, "Linear does not say how many tokens there are: give vocab_size"),
        (lambda: nn.Embedding(9, 4).requires_grad_(False), {"phase": "train"}, "Embedding has no parameters to train"),
        (lambda: nn.Sequential(nn.Embedding(9, 4), nn.Flatten()), {}, "returns Tensor of shape"),
        (lambda: build("encdec", d_model=32, n_layers=2, vocab_size=9), {}, "Seq2Seq has two lengths"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_words(model: Any, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        measure(model(), **{"phase": "prefill", "context_len": 7, **QUICK, **options})


def test_compare_takes_the_options_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def remember(config: CompareConfig, *, command: list[str]) -> int:
        asked.append((config, command))
        return 0

    monkeypatch.setattr(command, "compare", remember)
    data = {"source": "texts", "column": "body"}
    options = {"archs": ["mamba", "lstm"], "params": "300k", "context": (16, 48), "seq_len": 24, "data": data}
    more = {"objective": {"set": ["packing=reset"]}, "fresh": True, "time_box": 0.25, "threads": None}
    assert compare(**options, **more, out=tmp_path) == tmp_path
    config, words = asked.pop()
    assert (config.archs, config.params, config.context, config.seq_len) == (
        ("mamba", "lstm"),
        300_000,
        (16, 48),
        (24,),
    )
    assert (config.data.source, config.data.column, config.objective.set) == ("texts", "body", ("packing=reset",))
    assert (config.fresh, config.measure.time_box, config.threads) == (True, 0.25, None)
    assert words[:6] == ["crossover", "compare", "--archs", "mamba", "lstm", "--params"]
    assert compare(data="texts") == CompareConfig().out
    assert asked.pop()[0] == replace(CompareConfig(), data=replace(CompareConfig().data, source="texts"))
    with pytest.raises(ValueError, match="--sequence-len"):
        compare(sequence_len=3)
    monkeypatch.setattr(command, "compare", lambda *_, **__: 130)
    with pytest.raises(KeyboardInterrupt):
        compare()


def test_importing_the_names_of_a_package_loads_nothing() -> None:
    code = "import sys, crossover.benchmarks as b; assert 'torch' not in sys.modules; b.load_results\n"
    code += "assert 'torch' not in sys.modules; b.compare; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
