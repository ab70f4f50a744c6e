"""Clusters that `score_clusters` scores, their scores in float64, and what kernels must give."""

import jax.numpy as jnp
import numpy as np

from pallas_kernels.score_clusters import reference
from pallas_kernels.types import MASKED

LAYERS, BATCH, HEADS, LAYER, SCALE = 2, 3, 2, 1, 0.2
IN_USE = (300, 130, 0)  # clusters of each sequence


def cluster_case(seed, group, head_dim, dtype, room=IN_USE[0]):
    """Clusters of some sequences; all that must not be read is NaN."""
    rng = np.random.default_rng(seed)
    row = (LAYERS, BATCH, HEADS)
    sizes = rng.integers(0, 9, (*row, room))
    for b, count in enumerate(IN_USE):
        sizes[:, b, :, count:] = 0
    centroids = rng.normal(size=(*row, room, head_dim))
    centroids[sizes == 0] = np.nan
    centroids[[layer for layer in range(LAYERS) if layer != LAYER]] = np.nan
    offsets = np.concatenate([np.zeros((*row, 1), int), sizes.cumsum(-1)], -1)
    query = 2 * rng.normal(size=(BATCH, HEADS, group, head_dim))
    operands = jnp.asarray(query, dtype), jnp.asarray(centroids, dtype)
    return *operands, jnp.asarray(offsets, jnp.int32), jnp.int32(LAYER)


def in_float64(query, centroids, offsets, layer):
    """Logits `[batch, kv_heads, group, clusters]`, NaN for none, and their logsumexp."""
    sizes = np.diff(np.asarray(offsets)[layer])[:, :, None]
    query, centroids = (np.asarray(x, np.float64) for x in (query, centroids[layer]))
    logits = SCALE * np.sum(query[:, :, :, None] * centroids[:, :, None], axis=-1)
    masses = np.where(sizes > 0, sizes * np.exp(logits), 0).sum(axis=-1)
    return logits, np.log(np.maximum(masses, 1e-300)), masses > 0


def check(found, case, rotated):
    """Compare with the reference and with float64; what must not be read is NaN."""
    expected = reference.score_clusters(*case, scale=SCALE, rotated=rotated)
    np.testing.assert_allclose(found.logits, expected.logits, atol=3e-5)
    np.testing.assert_allclose(found.logsumexp, expected.logsumexp, rtol=1e-6, atol=3e-5)
    if rotated:
        np.testing.assert_allclose(found.rotated, expected.rotated, atol=1e-5)
    logits, logsumexp, some = in_float64(*case)
    exists = ~np.isnan(logits)
    np.testing.assert_array_equal(np.asarray(found.logits)[~exists], np.float32(MASKED))
    np.testing.assert_allclose(np.asarray(found.logits)[exists], logits[exists], atol=3e-5)
    np.testing.assert_allclose(np.asarray(found.logsumexp)[some], logsumexp[some], atol=3e-5)
    assert not some[2].any()
    assert some[:2].all()
    np.testing.assert_array_equal(np.asarray(found.logsumexp)[2], np.float32(MASKED))


def check_nan(run, *of_case):
    """Check that a NaN in a centroid of `cluster_case(0, 2, *of_case)` shows in its row alone."""
    query, centroids, offsets, layer = cluster_case(0, 2, *of_case)
    [at, *_] = np.flatnonzero(np.diff(offsets[LAYER, 0, 1]))
    centroids = centroids.at[LAYER, 0, 1, at, 7].set(jnp.nan)
    found = run(query, centroids, offsets, layer)
    spoilt = np.isnan(np.asarray(found.logsumexp))
    assert spoilt[0, 1].all()
    assert spoilt.sum() == 2
    assert np.isnan(np.asarray(found.logits)).sum() == 2
