"""The rotated query in the forms that the kernels multiply codes with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from pallas_kernels import _pallas
from pallas_kernels._numerics import LOG2_E, NO_ID
from pallas_kernels._warp import LANES, QUAD
from pallas_kernels.encode_tokens.reference import WORD_BITS

# How many of a word's bits lie in each of its four bytes.
BYTE = 8

# The kernel multiplies bits 0 to 3 and 4 to 7 of each byte in turn: see `_products`.
PHASES = BYTE // 2

# A right operand has a column for each of so many query heads, and takes so many words of a code.
ROUND, WORDS = 8, QUAD


def pack(query: Array, *, scale: float, interpret: bool = False) -> tuple[Array, Array, Array]:
    """The query in int8, as the right operands of the matrix units' products with codes.

    Bit k + 8 i of a code's word w belongs to dimension 32 w + k + 8 i: shifted by k and masked to
    the lowest bit of each byte, the word is four bits that are multiplied with four int8. A
    product takes those of a phase p: k = p and k = p + 4, of four words, each from a lane of its
    own. A lane gets columns 2 c and 2 c + 1 of it: head c of the round is column 2 c, head 4 + c
    is 2 c + 1.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        scale: multiplies every product of query and key.

    Returns:
        fragments: `[batch, kv_heads, ceil(group / 8), ceil(words / 4), 4, 2, 32]` int32: for every
            eight heads, four words, phase and k what each lane of a warp holds of the operand, four
            int8: lane 4 n + t has column n's for word t. Zero past the group and the head dim.
        factors, shifts: `[batch, kv_heads, group]` float32: the binary logarithm of a token's mass
            grows by its code's scale times (factor * product - shift), `product` being the
            sum of the int8 query over the code's set bits.
    """
    batch, kv_heads, group, head_dim = query.shape
    heads = (batch, kv_heads, group)
    rounds, fours = pl.cdiv(group, ROUND), pl.cdiv(head_dim, WORDS * WORD_BITS)

    def kernel(query_ref: Any, fragments_ref: Any, factors_ref: Any, shifts_ref: Any) -> None:
        b, h, g = _pallas.head_of(pl.program_id(0), kv_heads, ROUND * rounds)
        exists = g < group
        nth = jnp.arange(BYTE * WORDS * fours)
        k, w = nth % BYTE, nth // BYTE
        parts = []
        for i in range(4):
            dim = WORD_BITS * w + BYTE * i + k
            part = plt.load(query_ref.at[b, h, g, dim], mask=exists & (dim < head_dim), other=0)
            parts.append(part.astype(jnp.float32))
        peaks = [jnp.max(jnp.abs(part)) for part in parts]
        largest = jnp.maximum(jnp.maximum(peaks[0], peaks[1]), jnp.maximum(peaks[2], peaks[3]))
        step = jnp.maximum(largest, 1e-30) / 127
        packed, total = jnp.zeros(nth.shape, jnp.int32), jnp.int32(0)
        for i, part in enumerate(parts):
            # To the nearest: a conversion alone would cut off what is behind the point.
            whole = jnp.floor(part / step + 0.5).astype(jnp.int32)
            total += jnp.sum(whole)
            packed |= (whole & 0xFF) << (8 * i)
        column = 2 * (g % QUAD) + g % ROUND // QUAD
        at = (g // ROUND, w // WORDS, k % PHASES, k // PHASES, QUAD * column + w % WORDS)
        plt.store(fragments_ref.at[b, h, *at], packed)
        unit = (scale * LOG2_E) * step
        head = (b, h, jnp.where(exists, g, NO_ID))
        plt.store(factors_ref.at[head], 2 * unit, mask=exists)
        plt.store(shifts_ref.at[head], unit * total.astype(jnp.float32), mask=exists)

    fragments, factors, shifts = _pallas.call(
        kernel,
        (query,),
        (
            jax.ShapeDtypeStruct((*heads[:2], rounds, fours, PHASES, 2, LANES), jnp.int32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
            jax.ShapeDtypeStruct(heads, jnp.float32),
        ),
        (batch * kv_heads * ROUND * rounds,),
        name="pack_query",
        num_warps=1,
        interpret=interpret,
    )
    return fragments, factors, shifts


def split(query: Array) -> Array:
    """The query as a sum of bfloat16 parts: `[batch, kv_heads, parts, group, head_dim]`.

    Three of them hold all bits of a float32, one those of a bfloat16.
    """
    parts = {"bfloat16": 1, "float16": 2}.get(query.dtype.name, 3)
    return jnp.stack(_pallas.split_bfloat16(query.astype(jnp.float32), parts), axis=2)
