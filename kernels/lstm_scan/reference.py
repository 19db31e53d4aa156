"""The definition: one Python step per token, differentiated by autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes


@takes(
    gates="B L 4E",
    weight="4E E",
    initial_state="B 2 E",
    starts="B L bool",
    gives=("B L E", "B 2 E wide"),
)
def lstm_scan(
    gates: Tensor, weight: Tensor, initial_state: Tensor | None = None, starts: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Computes c[t] = f c[t-1] + i g, y[t] = o tanh(c[t]), with (i, f, g, o) from gates[t] + weight y[t-1].

    i, f and o pass through a sigmoid, g through tanh; the order is that of torch.nn.LSTM.

    Args:
        gates: what the input and the bias contribute, (B, L, 4 E).
        weight: recurrent weight, (4 E, E); inherent to the operation, not a projection around it.
        initial_state: y and c before gates[:, 0], (B, 2, E); zeros when None.
        starts: (B, L) bool, True where a document begins: the state before it is forgotten.

    Returns:
        y, (B, L, E), in the dtype of gates, and the state after the last token, (B, 2, E), in float32 (float64 for
        float64 inputs).
    """
    dtype = torch.promote_types(gates.dtype, torch.float32)
    E = weight.shape[1]
    state = gates.new_zeros(gates.shape[0], 2, E, dtype=dtype) if initial_state is None else initial_state.to(dtype)
    ys = []
    for t in range(gates.shape[1]):
        if starts is not None:
            state = torch.where(starts[:, t, None, None], 0.0, state)
        y, c = state.unbind(1)
        i, f, g, o = (gates[:, t].to(dtype) + y @ weight.to(dtype).T).chunk(4, dim=-1)
        c = f.sigmoid() * c + i.sigmoid() * g.tanh()
        y = o.sigmoid() * c.tanh()
        state = torch.stack([y, c], dim=1)
        ys.append(y)
    return torch.stack(ys, dim=1).to(gates.dtype), state
