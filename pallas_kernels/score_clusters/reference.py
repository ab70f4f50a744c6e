"""The semantics of `score_clusters`, in plain JAX."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.encode_tokens.reference import rotate
from pallas_kernels.numerics import log_count, log_sum_exp
from pallas_kernels.types import MASKED, ClusterScores


def score_clusters(
    query: Array,
    centroids: Array,
    offsets: Array,
    layer: Array | int,
    *,
    scale: float,
    rotated: bool = False,
    directions: Array | None = None,
    covariance: Array | None = None,
) -> ClusterScores:
    """See `pallas_kernels.score_clusters`."""
    sizes = jnp.diff(offsets[layer], axis=-1)[:, :, None, :]
    logits = scale * jnp.einsum(
        "bhgd,bhcd->bhgc", query, centroids[layer], preferred_element_type=jnp.float32
    )
    logits = jnp.where(sizes > 0, logits, MASKED)
    logsumexp = log_sum_exp(logits + log_count(sizes), axis=-1)
    products = None
    if directions is not None:
        products = scale * jnp.einsum(
            "bhgd,bhcrd->bhgcr",
            query.astype(jnp.float32),
            directions[layer].astype(jnp.float32),
        )
    pooled = None
    if covariance is not None:
        pooled = scale * jnp.einsum(
            "bhgd,bhked->bhgke", query, covariance[layer], preferred_element_type=jnp.float32
        )
    return ClusterScores(logits, logsumexp, rotate(query) if rotated else None, products, pooled)
