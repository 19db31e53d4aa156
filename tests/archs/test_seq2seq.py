"""Models of a source and a target: what they see, how they decode, their sizes, and their layers by definition."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from crossover.archs import LanguageModel, ModelConfig, State, available, build, configure
from crossover.archs.config import KINDS
from crossover.archs.generation import NO_TOKEN, Sampling
from crossover.archs.mixers import cross_attention
from crossover.archs.mixers.cross_attention import (
    AdditiveAttention,
    AdditiveAttentionConfig,
    CrossAttention,
    CrossAttentionConfig,
)
from crossover.archs.presets import TOLERANCE, count_params
from crossover.archs.seq2seq import Seq2Seq, Seq2SeqConfig, open_pretrained
from crossover.kernels.compare import assert_same
from crossover.kernels.dispatch import use_backend
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("encdec", {}),
    ("encdec", {"prenorm": True, "n_heads": 4, "n_kv_heads": 2, "positions": "learned", "max_positions": 16}),
    ("seq2seq", {}),
    ("seq2seq", {"of": "mamba", "d_attention": 5, "n_layers": 3}),
]
every_model = pytest.mark.parametrize("name", available("seq2seq"))
every_variant = pytest.mark.parametrize(("name", "options"), VARIANTS)


def tiny(name: Any, **options: Any) -> Seq2Seq:
    """A model in float64, with weights large enough for errors to show."""
    lm: Seq2Seq = build(name, **{"d_model": 24, "n_layers": 4, "vocab_size": 11, **options}).double()
    with torch.no_grad():
        for p in lm.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return lm


def pair(B: int = 2, S: int = 7, T: int = 9) -> tuple[Tensor, Tensor]:
    return torch.randint(11, (B, S)), torch.randint(11, (B, T))


def gradients(lm: nn.Module, y: Tensor) -> dict[str, Tensor]:
    """y, and the gradient of every parameter under a fixed random weighting of y."""
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(3), dtype=y.dtype)
    names, parameters = zip(*lm.named_parameters(), strict=True)
    grads = torch.autograd.grad((y * weight).sum(), parameters, materialize_grads=True)
    return {"y": y.detach()} | dict(zip(names, grads, strict=True))


def in_chunks(lm: Seq2Seq, state: Sequence[State], target: Tensor, bounds: list[int]) -> Tensor:
    ys = []
    for i, j in zip([0, *bounds], [*bounds, target.shape[1]], strict=True):
        logits, after, _ = lm.decode(target[:, i:j], state)
        assert after is not None
        state = after
        ys.append(logits)
    return torch.cat(ys, dim=1)


def test_the_two_models_are_a_kind_of_their_own() -> None:
    assert available("seq2seq") == ("encdec", "seq2seq")
    assert not set(available("seq2seq")) & {*available(), *available("encoder")}


@pytest.mark.parametrize("bounds", [[1, 2, 3, 4, 5, 6, 7, 8], [2, 7]])
@every_variant
def test_any_split_of_the_target_gives_the_full_pass(name: str, options: dict[str, Any], bounds: list[int]) -> None:
    lm, (source, target), source_len = tiny(name, **options), pair(), torch.tensor([7, 3])
    expected = gradients(lm, lm(source, target, source_len=source_len).logits)
    actual = gradients(lm, in_chunks(lm, lm.encode(source, source_len, max_len=9), target, bounds))
    assert_same(actual, expected, 1e-9)
    with torch.no_grad():  # where caches are written in place
        y = in_chunks(lm, lm.encode(source, source_len, max_len=9), target, bounds)
    torch.testing.assert_close(y, expected["y"])
    logits, _ = lm.prefill(target, lm.encode(source, source_len, max_len=9), chunk_len=max(1, bounds[0]))
    torch.testing.assert_close(logits, expected["y"][:, -1])


@every_variant
def test_logits_ignore_target_tokens_to_come_and_see_all_others(name: str, options: dict[str, Any]) -> None:
    lm, (source, target) = tiny(name, **options), pair(B=1)
    x, h = (lm.decoder.embedding(t).detach().requires_grad_() for t in (target, source))
    lm.decoder.embedding.register_forward_hook(lambda _, args, y: h if args[0] is source else x)
    seen = [torch.autograd.grad(y.sum(), [x, h], retain_graph=True) for y in lm(source, target).logits[0]]
    for t, (of_target, of_source) in enumerate(seen):
        assert of_target[0, t + 1 :].abs().sum() == 0
        assert (of_target[0, : t + 1].abs().sum(-1) > 0).all()
        assert (of_source[0].abs().sum(-1) > 0).all()


@every_variant
def test_padding_of_the_source_has_no_influence(name: str, options: dict[str, Any]) -> None:
    lm, (source, target), source_len = tiny(name, **options), pair(B=3), torch.tensor([4, 7, 1])
    padded = gradients(lm, lm(source, target, source_len=source_len).logits)
    rows = [lm(source[i : i + 1, :n], target[i : i + 1]).logits for i, n in enumerate(source_len)]
    assert_same(padded, gradients(lm, torch.cat(rows)), 1e-9)


@every_model
def test_the_loss_is_the_mean_over_the_targets_that_count(name: str) -> None:
    lm, (source, target), source_len = tiny(name), pair(), torch.tensor([7, 5])
    targets = torch.randint(11, (2, 9))
    targets[1, 4:] = -100
    loss, aux = lm.loss(source, target, targets, source_len=source_len)
    expected = F.cross_entropy(lm(source, target, source_len=source_len).logits.flatten(0, 1), targets.flatten())
    assert_same(gradients(lm, loss[None]), gradients(lm, expected[None]), 1e-6)  # the loss is summed in float32
    assert aux.item() == 0


def test_auxiliary_losses_of_both_sides_add_up() -> None:
    moe = {"pattern": ("lstm+moe",), "mixer": {"lstm": {"kind": "bidirectional", "of": "lstm"}}}
    config = Seq2SeqConfig(d_model=8, n_layers=1, vocab_size=11, pattern=("cross_attention+moe",), source=moe)
    lm, (source, target) = build(config), pair()
    h, _, of_source = lm.encoder(lm.decoder.embedding(source))
    memory = [lm.decoder.backbone.blocks[0].mixer.read(h)]  # pyright: ignore[reportCallIssue]
    of_target = lm.decode(target, memory).aux_loss
    assert min(of_source.item(), of_target.item()) > 0
    torch.testing.assert_close(lm.loss(source, target, target)[1], of_source + of_target)
    torch.testing.assert_close(lm(source, target).aux_loss, of_source + of_target)
    experts = [block.ffn for block in (*lm.encoder.blocks, *lm.decoder.backbone.blocks)]
    assert lm.n_active_params == lm.n_params - sum(ffn.n_inactive_params for ffn in experts if ffn is not None)


@pytest.mark.parametrize("source_len", [None, torch.tensor([5, 2])])
@every_model
def test_greedy_generation_equals_rerunning_the_whole_target(name: str, source_len: Tensor | None) -> None:
    lm, source = tiny(name), torch.randint(11, (2, 5))
    target = torch.full((2, 1), 6)
    for _ in range(5):
        logits = lm(source, target, source_len=source_len).logits
        target = torch.cat([target, logits[:, -1:].argmax(-1)], dim=1)
    written = lm.generate(source, 5, temperature=0, source_len=source_len, start_token=6)
    assert torch.equal(written, target[:, 1:])


def sources_and_targets(lm: Seq2Seq) -> tuple[list[list[int]], list[list[int]]]:
    """Sources of different lengths, and the target of nine tokens that each has alone."""
    sources = [torch.randint(11, (n,)).tolist() for n in (5, 1, 3, 5, 8)]
    return sources, [lm.generate(torch.tensor([row]), 9, temperature=0).flatten().tolist() for row in sources]


def until(tokens: list[int], stops: list[int]) -> list[int]:
    """The tokens up to the first of `stops`, which is included."""
    return tokens[: next((i + 1 for i, token in enumerate(tokens) if token in stops), len(tokens))]


@every_model
def test_sources_of_any_lengths_give_in_one_batch_what_they_give_alone(name: str) -> None:
    lm = tiny(name, tie_embeddings=False)  # tied ones repeat what was read last
    sources, targets = sources_and_targets(lm)
    assert len({*map(tuple, targets)}) > 1
    assert [row.tolist() for row in lm.generate(sources, 9, temperature=0)] == targets
    alike = [torch.tensor(sources[i]) for i in (0, 3)]  # of one length, which need no padding
    assert [row.tolist() for row in lm.generate(alike, 9, temperature=0)] == [targets[0], targets[3]]


@every_model
def test_a_target_ends_at_a_stop_token_and_the_others_go_on_as_if_alone(name: str) -> None:
    lm = tiny(name, tie_embeddings=False)  # tied ones repeat what was read last
    sources, targets = sources_and_targets(lm)
    stops = [targets[0][3], targets[4][6]]
    expected = [until(row, stops) for row in targets]
    assert len({*map(len, expected)}) > 1  # they end at different times
    calls: list[list[int]] = []
    written = lm.generate(sources, 9, temperature=0, stop_tokens=stops, on_token=lambda n, t: calls.append(t.tolist()))
    assert [row.tolist() for row in written] == expected
    assert calls == [[row[n] if n < len(row) else NO_TOKEN for row in expected] for n in range(len(calls))]


@every_model
def test_targets_of_a_tensor_are_filled_up_with_the_first_stop_token(name: str) -> None:
    lm, source = tiny(name, tie_embeddings=False), torch.randint(11, (6, 5))
    free = lm.generate(source, 12, temperature=0).tolist()
    stops = [free[0][3], free[1][5]]
    ended = [until(row, stops) for row in free]
    assert len({*map(len, ended)}) > 1
    longest = max(map(len, ended))
    written = lm.generate(source, 12, temperature=0, stop_tokens=stops)
    assert written.tolist() == [row + stops[:1] * (longest - len(row)) for row in ended]


def test_the_penalty_is_on_what_the_target_holds_and_not_on_the_source_or_the_start_token() -> None:
    lm = tiny("encdec")
    source, target, rules = [3, 3, 9, 4], [7], Sampling(repetition_penalty=5.0)
    for _ in range(8):
        logits = lm(torch.tensor([source]), torch.tensor([target])).logits[0, -1:]
        seen = torch.zeros(1, 11, dtype=torch.bool)
        seen[0, target[1:]] = True
        target.append(int(rules.probabilities(logits, seen).argmax()))
    (written,) = lm.generate([source], 8, temperature=0, start_token=7, repetition_penalty=5.0)
    assert written.tolist() == target[1:]
    assert target[1:] != lm.generate([source], 8, temperature=0, start_token=7)[0].tolist()


def test_the_seed_decides_what_is_sampled() -> None:
    lm, source = tiny("seq2seq"), torch.randint(11, (2, 5))
    first, again, other = (lm.generate(source, 12, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ([], "the list of prompts is empty"),
        (torch.zeros(2, 0), "the prompt is empty"),
        ([[1], []], "the prompt is empty"),
        ([[[1]]], r"must be \(L,\), not \(1, 1\)"),
    ],
)
def test_sources_that_are_none_are_refused(sources: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny("encdec").generate(sources, 1)


def test_a_source_is_not_read_in_chunks() -> None:
    with pytest.raises(ValueError, match="reads a source as a whole: leave prefill_chunk out"):
        tiny("encdec").generate([[1, 2]], 1, prefill_chunk=4)


def test_cross_attention_is_its_definition() -> None:
    torch.manual_seed(5)
    layer = CrossAttention(12, CrossAttentionConfig(n_heads=6, n_kv_heads=2, head_dim=3, bias=True)).double()
    torch.nn.init.normal_(layer.k_proj.bias)
    x, source = torch.randn(2, 7, 12, dtype=torch.float64), torch.randn(2, 5, 12, dtype=torch.float64)
    lengths = (5, 2)
    o = torch.zeros(2, 7, 18, dtype=torch.float64)
    for b, n in enumerate(lengths):
        for h in range(6):
            q = layer.q_proj(x[b])[:, 3 * h : 3 * h + 3]
            k, v = (p(source[b, :n])[:, 3 * (h // 3) : 3 * (h // 3) + 3] for p in (layer.k_proj, layer.v_proj))
            o[b, :, 3 * h : 3 * h + 3] = (q @ k.T / math.sqrt(3)).softmax(-1) @ v
    y, _ = layer(x, layer.read(source, torch.tensor(lengths)))
    assert_same(gradients(layer, y), gradients(layer, layer.out_proj(o)), 1e-9)


@pytest.mark.parametrize("chunk_numbers", [1, 2 * 2 * 5 * 9, 1 << 24])
def test_additive_attention_is_its_definition_in_chunks_of_any_size(
    chunk_numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_attention, "CHUNK_NUMBERS", chunk_numbers)
    torch.manual_seed(5)
    layer = AdditiveAttention(6, AdditiveAttentionConfig(d_attention=9)).double()
    torch.nn.init.normal_(layer.q_proj.bias)
    torch.nn.init.normal_(layer.score.weight)
    x, source = torch.randn(2, 7, 6, dtype=torch.float64), torch.randn(2, 5, 6, dtype=torch.float64)
    lengths, rows = (5, 2), []
    for b, n in enumerate(lengths):
        for t in range(7):
            e = [layer.score(torch.tanh(layer.q_proj(x[b, t]) + layer.k_proj(h))) for h in source[b, :n]]
            rows.append(torch.cat(e).softmax(-1) @ layer.v_proj(source[b, :n]))
    y, _ = layer(x, layer.read(source, torch.tensor(lengths)))
    assert_same(gradients(layer, y), gradients(layer, torch.stack(rows).view(2, 7, 6)), 1e-9)


def test_without_rotation_encdec_is_the_transformer_of_pytorch() -> None:
    lm = tiny("encdec", rope=False, bias=True, n_heads=3)
    sizes: dict[str, Any] = {"d_model": 24, "nhead": 3, "dim_feedforward": 96, "dropout": 0.0, "activation": "gelu"}
    # typed as what iterating its layers gives
    encoder: Any = nn.TransformerEncoder(nn.TransformerEncoderLayer(**sizes, batch_first=True), 2, None, False).double()
    decoder: Any = nn.TransformerDecoder(nn.TransformerDecoderLayer(**sizes, batch_first=True), 2).double()

    def attention(theirs: nn.MultiheadAttention, ours: Any) -> None:
        for name in ("weight", "bias"):
            packed = torch.cat([getattr(p, name) for p in (ours.q_proj, ours.k_proj, ours.v_proj)])
            theirs.load_state_dict(
                theirs.state_dict() | {f"in_proj_{name}": packed, f"out_proj.{name}": ours.out_proj.state_dict()[name]}
            )

    def ffn(theirs: Any, ours: Any, norm: nn.Module) -> None:
        theirs.linear1.load_state_dict(ours.ffn.up_proj.state_dict())
        theirs.linear2.load_state_dict(ours.ffn.down_proj.state_dict())
        norm.load_state_dict(ours.ffn_norm.state_dict())

    for theirs, ours in zip(encoder.layers, lm.encoder.blocks, strict=True):
        attention(theirs.self_attn, ours.mixer)
        theirs.norm1.load_state_dict(ours.mixer_norm.state_dict())
        ffn(theirs, ours, theirs.norm2)
    blocks = lm.decoder.backbone.blocks
    for theirs, self_block, cross_block in zip(decoder.layers, blocks[::2], blocks[1::2], strict=True):
        attention(theirs.self_attn, self_block.mixer)
        attention(theirs.multihead_attn, cross_block.mixer)
        theirs.norm1.load_state_dict(self_block.mixer_norm.state_dict())
        theirs.norm2.load_state_dict(cross_block.mixer_norm.state_dict())
        ffn(theirs, cross_block, theirs.norm3)
    source, target = pair()
    h = encoder(lm.encoder.norm(lm.decoder.embedding(source)))
    x = lm.decoder.backbone.norm(lm.decoder.embedding(target))
    y = decoder(x, h, tgt_mask=nn.Transformer.generate_square_subsequent_mask(9).double())
    torch.testing.assert_close(lm(source, target).logits, lm.decoder.logits(y))


@every_model
def test_sized_models_have_the_parameters_asked_for(name: str) -> None:
    for n_params, vocab_size in ((300_000, 256), (1_000_000, 256), (7_777_777, 4096), (40_000_000, 4096)):
        config = configure(name, n_params=n_params, vocab_size=vocab_size)
        assert abs(build(config, device="meta").n_params / n_params - 1) <= TOLERANCE
        assert config.n_layers % len(config.period) == 0


@every_model
def test_counting_on_meta_equals_counting_weights(name: str) -> None:
    config = configure(name, d_model=32, n_layers=8)
    distinct = {p.data_ptr(): p.numel() for p in build(config).parameters()}
    assert count_params(config) == sum(distinct.values())


def test_options_reach_both_sides_and_depths_may_differ() -> None:
    config = configure("encdec", d_model=24, n_heads=2, d_ff=40, n_layers=6)
    assert isinstance(config, Seq2SeqConfig)
    assert config.encoder.mixer["attention"] == {"causal": False, "n_heads": 2}
    assert config.mixer == {"attention": {"n_heads": 2}, "cross_attention": {"n_heads": 2}}
    assert config.ffn["mlp"]["d_ff"] == config.encoder.ffn["mlp"]["d_ff"] == 40
    assert (config.n_layers, config.encoder.n_layers) == (6, 3)
    assert (config.encoder.norm, config.encoder.prenorm) == ("layernorm", False)
    deep = configure(
        "seq2seq", source={"pattern": ["attention"], "mixer": {"attention": {"causal": False}}, "n_layers": 5}
    )
    assert isinstance(deep, Seq2SeqConfig)
    assert (deep.n_layers, deep.encoder.n_layers) == (6, 5)


@pytest.mark.quick
@every_model
def test_a_saved_model_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    lm, (source, target) = build(name, d_model=24, n_layers=2, vocab_size=11), pair()
    lm.save_pretrained(tmp_path)
    again = Seq2Seq.from_pretrained(tmp_path)
    assert again.config == lm.config
    assert "decoder.head.weight" not in again.state_dict()
    assert torch.equal(again(source, target).logits, lm(source, target).logits)


@pytest.mark.parametrize(("name", "cls"), [("encdec", Seq2Seq), ("seq2seq", Seq2Seq), ("lstm", LanguageModel)])
def test_a_saved_model_is_opened_as_what_it_is(name: str, cls: type[nn.Module], tmp_path: Path) -> None:
    lm = build(name, d_model=24, n_layers=2, vocab_size=11)
    lm.save_pretrained(tmp_path)
    again = open_pretrained(tmp_path, device="cpu")
    assert type(again) is cls
    assert again.config == lm.config
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), lm.parameters(), strict=True))


@every_variant
def test_the_size_of_a_state_is_known_without_running(name: str, options: dict[str, Any]) -> None:
    lm, (source, _) = tiny(name, **options), pair(S=5)
    on_meta = build(lm.config, device="meta", dtype=torch.float64).init_state(2, 9, n_source=5)
    assert [s.nbytes for s in on_meta] == [s.nbytes for s in lm.encode(source, max_len=9)]


UNSEEN = {  # per target token of two layers of the decoder, and per source token, D = 64: what is no matrix product
    "encdec": (lambda S, T: 2 * (2 * (T + 1) * 64 - 4 * T * 64), 0),
    "seq2seq": (lambda S, T: 2 * (10 * 64 + 64 * S), 2 * 2 * 10 * 64),
}


@every_model
def test_flops_are_those_of_the_flop_counter_plus_what_it_does_not_see(name: str) -> None:
    B, S, T = 2, 21, 13
    lm: Any = build(name, d_model=64, n_layers=4, vocab_size=32)
    source, target = torch.randint(32, (B, S)), torch.randint(32, (B, T))
    with FlopCounterMode(display=False) as counter, use_backend("reference"), sdpa_kernel(SDPBackend.MATH):
        lm.loss(source, target, target)
    of_target, of_source = UNSEEN[name]
    expected = counter.get_total_flops() / (B * T) + of_target(S, T) + of_source * S / T
    assert lm.mean_flops_per_token(T, S) == pytest.approx(expected, rel=1e-6)
    by_token = sum(lm.flops_per_token(t, S) for t in range(T)) + lm.source_flops(S)
    assert lm.mean_flops_per_token(T, S) == pytest.approx(by_token / T)
    assert lm.training_flops_per_token(T) == 3 * lm.mean_flops_per_token(T, T)


def test_a_reader_without_a_source_says_how_to_call_the_model() -> None:
    lm, (_, target) = tiny("encdec"), pair()
    with pytest.raises(ValueError, match=r"reads a source and was given none: call the model as lm\(source, target\)"):
        lm.decoder(target)
    with pytest.raises(ValueError, match="cannot be packed: leave starts out"):
        lm.decoder(target, lm.encode(target, max_len=9), starts=torch.zeros(2, 9, dtype=torch.bool))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern": ("lstm",)},
            r"no layer of model\.pattern=\['lstm'\] reads the source: add cross_attention or addit",
        ),
        ({"source": {"patern": ("lstm",)}}, r"unknown key model\.source\.patern; did you mean 'pattern'\?"),
        ({"source": {}}, r"model\.source lacks the pattern of the encoder"),
        ({"source": {"pattern": ("lstn",)}}, "unknown mixer 'lstn'"),
        ({"source": {"pattern": ("cross_attention",)}}, "unknown mixer 'cross_attention'"),
        ({"mixer": {"cross_attention": {"n_head": 2}}}, r"unknown key model\.mixer\.cross_attention\.n_head; did"),
        ({"head": "mlm"}, "model.head='mlm' predicts masked tokens"),
    ],
)
def test_a_config_that_cannot_be_says_what_is_wrong(fields: dict[str, Any], message: str) -> None:
    good: dict[str, Any] = {"pattern": ("cross_attention",), "source": {"pattern": ("lstm",)}}
    with pytest.raises(ValueError, match=message):
        Seq2SeqConfig(d_model=8, n_layers=1, vocab_size=11, **good | fields)


def test_a_seq2seq_model_is_not_made_an_encoder() -> None:
    with pytest.raises(ValueError, match="leave bidirectional out"):
        configure("encdec", bidirectional=True)


def test_a_config_knows_what_its_models_are_for() -> None:
    for kind in KINDS:
        assert {configure(name).kind for name in available(kind)} == {kind}
    assert {configure(name, bidirectional=True).kind for name in available()} == {"encoder"}
    half: dict[str, Any] = {"pattern": ("mamba", "both"), "mixer": {"both": {"kind": "bidirectional"}}}
    assert ModelConfig(d_model=8, n_layers=1, vocab_size=11, **half).kind == "encoder"
