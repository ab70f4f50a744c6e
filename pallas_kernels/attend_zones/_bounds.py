"""Bounds of the estimate that always hold, but for rounding: derived in docs/bounds.md."""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.attend_zones._rest import Rest, corrections
from pallas_kernels.cluster_sums import sum_by_cluster
from pallas_kernels.merge_states.reference import merge_states
from pallas_kernels.moments import Spread, ZoneBounds
from pallas_kernels.numerics import log_sum_exp
from pallas_kernels.types import MASKED, NO_ID, Correction, Estimate

_TINY = 1e-30

# Of an exponent in float32, well within its range.
_LARGEST = 80.0

# Of a difference of two numbers, what rounding may have taken of it, as a share of them.
_ROUNDING = 1e-5


def zone_bounds(
    query: Array,
    rows: Array,
    valid: Array,
    rest: Rest,
    estimate: Estimate,
    states: tuple[Array, Array],
    layer: Array | int,
    *,
    scale: float,
) -> ZoneBounds:
    """Bound the mass of what remains of the clusters, and the output's error.

    Args:
        query, rows, valid, scale: as for `what_remains`, which made `rest` of them.
        rest: what remains.
        estimate: with a correction, and its spread.
        states: outputs and logsumexps of the zones, the estimate last.
        layer: which layer.
    """
    correction = estimate.correction
    assert correction is not None
    assert correction.spread is not None
    spread = Spread(*(x[layer] for x in correction.spread))
    keeps = (rest.members > 0)[:, :, None]
    left = jnp.maximum(rest.members, 1).astype(jnp.float32)
    size = rest.sizes.astype(jnp.float32)
    gone_keys, gone_values = _retrieved_squares(query, rows, valid, estimate, layer, scale=scale)
    query_square = scale**2 * jnp.sum(query.astype(jnp.float32) ** 2, axis=-1)[..., None]

    def of_clusters(x: Array) -> Array:
        return x[:, :, None]

    # Products with residuals from what remains' own mean lie in [-b, a].
    shift = jnp.where(keeps, rest.logits - estimate.logits, 0)
    reach = jnp.sqrt(query_square) * of_clusters(spread.key_radius) * (1 + _ROUNDING)
    reach += _ROUNDING * jnp.abs(jnp.where(keeps, estimate.logits, 0))
    a, b = jnp.maximum(reach - shift, 0), jnp.maximum(reach + shift, 0)
    # Their mean square: at most that of all members, less the retrieved's, about the new mean.
    of_all = query_square * of_clusters(spread.key_square * size)
    square = (of_all * (1 + _ROUNDING) - gone_keys) / of_clusters(left) - shift**2
    square = jnp.minimum(jnp.maximum(square, 0) + _ROUNDING * of_all, a * b)
    log_factor = jnp.where(keeps, _bennett(square, a), 0)

    log_least = jnp.where(keeps, rest.logits + of_clusters(jnp.log(left)), MASKED)
    log_most = jnp.where(keeps, log_least + log_factor, MASKED)
    low, high = log_sum_exp(log_least, axis=-1), log_sum_exp(log_most, axis=-1)

    # The output's error, as a share of the least that all masses can be.
    outputs, logsumexps = states
    output, _ = merge_states(outputs, logsumexps, dtype=jnp.float32)
    total = log_sum_exp(jnp.stack([*logsumexps[:-1], low]), axis=0)
    more_mass, more_value = corrections(rest, correction, layer)
    factor = jnp.exp(log_factor)
    held = jnp.exp(jnp.where(keeps, rest.counted - rest.logits, 0))
    estimated = held * (1 + more_mass)
    mass_error = jnp.maximum(factor - estimated, estimated - 1)
    value_error = _deviation(a, b, factor) * of_clusters(_value_spread(
        spread, size, left, gone_values, rest, estimate, layer
    )) + _length(held[..., None] * more_value, correction, layer, keeps)  # fmt: skip
    distance = _distance(rest.values, output)
    share = jnp.exp(log_least - total[..., None])
    relative = mass_error * distance + value_error
    # A share of zero, of what float32 has no number for, is not known to be nothing.
    error = jnp.where(jnp.isinf(relative), jnp.inf, share * relative)
    error = jnp.where(keeps, error, 0)
    return ZoneBounds(low, high, jnp.sum(error, axis=-1))


def _bennett(square: Array, a: Array) -> Array:
    """Give the logarithm of the most that the mean of e^x can be.

    Of numbers x of mean zero, of at most `a`, whose mean square is at most `square`.
    """
    safe = jnp.maximum(a, 1e-6)
    spread = jnp.log(jnp.maximum(square, _TINY)) + safe
    rest = 2 * jnp.log(safe) - square / safe
    return jnp.maximum(jnp.logaddexp(spread, rest) - jnp.log(safe**2 + square), 0)


def _deviation(a: Array, b: Array, factor: Array) -> Array:
    """Give the most that the standard deviation of e^x can be.

    Of numbers from -b to a whose exponentials' mean is from 1 to `factor`.
    """
    top, bottom = jnp.exp(jnp.minimum(a, _LARGEST)), jnp.exp(-b)
    mean = jnp.clip((top + bottom) / 2, 1, factor)
    found = jnp.sqrt(jnp.maximum(top - mean, 0)) * jnp.sqrt(jnp.maximum(mean - bottom, 0))
    return jnp.where(a > _LARGEST, jnp.inf, found)


def _retrieved_squares(
    query: Array,
    rows: Array,
    valid: Array,
    estimate: Estimate,
    layer: Array | int,
    *,
    scale: float,
) -> tuple[Array, Array]:
    """Sum the retrieved's squared products with key residuals, and squared value residuals.

    Returns:
        `[batch, kv_heads, group, clusters]` and `[batch, kv_heads, clusters]`.
    """
    correction = estimate.correction
    assert correction is not None
    num_clusters = estimate.logits.shape[-1]
    clusters = jnp.where(valid, correction.clusters, NO_ID)
    at = jnp.minimum(clusters, num_clusters - 1)
    rows = jnp.where(valid[..., None, None], rows, 0).astype(jnp.float32)
    own = scale * jnp.einsum("bhgd,bhnd->bhgn", query.astype(jnp.float32), rows[..., 0, :])
    x = own - jnp.take_along_axis(estimate.logits, at[:, :, None], axis=-1)
    means = jnp.take_along_axis(estimate.value_means[layer], at[..., None], axis=2)
    e = rows[..., 1, :] - means.astype(jnp.float32)
    squares = jnp.concatenate(
        [jnp.swapaxes(x * x, -1, -2), jnp.sum(e * e, axis=-1, keepdims=True)], axis=-1
    )
    squares = jnp.where(valid[..., None], squares, 0)
    sums = sum_by_cluster(squares, clusters, num_clusters)
    return jnp.swapaxes(sums[..., :-1], -1, -2), sums[..., -1]


def _value_spread(
    spread: Spread,
    size: Array,
    left: Array,
    gone: Array,
    rest: Rest,
    estimate: Estimate,
    layer: Array | int,
) -> Array:
    """Give the root mean square distance of what remains' values from their own mean."""
    keeps = (rest.members > 0)[..., None]
    moved = rest.values - jnp.where(keeps, estimate.value_means[layer], 0).astype(jnp.float32)
    held = spread.value_square * size
    square = (held * (1 + _ROUNDING) - gone) / left - jnp.sum(moved**2, axis=-1)
    return jnp.sqrt(jnp.maximum(square, 0) + _ROUNDING * held)


def _length(values: Array, correction: Correction, layer: Array | int, keeps: Array) -> Array:
    """Give the length of what the moments add to the mean value."""
    vectors = correction.moments.weights[layer].astype(jnp.float32)
    vectors = jnp.where(keeps.swapaxes(2, 3)[..., None], vectors, 0)
    products = jnp.einsum("bhcrd,bhcsd->bhcrs", vectors, vectors)
    square = jnp.einsum("bhgcr,bhcrs,bhgcs->bhgc", values, products, values)
    return jnp.sqrt(jnp.maximum(square, 0)) * (1 + _ROUNDING)


def _distance(values: Array, output: Array) -> Array:
    """Measure from mean values `[b, h, clusters, d]` to outputs `[b, h, group, d]`."""
    product = jnp.einsum("bhgd,bhcd->bhgc", output, values)
    squares = jnp.sum(values**2, axis=-1)[:, :, None] + jnp.sum(output**2, axis=-1)[..., None]
    return jnp.sqrt(jnp.maximum(squares - 2 * product, 0) + _ROUNDING * squares)
