"""Clusters whose values vary with their keys, and float64's word on how they do."""

import itertools

import jax.numpy as jnp
import numpy as np

from pallas_kernels.types import Clusters

# Members of the clusters: more than a block, a block, as many as directions, fewer, one; an empty
# one, and the tokens past the last.
SIZES = (40, 16, 9, 3, 2, 1, 0)
TOKENS = sum(SIZES) + 5


def varying(seed, head_dim, spectrum=4.0):
    """Keys and values that vary together, most in one direction; what lies past them is NaN.

    Args:
        seed: of the numbers.
        head_dim: of keys and values; they vary in eight directions.
        spectrum: how many times as much in a direction as in the next.

    Returns:
        keys, values `[TOKENS, head_dim]`, and the tokens in the order of their clusters.
    """
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(TOKENS, 8)) * spectrum ** -np.arange(8)
    keys = keys @ np.linalg.qr(rng.normal(size=(head_dim, 8)))[0].T
    values = keys @ rng.normal(size=(head_dim, head_dim)) + 0.1 * rng.normal(size=keys.shape)
    order = rng.permutation(TOKENS)
    keys[order[sum(SIZES) :]] = values[order[sum(SIZES) :]] = np.nan
    return keys.astype(np.float32), values.astype(np.float32), order


def members(order):
    """Each cluster's tokens."""
    edges = np.cumsum((0, *SIZES))
    return [order[a:b] for a, b in itertools.pairwise(edges)]


def clusters_of(keys, values, order):
    """What `build_clusters` would return."""

    def means(x):
        own = [x[m].mean(0) if len(m) else np.zeros(x.shape[1]) for m in members(order)]
        return jnp.asarray(np.array(own), jnp.float32)

    offsets = jnp.asarray(np.cumsum((0, *SIZES)), jnp.int32)
    return Clusters(means(keys), means(values), offsets, jnp.asarray(order, jnp.int32))


def exact(keys, values, order):
    """float64: C and the keys' covariance of each cluster."""
    for own in members(order):
        d, e = (x[own].astype(np.float64) for x in (keys, values))
        d, e = (x - x.mean(0) if len(x) else x for x in (d, e))
        count = max(len(own), 1)
        yield e.T @ d / count, d.T @ d / count


def check_best(found, keys, values, order, rank):
    """Hold moments of float64 numbers to the best that there are."""
    assert found.directions.shape == found.weights.shape == (len(SIZES), rank, keys.shape[1])
    for j, (cross, own) in enumerate(exact(keys, values, order)):
        u, w, lambdas = found.directions[j], found.weights[j], found.lambdas[j]
        scale = np.linalg.norm(cross) + 1e-9
        lengths = np.linalg.norm(u, axis=-1)
        np.testing.assert_allclose(lengths[lengths > 0], 1, atol=1e-5)
        np.testing.assert_allclose(u @ u.T, np.diag(lengths > 0), atol=1e-4)
        best = np.sqrt((np.linalg.svd(cross, compute_uv=False)[rank:] ** 2).sum())
        # Directions come from C'C: in float32 it tells none below the square root of its epsilon.
        assert np.linalg.norm(cross - w.T @ u) <= 1.05 * best + 2 * 2**-11.5 * scale
        np.testing.assert_allclose(w, u @ cross.T, atol=1e-4 * scale)
        # Of the keys' covariance, all that the span holds.
        np.testing.assert_allclose(
            np.diag(lambdas), u @ own @ u.T, atol=1e-4 * np.linalg.norm(own) + 1e-9
        )
        assert (lambdas >= 0).all()
    # One member varies in nothing.
    assert not found.weights[5:].any()
    assert not found.lambdas[5:].any()
