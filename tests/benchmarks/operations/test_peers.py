"""Peers: that they compute the same as ours, train and decode, and how one gets those that are not here."""

import time

import pytest
import torch
from crossover.archs import available, build
from crossover.benchmarks.operations import models, peers
from crossover.benchmarks.operations.contestants import OURS
from crossover.benchmarks.operations.options import KernelsConfig
from crossover.benchmarks.operations.peers import PEERS, Peer, works_of
from crossover.benchmarks.operations.turns import model_of, our_step

SMALL = dict.fromkeys(available(), 60_000) | {"jamba": 252_000}


@pytest.fixture(params=PEERS)
def peer(request: pytest.FixtureRequest) -> Peer:
    found = PEERS[request.param]
    if found.missing:
        pytest.skip(f"needs {' and '.join(found.missing)}")
    return found


@pytest.mark.quick
def test_a_peer_computes_the_same_and_learns_with_every_parameter(peer: Peer) -> None:
    lm = model_of(peer.arch, SMALL[peer.arch], 13)
    model = peer.build(lm).train()
    window = torch.randint(256, (2, 14))
    expected, _ = lm.loss(window[:, :-1].contiguous(), window[:, 1:].contiguous())
    if peer.loss is not peers._of_transformers:  # whose own leaves out the last prediction
        torch.testing.assert_close(peer.loss(model, window), expected, rtol=1e-5, atol=1e-5)
    else:
        tokens = window[:, :-1]
        torch.testing.assert_close(model(input_ids=tokens).logits, lm(tokens).logits, rtol=1e-3, atol=1e-4)
    before = [p.detach().clone() for p in model.parameters()]
    peers.training_step(model, peer.loss)(torch.arange(258).view(2, 129) % 256)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_a_training_step_of_ours_changes_every_parameter() -> None:
    lm = model_of("transformer", 60_000, 8)
    before = [p.detach().clone() for p in lm.parameters()]
    our_step(lm)(torch.arange(258).view(2, 129) % 256)
    assert not any(torch.equal(p, old) for p, old in zip(lm.parameters(), before, strict=True))


def test_a_token_is_decoded_at_the_same_place_again_and_again() -> None:
    pytest.importorskip("transformers", reason="needs the extra [hf]")
    model = PEERS["HF Llama"].build(model_of("transformer", 60_000, 17)).eval()
    lengths: list[int] = []
    model.register_forward_hook(
        lambda *call: lengths.append(call[-1].past_key_values.get_seq_length()), with_kwargs=True
    )
    decode = peers.decoding(model, 16)
    for _ in range(3):
        decode()
    assert lengths == [16, 17, 17, 17]


@pytest.mark.parametrize("arch", ["gpt2", "lstm"])
def test_every_work_of_a_contestant_can_be_done_again(arch: str) -> None:
    works = works_of(arch, 60_000, OURS)
    facts = {}
    for name in ("train", "decode", "products", "read"):
        work, facts[name] = works({"work": name, "length": 1100, "batch_size": 1})  # more than gpt2's positions
        assert all(work(time.perf_counter) > 0 for _ in range(2))
    assert facts["train"]["n_params"] == pytest.approx(60_000, rel=0.02)
    assert (facts["decode"]["decode"], facts["decode"]["why"]) == ("compiled", None)
    assert "linear_cross_entropy" in facts["train"]["backends"]
    assert min(facts["read"]["weights"], facts["read"]["state"]) > 0


def test_what_is_not_installed_is_listed_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None if name == "mambapy" else object())
    (row,) = models.absent_rows(KernelsConfig())
    assert row == {
        "kind": "absent",
        "peers": ["HF Mamba with mambapy", "mambapy"],
        "install": ["pip install mambapy"],
    }
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: None)
    llama, with_mambapy, _ = models.absent_rows(KernelsConfig(archs=("transformer", "mamba", "lstm")))
    assert llama["install"] == ["pip install 'crossover[hf]'"]
    assert with_mambapy["install"] == ["pip install 'crossover[hf]'", "pip install mambapy"]


def test_learned_positions_reach_as_far_as_the_length() -> None:
    assert model_of("gpt2", 60_000, 1024).config.max_positions == 1024
    assert model_of("gpt2", 300_000, 2048).config.max_positions == 2048
    assert build("gpt2", n_params=60_000, vocab_size=256, device="meta").config.max_positions == 1024
