"""Sums of tokens' numbers by their clusters, the same bits run after run."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.types import NO_ID


def sum_by_cluster(x: Array, clusters: Array, num_clusters: int) -> Array:
    """Sum `[..., n, features]` by cluster: `[..., num_clusters, features]`; deterministic.

    By doubling: after k rounds an entry holds the sum of its cluster's last 2^k up to it. Floats
    that were added where they belong would come in the order in which a GPU happens to run.

    Args:
        x: zeros where there is no cluster.
        clusters: `[..., n]` int32, rising but for NO_ID, of which there may be any between.
        num_clusters: of the result.
    """
    n = x.shape[-2]
    clusters = lax.cummax(jnp.where(clusters == NO_ID, -1, clusters), axis=clusters.ndim - 1)
    place = jnp.arange(n)

    def double(k: Array, total: Array) -> Array:
        before = place - (1 << k)
        at = jnp.maximum(before, 0)
        same = (before >= 0) & (jnp.take(clusters, at, axis=-1) == clusters)
        return total + jnp.where(same[..., None], jnp.take(total, at, axis=-2), 0)

    total = lax.fori_loop(0, max(n - 1, 0).bit_length(), double, x)
    is_last = jnp.concatenate(
        [clusters[..., 1:] != clusters[..., :-1], jnp.ones_like(clusters[..., :1], bool)], axis=-1
    )
    places = jnp.where(is_last & (clusters >= 0), clusters, NO_ID)
    sums = jnp.zeros((*x.shape[:-2], num_clusters, x.shape[-1]), x.dtype)
    axes = (jnp.arange(size) for size in x.shape[:-2])
    index = jnp.meshgrid(*axes, place, indexing="ij")[:-1]
    return sums.at[(*index, places)].set(total, mode="drop")
