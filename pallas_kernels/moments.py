"""Values of a better estimate: pooled covariance, moments, spread, bounds; part of `types`."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class Pooled(NamedTuple):
    """How members lie about their clusters' means, in a shape that all clusters of a head share.

    With residuals d of keys and e of values, S is the mean of d d' over members of many clusters,
    and C that of e d', both times head_dim over the trace of the first. A cluster's own are taken
    to be these times its deviation, squared.

    Attributes:
        products: `[batch, kv_heads, group, 2, head_dim]` float32, scale * S q and scale * C q, as
            in `ClusterScores`.
        deviations: `[layers, batch, kv_heads, clusters]` float, the root mean square of the keys'
            residuals along a direction, in the mean of all directions.
    """

    products: Float[Array, "batch kv_heads group 2 head_dim"]
    deviations: Float[Array, "layers batch kv_heads clusters"]


class Moments(NamedTuple):
    """How the values of a cluster's members vary with their keys, in a few directions.

    With p = direction . q, q scaled as for logits, the members' mean mass grows to second order by
    the sum of lambda p^2 / 2, their mean value by that of weight * p.

    Attributes:
        directions: `[..., clusters, rank, head_dim]`, of keys; floats or int8.
        weights: the same shape and dtype, of values.
        lambdas: `[..., clusters, rank]` float32, zero or more.
        weight_scales: the same shape, float32, what multiplies weights of int8; None for floats.
    """

    directions: Array
    weights: Array
    lambdas: Array
    weight_scales: Array | None = None


class Spread(NamedTuple):
    """How far the members of each cluster lie from its mean key and mean value.

    Attributes:
        key_radius: `[..., clusters]` float32, the largest distance of a member's key.
        key_square: the same shape, the mean of the keys' squared distances.
        value_square: the same shape, the mean of the values' squared distances.
    """

    key_radius: Array
    key_square: Array
    value_square: Array


class Correction(NamedTuple):
    """What makes an estimate better than by its clusters' means.

    Attributes:
        moments: `[layers, batch, kv_heads, clusters, ...]`.
        products: `[batch, kv_heads, group, clusters, rank]` float32, as in `ClusterScores`.
        clusters: `[batch, kv_heads, retrieved]` int32, of each of the `Picks`: as in `Retrieved`,
            rising but for NO_ID, of which there may be any between.
        spread: of the same shape as the moments' lambdas but for the rank; None without bounds.
    """

    moments: Moments
    products: Array
    clusters: Int[Array, "batch kv_heads retrieved"]
    spread: Spread | None = None


class ZoneBounds(NamedTuple):
    """What is certain of an estimate, but for rounding; derived in docs/bounds.md.

    Attributes:
        log_mass_low, log_mass_high: `[batch, kv_heads, group]` float32: between them lies the
            logarithm of the estimated members' true mass; about -1e30 where there are none.
        output_error: the same shape: the merged output is no farther than this from full
            attention's, in the values' norm; may be infinite.
    """

    log_mass_low: Array
    log_mass_high: Array
    output_error: Array
