"""Explicit float32 vectors for numba kernels, because LLVM does not vectorize exponentials by itself.

A kernel works on a block of LANES channels at a time, LANES being what one register of the processor holds: 16 with
AVX-512, 8 with AVX2, 4 elsewhere (NEON, SSE). The processor is the one that numba compiles for: this one, unless
NUMBA_CPU_NAME and NUMBA_CPU_FEATURES name another. There are three types, all with the usual operators:

    vector   LANES values, one per channel;
    tile     STATES vectors side by side, one per state: as many independent recurrences hide each other's latency;
    pair     two vectors side by side: eight of them are the sums that a matrix product keeps in registers.

Multiplications and additions contract to fused multiply-add where the processor has it. No other liberty is taken:
NaN and infinity go through as in IEEE arithmetic, and a kernel gives the same bits on every call.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from .compiled import TARGET, inline
from .compiled import Bools2 as Bools2
from .compiled import Floats1 as Floats1
from .compiled import Floats2 as Floats2
from .compiled import Floats3 as Floats3
from .compiled import Floats4 as Floats4
from .compiled import called as called
from .compiled import kernel as kernel

_features = TARGET[2].split(",")
LANES = 16 if "+avx512f" in _features else 8 if "+avx2" in _features else 4
"""Channels in a vector."""

STATES = 4
"""Vectors in a tile: enough to cover the latency of a fused multiply-add, few enough to stay in registers."""

TILE = STATES * LANES
"""Values in a tile."""

PAIR = 2 * LANES
"""Values in a pair."""


class Vector(types.Type):
    """The numba type of `width` float32 values that stay together in registers."""

    def __init__(self, width: int) -> None:
        self.width = width
        super().__init__(f"float32x{width}")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, vector: Vector) -> None:
        super().__init__(manager, vector, _floats(vector.width))


_vector, _pair, _tile = Vector(LANES), Vector(PAIR), Vector(TILE)


# Code generation: llvmlite instructions of the operations below

_CONTRACT = ("contract",)


def _floats(width: int) -> ir.VectorType:
    return ir.VectorType(ir.FloatType(), width)


def _ints(values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(ir.IntType(32), len(values)), list(values))


def _shuffle(builder: Any, value: Any, lanes: Sequence[int]) -> Any:
    return builder.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), _ints(lanes))


def _splat(builder: Any, scalar: Any, width: int) -> Any:
    vector = builder.insert_element(ir.Constant(_floats(1), ir.Undefined), scalar, ir.IntType(32)(0))
    return _shuffle(builder, vector, [0] * width)


def _add(builder: Any, a: Any, b: Any) -> Any:
    return builder.fadd(a, b, flags=_CONTRACT)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _address(context: Any, builder: Any, sig: Any, args: Sequence[Any], width: int) -> Any:
    """A pointer to `width` numbers at args[0][args[1]], where args[1] is an index or a tuple of them."""
    index_type = sig.args[1]
    axes: Any = index_type if isinstance(index_type, types.BaseTuple) else (index_type,)
    values = cgutils.unpack_tuple(builder, args[1]) if axes is index_type else [args[1]]
    index = [context.cast(builder, i, t, types.intp) for i, t in zip(values, axes, strict=True)]
    return _place(context, builder, sig.args[0], args[0], index, width)


def _place(context: Any, builder: Any, array_type: Any, array: Any, index: Sequence[Any], width: int) -> Any:
    """A pointer to `width` numbers of an array, or of what begins at a pointer."""
    if isinstance(array_type, types.CPointer):
        pointer = builder.gep(array, index)
    else:
        made = context.make_array(array_type)(context, builder, array)
        pointer = cgutils.get_item_pointer(context, builder, array_type, made, index)
    return builder.bitcast(pointer, ir.VectorType(_number(array_type), width).as_pointer())


def _number(array_type: Any) -> ir.Type:
    """What an array holds: floats, or where it is of uint16 bfloat16."""
    return ir.FloatType() if array_type.dtype == types.float32 else ir.IntType(16)


def _if_whole(builder: Any, n: Any) -> Any:
    return builder.if_else(builder.icmp_signed(">=", n, n.type(LANES)), likely=True)


def _below(builder: Any, n: Any) -> Any:
    """Which of the places of a vector are below `n`, an index."""
    count = builder.trunc(n, ir.IntType(32))
    counts = builder.insert_element(
        ir.Constant(ir.VectorType(ir.IntType(32), 1), ir.Undefined), count, ir.IntType(32)(0)
    )
    return builder.icmp_signed("<", _ints(range(LANES)), _shuffle(builder, counts, [0] * LANES))


def _load_masked(builder: Any, source: Any, mask: Any, n_bytes: int) -> Any:
    """The values at a pointer that a mask names, each of so many bytes, which alone are read; zeros for the others."""
    vector = source.type.pointee
    signature = ir.FunctionType(vector, [source.type, ir.IntType(32), mask.type, vector])
    name = f"v{vector.count}{'f32' if vector.element == ir.FloatType() else 'i16'}"
    load = cgutils.get_or_insert_function(builder.module, signature, f"llvm.masked.load.{name}.p0{name}")
    return builder.call(load, [source, ir.IntType(32)(n_bytes), mask, ir.Constant(vector, None)])


# Memory

_operation = cast(Callable[[Callable[..., Any]], Callable[..., Any]], intrinsic)


def _loading(width: int) -> Callable[..., Any]:
    def load(typing_context, array, index):
        def generate(context, builder, sig, args):
            start = _address(context, builder, sig, args, width)
            return _wide(builder, builder.load(start, align=_bytes(array)))

        return Vector(width)(array, index), generate

    return _operation(load)


# (array, index): what begins at array[index], a vector, a tile, a pair or as many values as `total` gives; an array of
# uint16 holds bfloat16
load, load_tile, load_pair, load_few = (_loading(width) for width in (LANES, TILE, PAIR, STATES))


@_operation
def store(typing_context, array, index, value):
    """Writes a vector, a pair or a tile to array[index] and what follows it."""

    def generate(context, builder, sig, args):
        builder.store(args[2], _address(context, builder, sig, args, value.width), align=4)
        return context.get_dummy_value()

    return types.void(array, index, value), generate


@_operation
def load_first(typing_context, array, index, n):
    """Reads a vector of which only the first `n` values exist; zeros stand for the others."""

    def generate(context, builder, sig, args):
        source = _address(context, builder, sig, args, LANES)
        vector = ir.VectorType(_number(array), LANES)
        result = cgutils.alloca_once(builder, vector)
        with _if_whole(builder, args[2]) as (whole, tail):
            with whole:
                builder.store(builder.load(source, align=_bytes(array)), result)
            with tail:
                builder.store(_load_masked(builder, source, _below(builder, args[2]), _bytes(array)), result)
        return _wide(builder, builder.load(result))

    return _vector(array, index, types.intp), generate


@_operation
def store_first(typing_context, array, index, value, n):
    """Writes the first `n` values of a vector to array[index] and what follows it."""

    def generate(context, builder, sig, args):
        target, value = _address(context, builder, sig, args, LANES), args[2]
        if array.dtype != types.float32:
            value = _halves(builder, value)
        with _if_whole(builder, args[3]) as (whole, tail):
            with whole:
                builder.store(value, target, align=_bytes(array))
            with tail:
                source = cgutils.alloca_once(builder, value.type)
                builder.store(value, source)
                cgutils.raw_memcpy(builder, target, source, args[3], _bytes(array))
        return context.get_dummy_value()

    return types.void(array, index, value, types.intp), generate


@_operation
def load_rows(typing_context, array, index, stride):
    """Reads STATES vectors side by side, a tile, the first from array[index] and each `stride` after the one before.

    An array of uint16 holds bfloat16.
    """

    def generate(context, builder, sig, args):
        starts = _row_starts(context, builder, sig, args)
        return _beside(builder, [_wide(builder, builder.load(p, align=2)) for p in starts])

    return _tile(array, types.intp, types.intp), generate


@_operation
def load_rows_first(typing_context, array, index, stride, n):
    """`load_rows`, but only the first `n` values of each row exist; zeros stand for the others."""

    def generate(context, builder, sig, args):
        mask, starts = _below(builder, args[3]), _row_starts(context, builder, sig, args)
        return _beside(builder, [_wide(builder, _load_masked(builder, p, mask, _bytes(array))) for p in starts])

    return _tile(array, types.intp, types.intp, types.intp), generate


@_operation
def store_rows(typing_context, array, index, stride, tile):
    """Writes the vectors of a tile, as `load_rows` reads them."""

    def generate(context, builder, sig, args):
        for i, start in enumerate(_row_starts(context, builder, sig, args)):
            row = _shuffle(builder, args[3], range(i * LANES, (i + 1) * LANES))
            builder.store(row, start, align=4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, tile), generate


@_operation
def store_rows_first(typing_context, array, index, stride, tile, n):
    """Writes the first `n` values of each vector of a tile."""

    def generate(context, builder, sig, args):
        for i, start in enumerate(_row_starts(context, builder, sig, args)):
            held = cgutils.alloca_once(builder, _floats(LANES))
            builder.store(_shuffle(builder, args[3], range(i * LANES, (i + 1) * LANES)), held)
            cgutils.raw_memcpy(builder, start, held, args[4], 4)
        return context.get_dummy_value()

    return types.void(array, types.intp, types.intp, tile, types.intp), generate


def _row_starts(context: Any, builder: Any, sig: Any, args: Sequence[Any]) -> list[Any]:
    """Pointers to the STATES vectors that begin at args[0][args[1] + i * args[2]]."""
    array_type, vector = sig.args[0], ir.VectorType(_number(sig.args[0]), LANES)
    is_pointer = isinstance(array_type, types.CPointer)
    data = args[0] if is_pointer else context.make_array(array_type)(context, builder, args[0]).data
    starts = []
    for i in range(STATES):
        index = builder.add(args[1], builder.mul(args[2], args[2].type(i)))
        starts.append(builder.bitcast(builder.gep(data, [index]), vector.as_pointer()))
    return starts


def _bytes(array_type: Any) -> int:
    """Bytes of one of an array's numbers."""
    return array_type.dtype.bitwidth // 8


def _wide(builder: Any, value: Any) -> Any:
    """A vector as float32: bfloat16 is its upper half."""
    if value.type.element == ir.FloatType():
        return value
    width = value.type.count
    bits = builder.zext(value, ir.VectorType(ir.IntType(32), width))
    return builder.bitcast(builder.shl(bits, _ints([16] * width)), _floats(width))


def _halves(builder: Any, value: Any) -> Any:
    """A vector rounded to bfloat16, to the nearest and to even; what is no number stays none."""
    width = value.type.count
    bits = builder.bitcast(value, ir.VectorType(ir.IntType(32), width))
    upper = builder.lshr(bits, _ints([16] * width))
    rounded = builder.add(builder.add(bits, _ints([0x7FFF] * width)), builder.and_(upper, _ints([1] * width)))
    quiet = builder.or_(upper, _ints([0x40] * width))
    result = builder.select(
        builder.fcmp_unordered("uno", value, value), quiet, builder.lshr(rounded, _ints([16] * width))
    )
    return builder.trunc(result, ir.VectorType(ir.IntType(16), width))


def _beside(builder: Any, vectors: Sequence[Any]) -> Any:
    """Vectors side by side, as one."""
    while len(vectors) > 1:
        n = vectors[0].type.count
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [builder.shuffle_vector(a, b, _ints(range(2 * n))) for a, b in pairs]
    return vectors[0]


# Memory of a kernel's own


@called
def rounded_up(n, step):
    """The least multiple of a step that is not below n."""
    return -(-n // step) * step


@called
def aligned_zeros(n_rows, width):
    """Zeros that begin at a cache line: what lies across two takes twice as long to read."""
    line = 64 // 4
    memory = np.zeros(n_rows * width + line, np.float32)
    start = -(memory.ctypes.data // 4) % line
    return memory[start : start + n_rows * width].reshape(n_rows, width)


# Memory that is known by its address


# The numbers that begin at an address, indexed as an array is. It is no array, of which numba counts the users: those
# calls would be in the midst of every loop, with all vectors saved around them.


def _numbers_at(number: Any) -> Callable[..., Any]:
    def numbers_at(typing_context, address):
        def generate(context, builder, sig, args):
            return builder.inttoptr(args[0], context.get_value_type(number).as_pointer())

        return types.CPointer(number)(types.int64), generate

    return _operation(numbers_at)


# (address): of float32, bfloat16, which is held as uint16, and int64
floats_at, halves_at, ints_at = (_numbers_at(number) for number in (types.float32, types.uint16, types.int64))


# Between scalars, vectors and tiles


@_operation
def full(typing_context, value):
    """A vector of one value."""

    def generate(context, builder, sig, args):
        return _splat(builder, args[0], LANES)

    return _vector(types.float32), generate


@_operation
def spread(typing_context, array, index):
    """A tile of the STATES values that begin at array[index], each LANES times."""

    def generate(context, builder, sig, args):
        values = builder.load(_address(context, builder, sig, args, STATES), align=4)
        return _shuffle(builder, values, [i // LANES for i in range(TILE)])

    return _tile(array, index), generate


@_operation
def repeat(typing_context, vector):
    """A tile of STATES copies of a vector."""

    def generate(context, builder, sig, args):
        return _shuffle(builder, args[0], [i % LANES for i in range(TILE)])

    return _tile(_vector), generate


@_operation
def fold(typing_context, tile):
    """The sum of a tile's vectors."""

    def generate(context, builder, sig, args):
        parts = [_shuffle(builder, args[0], range(i, i + LANES)) for i in range(0, TILE, LANES)]
        return functools.reduce(functools.partial(_add, builder), parts)

    return _vector(_tile), generate


def _reduction(join: Callable[[Any, Any, Any], Any]) -> Callable[..., Any]:
    def reduce(typing_context, tile):
        def generate(context, builder, sig, args):
            value, width = args[0], LANES
            while width > 1:
                left = [i for i in range(STATES * width) if i % width < width // 2]
                right = [i + width // 2 for i in left]
                halves = (_shuffle(builder, value, side) for side in (left, right))
                value, width = join(builder, *halves), width // 2
            return value

        return Vector(STATES)(_tile), generate

    return _operation(reduce)


# (tile): the sums, or the largest, of the values in each of a tile's vectors, pairwise: STATES values
total, highest = _reduction(_add), _reduction(_larger)


@_operation
def sum_of(typing_context, vector):
    """The sum of a vector's values, pairwise."""

    def generate(context, builder, sig, args):
        value, width = args[0], LANES
        while width > 1:
            left, right = (_shuffle(builder, value, range(i, i + width // 2)) for i in (0, width // 2))
            value, width = _add(builder, left, right), width // 2
        return builder.extract_element(value, ir.IntType(32)(0))

    return types.float32(_vector), generate


@_operation
def exchanged(typing_context, tile):
    """Neighbours exchanged: values 1, 0, 3, 2, ... of a vector or tile, such as the parts of complex numbers."""

    def generate(context, builder, sig, args):
        return _shuffle(builder, args[0], [i ^ 1 for i in range(tile.width)])

    return tile(tile), generate


def _rearranged(lanes: Sequence[int], negated: Callable[[int], bool] = lambda _: False) -> Callable[..., Any]:
    """Takes these values of a vector, those at negated places with the other sign."""

    def rearrange(typing_context, vector):
        def generate(context, builder, sig, args):
            both = _beside(builder, [args[0], builder.fneg(args[0])])
            return _shuffle(builder, both, [lane + LANES * negated(i) for i, lane in enumerate(lanes)])

        return _vector(_vector), generate

    return _operation(rearrange)


# (vector): of the first half of its values each twice, and the same with the first of each two negated; and the other
# half in the place of the first
doubled = _rearranged([i // 2 for i in range(LANES)])
opposed = _rearranged([i // 2 for i in range(LANES)], lambda i: i % 2 == 0)
upper_half = _rearranged([(i + LANES // 2) % LANES for i in range(LANES)])


@_operation
def differences(typing_context, a, b):
    """Of every two neighbours in two vectors, the second less the first: a vector."""

    def generate(context, builder, sig, args):
        both = _beside(builder, args)
        return builder.fsub(*(_shuffle(builder, both, range(i, 2 * LANES, 2)) for i in (1, 0)), flags=_CONTRACT)

    return _vector(_vector, _vector), generate


@_operation
def without_first(typing_context, vector, n):
    """A vector whose first `n` values are zeros."""

    def generate(context, builder, sig, args):
        return builder.select(_below(builder, args[1]), ir.Constant(_floats(LANES), None), args[0])

    return _vector(_vector, types.intp), generate


# Arithmetic


def _define_operator(symbol: Callable[..., Any], instruction: str) -> None:
    """Makes `symbol` act on two vectors, pairs or tiles, or one of these and a number, value by value."""

    @type_callable(symbol)
    def _(context):
        def result(a, b):
            vectors = [t for t in (a, b) if isinstance(t, Vector)]
            if vectors and all(t == vectors[0] or isinstance(t, types.Number) for t in (a, b)):
                return vectors[0]
            return None

        return result

    def generate(context, builder, sig, args):
        operands = [
            a
            if isinstance(t, Vector)
            else _splat(builder, context.cast(builder, a, t, types.float32), sig.return_type.width)
            for a, t in zip(args, sig.args, strict=True)
        ]
        return getattr(builder, instruction)(*operands, flags=_CONTRACT)

    for operands in ((Vector, Vector), (Vector, types.Number), (types.Number, Vector)):
        lower_builtin(symbol, *operands)(generate)


_define_operator(operator.add, "fadd")
_define_operator(operator.sub, "fsub")
_define_operator(operator.mul, "fmul")
_define_operator(operator.truediv, "fdiv")


def _selection(comparison: str) -> Callable[..., Any]:
    def select(typing_context, x, bound, replacement, value):
        def generate(context, builder, sig, args):
            bounds, replacements = (_splat(builder, a, x.width) for a in args[1:3])
            return builder.select(builder.fcmp_ordered(comparison, args[0], bounds), replacements, args[3])

        return x(x, types.float32, types.float32, x), generate

    return _operation(select)


# (x, bound, replacement, value): the replacement where x is beyond the bound, the value elsewhere and where x is NaN
where_below = _selection("<")
where_above = _selection(">")


@inline
def at_least(x, bound):
    """The larger of each value and the bound; NaN stays."""
    return where_below(x, bound, bound, x)


@inline
def at_most(x, bound):
    """The smaller of each value and the bound; NaN stays."""
    return where_above(x, bound, bound, x)


@_operation
def larger(typing_context, a, b):
    """The larger of two vectors, pairs or tiles, value by value; `b` where either is NaN."""

    def generate(context, builder, sig, args):
        return _larger(builder, *args)

    return a(a, a), generate


@_operation
def usual_nan(typing_context, value):
    """Replaces every NaN by the one that IEEE arithmetic makes: exp2 would misread the low bits of another."""

    def generate(context, builder, sig, args):
        nan = ir.Constant(args[0].type, [math.nan] * value.width)
        return builder.select(builder.fcmp_ordered("ord", *args, *args), args[0], nan)

    return value(value), generate


@_operation
def absolute(typing_context, value):
    """Clears the signs."""

    def generate(context, builder, sig, args):
        mask = _ints([0x7FFFFFFF] * value.width)
        return builder.bitcast(builder.and_(builder.bitcast(args[0], mask.type), mask), args[0].type)

    return value(value), generate


@_operation
def _add_exponent(typing_context, value, shifted):
    """value * 2^n, where `shifted` is n + _ROUND, so that its low bits are the integer n."""

    def generate(context, builder, sig, args):
        shift = _ints([23] * value.width)  # the exponent begins at bit 23
        bits, n = (builder.bitcast(a, shift.type) for a in args)
        return builder.bitcast(builder.add(bits, builder.shl(n, shift)), args[0].type)

    return value(value, value), generate


# Matrices

BLOCK_ROWS = 8 if LANES == 16 or not TARGET[0].startswith("x86") else 4
"""Rows of a pair that `add_product` keeps in registers: processors have 32 of them, but x86 without AVX-512 has 16."""


def _product(width: int, adds: bool) -> Callable[..., Any]:
    def multiply(typing_context, c, i, j, a, b, begin, end):
        def generate(context, builder, sig, args):
            type_c, _, _, type_a, type_b, _, _ = sig.args
            c, i, j, a, b, begin, end = args
            rows = [builder.add(i, i.type(r)) for r in range(BLOCK_ROWS)]
            targets = [_place(context, builder, type_c, c, [row, j], width) for row in rows]
            zero = ir.Constant(_floats(width), None)
            starts = [builder.load(target, align=4) if adds else zero for target in targets]
            sums = [cgutils.alloca_once_value(builder, start) for start in starts]
            with cgutils.for_range_slice(builder, begin, end, end.type(1)) as (k, _):
                pair = builder.load(_place(context, builder, type_b, b, [k, j], width), align=4)
                for row, kept in zip(rows, sums, strict=True):
                    factor = builder.load(_place(context, builder, type_a, a, [k, row], 1), align=4)
                    product = builder.fmul(_shuffle(builder, factor, [0] * width), pair, flags=_CONTRACT)
                    builder.store(_add(builder, builder.load(kept), product), kept)
            for target, kept in zip(targets, sums, strict=True):
                builder.store(builder.load(kept), target, align=4)
            return context.get_dummy_value()

        return types.void(c, types.intp, types.intp, a, b, types.intp, types.intp), generate

    return _operation(multiply)


# (c, i, j, a, b, begin, end): a block of c, or what is added to it, is that of a^T b: c[i + r, j + s] is the sum, taken
# in order, of a[k, i + r] b[k, j + s] over k = begin .. end - 1. The block, BLOCK_ROWS by a pair, stays in registers.
product, add_product = _product(PAIR, adds=False), _product(PAIR, adds=True)
# the same for a block that is one vector wide
narrow_product, add_narrow_product = _product(LANES, adds=False), _product(LANES, adds=True)


@_operation
def transpose(typing_context, source, i, j, result):
    """result[j + s, i + r] = source[i + r, j + s] for a block of LANES rows and columns."""

    def generate(context, builder, sig, args):
        type_source, _, _, type_result = sig.args
        source, i, j, result = args
        here, there = ([builder.add(first, first.type(n)) for n in range(LANES)] for first in (i, j))
        lines = [builder.load(_place(context, builder, type_source, source, [row, j], LANES), align=4) for row in here]
        distance = LANES // 2
        while distance:  # swaps the off-diagonal quarters of every block that is twice as long
            upper = [n + LANES - distance if n & distance else n for n in range(LANES)]
            lower = [n + LANES if n & distance else n + distance for n in range(LANES)]
            for r in [r for r in range(LANES) if not r & distance]:
                pair = lines[r], lines[r + distance]
                lines[r], lines[r + distance] = (
                    builder.shuffle_vector(*pair, _ints(order)) for order in (upper, lower)
                )
            distance //= 2
        for row, line in zip(there, lines, strict=True):
            builder.store(line, _place(context, builder, type_result, result, [row, i], LANES), align=4)
        return context.get_dummy_value()

    return types.void(source, types.intp, types.intp, result), generate


# Functions

_ROUND = 1.5 * 2.0**23
"""Adding this number leaves no bits for a fraction: the sum is rounded to an integer, found in its low bits."""


@inline
def _exp2_of_sum(shifted, f):
    """2^(n + f) for |f| <= 1/2 and the integer n = shifted - _ROUND, -127 <= n <= 128; n = -127 and f = 0 give 0."""
    # minimax with value 1 at f = 0, relative error 9e-8; rounding adds as much
    p = ((((0.00132647273 * f + 0.00967151299) * f + 0.0555073358) * f + 0.240222424) * f + 0.693147004) * f + 1.0
    return _add_exponent(p, shifted)


@inline
def exp2(t):
    """2^t to three units in the last place; exactly 0 from t = -127 down, infinity from 128 up."""
    t = at_most(at_least(t, -127.0), 128.0)
    shifted = t + _ROUND
    return _exp2_of_sum(shifted, t - (shifted - _ROUND))


@inline
def exp(x):
    """e^x to three units in the last place, also for large |x|; 0 below -87.3 and infinity above 88.7."""
    shifted = x * LOG2_E + _ROUND
    n = shifted - _ROUND
    # log(2) in two parts, of which n times the first is exact
    y = _exp2_of_sum(shifted, ((x - n * 0.693145752) - n * 1.42860677e-6) * LOG2_E)
    return where_above(x, 88.72, np.inf, where_below(x, -87.3, 0.0, y))


LOG2_E = 1.4426950408889634


@inline
def sigmoid(x):
    """1 / (1 + e^-x) to four units in the last place."""
    return 1.0 / (1.0 + exp(0.0 - x))


@inline
def softplus(x):
    """log(1 + e^x) to five units in the last place, also where it is small."""
    e = exp(0.0 - absolute(x))
    s = e / (e + 2.0)  # log(1 + e) = 2 atanh(s), and s <= 1/3
    q = s * s
    series = ((((q * (1.0 / 13.0) + 1.0 / 11.0) * q + 1.0 / 9.0) * q + 1.0 / 7.0) * q + 1.0 / 5.0) * q + 1.0 / 3.0
    return at_least(x, 0.0) + 2.0 * s * (series * q + 1.0)


@inline
def tanh(x):
    """tanh x to four units in the last place, also where it is small: a minimax quotient of polynomials, up to 9."""
    x = at_least(at_most(x, 9.0), -9.0)
    q = x * x
    p = (((1.33546711e-8 * q + 2.06090898e-5) * q + 3.49558859e-3) * q + 0.13381026) * q + 0.999999979
    return x * p / ((((7.77656241e-7 * q + 3.28563558e-4) * q + 0.025876984) * q + 0.467143416) * q + 1.0)


@inline
def cos_and_sin(x):
    """Cosine and sine of x to 5e-7 up to a million; where float32 hardly tells turns apart, no more than -1 to 1."""
    shifted = at_least(at_most(x * 0.159154943, 4e6), -4e6) + _ROUND
    n = shifted - _ROUND
    # one turn in three parts, of which n times the first two is exact
    h = 0.5 * (((x - n * 6.28125) - n * 0.001935005187988281) - n * 3.0199159819567529e-7)
    h = at_least(at_most(h, 2.0), -2.0) + (x - x)  # of infinity, no number
    q = h * h
    s = h + h * q * (((2.60005481e-6 * q - 1.98066147e-4) * q + 0.00833301712) * q - 0.166666567)
    c = (((-2.60771060e-7 * q + 2.47618865e-5) * q - 0.00138884038) * q + 0.0416666418) * q - 0.5
    c = 1.0 + q * c
    return 1.0 - 2.0 * s * s, 2.0 * s * c
