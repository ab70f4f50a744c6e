"""Products of float32 weights with matrices in fewer bits, nearly exact: weights in parts."""

from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.toolbox import launch


def by_cluster(x: Array, whose: Array, contract: tuple[int, int], parts: int) -> Array:
    """Multiply float32 `[g, ...]` by the bools `[rows, clusters]` of which row is whose.

    Args:
        x: of rows, whose sums by cluster are made; or of clusters, each given to its rows.
        whose: the bools.
        contract: see `launch.dot`.
        parts: of how many bfloat16 numbers each of x is the sum: three hold all of a float32.
    """
    ones = jnp.where(whose, 1.0, 0.0).astype(jnp.bfloat16)
    return _sum_of_products(in_parts(x, parts, jnp.bfloat16), ones, contract)


def weigh(weights: Array, vectors: Array, parts: int) -> Array:
    """Sum vectors `[n, d]`, floats or int8 levels, with float32 weights `[g, n]`: `[g, d]`.

    Args:
        weights: at most about 1.
        vectors: what is weighed.
        parts: of how many numbers of the vectors' dtype a weight is the sum; float32 is one.
    """
    if vectors.dtype == jnp.float32:
        return launch.dot(weights, vectors)
    dtype = jnp.bfloat16 if vectors.dtype == jnp.int8 else vectors.dtype
    return _sum_of_products(in_parts(weights, parts, dtype), vectors.astype(dtype), (1, 0))


def _sum_of_products(parts: list[Array], b: Array, contract: tuple[int, int]) -> Array:
    found: Array = launch.dot(parts[0], b, contract)
    for part in parts[1:]:
        found += launch.dot(part, b, contract)
    return found


def in_parts(x: Array, parts: int, dtype: Any) -> list[Array]:
    """Cut a float32 into numbers of a 16-bit float dtype whose sum it is, as near as they can be.

    By bits: a cast and a cast back would be simplified away where the kernel is interpreted.
    """
    found = []
    lost = 23 - jnp.finfo(dtype).nmant
    for _ in range(parts - 1):
        bits = lax.bitcast_convert_type(x, jnp.int32)
        part = lax.bitcast_convert_type(bits & jnp.int32(-(1 << lost)), jnp.float32)
        found.append(part.astype(dtype))
        x = x - part
    return [*found, x.astype(dtype)]
