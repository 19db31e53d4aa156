"""A look into the layers of a model while it trains: what is seen, and that nothing changes by it."""

from typing import Any

import pytest
import torch
from crossover.archs import build
from crossover.train.config import TrainConfig
from crossover.train.data import Corpus
from crossover.train.layers import MeasuredUpdate, layers_of
from crossover.train.learner import Learner, Update
from crossover.train.objectives.next_token import NextToken
from crossover.train.runtime import choose_precision

FP32 = choose_precision("fp32", torch.device("cpu"))


def test_what_is_seen_are_root_mean_squares_before_clipping_and_over_all_parts(corpus: Corpus) -> None:
    settings = TrainConfig(batch_size=3, seq_len=16)
    objective = NextToken(corpus, seed=0, train=settings)
    model: Any = build("transformer", d_model=32, n_layers=2, vocab_size=256)
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), "lr_scale": 1.0}], lr=1.0)
    update = Update(Learner(model, objective), objective, optimizer, precision=FP32, clip=1e-3)
    rows = objective.rows(0)
    whole = objective.collate(rows)
    with torch.no_grad():
        before = [p.clone() for p in model.backbone.blocks[1].parameters()]
        x = model.backbone.blocks[0](model.embed(whole.tokens))[0]
    values, found = MeasuredUpdate(model, update)([objective.collate(rows[:2]), objective.collate(rows[2:])], lr=0.5)
    changes = torch.cat([(p - q).flatten() for p, q in zip(model.backbone.blocks[1].parameters(), before, strict=True)])
    assert values["grad_norm"] > 1e-3
    assert found["layer_00/activation_rms"] == pytest.approx(x.square().mean().sqrt().item(), rel=1e-4)
    weights = torch.cat([p.flatten() for p in before])
    ratio = changes.square().mean().sqrt() / weights.square().mean().sqrt()
    assert found["layer_01/update_ratio"] == pytest.approx(ratio.item(), rel=1e-4)
    unclipped = changes / 0.5 * values["grad_norm"] / 1e-3
    assert found["layer_01/gradient_rms"] == pytest.approx(unclipped.square().mean().sqrt().item(), rel=1e-2)
    assert not any(module._forward_hooks for module in model.modules())


def test_layers_of_two_stacks_have_names_of_their_own() -> None:
    names = list(layers_of(build("encdec", d_model=32, n_layers=2, vocab_size=64, device="meta")))
    assert names == ["encoder_layer_00", "decoder_layer_00", "decoder_layer_01"]
    assert list(layers_of(build("lstm", d_model=32, n_layers=1, vocab_size=64, device="meta"))) == ["layer_00"]
