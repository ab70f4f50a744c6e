"""The estimate by moments: what remains of each cluster, and its attention to second order.

A cluster of n members with mean key c and mean value v, of which r are retrieved, keeps
n' = n - r. Without the retrieved its mean key c' and mean value v' are exact:

    q.c' = q.c + (r q.c - sum of the retrieved's q.k) / n'
    v'   = v + (r v - sum of the retrieved's values) / n'

but for rounding: what it adds to the stored c comes in n / n' times. In an exponent that can be
much. So where less than half remains, it counts as no nearer to the query than the whole: as q.c.

With residuals from these means, x of q.k and e of values, the mass is n' e^{q.c'} (1 + m) and the
values' weighted sum is n' e^{q.c'} ((1 + m) v' + C q) to second order: m = mean(x^2) / 2 and
C q = mean(e x). They are known of all n members: m = sum lambda p^2 / 2 and C q = sum w p, with
p = q.u. For n' they are multiplied by `share_of_moments`. m is capped, since for large x the
second order says nothing.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels.cluster_sums import sum_by_cluster
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import MASKED, NO_ID, Correction, Estimate

# The most that m may be: from algorithm's measurements, see docs/bounds.md.
MOST_MASS = 2.0


class Rest(NamedTuple):
    """What remains of the clusters, at the layer and for the query at hand.

    Attributes:
        members: `[batch, kv_heads, clusters]` int32, to be estimated; 0 where nothing is.
        sizes: the same shape, how many members each cluster has.
        logits: `[batch, kv_heads, group, clusters]` float32, of the members' mean key; MASKED where
            nothing is to be estimated.
        counted: the same shape and dtype, the logits that the estimate has in their place: no more.
        values: `[batch, kv_heads, clusters, head_dim]` float32, the members' mean value; zeros
            there.
    """

    members: Array
    sizes: Array
    logits: Array
    counted: Array
    values: Array


def what_remains(
    query: Array,
    rows: Array,
    valid: Array,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
) -> Rest:
    """Take the retrieved rows out of their clusters.

    Args:
        query: `[batch, kv_heads, group, head_dim]`.
        rows: `[batch, kv_heads, n, 2, head_dim]`, the retrieved ones.
        valid: `[batch, kv_heads, n]` bool.
        estimate: with a correction.
        layer: which layer.
        scale: multiplies every product.
    """
    logits, value_means, offsets, remaining, correction, _ = estimate
    assert correction is not None
    group, head_dim = query.shape[2:]
    sizes = jnp.diff(offsets[layer], axis=-1)
    rows = jnp.where(valid[..., None, None], rows, 0)
    own = scale * jnp.einsum(
        "bhgd,bhnd->bhng", query, rows[..., 0, :], preferred_element_type=jnp.float32
    )
    parts = rows[..., 1, :].astype(jnp.float32), own, valid[..., None].astype(jnp.float32)
    clusters = jnp.where(valid, correction.clusters, NO_ID)
    sums = sum_by_cluster(jnp.concatenate(parts, axis=-1), clusters, sizes.shape[-1])
    taken = sums[..., -1]
    left = sizes - taken.astype(jnp.int32)
    members = jnp.minimum(remaining, left)
    keeps = members > 0
    left = jnp.maximum(left, 1).astype(jnp.float32)
    logit_sums = jnp.swapaxes(sums[..., head_dim : head_dim + group], -1, -2)
    gone, left = taken[:, :, None], left[:, :, None]
    # As a change, which is nothing where nothing is retrieved.
    nearer = (gone * logits - logit_sums) / left
    held = (2 * left < sizes[:, :, None]) & (nearer > 0)
    means = jnp.where(keeps[..., None], value_means[layer], 0).astype(jnp.float32)
    gone, left = (jnp.swapaxes(x, -1, -2) for x in (gone, left))
    return Rest(
        jnp.where(keeps, members, 0),
        sizes,
        jnp.where(keeps[:, :, None], logits + nearer, MASKED),
        jnp.where(keeps[:, :, None], jnp.where(held, logits, logits + nearer), MASKED),
        jnp.where(keeps[..., None], means + (gone * means - sums[..., :head_dim]) / left, 0),
    )


def attend_rest(rest: Rest, correction: Correction, layer: Array | int) -> tuple[Array, Array]:
    """Attend to what remains, to second order.

    Returns:
        output `[batch, kv_heads, group, head_dim]` and logsumexp `[batch, kv_heads, group]`, both
        float32.
    """
    more_mass, more_value = corrections(rest, correction, layer)
    keeps = (rest.members > 0)[:, :, None]
    count = jnp.log(jnp.maximum(rest.members, 1).astype(jnp.float32))[:, :, None]
    logits = jnp.where(keeps, rest.counted + count + jnp.log1p(more_mass), MASKED)
    logsumexp = log_sum_exp(logits, axis=-1)
    weights = jnp.where(keeps, jnp.exp(logits - logsumexp[..., None]), 0.0)
    output = jnp.einsum("bhgc,bhcd->bhgd", weights, rest.values)
    by_direction = (weights / (1 + more_mass))[..., None] * more_value
    vectors = jnp.where(keeps.swapaxes(2, 3)[..., None], correction.moments.weights[layer], 0)
    output += jnp.einsum("bhgcr,bhcrd->bhgd", by_direction, vectors.astype(jnp.float32))
    return output, logsumexp


def corrections(rest: Rest, correction: Correction, layer: Array | int) -> tuple[Array, Array]:
    """Make the second order's parts of what remains.

    Returns:
        `[batch, kv_heads, group, clusters]` m, zero where nothing remains;
        `[batch, kv_heads, group, clusters, rank]`, what multiplies the moments' weights, likewise.
    """
    _, _, lambdas, weight_scales = correction.moments
    share = share_of_moments(rest.sizes, rest.members)[:, :, None]
    keeps = (rest.members > 0)[:, :, None]
    products = jnp.where(keeps[..., None], correction.products, 0)
    held = jnp.where(keeps[..., None], lambdas[layer][:, :, None], 0)
    mass = 0.5 * share * jnp.sum(held * products**2, axis=-1)
    values = share[..., None] * products
    if weight_scales is not None:
        values *= jnp.where(keeps[..., None], weight_scales[layer][:, :, None], 0)
    return jnp.where(mass > MOST_MASS, MOST_MASS, mass), values


def share_of_moments(sizes: Array, members: Array) -> Array:
    """Say what share of its moments a cluster keeps, in float32.

    As if the retrieved were any of the members: the mean square of n' numbers about their own mean
    is (n' - 1) / n' of their variance. So one member alone, which is its own mean, has no moments.

    Args:
        sizes, members: as in `Rest`; of any shape.
    """
    n, left = (x.astype(jnp.float32) for x in (sizes, members))
    share = (left - 1) * n / (jnp.maximum(left, 1) * jnp.maximum(n - 1, 1))
    return jnp.maximum(share, 0)
