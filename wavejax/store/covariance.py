"""The pooled covariance in the index: how members lie about their clusters' means, in each head."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike
from jaxtyping import Bool, Float, Int

from pallas_kernels.types import Clusters
from wavejax.config import WaveConfig


def init_covariance(
    config: WaveConfig, stack: tuple[int, ...], head_dim: int, dtype: DTypeLike
) -> Array | None:
    """Make room for the covariance of heads; None where the settings want none.

    Args:
        config: the settings.
        stack: `(layers, batch, kv_heads)`.
        head_dim: numbers in a key.
        dtype: the model's.
    """
    shape = (*stack, 2, head_dim, head_dim)
    return jnp.zeros(shape, dtype) if config.pooled_covariance else None


def put_covariance(
    covariance: Array | None,
    keys: Float[Array, "kv_heads tokens head_dim"],
    centroids: Float[Array, "kv_heads tokens head_dim"],
    values: Float[Array, "kv_heads tokens head_dim"],
    own: Int[Array, "kv_heads tokens"],
    clusters: Clusters,
    at: tuple[Array, Array],
    *,
    new: Bool[Array, ""] | bool,
) -> Array | None:
    """Find a segment's covariance and write it, if it is a sequence's first; None stays None.

    Both matrices are over the mean square of a key's residual along a direction. So with residuals
    of length zero, all keys of a cluster alike, there is none.

    Args:
        covariance: the index's.
        keys: the segment's, by index place; anything past the last member, as of the next two.
        centroids: each one's.
        values: the segment's, in the text's order.
        own: int32, the cluster at each index place.
        clusters: of the segment.
        at: layer and sequence, int32.
        new: whether it is the first segment of the sequence.
    """
    if covariance is None:
        return None
    ordered = jnp.take_along_axis(values, clusters.order[..., None], axis=1)
    means = jnp.take_along_axis(clusters.value_means, own[..., None], axis=1)
    member = (jnp.arange(keys.shape[1]) < clusters.offsets[:, -1:])[..., None]
    keys, values = (
        jnp.where(member, x.astype(jnp.float32) - mean.astype(jnp.float32), 0)
        for x, mean in ((keys, centroids), (ordered, means))
    )
    # Products of residuals, which are small and of either sign, in float32.
    pair = [
        jnp.einsum("hti,htj->hij", x, keys, precision=lax.Precision.HIGHEST) for x in (keys, values)
    ]
    trace = jnp.trace(pair[0], axis1=-2, axis2=-1)[:, None, None, None]
    matrices = jnp.stack(pair, axis=1) * keys.shape[-1] / jnp.where(trace == 0, 1.0, trace)
    held = covariance[at]
    # Values may vary far more than keys do, which float16 would not hold. NaN stays.
    most = float(jnp.finfo(held.dtype).max)
    matrices = jnp.clip(matrices, -most, most).astype(held.dtype)
    return covariance.at[at].set(jnp.where(new, matrices, held))
