"""The semantics of `build_spread`, in plain JAX."""

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.cluster_sums import sum_by_cluster
from pallas_kernels.moments import Spread
from pallas_kernels.types import NO_ID, Clusters

# More than float32's rounding of a sum of a thousand squares.
ROUNDED_UP = 1 + 1e-5


def build_spread(keys: Array, values: Array, clusters: Clusters) -> Spread:
    """See `pallas_kernels.build_spread`."""
    if keys.ndim > 2:
        return lax.map(lambda x: build_spread(*x), (keys, values, clusters))
    centroids, value_means, offsets, order = clusters
    num_clusters = centroids.shape[0]
    place = jnp.arange(keys.shape[0])
    own = jnp.searchsorted(offsets, place, side="right", method="scan_unrolled") - 1
    own = jnp.minimum(own, num_clusters - 1)
    member = place < offsets[-1]

    def squares(x: Array, means: Array) -> Array:
        rest = jnp.where(member[:, None], x[order].astype(jnp.float32) - means[own], 0)
        return jnp.sum(rest * rest, axis=-1)

    of_keys, of_values = squares(keys, centroids), squares(values, value_means)
    own = jnp.where(member, own, NO_ID)
    count = jnp.maximum(jnp.diff(offsets), 1).astype(jnp.float32)
    squares_of = jnp.stack([of_keys, of_values], axis=-1)
    means = sum_by_cluster(squares_of, own, num_clusters) / count[:, None]
    largest = jnp.zeros(num_clusters).at[own].max(of_keys, mode="drop")
    found = Spread(jnp.sqrt(largest), means[:, 0], means[:, 1])
    return jax.tree.map(lambda x: x * ROUNDED_UP, found)
