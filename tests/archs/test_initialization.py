"""Special initial values, read from whole models: nothing may have overwritten them."""

import math

import pytest
import torch
import torch.nn.functional as F
from crossover.archs import available, build
from crossover.archs.mixers.mamba import Mamba
from crossover.archs.mixers.s4d import S4D


def mixers(name: str, kind: type) -> list:
    found = [b.mixer for b in build(name, d_model=128, n_layers=8).backbone.blocks if isinstance(b.mixer, kind)]
    assert found
    return found


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_mamba_step_sizes_are_log_uniform(name: str) -> None:
    dt = torch.cat([F.softplus(m.dt_bias) for m in mixers(name, Mamba)]).log()
    low, high = math.log(1e-3), math.log(1e-1)
    assert dt.min() >= low - 1e-3
    assert dt.max() <= high + 1e-3
    uniform = (dt.sort().values - low) / (high - low)
    # Kolmogorov-Smirnov at one in a thousand
    assert (uniform - torch.linspace(0, 1, len(dt))).abs().max() < 1.95 / len(dt) ** 0.5


@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_mamba_poles_are_the_integers(name: str) -> None:
    for mixer in mixers(name, Mamba):
        torch.testing.assert_close(mixer.A_log.exp(), torch.arange(1.0, 17).expand(256, -1))
        assert torch.equal(mixer.D, torch.ones(256))


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
