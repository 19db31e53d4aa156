"""Classifies noisy waves by their frequency with any backbone of the project: `python examples/time_series.py`.

A Backbone maps (batch, time, d_model) to the same shape and knows nothing of tokens, so a series needs only a
projection in and one out. Mamba learns it in 100 steps; try --arch s4d, transformer, lstm, ...
"""

import argparse

import torch
from crossover.archs import Backbone, available, configure
from torch import Tensor, nn

N_CLASSES, LENGTH, D_MODEL = 4, 64, 32


class Classifier(nn.Module):
    """A backbone between two projections."""

    def __init__(self, arch: str) -> None:
        super().__init__()
        self.project = nn.Linear(1, D_MODEL)
        self.backbone = Backbone(configure(arch, d_model=D_MODEL, n_layers=2))
        self.head = nn.Linear(D_MODEL, N_CLASSES)

    def forward(self, series: Tensor) -> Tensor:
        """(B, L) -> logits, (B, N_CLASSES)."""
        y, _, _ = self.backbone(self.project(series[..., None]))
        return self.head(y.mean(dim=1))


def waves(n: int) -> tuple[Tensor, Tensor]:
    """Series with 2, 3, 4 or 5 periods, a random phase and noise, (n, L), and their classes, (n,)."""
    label = torch.randint(N_CLASSES, (n,))
    periods = (label[:, None] + 2) * torch.arange(LENGTH) / LENGTH + torch.rand(n, 1)
    return torch.sin(2 * torch.pi * periods) + 0.3 * torch.randn(n, LENGTH), label


def main() -> None:
    """Trains, and prints the accuracy on new series."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", choices=available() + available("encoder"), default="mamba")
    options = parser.parse_args()
    torch.manual_seed(0)
    model = Classifier(options.arch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(100):
        series, label = waves(64)
        loss = nn.functional.cross_entropy(model(series), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        series, label = waves(500)
        accuracy = (model(series).argmax(-1) == label).float().mean().item()
    print(f"{options.arch}: {accuracy:.1%} of 500 new series classified correctly (chance: {1 / N_CLASSES:.0%})")


if __name__ == "__main__":
    main()
