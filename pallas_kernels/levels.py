"""Matrices in 8 or 4 bits, in groups: what their arrays hold, and the numbers they stand for."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Num

# In a byte a level of -8 to 7 is kept as one of 0 to 15.
MIDDLE = 8


class Levels(NamedTuple):
    """A matrix ``[..., out, in]`` as levels in groups of its rows' numbers.

    A number is its level times its group's scale, plus the group's minimum if there are minima.

    Attributes:
        levels: int8 ``[..., out, width]``; or, in 4 bits, uint8 ``[..., out, width / 2]``. `width`
            is `in`, padded to whole groups. The byte i of a group of n holds its levels i, in the
            lower half, and i + n / 2; without minima 8 is added to them.
        scales: ``[..., out, groups]``, float32, float16, bfloat16, or int8 with factors.
        scale_factors: float16 ``[..., out, blocks]``, which scales are multiplied by; or None.
        minima: as `scales`, or None.
        minimum_factors: as `scale_factors`, or None.
    """

    levels: Array
    scales: Array
    scale_factors: Array | None = None
    minima: Array | None = None
    minimum_factors: Array | None = None

    @property
    def bits(self) -> int:
        """Bits of a level."""
        return 8 if self.levels.dtype == jnp.int8 else 4

    @property
    def width(self) -> int:
        """Numbers of a row, padding included."""
        return self.levels.shape[-1] * 8 // self.bits

    @property
    def group(self) -> int:
        """Numbers that share a scale."""
        return self.width // self.scales.shape[-1]


def dequantise(matrix: Levels) -> Float[Array, "*lead out width"]:
    """Return the numbers that levels stand for, in float32, padding included."""
    numbers = _whole_numbers(matrix).astype(jnp.float32)
    numbers = numbers * widened(matrix.scales, matrix.scale_factors)[..., None]
    if matrix.minima is not None:
        numbers = numbers + widened(matrix.minima, matrix.minimum_factors)[..., None]
    return numbers.reshape(*numbers.shape[:-2], -1)


def widened(small: Num[Array, "..."], factors: Any) -> Float[Array, "*lead out groups"]:
    """Return scales or minima in float32, times their factors if they have any."""
    wide = small.astype(jnp.float32)
    if factors is None:
        return wide
    blocks = wide.reshape(*factors.shape, -1) * factors.astype(jnp.float32)[..., None]
    return blocks.reshape(wide.shape)


def _whole_numbers(matrix: Levels) -> Int[Array, "*lead out groups group"]:
    grouped = matrix.levels.reshape(*matrix.scales.shape, -1)
    if matrix.bits == 8:
        return grouped
    shifts = jnp.array([[0], [4]], jnp.uint8)
    halves = (grouped[..., None, :] >> shifts & 15).astype(jnp.int8)
    levels = halves.reshape(*matrix.scales.shape, -1)
    return levels - MIDDLE if matrix.minima is None else levels
