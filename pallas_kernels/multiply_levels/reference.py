"""The semantics of `multiply_levels`, in plain JAX."""

import math

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.levels import Levels, dequantise

FEW_ROWS = 4
"""Up to this number of tokens, a GPU multiplies without a matrix product."""

ROWS_AT_ONCE = 2
"""So many tokens' sums are made together: the matrix is read once for each."""


def multiply_levels(inputs: Array, matrix: Levels, *, dtype: DTypeLike | None = None) -> Array:
    """See `pallas_kernels.multiply_levels`."""
    columns = inputs.shape[-1]

    def product(inputs: Array, matrix: Levels) -> Array:
        numbers = dequantise(matrix)[:, :columns].astype(inputs.dtype)
        return jnp.einsum("...i,oi->...o", inputs, numbers, preferred_element_type=dtype)

    def sums(inputs: Array, matrix: Levels) -> Array:
        few = inputs.reshape(-1, columns)

        def of(rows: Array, matrix: Levels) -> Array:
            numbers = dequantise(matrix)[:, :columns].astype(inputs.dtype).astype(jnp.float32)
            return jnp.sum(rows[:, None, :].astype(jnp.float32) * numbers, axis=-1)

        # Of more rows at once XLA would write the floats to memory after all; and so it would if
        # two sums could share them, which a barrier between them forbids.
        parts: list[Array] = []
        for i in range(0, len(few), ROWS_AT_ONCE):
            matrix, parts = lax.optimization_barrier((matrix, parts))
            parts.append(of(few[i : i + ROWS_AT_ONCE], matrix))
        summed = jnp.concatenate(parts).reshape(*inputs.shape[:-1], -1)
        return summed.astype(dtype or inputs.dtype)

    if not 0 < math.prod(inputs.shape[:-1]) <= FEW_ROWS:
        return product(inputs, matrix)
    # XLA's products on GPUs take a conversion as an operand, but no scales of groups: the floats
    # would be written to memory and read again. Sums take any operand as it is computed.
    return lax.platform_dependent(inputs, matrix, cuda=sums, rocm=sums, default=product)
