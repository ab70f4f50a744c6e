"""The estimate by a covariance that all clusters of a head share, in plain JAX.

A cluster of n members has the mean key c and mean value v, and residuals d and e. All clusters of a
head share the shape of their residuals: the mean of d d' is s^2 S, that of e d' is s^2 C. S and C
are the head's, s is the cluster's deviation. With the query q, scaled as for logits,

    sigma = s sqrt(q'S q)             the standard deviation of the members' logits

Of the n members r are retrieved, those of the largest logits mostly. So those that remain,
n' = n - r, have lower ones: as if a retrieved one were `ABOVE` deviations above the mean.

    l' = q.c - ABOVE sigma min(r / n', MOST_GONE)     the mean logit of what remains
    m  = h sigma^2 / 2, at most `MOST_MASS`

h is the share of its moments that a cluster keeps (`share_of_moments`). To second order the mass is
n' e^{l'} (1 + m), and the weighted sum of values is n' e^{l'} ((1 + m) v + h s^2 C q). C q is one
vector of a query head: what clusters add to it is summed as a number.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attend_zones._rest import MOST_MASS, share_of_moments
from pallas_kernels.numerics import is_masked, log_count, log_sum_exp
from pallas_kernels.types import MASKED, Estimate

# By KL of a 0.5B model, see docs/lab/2026-12-01-pooled.md.
ABOVE = 0.2
# A mean of n' of n numbers lies no more than sqrt(r / n') deviations below that of all.
MOST_GONE = ABOVE**-2


def attend_pooled(
    query: Array, estimate: Estimate, layer: Array | int, *, scale: float
) -> tuple[Array, Array]:
    """Attend to what remains of the clusters, to second order.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        estimate: with `pooled`.
        layer: which layer.
        scale: multiplies every product of query and key.

    Returns:
        output `[batch, kv_heads, group, head_dim]` and logsumexp `[batch, kv_heads, group]`, both
        float32.
    """
    pooled = estimate.pooled
    assert pooled is not None
    sizes = jnp.diff(estimate.offsets[layer], axis=-1)
    left = jnp.clip(estimate.remaining, 0, sizes)
    keeps = left > 0
    # A cluster without any may hold anything, NaN included.
    deviations = jnp.where(keeps, pooled.deviations[layer], 0).astype(jnp.float32)[:, :, None]
    means = jnp.where(keeps[..., None], estimate.value_means[layer], 0).astype(jnp.float32)
    sigma = deviations * logit_deviation(query, pooled.products[..., 0, :], scale=scale)[..., None]
    share = share_of_moments(sizes, left)[:, :, None]
    gone = ((sizes - left) / jnp.maximum(left, 1)).astype(jnp.float32)[:, :, None]
    gone = jnp.minimum(gone, MOST_GONE)
    more = 0.5 * share * jnp.square(sigma)
    more = jnp.where(more > MOST_MASS, MOST_MASS, more)
    logits = estimate.logits - ABOVE * sigma * gone + log_count(left)[:, :, None]
    logits = jnp.where(keeps[:, :, None], logits + jnp.log1p(more), MASKED)
    logsumexp = log_sum_exp(logits, axis=-1)
    weights = jnp.where(is_masked(logits), 0.0, jnp.exp(logits - logsumexp[..., None]))
    output = jnp.einsum("bhgc,bhcd->bhgd", weights, means)
    along = jnp.sum(weights / (1 + more) * share * jnp.square(deviations), axis=-1)
    return output + along[..., None] * pooled.products[..., 1, :], logsumexp


def logit_deviation(query: Array, product: Array, *, scale: float) -> Array:
    """Find the standard deviation of logits in a cluster whose deviation is 1: sqrt(q'S q).

    Args:
        query: `[..., head_dim]`.
        product: the same shape, float32, scale * S q.
        scale: multiplies the query.
    """
    square = scale * jnp.sum(query.astype(jnp.float32) * product, axis=-1)
    # Rounding may leave a little less than nothing. NaN stays.
    return jnp.sqrt(jnp.where(square < 0, 0.0, square))
