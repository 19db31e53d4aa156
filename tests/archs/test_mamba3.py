"""Mamba-3 against the authors' equations in complex numbers; steps of any size, angles, heads, initial values, sizes.

The contract is in test_contract.py.
"""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.archs import build
from crossover.archs.mixers.mamba3 import Mamba3, Mamba3Config
from crossover.kernels.compare import assert_same, relative_error
from torch import Tensor


def mixer(d_model: int = 24, **options: Any) -> Mamba3:
    return Mamba3(d_model, Mamba3Config(**options))


def random_layer(**options: Any) -> Mamba3:
    """A layer with large weights, so that tokens differ in all they can, in float64."""
    layer = mixer(11, d_state=10, head_dim=2, dt_max=1.0, **options).double()
    with torch.no_grad():
        layer.in_proj.weight.normal_()
        for p in (layer.B_norm.weight, layer.C_norm.weight, layer.B_bias, layer.C_bias, layer.D):
            p.uniform_(0.5, 1.5)
    return layer


def definition(layer: Mamba3, x: Tensor) -> Tensor:
    """The layer on one row, (L, D), a token and a head at a time: states 2 i and 2 i + 1 are one complex number."""
    E, H, P, N = layer.d_inner, layer.n_heads, layer.head_dim, layer.config.d_state
    n_angles = int(N * layer.config.rope_fraction) // 2
    z, u, B, C, dt, A, mix, theta = (x @ layer.in_proj.weight.T).split([E, E, N, N, H, H, H, n_angles], dim=-1)
    speed = F.pad(math.pi * torch.tanh(theta), (0, N // 2 - n_angles))

    def pairs(t: Tensor, norm: Tensor, bias: Tensor) -> Tensor:
        normed = norm * t / (t.square().mean() + 1e-5).sqrt() + bias
        return torch.complex(normed[0::2], normed[1::2])

    heads = []
    for i in range(H):
        h = before = torch.zeros(P, N // 2, dtype=torch.complex128)
        angle = torch.zeros(N // 2, dtype=torch.float64)
        ys = []
        for t in range(len(x)):
            step, share = F.softplus(dt[t, i] + layer.dt_bias[i]), torch.sigmoid(mix[t, i])
            rate = 1 + A[t, i] if A[t, i] >= 0 else 1 / (1 - A[t, i])
            decay = torch.exp(-step * rate.clamp(min=layer.config.A_min))
            angle = (angle + step * speed[t]) % (2 * math.pi)
            turn = torch.complex(torch.cos(angle), torch.sin(angle))
            u_t = u[t, i * P : (i + 1) * P]
            now = torch.outer(u_t, turn * pairs(B[t], layer.B_norm.weight, layer.B_bias[i]))
            h = decay * h + (1 - share) * step * decay * before + share * step * now
            before = now
            y = (h * (turn * pairs(C[t], layer.C_norm.weight, layer.C_bias[i])).conj()).sum(-1).real
            ys.append(y + layer.D[i] * u_t)
        heads.append(torch.stack(ys))
    return (torch.cat(heads, dim=-1) * F.silu(z)) @ layer.out_proj.weight.T


def values_and_gradients(layer: Mamba3, y: Tensor, x: Tensor) -> dict[str, Tensor]:
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weight).sum(), [x, *parameters])
    return {"y": y.detach()} | dict(zip(("x", *names), grads, strict=True))


# 0.6 is above many a rate, which then is 0.6
@pytest.mark.parametrize("options", [{}, {"rope_fraction": 0}, {"rope_fraction": 1}, {"A_min": 0.6}])
def test_a_layer_is_its_equation(options: dict[str, Any]) -> None:
    layer, x = random_layer(**options), torch.randn(17, 11, dtype=torch.float64, requires_grad=True)
    expected = values_and_gradients(layer, definition(layer, x), x)
    assert_same(values_and_gradients(layer, layer(x[None])[0][0], x), expected, 1e-10)


def test_steps_next_to_nothing_and_far_above_one_lose_no_digits() -> None:
    # the drive of a token is divided by its own step, which may be a millionth of the step before it
    layer, x = random_layer(), torch.randn(17, 11, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        of_steps = layer.in_proj.weight.split(layer.widths)[4]
        of_steps *= 2
        layer.dt_bias.fill_(-5)
        step = F.softplus(x @ of_steps.T - 5)
    assert (step[1:] / step[:-1]).min() < 1e-5
    assert step.max() > 5
    expected = values_and_gradients(layer, definition(layer, x), x)
    layer, x = layer.float(), x.detach().float().requires_grad_()
    actual = values_and_gradients(layer, layer(x[None])[0][0], x)
    assert {k: e for k in expected if (e := relative_error(actual[k], expected[k])) > 2e-5} == {}


def test_steps_that_vanish_leave_the_state_alone() -> None:
    layer = random_layer().float()
    x = torch.randn(2, 9, 11, requires_grad=True)
    _, state = layer(x, layer.init_state(2, 9))
    torch.nn.init.constant_(layer.dt_bias, -1e4)  # softplus is zero in float32
    y, after = layer(x, state)
    torch.testing.assert_close(after.ssm, state.ssm, rtol=1e-5, atol=1e-6)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [x, *layer.parameters()]))


def test_angles_stay_below_one_turn_however_long_the_context() -> None:
    layer, x = random_layer(), torch.randn(1, 300, 11, dtype=torch.float64)
    with torch.no_grad():
        _, state = layer(x, layer.init_state(1, 300, dtype=torch.float64))
        *_, dt, _, _, theta = layer.in_proj(x).split(layer.widths, dim=-1)
        turned = (F.softplus(dt + layer.dt_bias)[..., None] * math.pi * theta[:, :, None].tanh()).sum(1)
    assert turned.abs().median() > 2 * math.pi
    assert 0 <= state.angle.min() < state.angle.max() < 2 * math.pi
    torch.testing.assert_close(state.angle, turned.remainder(2 * math.pi))


@pytest.mark.parametrize(
    ("d_model", "options", "heads"),
    [
        (768, {}, (24, 64)),
        (64, {}, (4, 32)),
        (8, {}, (4, 4)),
        (10, {"expand": 1.5}, (15, 1)),
        (64, {"head_dim": 128}, (1, 128)),
    ],
)
def test_heads_fit_the_width(d_model: int, options: dict[str, Any], heads: tuple[int, int]) -> None:
    layer = mixer(d_model, **options)
    assert (layer.n_heads, layer.head_dim) == heads


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"head_dim": 5}, "d_inner=48 is not divisible by head_dim=5"),
        ({"rope_fraction": 1.5}, "rope_fraction=1.5 must be at most 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(**options)


@pytest.mark.parametrize(("d_model", "n"), [(768, 3_821_872), (1024, 6_693_184), (2048, 26_165_632)])
def test_a_layer_has_as_many_parameters_as_that_of_the_authors(d_model: int, n: int) -> None:
    # counted in state-spaces/mamba at e9594ce, with its defaults
    with torch.device("meta"):
        assert sum(p.numel() for p in mixer(d_model).parameters()) == n


def test_flops_of_a_sequence_are_those_of_its_chunks_and_of_a_token_those_of_the_recurrence() -> None:
    layer = build("mamba3", d_model=768, n_layers=1, chunk_len=256, device="meta").backbone.blocks[0].mixer
    projections = 2 * 768 * (2 * 1536 + 2 * 128 + 3 * 24 + 32) + 2 * 1536 * 768
    outside = projections + 4 * 24 * 128 + 16 * 24 * 32 + 2 * 1536
    assert layer.flops_per_token(10**6) - outside == 7 * 1536 * 128
    assert layer.sequence_flops(512) / 512 - outside == pytest.approx(
        2 * 256 * (24 * 128 + 1536) + 4 * 1536 * 128 + 2 * 1536 * 128 / 256
    )
