"""What a decoder must read for each token that it decodes: at small batches nothing else takes as long.

Whatever computes the token, the weights that multiply it, the experts that it is routed to and the state of all layers
go through the processor once. At the bandwidth of memory this is the floor of a decoded token.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ...archs import LanguageModel

__all__ = ["Reads", "matrices", "reads_per_token"]


@dataclass(frozen=True, kw_only=True)
class Reads:
    """Bytes that one sequence reads for one token."""

    weights: int
    state: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.state


def reads_per_token(lm: LanguageModel, context_len: int) -> Reads:
    """Bytes that a token reads which has `context_len` tokens before it.

    Of a table that is looked up it is one row, but all of an embedding that is the output projection too; of a mixture
    of experts those that the token uses; of a cache what is held, and not what there is room for.
    """
    tables = _tables(lm)
    whole = sum(p.nbytes for p in lm.parameters()) - sum(table.nbytes for table in tables)
    unused = sum((b.ffn.n_inactive_params for b in lm.backbone.blocks if b.ffn is not None), 0)
    rows = sum(table[0].nbytes for table in tables)
    state = lm.init_state(1, context_len, device="meta", dtype=lm.embedding.weight.dtype)
    return Reads(
        weights=whole - unused * lm.embedding.weight.element_size() + rows,
        state=sum(layer.nbytes for layer in state if layer is not None),
    )


def matrices(lm: LanguageModel) -> list[Tensor]:
    """The matrices that multiply one token, (rows, columns) each; of a mixture of experts as many as it uses."""
    tables = {id(table) for table in _tables(lm)}
    found = [p.detach() for name, p in lm.named_parameters() if _is_matrix(name, p) and id(p) not in tables]
    for block in lm.backbone.blocks:
        if block.ffn is not None and block.ffn.n_inactive_params:
            stacks = [p for p in block.ffn.parameters() if p.dim() == 3]
            n_params = sum(p.numel() for p in stacks)
            share = 1 - block.ffn.n_inactive_params / n_params
            found += [expert for p in stacks for expert in p.detach()[: round(share * len(p))]]
    return found


def _tables(lm: LanguageModel) -> list[Tensor]:
    """The weights that are looked up and multiply nothing."""
    modules: list[nn.Module | None] = [lm.segments, lm.backbone.positions]
    if lm.output_weight is not lm.embedding.weight:
        modules.append(lm.embedding)
    return [p for module in modules if module is not None for p in module.parameters()]


def _is_matrix(name: str, p: Tensor) -> bool:
    # what a mixer multiplies by without an nn.Linear is called as in one; taps and poles have names of their own
    return p.dim() == 2 and name.endswith(".weight")
