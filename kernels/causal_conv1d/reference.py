"""The definition: one Python step per token over a rolling window of inputs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import takes


@takes(
    x="B L E",
    weight="E K",
    bias="E",
    activation=(None, "silu"),
    initial_state="B K-1 E",
    starts="B L bool",
    gives=("B L E", "B K-1 E"),
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes y[t] = act(bias + sum_k weight[:, k] x[t - K + 1 + k]), inputs before the first being zero.

    Args:
        x: input, (B, L, E).
        weight: one filter per channel, (E, K); the last tap multiplies the current token.
        bias: (E,).
        activation: "silu" or None.
        initial_state: the K - 1 inputs before x[:, 0], (B, K-1, E); zeros when None.
        starts: (B, L) bool, True where a document begins: inputs before it count as zero from there on.

    Returns:
        y, (B, L, E), and the window that continues it, (B, K-1, E): the last K - 1 inputs, zero before the last start,
        in storage of their own, so that a state with it does not keep the whole input alive.
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    K = weight.shape[1]
    window = x.new_zeros(x.shape[0], K - 1, x.shape[2]) if initial_state is None else initial_state.to(x.dtype)
    ys = []
    for t in range(x.shape[1]):
        if starts is not None:
            window = torch.where(starts[:, t, None, None], 0.0, window)
        window = torch.cat([window, x[:, t : t + 1]], dim=1)  # (B, K, E)
        y = (window.to(dtype) * weight.T.to(dtype)).sum(1)
        y = y if bias is None else y + bias.to(dtype)
        ys.append(y if activation is None else F.silu(y))
        window = window[:, 1:]
    return torch.stack(ys, dim=1).to(x.dtype), window.clone()
