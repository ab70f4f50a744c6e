"""The rotated query in the forms that the kernel multiplies codes with."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental.pallas import triton as plt

from pallas_kernels.encode_tokens.reference import WORD_BITS

LANES = 8  # Words are split into 8 sets of 4 bits, one bit a byte.


def pack(query: Array) -> tuple[Array, Array, Array]:
    """The query in int8, four dimensions a word, in the order of the codes' bits.

    Bit k + 8 j of a code's word w belongs to dimension 32 w + k + 8 j: shifted by k and masked to
    the lowest bit of each byte, the word holds four bits that `dp4a` multiplies with four int8.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.

    Returns:
        packed: `[batch, kv_heads, group, 8, words]` int32, byte j of [k, w] being dimension
            32 w + k + 8 j.
        steps: `[batch, kv_heads, group]` float32, what one unit is worth.
        sums: `[batch, kv_heads, group]` int32, of all dimensions.
    """
    query = query.astype(jnp.float32)
    head_dim = query.shape[-1]
    steps = jnp.maximum(jnp.max(jnp.abs(query), axis=-1), 1e-30) / 127
    whole = jnp.round(query / steps[..., None]).astype(jnp.int32)
    words = -(-head_dim // WORD_BITS)
    padded = jnp.pad(whole, [(0, 0)] * (whole.ndim - 1) + [(0, words * WORD_BITS - head_dim)])
    byte = padded.reshape(*whole.shape[:-1], words, 4, LANES) & 0xFF
    shifts = (8 * jnp.arange(4, dtype=jnp.int32))[:, None]
    packed = jnp.sum(byte << shifts, axis=-2, dtype=jnp.int32)
    return jnp.swapaxes(packed, -1, -2), steps, jnp.sum(whole, axis=-1, dtype=jnp.int32)


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
