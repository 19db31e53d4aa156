"""The definition, in float32 or float64, differentiated by autograd."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..arguments import takes


def _has_groups(size: dict[str, int]) -> bool:
    G, rest = divmod(size["C"] - size["H"] * size["P"], 2 * size["N"])
    return rest == 0 and G > 0 and size["H"] % G == 0


@takes(
    x="B C",
    dt="B H",
    window="B K-1 C",
    state="B H P N",
    weight="C K",
    bias="C",
    A="H",
    D="H",
    dt_bias="H",
    gives=("B H P", "B K-1 C", "B H P N wide"),
    where={"C = H P + 2 G N for G groups of heads": _has_groups},
)
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
    """Computes x, B, C = silu(conv(x)); h = exp(dt A) h + dt x B^T; y = h C + D x, for one token.

    It is `causal_conv1d` and then `ssd` at length 1, with dt = softplus(dt + dt_bias) (arXiv:2405.21060, section 7.1).

    Args:
        x: input of the convolution, (B, H P + 2 G N): x, B and C of the token side by side.
        dt: step size before bias and softplus, (B, H).
        window: the K - 1 inputs of the convolution before x, (B, K-1, H P + 2 G N).
        state: h before x, (B, H, P, N).
        weight: one filter per channel, (H P + 2 G N, K); the last tap multiplies x.
        bias: bias of the convolution, (H P + 2 G N,).
        A: state decay, (H,), negative.
        D: skip connection, (H,).
        dt_bias: added to dt, (H,).
        in_place: whether `state` may be overwritten, so that no second one is allocated. Not what autograd records.

    Returns:
        y, (B, H, P), in x's dtype; the window that continues it, shaped like `window`, in x's dtype and storage of its
        own; h after x, (B, H, P, N), in float32 (float64 for float64 inputs).
    """
    (batch, H, P, N), G = state.shape, n_groups(x, state)
    dtype = torch.promote_types(x.dtype, torch.float32)
    inputs = torch.cat([window.to(x.dtype), x[:, None]], dim=1)  # (B, K, H P + 2 G N)
    x, B, C = F.silu((inputs * weight.T.to(dtype)).sum(1) + bias.to(dtype)).split([H * P, G * N, G * N], dim=1)
    x = x.reshape(batch, H, P)
    B, C = (t.reshape(batch, G, N).repeat_interleave(H // G, dim=1) for t in (B, C))  # (B, H, N)
    dt = F.softplus(dt.to(dtype) + dt_bias.to(dtype))
    h = torch.exp(dt * A.to(dtype))[..., None, None] * state.to(dtype) + (dt[..., None] * x)[..., None] * B[:, :, None]
    y = (h * C[:, :, None]).sum(-1) + D.to(dtype)[:, None] * x
    return y.to(inputs.dtype), inputs[:, 1:].clone(), h


def n_groups(x: Tensor, state: Tensor) -> int:
    """G, the number of groups of heads that share B and C, by the shapes of `state_update`'s x and state."""
    _, H, P, N = state.shape
    return (x.shape[1] - H * P) // (2 * N)
