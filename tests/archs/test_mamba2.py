"""Mamba-2: against Hugging Face's, its initial values, heads, state and FLOPs. The contract is in test_contract.py."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.archs import LanguageModel, ModelConfig, build, configure
from crossover.archs.mixers.mamba2 import Mamba2, Mamba2Config, Mamba2State
from crossover.archs.presets import count_params
from crossover.kernels.compare import assert_same
from crossover.kernels.dispatch import record_backends

V = 37
PUBLISHED = {"130m": (768, 24), "370m": (1024, 48), "780m": (1536, 48), "1.3b": (2048, 48), "2.7b": (2560, 64)}
SMALL: dict[str, Any] = {"d_state": 5, "d_conv": 3, "n_groups": 2, "expand": 1.5}


def mixer(d_model: int = 24, **options: Any) -> Mamba2:
    return Mamba2(d_model, Mamba2Config(**options))


def run(layer: Mamba2, x: torch.Tensor, bounds: list[int], starts: torch.Tensor | None) -> torch.Tensor:
    """y, one chunk after the other."""
    state: Any = layer.init_state(len(x), x.shape[1], dtype=x.dtype)
    ys = []
    for i, j in zip([0, *bounds], [*bounds, x.shape[1]], strict=True):
        y, state = layer(x[:, i:j], state, starts=None if starts is None else starts[:, i:j])
        ys.append(y)
    return torch.cat(ys, dim=1)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("n_groups", [1, 3])
def test_mamba2_is_mamba2(n_groups: int) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    theirs = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            vocab_size=V, hidden_size=45, state_size=7, num_hidden_layers=3, conv_kernel=3, num_heads=9,
            head_dim=10, n_groups=n_groups, chunk_size=8, layer_norm_epsilon=1e-5, tie_word_embeddings=False,
        )
    )  # fmt: skip
    options = {"d_state": 7, "d_conv": 3, "head_dim": 10, "n_groups": n_groups}
    ours = LanguageModel(
        ModelConfig(
            d_model=45, n_layers=3, vocab_size=V, pattern=("mamba2",), mixer={"mamba2": options}, tie_embeddings=False
        )
    )
    with torch.no_grad():
        for p in theirs.parameters():
            # with the usual 0.02 all logits are tiny and errors hide; vectors differ too, so that none is forgotten
            p.copy_(torch.randn_like(p) * 0.15 if p.dim() > 1 else p + 0.3 * torch.randn_like(p))
    source = theirs.eval().state_dict()
    names = {"embedding.weight": "backbone.embeddings.weight", "head.weight": "lm_head.weight"}
    names |= {"backbone.norm.weight": "backbone.norm_f.weight"}
    state = {}
    for name, value in ours.state_dict().items():
        theirs_name = names.get(name) or (
            name.replace("blocks", "layers").replace("mixer_norm", "norm").replace("mixer.conv_", "mixer.conv1d.")
        )
        state[name] = source[theirs_name].reshape(value.shape)
    assert len(state) == len(source)
    ours.load_state_dict(state)
    tokens = torch.randint(V, (2, 23))
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert (ours(tokens).logits - expected).abs().max() < 1e-5 * expected.abs().max()
        after: Any = ours.init_state(2, 23)
        pieces = []
        for chunk in tokens.split([1, 17, 1, 1, 1, 2], dim=1):  # one token on its own, and many
            logits, after, _ = ours(chunk, after)
            pieces.append(logits)
        assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameters(size: str) -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra [hf]")
    d_model, n_layers = PUBLISHED[size]
    config = transformers.Mamba2Config(
        vocab_size=50288, hidden_size=d_model, num_hidden_layers=1, num_heads=d_model // 32, n_groups=1,
        tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device("meta"):
        theirs = transformers.Mamba2ForCausalLM(config)
    layer = sum(p.numel() for p in theirs.backbone.layers.parameters())
    total = sum(p.numel() for p in theirs.parameters()) + (n_layers - 1) * layer
    assert count_params(configure(f"mamba2-{size}")) == total


def test_the_smallest_published_model_has_129_million_parameters() -> None:
    assert count_params(configure("mamba2-130m")) == 128_989_632


def test_the_state_of_the_largest_published_model_takes_160_mib() -> None:
    states = build("mamba2-2.7b", device="meta").init_state(1, 10**6)
    assert all(isinstance(s, Mamba2State) for s in states)
    assert sum(s.tensors()["ssm"].nbytes for s in states) == 160 * 2**20


@pytest.mark.parametrize("packed", [False, True])  # one token that no document can start at is another operation
def test_groups_of_heads_change_nothing_across_chunks(packed: bool) -> None:
    layer, x = mixer(**SMALL).double(), torch.randn(2, 13, 24, dtype=torch.float64)
    starts = torch.rand(2, 13) < 0.2 if packed else None

    def values_and_gradients(bounds: list[int]) -> dict[str, torch.Tensor]:
        given = x.clone().requires_grad_()
        y = run(layer, given, bounds, starts)
        names, parameters = zip(*layer.named_parameters(), strict=True)
        weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
        grads = torch.autograd.grad((y * weight).sum(), [given, *parameters])
        return {"y": y.detach()} | dict(zip(("x", *names), grads, strict=True))

    whole = values_and_gradients([])
    for bounds in ([5], [1, 2, 12], list(range(1, 13))):
        assert_same(values_and_gradients(bounds), whole, 1e-9)
        with torch.no_grad():
            assert_same({"y": run(layer, x, bounds, starts)}, {"y": whole["y"]}, 1e-9)


def test_one_token_is_one_operation_that_reuses_the_state() -> None:
    layer = mixer(**SMALL)
    with torch.no_grad(), record_backends() as ran:
        _, state = layer(torch.randn(2, 5, 24), layer.init_state(2, 9))
        assert "state_update" not in ran
        ran.clear()
        _, after = layer.step(torch.randn(2, 24), state)
    assert set(ran) == {"state_update", "gated_rms_norm"}
    assert after.ssm.data_ptr() == state.ssm.data_ptr()


@pytest.mark.parametrize("trained", ["dt_bias", "conv_weight", "D"])
def test_a_state_stays_as_it_was_while_any_parameter_is_trained(trained: str) -> None:
    layer = mixer(**SMALL).requires_grad_(False)
    layer.get_parameter(trained).requires_grad_()
    with torch.no_grad():
        _, state = layer(torch.randn(1, 5, 24), layer.init_state(1, 9))
    before = state.clone()
    y, _ = layer.step(torch.randn(1, 24), state)
    y.sum().backward()
    assert torch.equal(state.ssm, before.ssm)
    assert layer.get_parameter(trained).grad.any()  # pyright: ignore[reportOptionalMemberAccess]


def uniform(values: torch.Tensor, low: float, high: float) -> bool:
    """Whether sorted values lie as near to the line as a uniform sample does 999 times in a thousand."""
    at = (values.sort().values - low) / (high - low)
    assert at.min() >= -1e-3
    assert at.max() <= 1 + 1e-3
    return bool((at - torch.linspace(0, 1, len(at))).abs().max() < 1.95 / len(at) ** 0.5)


@pytest.mark.parametrize(("name", "options"), [("mamba2", {}), ("jamba", {"ssm": "mamba2"})])
def test_initial_values_are_the_papers(name: str, options: dict[str, Any]) -> None:
    blocks = build(name, d_model=128, n_layers=8, head_dim=1, d_state=1, **options).backbone.blocks
    layers = [block.mixer for block in blocks if isinstance(block.mixer, Mamba2)]
    assert len(layers) >= 7
    assert uniform(torch.cat([layer.A_log.exp() for layer in layers]), 1, 16)
    dt = torch.cat([F.softplus(layer.dt_bias) for layer in layers])
    assert uniform(dt.log(), math.log(1e-3), math.log(1e-1))
    for layer in layers:
        assert torch.equal(layer.D, torch.ones(256))
        assert torch.equal(layer.norm.weight, torch.ones(256))


def test_step_sizes_have_a_floor() -> None:
    dt = F.softplus(mixer(expand=40, head_dim=1, d_state=1, dt_min=1e-6).dt_bias)
    assert dt.min().item() == pytest.approx(1e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("d_model", "options", "heads"),
    [
        (768, {}, (24, 64)),
        (128, {}, (4, 64)),
        (64, {}, (4, 32)),
        (120, {}, (15, 16)),
        (8, {}, (4, 4)),
        (128, {"n_groups": 8}, (8, 32)),
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
        ({"head_dim": 16, "n_groups": 2}, "n_heads=3 is not divisible by n_groups=2"),
    ],
)
def test_heads_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mixer(**options)


def test_flops_of_a_sequence_are_those_of_its_chunks_and_of_a_token_those_of_the_recurrence() -> None:
    layer = build("mamba2", d_model=768, n_layers=1, chunk_len=256, device="meta").backbone.blocks[0].mixer
    projections = 2 * 768 * (2 * 1536 + 2 * 128 + 24) + 2 * 1536 * 768
    outside = projections + 2 * 4 * (1536 + 256) + 2 * 1536
    # G 2 Q N + H (2 Q P + 4 N P + 2 N P / Q), the 1.64 million of a published accounting at this size
    assert layer.sequence_flops(512) / 512 - outside == pytest.approx(1.64e6, rel=1e-3)
    assert layer.flops_per_token(512) - outside == 5 * 1536 * 128


def test_jamba_takes_mamba2_in_the_place_of_mamba() -> None:
    layers = configure("jamba", ssm="mamba2", d_state=6).layers
    assert [mixer for mixer, _ in layers] == ["attention" if i % 8 == 4 else "mamba2" for i in range(len(layers))]
    assert configure("jamba", ssm="mamba2", d_state=6).mixer["mamba2"] == {"d_state": 6}
    with pytest.raises(ValueError, match="unknown mixer 'mamba9'"):
        configure("jamba", ssm="mamba9")
