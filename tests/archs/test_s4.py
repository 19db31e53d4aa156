"""S4 and S4D against dense float64 state space models, built from their papers' formulas."""

import math
from typing import Any

import pytest
import torch
from crossover.archs import build
from crossover.archs.mixers.s4 import S4, S4Config
from crossover.archs.mixers.s4d import S4D, S4DConfig, hippo_legs, initial_poles, legs_normal_form
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, values_and_gradients
from crossover.kernels.dispatch import use_backend
from torch import Tensor


def double(t: Tensor) -> Tensor:
    return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)


def both(t: Tensor, dim: int = -1) -> Tensor:
    """The whole of what holds one of each conjugate pair."""
    return torch.cat([t, t.conj()], dim)


def eigenvectors(d_state: int) -> Tensor:
    """V of the normal part of HiPPO-LegS, with the phases that make V^* B positive."""
    A, B = hippo_legs(d_state)
    values, V = torch.linalg.eig(A + torch.outer(B, B) / 2)
    V = V[:, values.imag > 0][:, values.imag[values.imag > 0].argsort()]
    inner = V.mH @ B.to(V.dtype)
    return V * (inner / inner.abs())


def dense_kernel(A: Tensor, B: Tensor, C: Tensor, dt: float, length: int) -> Tensor:
    """C Ab^t Bb by matrices, where Ab and Bb are A and B under the bilinear rule with step dt."""
    identity = torch.eye(len(A), dtype=A.dtype)
    h = torch.linalg.solve(identity - dt / 2 * A, dt * B)
    step = torch.linalg.solve(identity - dt / 2 * A, identity + dt / 2 * A)
    ys = []
    for _ in range(length):
        ys.append(C @ h)
        h = step @ h
    return torch.stack(ys)


def small_s4(d_state: int = 6, d_model: int = 5) -> S4:
    """An S4 in float64 whose parameters have left their initial values."""
    mixer = S4(d_model, S4Config(d_state=d_state)).double()
    with torch.no_grad():
        for name in ("A_log", "A_imag", "P", "B"):
            mixer.get_parameter(name).add_(torch.randn(mixer.get_parameter(name).shape) * 0.2)
    return mixer


def test_hippo_legs_is_the_published_matrix() -> None:
    A, B = hippo_legs(7)
    for n in range(7):
        assert B[n].item() == pytest.approx(math.sqrt(2 * n + 1))
        for k in range(7):
            expected = -math.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1) if n == k else 0
            assert A[n, k].item() == pytest.approx(expected)


@pytest.mark.parametrize("d_state", [2, 6, 64])
def test_the_normal_form_is_hippo_legs_in_another_basis(d_state: int, request: pytest.FixtureRequest) -> None:
    torch.set_default_dtype(torch.float64)
    request.addfinalizer(lambda: torch.set_default_dtype(torch.float32))
    A, B = hippo_legs(d_state)
    poles, P, VB = legs_normal_form(d_state)
    V, P = both(eigenvectors(d_state)), both(P.to(poles.dtype))
    torch.testing.assert_close(V.mH @ V, torch.eye(d_state, dtype=V.dtype))
    rebuilt = V @ (torch.diag(both(poles)) - torch.outer(P, P.conj())) @ V.mH
    torch.testing.assert_close(rebuilt, A.to(V.dtype), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(V @ both(VB.to(V.dtype)), B.to(V.dtype), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", [1, 2, 7, 30, 101])
def test_a_new_s4_has_the_impulse_response_of_hippo_legs(length: int) -> None:
    d_state = 12
    mixer, V = S4(3, S4Config(d_state=d_state)), eigenvectors(d_state)
    kernel = mixer.double().kernel(length)
    A, B = hippo_legs(d_state)
    for e in range(3):
        C = 2 * (double(torch.view_as_complex(mixer.C[e].detach())) @ V.mH).real
        expected = dense_kernel(A, B, C, mixer.log_dt[e].exp().item(), length)
        # the parameters were drawn in float32
        torch.testing.assert_close(kernel[e], expected, rtol=1e-4, atol=1e-5 * expected.abs().max().item())


@pytest.mark.parametrize("length", [1, 2, 13, 64, 75])
def test_the_kernel_is_that_of_the_dense_matrices_with_gradients(length: int) -> None:
    mixer = small_s4()

    def dense(A: Tensor, P: Tensor, B: Tensor, C: Tensor) -> Tensor:
        A = torch.diag_embed(both(A)) - both(P)[..., :, None] * both(P).conj()[..., None, :]
        rows = [dense_kernel(a, b, c, 1.0, length).real for a, b, c in zip(A, both(B), both(C), strict=True)]
        return torch.stack(rows)

    tensors = {k: t.detach() for k, t in zip("APBC", mixer._scaled(), strict=True)}
    expected = values_and_gradients(dense, tensors)
    assert_same(values_and_gradients(ops.dplr_kernel, tensors, length=length), expected, 1e-11)


@pytest.mark.parametrize("init", ["lin", "inv", "legs", "real"])
def test_a_diagonal_kernel_is_the_dense_one_held_between_samples(init: Any) -> None:
    mixer = S4D(3, S4DConfig(d_state=6, init=init)).double()
    A = torch.complex(-mixer.A_log.exp(), mixer.A_imag).detach()
    C = torch.view_as_complex(mixer.C.detach())
    dt = mixer.log_dt.detach().exp()
    t = torch.arange(20)
    for e in range(3):
        # zero-order hold: the state is exp(A dt) h plus the integral of exp(A s) over one step
        held = (torch.exp(dt[e] * A[e]) - 1) / A[e]
        expected = sum((2 * C[e, n] * held[n] * torch.exp(dt[e] * A[e, n]) ** t).real for n in range(3))
        torch.testing.assert_close(mixer.kernel(20)[e], expected)


@pytest.mark.parametrize("make", [small_s4, lambda: S4D(5, S4DConfig(d_state=6, init="real")).double()])
def test_the_convolution_is_the_recurrence(make) -> None:
    mixer = make()
    x = torch.randn(2, 90, 5, dtype=torch.float64)  # more than a chunk
    y, _ = mixer(x)
    by_steps, state = [], mixer.init_state(2, 90, dtype=x.dtype)
    for t in range(90):
        step, state = mixer.step(x[:, t], state)
        by_steps.append(step)
    torch.testing.assert_close(torch.stack(by_steps, dim=1), y, rtol=1e-9, atol=1e-11)
    in_chunks, after = mixer(x, mixer.init_state(2, 90, dtype=x.dtype))
    torch.testing.assert_close(in_chunks, y, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(after.ssm, state.ssm, rtol=1e-9, atol=1e-11)


def test_a_kernel_begins_with_every_shorter_one() -> None:
    mixer = small_s4()
    long = mixer.kernel(257)
    for length in (1, 2, 31, 128, 256):
        torch.testing.assert_close(mixer.kernel(length), long[:, :length], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 16, 36])
def test_the_state_of_the_recurrence_hands_over_at_any_cut(cut: int) -> None:
    tensors = ops.dplr_scan.cases.example()
    y, last = ops.dplr_scan(**tensors)
    first = tensors | {"u": tensors["u"][:, :cut], "starts": tensors["starts"][:, :cut]}
    y1, middle = ops.dplr_scan(**first)
    second = {"u": tensors["u"][:, cut:], "starts": tensors["starts"][:, cut:], "initial_state": middle}
    y2, end = ops.dplr_scan(**tensors | second)
    torch.testing.assert_close(torch.cat([y1, y2], dim=1), y)
    torch.testing.assert_close(end, last)


@pytest.mark.parametrize("length", [700, 4096])
def test_float32_loses_what_the_recurrence_loses_on_the_slowest_and_the_fastest_systems(length: int) -> None:
    mixer = S4(2, S4Config())
    with torch.no_grad():
        mixer.log_dt.copy_(torch.tensor([1e-3, 1e-1]).log())
    A, P, B, C = (double(t) for t in mixer._scaled())
    expected = ops.dplr_kernel(A, P, B, C, length)

    def error(kernel: Tensor) -> Tensor:
        return (kernel - expected).norm(dim=1) / expected.norm(dim=1)

    with use_backend("reference"):
        by_steps = error(mixer.kernel(length))
    assert (by_steps < 1e-4).all()
    assert (error(mixer.kernel(length)) < 1.5 * by_steps + 1e-5).all()


@pytest.mark.parametrize("cls", [S4, S4D])
def test_autocast_does_not_touch_the_system(cls: type[S4D]) -> None:
    mixer = cls(5, cls.Config(d_state=6))
    x, state = torch.randn(2, 70, 5), mixer.init_state(2, 70)
    expected = mixer.kernel(70), *mixer.scan(x, state.ssm, None)
    with torch.autocast("cpu", torch.bfloat16):
        actual = mixer.kernel(70), *mixer.scan(x, state.ssm, None)
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))


def test_poles_of_s4d_are_those_of_the_formulas() -> None:
    n, N = torch.arange(32), 64
    lin, inv, real = (initial_poles(name, N) for name in ("lin", "inv", "real"))
    torch.testing.assert_close(lin, torch.complex(torch.tensor(-0.5).expand(32), math.pi * n))
    imaginary = torch.tensor([N / math.pi * (N / (2 * k + 1) - 1) for k in range(32)])
    torch.testing.assert_close(inv, torch.complex(torch.tensor(-0.5).expand(32), imaginary))
    torch.testing.assert_close(real, torch.complex(-torch.arange(1.0, 33), torch.zeros(32)))


def test_s4d_inv_follows_the_fast_poles_of_s4d_legs() -> None:
    legs, inv = (initial_poles(name, 64).imag.sort(descending=True).values for name in ("legs", "inv"))
    torch.testing.assert_close(inv[0], legs[0], rtol=0.02, atol=0)
    torch.testing.assert_close(inv[:8], legs[:8], rtol=0.2, atol=0)


def test_s4d_real_has_the_slow_eigenvalues_of_hippo_legs() -> None:
    eigenvalues = torch.linalg.eigvals(hippo_legs(8)[0]).real.sort(descending=True).values
    torch.testing.assert_close(double(initial_poles("real", 8)).real, eigenvalues[:4])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"init": "inverse"}, "init='inverse' must be one of"), ({"d_state": 5}, "is odd")],
)
def test_wrong_options_of_s4d_say_what_is_right(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        S4D(4, S4DConfig(**options))


def test_a_model_of_s4_starts_with_hippo_legs() -> None:
    mixers = [b.mixer for b in build("s4", d_model=128, n_layers=8).backbone.blocks if isinstance(b.mixer, S4)]
    assert len(mixers) == 8
    poles, P, B = legs_normal_form(64)
    for mixer in mixers:
        torch.testing.assert_close(mixer.A_log.exp(), torch.full((128, 32), 0.5))
        torch.testing.assert_close(mixer.A_imag, poles.imag.expand(128, -1))
        torch.testing.assert_close(mixer.P[..., 0], P.expand(128, -1))
        torch.testing.assert_close(mixer.B[..., 0], B.expand(128, -1))
        assert not mixer.P[..., 1].any()
        assert not mixer.B[..., 1].any()
        assert mixer.C.std().item() == pytest.approx(0.5**0.5, rel=0.05)
        assert mixer.D.std().item() == pytest.approx(1, rel=0.25)
    uniform = torch.cat([m.log_dt for m in mixers]).sort().values
    uniform = (uniform - math.log(1e-3)) / math.log(100)
    # Kolmogorov-Smirnov at one in a thousand
    assert (uniform - torch.linspace(0, 1, len(uniform))).abs().max() < 1.95 / len(uniform) ** 0.5


def test_the_system_of_s4_trains_slower_and_does_not_decay() -> None:
    names = {"log_dt", "A_log", "A_imag", "P", "B"}
    assert S4.no_weight_decay == set(S4.lr_scale) == names
    assert set(S4.lr_scale.values()) == {0.25}
