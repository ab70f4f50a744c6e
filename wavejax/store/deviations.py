"""How far members lie from their clusters' means, by the scales of their codes."""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float, Int

from pallas_kernels.cluster_sums import sum_by_cluster
from pallas_kernels.types import NO_ID
from wavejax.config import WaveConfig


def init_deviations(
    config: WaveConfig, clusters: tuple[int, ...], dtype: DTypeLike
) -> Array | None:
    """Make room for the deviations of clusters; None where the settings want none.

    Args:
        config: the settings.
        clusters: `(layers, batch, kv_heads, clusters)`.
        dtype: the model's.
    """
    return jnp.zeros(clusters, dtype) if config.reach or config.pooled_covariance else None


def put_deviations(
    deviations: Array | None,
    scales: Float[Array, "segments kv_heads tokens"],
    own: Int[Array, "segments kv_heads tokens"],
    offsets: Int[Array, "segments kv_heads edges"],
    at: tuple[Any, ...],
) -> Array | None:
    """Measure new clusters' deviations and write them beside the others'; None stays None.

    A rotated residual of length r in d dimensions has a code's scale near r sqrt(pi / 2 d): its
    numbers are near to normal ones. Along a direction it has r / sqrt(d), in the mean of all. So
    the deviation is the root of the mean square of scales, times sqrt(2 / pi).

    Args:
        deviations: the index's.
        scales: of the segments' codes, by index place; anything past the last member.
        own: the cluster at each index place; anything past the last member.
        offsets: of the segments' clusters.
        at: where in the stacks each cluster goes, NO_ID for none.
    """
    if deviations is None:
        return None
    member = jnp.arange(scales.shape[-1]) < offsets[..., -1:]
    squares = jnp.where(member, jnp.square(scales.astype(jnp.float32)), 0)
    clusters = jnp.where(member, own, NO_ID)
    sums = sum_by_cluster(squares[..., None], clusters, offsets.shape[-1] - 1)[..., 0]
    means = sums / jnp.maximum(jnp.diff(offsets, axis=-1), 1)
    found = math.sqrt(2 / math.pi) * jnp.sqrt(means)
    return deviations.at[at].set(found.astype(deviations.dtype), mode="drop")
