"""The definition: one Python step per token, in float32 or float64, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(
    q="B L H N",
    k="B L H N",
    v="B L H P",
    log_decay="B L H",
    beta="B L H",
    initial_state="B H P N",
    starts="B L bool",
    gives=("B L H P", "B H P N wide"),
)
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes S[t] = a[t] S[t-1] (I - b[t] k[t] k[t]^T) + b[t] v[t] k[t]^T and o[t] = S[t] q[t]; a = exp(log_decay).

    S maps keys to values (arXiv:2412.06464, section 3.1): it decays by a, and of what it then holds for k, a share of b
    gives way to v. Keys are taken as they are: with |k| = 1 and b in [0, 2] no state grows by itself.

    Args:
        q: queries, (B, L, H, N).
        k: keys, (B, L, H, N).
        v: values, (B, L, H, P).
        log_decay: log a, (B, L, H), not positive; -inf forgets everything.
        beta: b, the writing strength, (B, L, H).
        initial_state: S before the first token, (B, H, P, N); zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.

    Returns:
        o, (B, L, H, P), in v's dtype, and the state after the last token, (B, H, P, N), in float32 (float64 for float64
        inputs).
    """
    dtype = torch.promote_types(v.dtype, torch.float32)
    decay = log_decay.to(dtype).exp()
    (batch, L, H, P), N = v.shape, k.shape[-1]
    S = v.new_zeros(batch, H, P, N, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    os = []
    for t in range(L):
        if starts is not None:
            S = torch.where(starts[:, t, None, None, None], 0.0, S)
        q_t, k_t = (x[:, t, :, None].to(dtype) for x in (q, k))  # (B, H, 1, N)
        S = decay[:, t, :, None, None] * S
        held = (S * k_t).sum(-1)  # (B, H, P), what S holds for k
        S = S + (beta[:, t, :, None].to(dtype) * (v[:, t].to(dtype) - held))[..., None] * k_t
        os.append((S * q_t).sum(-1))
    return torch.stack(os, dim=1).to(v.dtype), S
