"""Adds a mixer, checks the contract, and trains it in one stack with attention: `python examples/new_mixer.py`.

In this folder commands take it too: `crossover train --import new_mixer --model.preset custom --model.d-model 96
--model.n-layers 4 --model.set 'pattern=["ema+mlp", "attention+mlp"]' --optim.lr 2e-3`; plugin/ goes further.

The mixer is an exponential moving average with a decay per channel and a gate: h[t] = a h[t-1] + (1 - a) x[t]. It
takes what every mixer takes: a state, so that it reads in chunks and generates, and starts, at which documents begin.
It generates by `forward`; a mixer that has a `describe_step` too is decoded by a compiled step (crossover.archs.step).
"""

import math
from dataclasses import dataclass

import torch
from crossover.archs import Mixer, ModelConfig, State, Zeros, build, register_mixer
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class EMAConfig:
    """Options of EMA."""

    slowest: float = 100.0
    """Longest initial time constant, in tokens."""


@dataclass
class EMAState(State):
    """Constant in the context length."""

    h: Tensor
    """The averages, (B, D), in float32 at least: in half precision a slow average stands still."""


class EMA(Mixer[EMAConfig, EMAState]):
    """y = out_proj(h silu(gate_proj(x))), where h is the moving average of x."""

    Config = EMAConfig
    State = EMAState
    no_weight_decay = frozenset({"logit"})

    def __init__(self, d_model: int, config: EMAConfig, *, residual_scale: float = 1.0) -> None:
        super().__init__(d_model, config, residual_scale=residual_scale)
        time_constant = torch.logspace(0, math.log10(config.slowest), d_model)
        self.logit = nn.Parameter(torch.logit(torch.exp(-1 / time_constant)))
        self.gate_proj = nn.Linear(d_model, d_model, bias=False)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        with torch.no_grad():
            self.out_proj.weight.mul_(residual_scale)

    def forward(
        self, x: Tensor, state: EMAState | None = None, *, starts: Tensor | None = None
    ) -> tuple[Tensor, EMAState | None]:
        """See Mixer.forward."""
        a = torch.sigmoid(self.logit)
        h = self.init_state(len(x), 0, device=x.device, dtype=x.dtype).h if state is None else state.h
        averages = [h[:, None][:, :0]]  # no tokens have no averages
        for t in range(x.shape[1]):
            if starts is not None:
                h = torch.where(starts[:, t, None], 0.0, h)
            h = a * h + (1 - a) * x[:, t]
            averages.append(h[:, None])
        y = self.out_proj(torch.cat(averages, dim=1).to(x.dtype) * nn.functional.silu(self.gate_proj(x)))
        return y, None if state is None else EMAState(h)

    def state_layout(self, max_len: int) -> dict[str, Zeros]:
        """See Mixer.state_layout."""
        return {"h": Zeros((self.d_model,), at_least=torch.float32)}

    def flops_per_token(self, context_len: float) -> float:
        """Two projections, and five operations per channel."""
        return 4 * self.d_model**2 + 5 * self.d_model


register_mixer("ema", EMA)


def main() -> None:
    """Checks that steps equal the full pass, then trains."""
    torch.manual_seed(0)
    pattern = ("ema+mlp", "attention+mlp")
    lm = build(ModelConfig(d_model=48, n_layers=2, vocab_size=16, pattern=pattern, mixer={"ema": {"slowest": 50.0}}))

    tokens = torch.randint(16, (4, 33))
    with torch.no_grad():
        full = lm(tokens).logits
        state, steps = lm.init_state(4, 33), []
        for token in tokens.split(1, dim=1):
            logits, state, _ = lm(token, state)
            steps.append(logits)
    error = (torch.cat(steps, dim=1) - full).abs().max().item()
    assert error < 1e-4, error
    print(f"token by token equals the full pass: largest difference {error:.0e}")

    # each series repeats itself after 8 tokens, so that the second half can be predicted from the first
    optimizer = torch.optim.AdamW(lm.parameters(), lr=5e-3)
    losses = []
    for _ in range(50):
        tokens = torch.randint(16, (32, 8)).repeat(1, 3)
        loss, _ = lm.loss(tokens[:, :-1], tokens[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    print(f"{' | '.join(pattern)}: loss {losses[0]:.2f} -> {losses[-1]:.2f} nats per token in {len(losses)} steps")


if __name__ == "__main__":
    main()
