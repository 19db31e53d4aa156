"""The definition: the matrix of each row is looked up."""

from __future__ import annotations

import torch
from torch import Tensor

from ..arguments import takes
from ..dispatch import transform


@takes(x="T D", weight="G F D", counts="G int64")
def grouped_mm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Computes y[t] = weight[g(t)] x[t], where the first counts[0] rows belong to group 0, the next to group 1, ...

    Args:
        x: (T, D), rows sorted by group.
        weight: one matrix per group, (G, F, D), laid out as nn.Linear's.
        counts: number of rows of each group, (G,) int64, with sum T; zero is fine.

    Returns:
        y, (T, F), in x's dtype.

    Raises:
        ValueError: if the counts are not those of T rows. A GPU's are not read: what else they mean is undefined.
    """
    if transform() is None:  # under torch.func.vmap nothing can be read
        sizes(counts, len(x))
    group = (torch.arange(x.shape[0], device=x.device)[:, None] >= counts.cumsum(0)).sum(1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    return torch.einsum("td,tfd->tf", x.to(dtype), weight[group].to(dtype)).to(x.dtype)


def sizes(counts: Tensor, T: int) -> list[int]:
    """The counts, if they are those of T rows."""
    numbers = counts.tolist()
    if min(numbers) < 0 or sum(numbers) != T:
        raise ValueError(f"grouped_mm: counts are {numbers}, expected those of {T} rows")
    return numbers
