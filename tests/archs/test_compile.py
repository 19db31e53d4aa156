"""torch.compile traces every model in one graph, forward and backward, without changing what it computes."""

import pytest
import torch
from crossover.archs import available, build, configure


@pytest.mark.parametrize("name", [*available(), *available("encoder")])
def test_compiles_to_one_graph_with_the_same_loss_and_gradients(name: str) -> None:
    torch._dynamo.reset()
    period = len(configure(name, d_model=32, n_layers=1, vocab_size=17).pattern)
    lm = build(name, d_model=32, n_layers=period, vocab_size=17)
    tokens = torch.randint(17, (2, 23))

    def loss(tokens: torch.Tensor) -> torch.Tensor:
        return sum(lm.loss(tokens[:, :-1], tokens[:, 1:]), torch.zeros(()))

    def with_gradients(function) -> list[torch.Tensor]:
        value = function(tokens)
        return [value.detach(), *torch.autograd.grad(value, list(lm.parameters()), allow_unused=True)]

    # aot_eager runs the traced graph as it is: what is tested is the tracing, and not a compiler
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=False)
    torch.testing.assert_close(with_gradients(compiled), with_gradients(loss))
