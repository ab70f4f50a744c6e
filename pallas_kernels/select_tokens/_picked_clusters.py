"""Which clusters the picks are members of, from what each cluster keeps: for `attend_zones`."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.types import NO_ID


def picked_clusters(tokens: Array, remaining: Array, offsets: Array) -> Array:
    """Find each pick's cluster, in plain JAX: picks stand in the order of the clusters.

    Args:
        tokens: `[batch, kv_heads, budget]` int32; NO_ID for none, also between.
        remaining: `[batch, kv_heads, clusters]` int32, members less picks.
        offsets: `[batch, kv_heads, clusters + 1]` int32.

    Returns:
        int32, as `tokens`; NO_ID for none.
    """
    ends = jnp.cumsum(jnp.diff(offsets, axis=-1) - remaining, axis=-1, dtype=jnp.int32)
    valid = tokens != NO_ID
    number = jnp.cumsum(valid, axis=-1, dtype=jnp.int32) - 1
    # Unrolled: on a GPU a loop's rounds cost more than the search.
    search = functools.partial(jnp.searchsorted, side="right", method="scan_unrolled")
    own = jax.vmap(jax.vmap(search))(ends, number)
    return jnp.where(valid, own.astype(jnp.int32), NO_ID)
