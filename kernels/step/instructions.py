"""Every instruction by its name: the functions of (words, rank, n_ranks) in these files."""

from __future__ import annotations

import functools
from typing import Any, cast

from ..simd import kernel
from . import attention, pointwise, products, recurrences

_FILES = (attention, pointwise, products, recurrences)


@functools.cache
def address_of(name: str) -> int:
    """The address of an instruction's machine code, which is compiled first if need be."""
    (code,) = (getattr(file, name) for file in _FILES if hasattr(file, name))
    (compiled,) = cast(Any, kernel(code)).overloads.values()
    return compiled.library.get_pointer_to_function(compiled.fndesc.llvm_func_name)
