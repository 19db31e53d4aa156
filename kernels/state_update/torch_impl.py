"""Plain PyTorch: the state passes through memory three times, half as often as through `causal_conv1d` and `ssd`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .reference import n_groups


def state_update(
    x: Tensor,
    dt: Tensor,
    window: Tensor,
    state: Tensor,
    weight: Tensor,
    bias: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Same contract as reference.state_update."""
    (batch, H, P, N), G = state.shape, n_groups(x, state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)  # (B, K, H P + 2 G N)
    # products and a sum: a convolution of one token costs five times as much
    mixed = F.silu((inputs.to(dtype) * weight.T.to(dtype)).sum(1) + bias.to(dtype))
    u, B, C = mixed.split([H * P, G * N, G * N], dim=1)
    u = u.reshape(batch, H, P)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))
    decay = torch.exp(dt * A.to(dtype))[..., None, None]
    h = state.to(dtype).contiguous()
    h = h.mul_(decay) if in_place else h * decay
    by_group = h.view(batch, G, -1, N)  # the heads of a group side by side
    by_group.addcmul_((dt[..., None] * u).reshape(batch, G, -1, 1), B.reshape(batch, G, 1, N))
    y = (by_group @ C.reshape(batch, G, N, 1)).view(batch, H, P)
    return torch.addcmul(y, D.to(dtype)[:, None], u).to(x.dtype), inputs[:, 1:].clone(), h
