"""What an instruction of a compiled step is, and the loop that runs a list of them (see program.py).

An instruction is a kernel of one signature, (words, rank, n_ranks): the address of the int64 numbers that it was
recorded with, most of them addresses of tensors themselves, and which of how many threads it runs on. Threads share an
instruction's work as it likes and wait for each other after it. It is compiled when the first program needs it.

Activations are float32, (rows, n) with any stride between rows. Weights and states are float32 or bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numba
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

from ..simd import ints_at, kernel

WORDS = 24
"""Numbers of a recorded instruction: the address of its code, and what it reads."""


_operation = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)
_literal = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic(prefer_literal=True))


@_literal
def unpack(typing_context, words, n):
    """The first `n` numbers at an address, as a tuple."""
    if not isinstance(n, types.IntegerLiteral):
        return None
    count = n.literal_value
    result = types.UniTuple(types.int64, count)

    def generate(context, builder, sig, args):
        start = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        values = [builder.load(builder.gep(start, [ir.IntType(64)(i)])) for i in range(count)]
        return context.make_tuple(builder, result, values)

    return result(types.int64, n), generate


@_operation
def float_of(typing_context, word):
    """The float64 whose bits a word has."""

    def generate(context, builder, sig, args):
        return builder.bitcast(args[0], ir.DoubleType())

    return types.float64(types.int64), generate


@numba.njit(inline="always", error_model="numpy")
def share(n, rank, n_ranks):
    """The range of 0 .. n that is a thread's share."""
    return rank * n // n_ranks, (rank + 1) * n // n_ranks


@_operation
def _invoke(typing_context, address, words, rank, n_ranks):
    parameters = (types.int64, types.int64, types.int64)

    def generate(context, builder, sig, args):
        function_type = context.call_conv.get_function_type(types.none, parameters)
        function = builder.inttoptr(args[0], function_type.as_pointer())
        context.call_conv.call_function(builder, function, types.none, parameters, args[1:])
        return context.get_dummy_value()

    return types.void(types.int64, *parameters), generate


@_operation
def _arrive(typing_context, address):
    def generate(context, builder, sig, args):
        counter = builder.inttoptr(args[0], ir.IntType(64).as_pointer())
        builder.atomic_rmw("add", counter, ir.IntType(64)(1), "seq_cst")
        return context.get_dummy_value()

    return types.void(types.int64), generate


@_operation
def _arrived(typing_context, address):
    def generate(context, builder, sig, args):
        return builder.load_atomic(builder.inttoptr(args[0], ir.IntType(64).as_pointer()), "seq_cst", 8)

    return types.int64(types.int64), generate


@_operation
def _let_others_run(typing_context):
    def generate(context, builder, sig, args):
        signature = ir.FunctionType(ir.IntType(32), [])
        builder.call(cgutils.get_or_insert_function(builder.module, signature, "sched_yield"), [])
        return context.get_dummy_value()

    return types.void(), generate


_PATIENCE = 4096
"""Looks at the counter before a thread that waits lets others run: a few microseconds."""


@kernel
def run(code: int, n: int, width: int, rank: int, n_ranks: int, counter: int) -> None:
    """Runs a program on thread `rank` of `n_ranks`, which share a counter that is at zero when the first begins.

    Args:
        code: address of the instructions, `width` int64 each, the first of which is the address of the code.
        n: number of instructions.
        width: see code.
        rank: number of this thread.
        n_ranks: number of threads that run the program.
        counter: address of an int64.
    """
    table = ints_at(code)
    for i in range(n):
        _invoke(table[i * width], code + 8 * (i * width + 1), rank, n_ranks)
        if n_ranks > 1:
            _arrive(counter)
            looks = 0
            while _arrived(counter) < (i + 1) * n_ranks:
                looks += 1
                if looks > _PATIENCE:
                    _let_others_run()
