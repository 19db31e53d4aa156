"""F.conv1d over the window and the input; across documents, where taps must be masked, shifted multiply-adds."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..documents import tokens_since_start


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Same contract as reference.causal_conv1d."""
    (batch, L, E), K = x.shape, weight.shape[1]
    past = x.new_zeros(batch, K - 1, E) if initial_state is None else initial_state.to(x.dtype)
    inputs = torch.cat([past, x], dim=1)  # (B, K-1+L, E)
    if starts is None:
        y = F.conv1d(inputs.mT, weight[:, None], bias, groups=E).mT.contiguous()  # what follows would pay for strides
    else:
        since = tokens_since_start(starts)[..., None]  # (B, L, 1)
        y = x * weight[:, K - 1] if bias is None else torch.addcmul(bias, x, weight[:, K - 1])
        for lag in range(1, K):
            shifted = inputs[:, K - 1 - lag : K - 1 - lag + L]
            y = torch.addcmul(y, torch.where(since >= lag, shifted, 0.0), weight[:, K - 1 - lag])
    return (y if activation is None else F.silu(y)).to(x.dtype), next_window(x, past, starts)


def next_window(x: Tensor, past: Tensor, starts: Tensor | None) -> Tensor:
    """The last K - 1 of the inputs past (B, K-1, E) and x (B, L, E), zero before the last start, copied."""
    L, n = x.shape[1], past.shape[1]
    if torch.compiler.is_compiling():  # for any length, which is not to be compared with n
        window = torch.cat([past, x], dim=1)[:, L:].clone()
    else:
        window = x[:, L - n :].clone() if n <= L else torch.cat([past[:, L:], x], dim=1)
    if starts is None:
        return window
    lag = torch.arange(n, 0, -1, device=x.device)[:, None]  # of each entry, seen from the next token
    return torch.where(tokens_since_start(starts)[:, -1:, None] + 1 >= lag, window, 0.0)
