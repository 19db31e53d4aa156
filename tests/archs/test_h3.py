"""H3 against the formulas of its paper, written out as loops over time and heads in float64."""

import math
from collections.abc import Callable

import pytest
import torch
from crossover.archs import build, configure
from crossover.archs.mixers.h3 import H3, H3Config
from crossover.kernels.compare import assert_same
from torch import Tensor


def new(head_dim: int = 1, d_conv: int = 3) -> H3:
    return H3(6, H3Config(d_state=4, d_conv=d_conv, head_dim=head_dim)).double()


def shift_ssm(mixer: H3, k: Tensor) -> Tensor:
    """The shift SSM on (L, D): its matrix moves the state down by one, the input enters at the top."""
    K = mixer.config.d_conv
    C = mixer.shift_weight.flip(1)  # (D, K): what is written last is read first
    matrix, first = torch.diag(torch.ones(K - 1, dtype=k.dtype), -1), torch.eye(K, dtype=k.dtype)[0]
    state, ys = torch.zeros(k.shape[1], K, dtype=k.dtype), []
    for t in range(len(k)):
        state = state @ matrix.T + k[t, :, None] * first
        ys.append((C * state).sum(1))
    return torch.stack(ys)


def by_definition(mixer: H3, x: Tensor) -> Tensor:
    """y of one sequence x (L, D): every head keeps a matrix of P x P sums, each a bank of oscillators."""
    P, D = mixer.config.head_dim, mixer.d_model
    q, k, v = (x @ mixer.in_proj.weight.T).split(D, dim=1)
    k = shift_ssm(mixer, k)
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag)  # (H, N)
    decay = torch.exp(A * mixer.log_dt.exp()[:, None])
    C = torch.view_as_complex(mixer.C) * (decay - 1) / A
    rows = []
    states = [torch.zeros(P, P, A.shape[1], dtype=A.dtype) for _ in range(D // P)]
    for t in range(len(x)):
        out = []
        for h in range(D // P):
            of_head = slice(h * P, h * P + P)
            outer = torch.outer(k[t, of_head], v[t, of_head])
            states[h] = decay[h] * states[h] + outer[..., None]
            memory = 2 * (C[h] * states[h]).sum(-1).real + mixer.D[h] * outer
            out.append(q[t, of_head] @ memory)
        rows.append(torch.cat(out))
    return torch.stack(rows) @ mixer.out_proj.weight.T


def gradients(mixer: H3, x: Tensor, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """y = function(x), and the gradients of its weighted sum, of x and of every parameter."""
    x = x.clone().requires_grad_()
    y = function(x)
    names, parameters = zip(*mixer.named_parameters(), strict=True)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    found = torch.autograd.grad((y * weights).sum(), [x, *parameters], materialize_grads=True)
    return {"y": y.detach()} | dict(zip(("x", *names), found, strict=True))


@pytest.mark.parametrize("options", [{}, {"head_dim": 2}, {"head_dim": 6}, {"head_dim": 3, "d_conv": 1}])
@pytest.mark.parametrize("length", [1, 2, 11])
def test_h3_is_its_definition_with_gradients(options: dict[str, int], length: int) -> None:
    mixer, x = new(**options), torch.randn(2, length, 6, dtype=torch.float64)
    expected = gradients(mixer, x, lambda x: torch.stack([by_definition(mixer, row) for row in x]))
    assert_same(gradients(mixer, x, lambda x: mixer(x)[0]), expected, 1e-11)


@pytest.mark.parametrize("head_dim", [1, 3])
def test_the_state_is_the_last_keys_and_a_matrix_of_each_head(head_dim: int) -> None:
    mixer, x = new(head_dim=head_dim), torch.randn(2, 9, 6, dtype=torch.float64)
    _, before = mixer(x[:, :-1], mixer.init_state(2, 9, dtype=x.dtype))
    y, after = mixer(x, mixer.init_state(2, 9, dtype=x.dtype))
    assert before is not None
    assert after is not None
    torch.testing.assert_close(y, mixer(x)[0])
    _, k, v = (x @ mixer.in_proj.weight.T).chunk(3, dim=-1)
    torch.testing.assert_close(after.conv, k[:, -2:])
    k = torch.stack([shift_ssm(mixer, row) for row in k])
    k, v = (t[:, -1].unflatten(-1, (-1, head_dim)) for t in (k, v))  # (B, H, P) each
    decay = torch.exp(torch.complex(-mixer.A_log.exp(), mixer.A_imag) * mixer.log_dt.exp()[:, None])
    outer = torch.einsum("bhi,bhj->bijh", k, v)
    torch.testing.assert_close(after.ssm, decay * before.ssm + outer[..., None])


@pytest.mark.parametrize("head_dim", [1, 2, 6])
def test_chunks_and_packed_documents_are_documents_apart(head_dim: int) -> None:
    mixer = new(head_dim=head_dim)
    parts = [torch.randn(2, n, 6, dtype=torch.float64) for n in (5, 1, 7)]
    starts = torch.zeros(2, 13, dtype=torch.bool)
    starts[:, [0, 5, 6]] = True
    apart = torch.cat([mixer(part)[0] for part in parts], dim=1)
    x = torch.cat(parts, dim=1)
    torch.testing.assert_close(mixer(x, starts=starts)[0], apart)
    state, ys = mixer.init_state(2, 13, dtype=x.dtype), []
    for i, j in ((0, 3), (3, 4), (4, 13)):
        y, state = mixer(x[:, i:j], state, starts=starts[:, i:j])
        ys.append(y)
    torch.testing.assert_close(torch.cat(ys, dim=1), apart)


def test_a_head_that_does_not_divide_the_width_is_refused() -> None:
    with pytest.raises(ValueError, match="d_model=6 is not divisible by head_dim=4"):
        new(head_dim=4)


def test_a_model_of_h3_starts_like_the_authors() -> None:
    mixers = [b.mixer for b in build("h3", d_model=128, n_layers=8).backbone.blocks]
    taps = torch.stack([m.get_parameter("shift_weight") for m in mixers])  # (8, 128, 64)
    assert taps[..., :-1].abs().max().item() <= 1 / 8
    assert taps[..., :-1].std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.02)
    assert taps[..., -1].std().item() == pytest.approx(1, rel=0.1)  # with the skip connection
    for mixer in mixers:
        assert isinstance(mixer, H3)
        torch.testing.assert_close(mixer.A_log.exp(), torch.full((128, 32), 0.5))
        torch.testing.assert_close(mixer.A_imag, math.pi * torch.arange(32.0).expand(128, -1))
        assert mixer.C.std().item() == pytest.approx(0.5**0.5, rel=0.05)
        assert mixer.D.std().item() == pytest.approx(1, rel=0.25)
        assert 1e-3 <= mixer.log_dt.exp().min() < 3e-3 < 3e-2 < mixer.log_dt.exp().max() <= 1e-1


def test_the_poles_of_h3_train_slower_and_do_not_decay() -> None:
    assert H3.no_weight_decay == set(H3.lr_scale) == {"log_dt", "A_log", "A_imag"}
    assert set(H3.lr_scale.values()) == {0.25}


def test_hybrid_h3_has_attention_in_two_layers() -> None:
    config = configure("h3", d_model=48, n_layers=12, attention_every=6)
    assert [i for i, (mixer, _) in enumerate(config.layers) if mixer == "attention"] == [1, 7]
    with pytest.raises(ValueError, match="attention_every=1 must be at least 2"):
        configure("h3", attention_every=1)
