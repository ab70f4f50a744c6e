"""KV rows in 8 bits: the one place where rows are rounded, and where they are numbers again."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Num

from pallas_kernels.rows import Rows

# Levels to each side of zero. -128 is not used: levels are symmetric.
LEVELS = 127

# Bits of a scale after its first. With the 7 of a level they are fewer than float32's 24, so a
# level times its scale is exact, and a dequantised row quantises to itself.
_SCALE_BITS = 15


def quantise(rows: Float[Array, "*rows head_dim"]) -> Rows:
    """Round each vector to int8, with a scale of its own: its largest number's level is 127.

    Every level is at most half a scale from its number, but for float32's rounding. Rows that were
    quantised and dequantised quantise to the same levels and scales.

    A vector of zeros has a scale of zero, and so has one of numbers too small for float32's normal
    range. One that is not finite has a scale of NaN, and is NaN when it is dequantised.

    Args:
        rows: any floats; the last axis is a key, or a value.

    Returns:
        levels in int8, and for each vector a float32 scale.
    """
    numbers = rows.astype(jnp.float32)
    # Not divided by 127: XLA does or does not multiply by the inverse in its place.
    largest = jnp.max(jnp.abs(numbers), axis=-1) * jnp.float32(1 / LEVELS)
    scales = lax.reduce_precision(largest, exponent_bits=8, mantissa_bits=_SCALE_BITS)
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 0, scales)
    levels = jnp.round(numbers / jnp.where(scales > 0, scales, 1)[..., None])
    # Not told by the largest: of a long row XLA's maximum passes over NaN on CPUs.
    finite = jnp.all(jnp.isfinite(numbers), axis=-1)
    scales = jnp.where(finite, scales, jnp.nan)
    levels = jnp.where(finite[..., None], levels, 0)
    return Rows(jnp.clip(levels, -LEVELS, LEVELS).astype(jnp.int8), scales)


def held_as(numbers: Num[Array, "*rows head_dim"], rows: Rows) -> Rows:
    """Return new numbers in the format of rows that they shall be written to.

    Args:
        numbers: any floats, or for plain rows what these hold; the last axis is a key, or a value.
        rows: of any shape; only their format counts.

    Returns:
        the numbers rounded, as of `quantise`; or, for plain rows, as they are.
    """
    return Rows(numbers) if rows.scales is None else quantise(numbers)


def dequantise(rows: Rows) -> Num[Array, "..."]:
    """Return the numbers that rows stand for: levels times scales, exact in float32.

    Args:
        rows: of either format, and any axes but the last; plain ones are returned as they are.
    """
    if rows.scales is None:
        return rows.data
    return rows.data.astype(jnp.float32) * rows.scales[..., None]
