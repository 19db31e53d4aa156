"""Every instruction by its name: the functions of (words, rank, n_ranks) in these files."""

from __future__ import annotations

import functools

from ..compiled import Kernel
from . import attention, pointwise, products, recurrences

_FILES = (attention, pointwise, products, recurrences)


@functools.cache
def _instruction(name: str) -> Kernel:
    """The instruction, kept because programs hold no more than the address of its code."""
    (function,) = (getattr(file, name) for file in _FILES if hasattr(file, name))
    return Kernel(function)


def address_of(name: str) -> int:
    """The address of an instruction's machine code, which is compiled first if need be."""
    code = _instruction(name).make()
    return code.library.get_pointer_to_function(code.fndesc.llvm_func_name)
