"""The arithmetic of a comparison: the same for all its models, and for as long as its folder is gone on with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from ...files import read_json, write_json
from ...options import check_table
from .options import Place

if TYPE_CHECKING:
    from ...train.runtime import Precision

__all__ = ["decide_precision"]


def decide_precision(config: Place, widths: Iterable[int], *, keep: bool = True) -> Precision:
    """What --precision stands for; "auto" is decided once, for the narrowest model; `keep` keeps it in precision.json.

    Raises:
        ValueError: if the device cannot be used, or the file is none of this.
    """
    from ...train.runtime import Precision, choose_device, choose_precision

    path = config.out / "precision.json"
    if config.precision == "auto" and path.exists():
        held = read_json(path)
        check_table(held, {"name": str, "reason": str, "speedup": float | None}, path)
        return Precision(held["name"], held["reason"], held.get("speedup"))
    found = choose_precision(config.precision, choose_device(config.device), d_model=min(widths))
    if config.precision == "auto":
        if keep:
            write_json(path, vars(found))
        print(f"Precision: {found.name} ({found.reason}).\n", flush=True)
    return found
