"""The rotated query in the forms that the kernel multiplies codes with."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._numerics import LOG2_E, NO_ID
from pallas_kernels.encode_tokens.reference import WORD_BITS

LANES = 8  # Words are split into 8 sets of 4 bits, one bit a byte.


def pack(query: Array, *, interpret: bool = False) -> tuple[Array, Array, Array]:
    """The query in int8, four dimensions a word, in the order of the codes' bits.

    Bit k + 8 j of a code's word w belongs to dimension 32 w + k + 8 j: shifted by k and masked to
    the lowest bit of each byte, the word holds four bits that `dp4a` multiplies with four int8.
    One kernel, where XLA would make four of it.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.

    Returns:
        packed: `[batch, kv_heads, group, 8, words]` int32, byte j of [k, w] being dimension
            32 w + k + 8 j.
        steps: `[batch, kv_heads, group]` float32, what one unit is worth.
        sums: `[batch, kv_heads, group]` int32, of all dimensions.
    """
    batch, kv_heads, group, head_dim = query.shape
    words = -(-head_dim // WORD_BITS)
    heads = (batch, kv_heads, group)
    packed, steps, sums = _pallas.call(
        _pack,
        (query,),
        (
            jax.ShapeDtypeStruct((*heads, LANES, words), jnp.int32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.int32),
        ),
        (batch * kv_heads * group,),
        name="pack_query",
        num_warps=1,
        interpret=interpret,
    )
    return packed, steps, sums


def _pack(query_ref: Any, packed_ref: Any, steps_ref: Any, sums_ref: Any) -> None:
    _, kv_heads, group, head_dim = query_ref.shape
    words = packed_ref.shape[-1]
    at = _pallas.head_of(pl.program_id(0), kv_heads, group)
    k, w = jnp.arange(LANES)[:, None], jnp.arange(_pallas.tile(words))[None, :]
    parts = []
    for j in range(4):
        dim = WORD_BITS * w + LANES * j + k
        part = plt.load(query_ref.at[*at, dim], mask=dim < head_dim, other=0)
        parts.append(part.astype(jnp.float32))
    peaks = [jnp.max(jnp.abs(part)) for part in parts]
    largest = jnp.maximum(jnp.maximum(peaks[0], peaks[1]), jnp.maximum(peaks[2], peaks[3]))
    step = jnp.maximum(largest, 1e-30) / 127
    packed = jnp.zeros(parts[0].shape, jnp.int32)
    total = jnp.int32(0)
    for j, part in enumerate(parts):
        # To the nearest: a conversion alone would cut off what is behind the point.
        whole = jnp.floor(part / step + 0.5).astype(jnp.int32)
        total += jnp.sum(whole)
        packed |= (whole & 0xFF) << (8 * j)
    plt.store(packed_ref.at[*at, k, jnp.where(w < words, w, NO_ID)], packed, mask=w < words)
    plt.store(steps_ref.at[at], step)
    plt.store(sums_ref.at[at], total)


def split(query: Array) -> Array:
    """The query as a sum of bfloat16 parts: `[batch, kv_heads, parts, group, head_dim]`.

    Three of them hold all bits of a float32, one those of a bfloat16.
    """
    parts = {"bfloat16": 1, "float16": 2}.get(query.dtype.name, 3)
    return jnp.stack(_pallas.split_bfloat16(query.astype(jnp.float32), parts), axis=2)


def products(words: list[Any], query: list[list[list[Any]]], *, emulate: bool) -> list[Any]:
    """Sums of each head's int8 query over the set bits of codes: for each head `[n]` int32.

    Args:
        words: the codes' words, each `[n]` uint32.
        query: for each head and word 8 int32 scalars of four int8 each: byte j of the k-th belongs
            to bit k + 8 j.
        emulate: in plain JAX instead of CUDA's assembly.
    """
    if emulate:
        return [sum(map(_emulated, words, head)) for head in query]
    pairs = [query[even : even + 2] for even in range(0, len(query), 2)]
    totals = [jnp.zeros(words[0].shape, jnp.int32) for _ in pairs]
    # Word by word, so that only one is held unpacked: as 8 words of four bits, one a byte.
    for w, word in enumerate(words):
        bits = [
            (lax.shift_right_logical(word, jnp.uint32(k)) & jnp.uint32(0x01010101)).astype(
                jnp.int32
            )
            for k in range(LANES)
        ]
        for i, pair in enumerate(pairs):
            totals[i] += _two_heads(bits, [head[w] for head in pair])
    sums = []
    for pair, total in zip(pairs, totals, strict=True):
        # Two sums in one word, each less than 2^15: the lower one may have borrowed from the upper.
        lower = lax.shift_right_arithmetic(total << 16, jnp.int32(16))
        sums += [lower, lax.shift_right_arithmetic(total - lower, jnp.int32(16))][: len(pair)]
    return sums


def log_sum_exp(heads: list[Any], *, emulate: bool) -> Any:
    """The logarithm of the heads' summed exponentials: `[n]` float32.

    Args:
        heads: each `[n]` float32.
        emulate: in plain JAX instead of CUDA's assembly, which has powers and logarithms of 2 as
            single instructions where the library takes some twelve for each. They err by 2^-22,
            less than an int8 query.
    """
    peak = functools.reduce(jnp.maximum, heads)
    if emulate:
        return peak + jnp.log(sum(jnp.exp(x - peak) for x in heads))
    least = LOG2_E * peak
    total = sum(_approximate("ex2", LOG2_E * x - least) for x in heads)
    return peak + math.log(2) * _approximate("lg2", total)


def _approximate(instruction: str, x: Any) -> Any:
    [result] = plt.elementwise_inline_asm(
        f"{instruction}.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=f,f",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, x.dtype)],
    )
    return result


def _emulated(words: Any, query: list[Any]) -> Any:
    total = jnp.zeros(words.shape, jnp.int32)
    for k, word in enumerate(query):
        for j in range(4):
            bit = lax.shift_right_logical(words, jnp.uint32(k + 8 * j)) & 1
            byte = lax.shift_right_arithmetic(word << (24 - 8 * j), jnp.int32(24))
            total = total + bit.astype(jnp.int32) * byte
    return total


def _two_heads(bits: list[Any], query: list[list[Any]]) -> Any:
    """The first head's sum plus 2^16 times the second's, over one word: `[n]` int32.

    On the matrix units, though each lane of a warp keeps tokens of its own: lanes 4 g to 4 g + 3
    make up row g of the left operand, each with the bytes of its own word, and column 2 c + j of
    the right operand holds head j's query where the bytes are those of lane 4 g + c, and zeros
    elsewhere. So what a lane gets of the product, columns 2 c and 2 c + 1 of its row, are both
    heads' sums over its own word: elementwise, wherever Triton lays which token.
    """
    shape = bits[0].shape
    # One head alone leaves its column empty.
    query = query + [[jnp.int32(0)] * LANES] * (2 - len(query))
    splats = [jnp.broadcast_to(word, shape) for head in query for word in head]
    args = [*bits, *splats]
    [result] = plt.elementwise_inline_asm(
        _assembly(),
        args=args,
        constraints=",".join(["=&r"] * PACK + ["r"] * (PACK * len(args))),
        pack=PACK,
        result_shape_dtypes=[jax.ShapeDtypeStruct(shape, jnp.int32)],
    )
    return result


PACK = 4  # Tokens a lane and piece of assembly: two products of two.


def _assembly() -> str:
    """PTX of `_two_heads`; its operands are PACK registers of each result and argument."""

    def operand(n: int, token: int) -> str:
        return f"${PACK * (1 + n) + token}"

    lines = [
        ".reg .b32 lane, low, high, first, second, b<8>, p<4>;",
        ".reg .pred mine, odd;",
        # Of the right operand a lane holds rows 4 t to 4 t + 3 and 16 more of column g, for t its
        # lane in row g: those are its own if t is half of g, and the head is the lowest bit of g.
        "mov.u32 lane, %laneid;",
        "and.b32 low, lane, 3;",
        "shr.u32 high, lane, 3;",
        "setp.eq.u32 mine, low, high;",
        "and.b32 low, lane, 4;",
        "setp.ne.and.u32 odd, low, 0, mine;",
        "selp.b32 second, -1, 0, odd;",
        "selp.b32 first, -1, 0, mine;",
        "xor.b32 first, first, second;",
    ]
    for k in range(LANES):
        lines += [
            f"and.b32 low, {operand(LANES + k, 0)}, first;",
            f"and.b32 b{k}, {operand(2 * LANES + k, 0)}, second;",
            f"or.b32 b{k}, b{k}, low;",
        ]
    for token in range(0, PACK, 2):
        lines += [f"mov.b32 p{i}, 0;" for i in range(4)]
        for k in range(0, LANES, 2):
            left = [operand(n, token + i) for n in (k, k + 1) for i in range(2)]
            lines += [
                "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {p0, p1, p2, p3}, "
                f"{{{', '.join(left)}}}, {{b{k}, b{k + 1}}}, {{p0, p1, p2, p3}};"
            ]
        lines += [
            f"mad.lo.s32 ${token}, p1, 65536, p0;",
            f"mad.lo.s32 ${token + 1}, p3, 65536, p2;",
        ]
    return "{\n" + "\n".join(lines) + "\n}"
