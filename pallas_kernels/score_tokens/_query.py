"""The rotated query in the forms that the kernel multiplies codes with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._numerics import NO_ID
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
    head = pl.program_id(0)
    at = (head // (kv_heads * group), head // group % kv_heads, head % group)
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
    rest = query.astype(jnp.float32)
    parts = []
    for _ in range({jnp.bfloat16: 1, jnp.float16: 2}.get(query.dtype.type, 3)):
        # The barrier keeps XLA from simplifying the rounding away.
        part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
        parts.append(part.astype(jnp.bfloat16))
        rest = rest - part
    return jnp.stack(parts, axis=2)


def dot_of_bytes(bits: Any, query: Any, total: Any, *, emulate: bool) -> Any:
    """total + the dot product of four unsigned bytes with four signed ones, elementwise.

    Args:
        bits, query, total: int32 of one shape.
        emulate: in plain JAX instead of CUDA's instruction.
    """
    if emulate:
        for j in range(4):
            byte = lax.shift_right_arithmetic(query << (24 - 8 * j), jnp.full_like(query, 24))
            total = total + ((bits >> (8 * j)) & 0xFF) * byte
        return total
    [result] = plt.elementwise_inline_asm(
        "dp4a.u32.s32 $0, $1, $2, $3;",
        args=[bits, query, total],
        constraints="=r,r,r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(bits.shape, jnp.int32)],
    )
    return result
