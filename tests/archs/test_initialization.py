"""Special initial values, read from whole models: nothing may have overwritten them."""

import math

import pytest
import torch
import torch.nn.functional as F
from crossover.archs import available, build
from crossover.archs.mixers.gated_deltanet import GatedDeltaNet
from crossover.archs.mixers.mamba import Mamba
from crossover.archs.mixers.mamba3 import Mamba3
from crossover.archs.mixers.s4d import S4D


def mixers(name: str, kind: type) -> list:
    found = [b.mixer for b in build(name, d_model=128, n_layers=8).backbone.blocks if isinstance(b.mixer, kind)]
    assert found
    return found


def assert_uniform(values: torch.Tensor, low: float, high: float) -> None:
    assert values.min() >= low - 1e-3
    assert values.max() <= high + 1e-3
    uniform = (values.sort().values - low) / (high - low)
    # Kolmogorov-Smirnov at one in a thousand
    assert (uniform - torch.linspace(0, 1, len(values))).abs().max() < 1.95 / len(values) ** 0.5


@pytest.mark.parametrize(
    ("name", "kind"),
    [("mamba", Mamba), ("jamba", Mamba), ("mamba3", Mamba3), ("gated_deltanet", GatedDeltaNet)],
)
def test_step_sizes_are_log_uniform(name: str, kind: type) -> None:
    dt = torch.cat([F.softplus(m.dt_bias) for m in mixers(name, kind)])
    assert_uniform(dt.log(), math.log(1e-3), math.log(1e-1))


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_mamba_poles_are_the_integers(name: str) -> None:
    for mixer in mixers(name, Mamba):
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(256, -1))
        assert torch.equal(mixer.D, torch.ones(256))


def test_mamba3_starts_with_ones_beside_its_projections() -> None:
    projections = {"in_proj.weight", "out_proj.weight", "dt_bias"}
    for mixer in mixers("mamba3", Mamba3):
        ones = {name: p for name, p in mixer.named_parameters() if name not in projections}
        assert set(ones) == {"B_norm.weight", "C_norm.weight", "B_bias", "C_bias", "D"}
        assert all(torch.equal(p, torch.ones_like(p)) for p in ones.values())
        assert_uniform(mixer.in_proj.weight.flatten()[:10_000], -(128**-0.5), 128**-0.5)


def test_gated_deltanet_decay_rates_are_uniform() -> None:
    assert_uniform(torch.cat([m.A_log.exp() for m in mixers("gated_deltanet", GatedDeltaNet)]), 0, 16)


def test_s4d_poles_are_s4d_lin() -> None:
    for mixer in mixers("s4d", S4D):
        torch.testing.assert_close(mixer.A_log.exp(), torch.full((128, 32), 0.5))
        torch.testing.assert_close(mixer.A_imag, math.pi * torch.arange(32.0).expand(128, -1))
        assert mixer.C.std().item() == pytest.approx(0.5**0.5, rel=0.05)
        dt = mixer.log_dt.exp()
        assert 1e-3 <= dt.min() < 3e-3 < 3e-2 < dt.max() <= 1e-1


@pytest.mark.parametrize("name", available())
def test_residual_branches_shrink_with_depth(name: str) -> None:
    def output_std(n_layers: int) -> float:
        lm = build(name, d_model=128, n_layers=n_layers)
        return lm.get_parameter("backbone.blocks.0.mixer.out_proj.weight").std().item()

    assert output_std(8) / output_std(32) == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize("name", available())
def test_a_new_model_knows_nothing(name: str) -> None:
    tokens = torch.randint(256, (4, 65))
    lm = build(name, d_model=96, tie_embeddings=False)
    loss, _ = lm.loss(tokens[:, :-1], tokens[:, 1:])
    # a head with weights uniform in +-1 / sqrt(D) gives logits of variance 1/3: log 256 + 1/6
    assert loss.item() == pytest.approx(math.log(256) + 1 / 6, abs=0.1)


@pytest.mark.parametrize("name", available())
def test_embeddings_start_with_norm_one(name: str) -> None:
    norms = build(name, d_model=128).embedding.weight.norm(dim=1)
    assert norms.mean().item() == pytest.approx(1, abs=0.02)


def test_lstm_forget_gates_start_open() -> None:
    bias = build("lstm", d_model=32).get_parameter("backbone.blocks.0.mixer.in_proj.bias")
    assert torch.equal(bias, torch.cat([torch.zeros(32), torch.ones(32), torch.zeros(64)]))


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", available())
def test_every_model_is_built_and_runs_under_any_default_precision(name: str, default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        lm = build(name, d_model=8, n_layers=2, vocab_size=11)
        assert {p.dtype for p in lm.parameters()} == {default}
        tokens = torch.randint(11, (2, 9))
        loss, aux_loss = lm.loss(tokens, tokens, starts=torch.ones(2, 9) < 0)
        (loss + aux_loss).backward()
        assert torch.isfinite(loss)
        with torch.no_grad():
            for precision in (default, torch.float32):  # the state's may be another than the activations'
                logits = lm(tokens, lm.init_state(2, 9, dtype=precision)).logits
                assert torch.isfinite(logits).all()
    finally:
        torch.set_default_dtype(before)
