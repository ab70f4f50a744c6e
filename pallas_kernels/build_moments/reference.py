"""The semantics of `build_moments`, in plain JAX."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.encode_tokens.reference import rotation
from pallas_kernels.types import Clusters, Moments

ITERATIONS = 8

# Members of every cluster that are read at once.
BLOCK = 16

# The weight of the keys' own covariance beside that of values and keys: it decides where the latter
# is zero, as of clusters with fewer members than directions.
OWN_SHARE = 1e-4

TINY = 1e-30


def build_moments(keys: Array, values: Array, clusters: Clusters, *, rank: int) -> Moments:
    """See `pallas_kernels.build_moments`."""
    if keys.ndim > 2:
        # One row after another: all at once would take memory and save no time.
        return lax.map(lambda x: build_moments(*x, rank=rank), (keys, values, clusters))
    return build_moments_of_row(keys, values, clusters, rank=rank)


def build_moments_of_row(keys: Array, values: Array, clusters: Clusters, *, rank: int) -> Moments:
    """See `pallas_kernels.build_moments`; keys and values `[tokens, head_dim]`."""
    centroids, value_means, offsets, order = clusters
    head_dim, num_clusters = keys.shape[-1], centroids.shape[0]
    sizes = jnp.diff(offsets)
    spoilt = ~jnp.all(jnp.isfinite(centroids) & jnp.isfinite(value_means), axis=-1)
    place = jnp.arange(keys.shape[0])
    own = jnp.searchsorted(offsets, place, side="right", method="scan_unrolled") - 1
    own = jnp.minimum(own, num_clusters - 1)
    sound = (place < offsets[-1]) & ~spoilt[own]

    def residuals(x: Array, means: Array) -> Array:
        """Subtract each member's mean, by index place."""
        return jnp.where(sound[:, None], x[order].astype(jnp.float32) - means[own], 0)

    key_rest, value_rest = residuals(keys, centroids), residuals(values, value_means)
    count = jnp.maximum(sizes, 1).astype(jnp.float32)[:, None, None]
    blocks = -(-jnp.max(sizes, initial=0) // BLOCK)

    def mean_over_members(part: Callable[[Array, Array], Array]) -> Array:
        """Average over each cluster's members what `part` sums over a block of them."""
        zero = jnp.zeros_like(part(*(jnp.zeros((num_clusters, BLOCK, head_dim)),) * 2))

        def add(i: Array, total: Array) -> Array:
            nth = i * BLOCK + jnp.arange(BLOCK)
            at = jnp.minimum(offsets[:-1, None] + nth, keys.shape[0] - 1)
            member = (nth < sizes[:, None])[..., None]
            return total + part(*(jnp.where(member, x[at], 0) for x in (key_rest, value_rest)))

        return lax.fori_loop(0, blocks, add, zero) / count

    def product(x: Array, y: Array, basis: Array) -> Array:
        """Multiply X'Y with the columns of the basis `[clusters, head_dim, rank]`, of a block."""
        return _times(x.swapaxes(1, 2), _times(y, basis))

    variance = mean_over_members(lambda _, e: jnp.sum(e * e, axis=(1, 2))[:, None, None])
    share = jnp.where(variance > 0, OWN_SHARE * variance, 1.0)

    def iterate(_: Array, basis: Array) -> Array:
        both = mean_over_members(
            lambda d, e: jnp.concatenate([product(e, d, basis), product(d, d, basis)], axis=-1)
        )
        of_values, of_keys = both[..., :rank], both[..., rank:]
        back = mean_over_members(lambda d, e: product(d, e, of_values))
        return orthonormal(back + share * of_keys)

    start = jnp.broadcast_to(rotation(head_dim)[:, :rank], (num_clusters, head_dim, rank))
    basis = lax.fori_loop(0, ITERATIONS, iterate, start)

    def along(d: Array, _: Array) -> Array:
        x = _times(d, basis)
        return _times(x.swapaxes(1, 2), x)

    weights = mean_over_members(lambda d, e: product(e, d, basis))
    found = turn(basis.swapaxes(1, 2), weights.swapaxes(1, 2), mean_over_members(along))
    return spoil(found, spoilt)


def turn(directions: Array, weights: Array, within: Array) -> Moments:
    """Turn directions within their span, so that keys vary along each of them alone.

    Args:
        directions: `[..., rank, head_dim]`, orthonormal, or zero.
        weights: the same shape, of them.
        within: `[..., rank, rank]`, the keys' covariance along them.
    """
    rank = within.shape[-1]
    if rank == 1:
        return Moments(directions, weights, jnp.maximum(within[..., 0], 0))
    # A dependent direction, of zeros, is not to be mixed with one along which nothing varies: it
    # has a variance of its own, less than any.
    none = jnp.all(directions == 0, axis=-1)
    trace = jnp.trace(within, axis1=-2, axis2=-1)[..., None]
    apart = jnp.where(none, -trace, 0)[..., None] * jnp.eye(rank)
    variances, turned = jnp.linalg.eigh(within + apart)
    variances, turned = variances[..., ::-1], turned[..., ::-1]

    def mix(vectors: Array) -> Array:
        # Not a product of matrices: of many so small ones XLA's compiler for GPUs broke down.
        return jnp.sum(turned[..., None] * vectors[..., None, :], axis=-3)

    found, length = unit(mix(directions))
    kept = length > 0.5
    return Moments(
        jnp.where(kept[..., None], found, 0),
        jnp.where(kept[..., None], mix(weights) / jnp.maximum(length, TINY)[..., None], 0),
        jnp.where(kept, jnp.maximum(variances, 0), 0),
    )


def orthonormal(vectors: Array) -> Array:
    """Make the columns of `[..., n, rank]` orthonormal, the first first; zero where dependent.

    By Gram and Schmidt, each column twice: after that it is orthogonal to float32's precision. One
    that the second time loses half of what the first time left was but rounding.
    """
    columns: list[Array] = []
    for i in range(vectors.shape[-1]):
        column = unit(vectors[..., i])[0]
        kept = jnp.ones(column.shape[:-1], bool)
        for least in (0, 0.5) if columns else ():
            basis = jnp.stack(columns, axis=-1)
            inside = jnp.sum(basis * column[..., None], axis=-2, keepdims=True)
            column, length = unit(column - jnp.sum(basis * inside, axis=-1))
            kept &= length > least
        columns.append(jnp.where(kept[..., None], column, 0))
    return jnp.stack(columns, axis=-1)


def in_int8(moments: Moments) -> Moments:
    """Round directions and weights to 8 bits, symmetric, with one scale a vector.

    A direction's scale goes into its lambda and its weight's scale: `directions` are then as long
    as they come out, up to 127 in each dimension.

    Args:
        moments: of floats.
    """
    directions, direction_scale = _rounded(moments.directions)
    weights, weight_scale = _rounded(moments.weights)
    return Moments(
        directions,
        weights,
        moments.lambdas * direction_scale**2,
        weight_scale * direction_scale,
    )


def _rounded(x: Array) -> tuple[Array, Array]:
    # Not told by the largest: of a long vector XLA's maximum passes over NaN on CPUs.
    finite = jnp.all(jnp.isfinite(x), axis=-1)
    scale = jnp.where(finite, jnp.max(jnp.abs(x), axis=-1) / 127, jnp.nan)
    # Of NaN's any number will do: the scale is NaN.
    level = jnp.round(x / jnp.maximum(scale, TINY)[..., None])
    return jnp.where(level == level, level, 0).astype(jnp.int8), scale


def unit(x: Array) -> tuple[Array, Array]:
    """Give vectors of length 1, or 0, and how long they were."""
    # By the largest number first, so that squares neither overflow nor vanish.
    peak = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), TINY)
    length = jnp.linalg.norm(x / peak, axis=-1, keepdims=True)
    return x / peak / jnp.maximum(length, TINY), (peak * length)[..., 0]


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def spoil(moments: Moments, spoilt: Array) -> Moments:
    """Make NaN of the moments of some clusters, `[..., clusters]`."""

    def of(x: Array) -> Array:
        return jnp.where(spoilt.reshape(*spoilt.shape, *(1,) * (x.ndim - spoilt.ndim)), jnp.nan, x)

    return jax.tree.map(of, moments)
