"""Gated DeltaNet and its operation: against a definition and Hugging Face's, heads, initial values, FLOPs.

The contract is in test_contract.py, the operation on random examples in tests/kernels/test_ops.py.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.archs.mixers.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from crossover.kernels import ops
from crossover.kernels.compare import assert_same, cast, values_and_gradients
from crossover.kernels.dispatch import use_backend
from crossover.kernels.gated_delta_rule import reference, torch_impl
from torch import Tensor

hf = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def mixer(d_model: int = 24, **options: Any) -> GatedDeltaNet:
    return GatedDeltaNet(d_model, GatedDeltaNetConfig(**options))


def oracle() -> Any:
    """Hugging Face's Qwen3-Next, whose linear attention is a Gated DeltaNet."""
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    from transformers.models.qwen3_next import modeling_qwen3_next

    return modeling_qwen3_next


def definition(layer: GatedDeltaNet, x: Tensor) -> Tensor:
    """The layer on one row, (L, D), a token and a head at a time."""
    H, N, P, K = layer.n_heads, layer.d_state, layer.head_dim, layer.config.d_conv
    qkv, z, dt, b = (x @ layer.in_proj.weight.T).split([H * (2 * N + P), H * P, H, H], dim=-1)
    padded = F.pad(qkv, (0, 0, K - 1, 0))
    qkv = F.silu((layer.conv_weight * padded.unfold(0, K, 1)).sum(-1))
    ys = []
    for h in range(H):
        S, outs = x.new_zeros(P, N), []
        for t in range(len(x)):
            q, k = qkv[t, h * N : (h + 1) * N], qkv[t, (H + h) * N : (H + h + 1) * N]
            q, k = (u / (u.square().sum() + 1e-6).sqrt() for u in (q, k))
            v = qkv[t, 2 * H * N + h * P : 2 * H * N + (h + 1) * P]
            a = torch.exp(-layer.A_log[h].exp() * F.softplus(dt[t, h] + layer.dt_bias[h]))
            beta = (2 if layer.config.negative_eigenvalues else 1) / (1 + torch.exp(-b[t, h]))
            S = a * S @ (torch.eye(N, dtype=x.dtype) - beta * torch.outer(k, k)) + beta * torch.outer(v, k)
            o = S @ q / N**0.5
            o = layer.norm.weight * o / (o.square().mean() + 1e-5).sqrt()
            outs.append(o * F.silu(z[t, h * P : (h + 1) * P]))
        ys.append(torch.stack(outs))
    return torch.cat(ys, dim=-1) @ layer.out_proj.weight.T


@pytest.mark.parametrize("negative", [False, True])
def test_a_layer_is_its_equations(negative: bool) -> None:
    layer = mixer(11, n_heads=3, d_state=5, expand=1.4, d_conv=3, negative_eigenvalues=negative).double()
    torch.nn.init.uniform_(layer.norm.weight, 0.5, 1.5)
    torch.nn.init.normal_(layer.in_proj.weight)
    x = torch.randn(13, 11, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(13, 11, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    expected, actual = definition(layer, x), layer(x[None])[0][0]
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    wanted, got = (torch.autograd.grad((y * weight).sum(), leaves) for y in (expected, actual))
    torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-11)


@hf
def test_a_layer_is_that_of_qwen3_next() -> None:
    theirs = oracle().Qwen3NextGatedDeltaNet(
        oracle().Qwen3NextConfig(
            hidden_size=26, linear_num_value_heads=3, linear_num_key_heads=3, linear_key_head_dim=8,
            linear_value_head_dim=10, linear_conv_kernel_dim=4, rms_norm_eps=1e-5, num_hidden_layers=1,
            layer_types=["linear_attention"],
        ),
        0,
    )  # fmt: skip
    ours = mixer(26, n_heads=3, d_state=8, expand=1.25)
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.3 if p.dim() > 1 else p + 0.3 * torch.randn_like(p))
        # theirs: q, k, v and z of the first head, then of the second; ours: q of all heads, then k of all heads
        by_head = theirs.in_proj_qkvz.weight.unflatten(0, (3, -1)).split([8, 8, 10, 10], dim=1)
        b, dt = theirs.in_proj_ba.weight.unflatten(0, (3, 2)).unbind(1)
        ours.in_proj.weight.copy_(torch.cat([*(part.flatten(0, 1) for part in by_head), dt, b]))
        ours.conv_weight.copy_(theirs.conv1d.weight[:, 0])
        ours.norm.weight.copy_(theirs.norm.weight)
        ours.out_proj.weight.copy_(theirs.out_proj.weight)
        ours.A_log.copy_(theirs.A_log)
        ours.dt_bias.copy_(theirs.dt_bias)
    x, weight = torch.randn(2, 70, 26, requires_grad=True), torch.randn(2, 70, 26)
    names = ("norm.weight", "out_proj.weight", "A_log", "dt_bias")

    def outcome(layer: torch.nn.Module, y: Tensor, conv_weight: Tensor) -> dict[str, Tensor]:
        leaves = {"x": x, "conv": conv_weight} | {name: layer.get_parameter(name) for name in names}
        grads = torch.autograd.grad((y * weight).sum(), list(leaves.values()))
        return {"y": y.detach()} | {k: g.squeeze() for k, g in zip(leaves, grads, strict=True)}

    expected = outcome(theirs, theirs(x), theirs.conv1d.weight)
    assert_same(outcome(ours, ours(x)[0], ours.conv_weight), expected, 1e-5)


@hf
@pytest.mark.parametrize("form", ["chunk", "recurrent"])
@pytest.mark.parametrize("backend", ["reference", "torch", "cpu"])
def test_the_operation_is_that_of_qwen3_next(form: str, backend: str) -> None:
    theirs: Callable[..., Any] = getattr(oracle(), f"torch_{form}_gated_delta_rule")
    tensors = cast(ops.gated_delta_rule.cases.example(L=131, E=7, N=9), torch.float32)
    del tensors["starts"]  # which theirs does not know
    tensors["log_decay"].clamp_(min=-4)  # theirs, in chunks, loses digits to all decays before

    def as_ours(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor, initial_state: Tensor) -> Any:
        inputs = (q * 9**0.5, k, v, log_decay, beta)  # theirs scales queries by itself
        o, state = theirs(*inputs, initial_state=initial_state.mT, output_final_state=True)
        return o, state.mT

    expected = values_and_gradients(as_ours, tensors)
    with use_backend(backend):
        assert_same(values_and_gradients(ops.gated_delta_rule, tensors), expected, 1e-5)


@pytest.mark.parametrize("L", [2, 7, 8, 45])
def test_any_number_of_chunks_gives_the_same(L: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "CHUNK", 7)
    tensors = ops.gated_delta_rule.cases.example(B=3, L=L, E=5, N=6)
    starts = torch.zeros(3, L, dtype=torch.bool)
    starts[0, L // 2], starts[1, L - 1], starts[1, 0] = True, True, True
    tensors["starts"] = starts
    expected = values_and_gradients(reference.gated_delta_rule, tensors)
    assert_same(values_and_gradients(torch_impl.gated_delta_rule, tensors), expected, 1e-11)


@pytest.mark.parametrize("cut", [1, 16, 36])
def test_the_state_hands_over_at_any_cut(cut: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_impl, "CHUNK", 5)
    tensors = ops.gated_delta_rule.cases.example(L=37)
    o, state = ops.gated_delta_rule(**tensors)
    sequence = {k: t for k, t in tensors.items() if k != "initial_state"}
    first, middle = ops.gated_delta_rule(**tensors | {k: t[:, :cut] for k, t in sequence.items()})
    second, last = ops.gated_delta_rule(**{k: t[:, cut:] for k, t in sequence.items()}, initial_state=middle)
    torch.testing.assert_close(torch.cat([first, second], dim=1), o)
    torch.testing.assert_close(last, state)


@pytest.mark.parametrize(
    ("backend", "dtype", "size"),
    [("reference", torch.float64, 1e100), ("torch", torch.float64, 1e100), ("cpu", torch.float32, 1e30)],
)
def test_a_start_forgets_a_state_of_any_size(backend: str, dtype: torch.dtype, size: float) -> None:
    tensors = cast(ops.gated_delta_rule.cases.example(), dtype)
    tensors["initial_state"] *= size
    tensors["starts"] = torch.zeros(2, 37, dtype=torch.bool)
    tensors["starts"][:, 20] = True
    with use_backend(backend):
        whole, state = ops.gated_delta_rule(**tensors)
        apart, last = ops.gated_delta_rule(**{k: tensors[k][:, 20:] for k in ("q", "k", "v", "log_decay", "beta")})
    torch.testing.assert_close(whole[:, 20:], apart)
    torch.testing.assert_close(state, last)


@pytest.mark.parametrize("backend", ["torch", "cpu"])
def test_decays_that_leave_nothing_do_not_disturb_the_others(backend: str) -> None:
    # in a difference of running sums, the digits of the weak decays would drown in the strong ones
    tensors = cast(ops.gated_delta_rule.cases.example(L=50, optional=False), torch.float32)
    tensors["log_decay"] = tensors["log_decay"].clamp(min=-0.1)
    tensors["log_decay"][:, [3, 11]], tensors["log_decay"][0, 30] = -1e6, -torch.inf
    expected = values_and_gradients(reference.gated_delta_rule, cast(tensors, torch.float64))
    with use_backend(backend):
        assert_same(values_and_gradients(ops.gated_delta_rule, tensors), expected, 1e-5)


def test_a_key_reads_the_last_value_that_was_written_to_it() -> None:
    keys, _ = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))
    written = torch.tensor([0, 1, 2, 1, 3, 0, 0])
    k, v = keys[written].view(1, 7, 1, 5), torch.randn(7, 4, dtype=torch.float64)
    keep, overwrite = k.new_zeros(1, 7, 1), k.new_ones(1, 7, 1)
    _, S = ops.gated_delta_rule(k, k, v.view(1, 7, 1, 4), keep, overwrite)
    torch.testing.assert_close(S[0, 0] @ keys.T, torch.stack([v[6], v[3], v[2], v[4], torch.zeros_like(v[0])], dim=1))


@pytest.mark.parametrize("L", [1, 70])
def test_half_precision_comes_out_as_it_went_in_and_the_state_is_wide(L: int) -> None:
    tensors = cast(ops.gated_delta_rule.cases.example(L=L), torch.bfloat16)
    o, state = ops.gated_delta_rule(**tensors)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


def test_autocast_leaves_the_operation_in_float32() -> None:
    tensors = cast(ops.gated_delta_rule.cases.example(L=70), torch.float32)
    expected = ops.gated_delta_rule(**tensors)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        o, state = ops.gated_delta_rule(**tensors)
    torch.testing.assert_close((o, state), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("d_model", "options", "heads"),
    [
        (2048, {}, (12, 128, 256)),
        (2048, {"d_state": 256}, (6, 256, 512)),
        (128, {}, (3, 32, 64)),
        (160, {}, (4, 32, 64)),
        (8, {}, (3, 2, 4)),
        (2, {}, (2, 1, 2)),
        (128, {"n_heads": 1}, (1, 64, 128)),
        (24, {"n_heads": 5, "d_state": 7, "expand": 0.5}, (5, 7, 3)),
    ],
)
def test_heads_fit_the_width(d_model: int, options: dict[str, Any], heads: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        layer = mixer(d_model, **options)
    assert (layer.n_heads, layer.d_state, layer.head_dim) == heads


def test_values_without_channels_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expand=0.1 of d_state=8 leaves no channel of a value"):
        mixer(d_state=8, expand=0.1)


def test_a_layer_has_about_six_squares_of_its_width_in_parameters() -> None:
    with torch.device("meta"):
        layer = mixer(2048)
    assert sum(p.numel() for p in layer.parameters()) == pytest.approx(6 * 2048**2, rel=0.01)


def test_decays_start_as_those_of_the_authors() -> None:
    layer = mixer(64, n_heads=500, d_state=1)
    assert 0 < layer.A_log.exp().min() < 0.5 < 15.5 < layer.A_log.exp().max() <= 16
    assert layer.A_log.exp().mean().item() == pytest.approx(8, abs=0.8)
    dt = F.softplus(layer.dt_bias).log()
    assert dt.mean().item() == pytest.approx(math.log(1e-2), abs=0.25)  # log-uniform in [1e-3, 1e-1]
    assert math.log(1e-3) - 1e-3 <= dt.min() < dt.max() <= math.log(1e-1) + 1e-3


def test_flops_of_a_sequence_are_those_of_its_chunks_and_of_a_token_those_of_the_recurrence() -> None:
    with torch.device("meta"):
        layer = mixer(256)  # 3 heads with N = 64, P = 128
    outside = 2 * 256 * (3 * (2 * 64 + 2 * 128) + 6) + 2 * 3 * 128 * 256 + 2 * 4 * 3 * (2 * 64 + 128)
    assert layer.flops_per_token(10**6) - outside == 7 * 3 * 64 * 128
    products = 2 * 64 * (2 * 64 + 128) + 64 * (64 + 128) + 6 * 64 * 128 + 128  # with Q = 64 tokens in a chunk
    assert layer.sequence_flops(512) / 512 - outside == pytest.approx(3 * products)
