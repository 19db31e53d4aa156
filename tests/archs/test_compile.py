"""torch.compile traces every model in one graph, forward and backward, without changing what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from crossover.archs import LanguageModel, available, build, configure
from crossover.archs.mixer import State
from torch import Tensor

FEW_TAPS = {"h3": {"d_conv": 3}}  # whose defaults trace 64 operations a layer
OWN = {"jamba": ["mamba+moe", "attention+mlp"], "samba": ["attention"]}
"""Layers of the hybrids, without those that another architecture has too."""


def one_of_each_layer(name: str) -> LanguageModel:
    """The smallest model that holds every kind of layer of an architecture, of a hybrid those that are its own."""
    torch._dynamo.reset()
    sizes: dict[str, Any] = {"d_model": 32, "vocab_size": 17, **FEW_TAPS.get(name, {})}
    kinds = OWN.get(name) or list(dict.fromkeys(configure(name, n_layers=1, **sizes).pattern))
    return build(name, n_layers=len(kinds), pattern=kinds, **sizes)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    # aot_eager runs the traced graph as it is: what is tested is the tracing, and not a compiler
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=False)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*available(), *available("encoder")])
def test_compiles_to_one_graph_with_the_same_loss_and_gradients(name: str) -> None:
    lm = one_of_each_layer(name)
    tokens = torch.randint(17, (2, 7))
    starts = torch.rand(2, 6) < 0.3

    def loss(tokens: Tensor, starts: Tensor) -> Tensor:
        whole, packed = (lm.loss(tokens[:, :-1], tokens[:, 1:], starts=marks) for marks in (None, starts))
        return sum((*whole, *packed), torch.zeros(()))

    def with_gradients(function: Callable[..., Tensor]) -> list[Tensor]:
        value = function(tokens, starts)
        return [value.detach(), *torch.autograd.grad(value, list(lm.parameters()), allow_unused=True)]

    torch.testing.assert_close(with_gradients(compiled(loss)), with_gradients(loss))


@torch.no_grad()
@pytest.mark.parametrize("name", available())
def test_decoding_compiles_to_one_graph_with_the_same_logits_and_states(name: str) -> None:
    lm = one_of_each_layer(name)
    tokens = torch.randint(17, (2, 5))

    def decode(tokens: Tensor, state: list[State]) -> tuple[Tensor, list[State]]:
        prompt, state, _ = lm(tokens[:, :-1], state)
        step, state, _ = lm(tokens[:, -1:], state)
        return torch.cat([prompt, step], dim=1), state

    (logits, after), (expected, expected_after) = (
        function(tokens, lm.init_state(2, 5)) for function in (compiled(decode), decode)
    )
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close([s.tensors() for s in after], [s.tensors() for s in expected_after])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("name", available())
def test_exports_with_any_length_and_with_a_state(name: str) -> None:
    class Logits(torch.nn.Module):
        def __init__(self, lm: LanguageModel) -> None:
            super().__init__()
            self.lm = lm

        def forward(self, tokens: Tensor, starts: Tensor | None = None, state: Any = None) -> Tensor:
            return self.lm(tokens, state, starts=starts).logits

    whole = Logits(one_of_each_layer(name))
    tokens, starts = torch.randint(17, (2, 9)), torch.rand(2, 9) < 0.3
    length = torch.export.Dim("length", min=3, max=500)
    shapes = ({1: length}, {1: length}, None)
    exported = torch.export.export(whole, (tokens, starts, None), dynamic_shapes=shapes, strict=False).module()
    for n in (9, 31):
        inputs = torch.randint(17, (2, n)), torch.rand(2, n) < 0.3
        torch.testing.assert_close(exported(*inputs, None), whole(*inputs))
    step = (tokens[:, :1], None, whole.lm.init_state(2, 4))
    exported = torch.export.export(whole, step, strict=False).module()
    torch.testing.assert_close(exported(*step), whole(tokens[:, :1], None, whole.lm.init_state(2, 4)))
