"""`build_clusters`: a partition into bounded, non-empty clusters with the right sums."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.build_clusters import capacity

SETTINGS = {"cluster_size": 8, "max_cluster_size": 16, "iterations": 5}
build = jax.jit(
    ops.build_clusters, static_argnames=("cluster_size", "max_cluster_size", "iterations")
)


def skewed(rng, shape, dtype=np.float32):
    """Keys of very unequal density: most near one point, as real keys are."""
    keys = rng.normal(size=shape) + 3
    keys[..., : shape[-2] // 2, :] = 5 + 0.01 * rng.normal(size=(*shape[:-2], shape[-2] // 2, 1))
    return jnp.asarray(keys, dtype)


@pytest.mark.parametrize("count", [0, 1, 7, 8, 100, 200])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_clusters_partition_the_tokens(count, dtype):
    rng = np.random.default_rng(count)
    keys, values = skewed(rng, (3, 200, 24), dtype), jnp.asarray(rng.normal(size=(3, 200, 24)))
    # What lies past the count must not matter.
    keys, values = keys.at[:, count:].set(jnp.nan), values.astype(dtype).at[:, count:].set(jnp.nan)
    clusters = build(keys, values, jnp.int32(count), **SETTINGS)
    assert clusters.centroids.shape[1] == capacity(200, 8, 16)
    for h in range(3):
        offsets, order = np.asarray(clusters.offsets[h]), np.asarray(clusters.order[h])
        sizes = np.diff(offsets)
        used = int((sizes > 0).sum())
        assert (sizes[:used] > 0).all()
        assert sizes.max(initial=0) <= 16
        assert offsets[0] == 0
        assert offsets[-1] == count
        assert sorted(order[:count]) == list(range(count))
        assert sorted(order) == list(range(200))
        for j in range(used):
            members = order[offsets[j] : offsets[j + 1]]
            assert (np.diff(members) > 0).all()
            own = np.asarray(keys[h], np.float64)[members]
            np.testing.assert_allclose(clusters.centroids[h, j], own.mean(0), atol=1e-5)
            own = np.asarray(values[h], np.float64)[members]
            np.testing.assert_allclose(clusters.value_means[h, j], own.mean(0), atol=1e-5)


def test_k_means_separates_what_lies_apart():
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(12, 32)) * 10
    kind = np.arange(96) // 8
    keys = jnp.asarray(centres[kind] + 0.01 * rng.normal(size=(96, 32)), jnp.float32)[None]
    clusters = build(keys, keys, 96, **SETTINGS)
    offsets, order = np.asarray(clusters.offsets[0]), np.asarray(clusters.order[0])
    for j in range(12):
        assert len(set(kind[order[offsets[j] : offsets[j + 1]]])) == 1


def test_a_large_cluster_is_cut_along_its_main_direction():
    rng = np.random.default_rng(1)
    direction = rng.normal(size=16)
    direction /= np.linalg.norm(direction)
    place = rng.permutation(60)
    noise = 0.001 * rng.normal(size=(60, 16))
    # One blob, stretched; the mean is far away, so that k-means sees one direction only.
    keys = 100 + 0.1 * place[:, None] * direction + noise
    keys = jnp.asarray(np.concatenate([keys, -keys]), jnp.float32)[None]
    clusters = build(keys, keys, 120, cluster_size=60, max_cluster_size=16, iterations=3)
    sizes = np.diff(np.asarray(clusters.offsets[0]))
    assert sorted(sizes[sizes > 0]) == [15] * 8
    order = np.asarray(clusters.order[0])
    for j in range(8):
        along = place[order[15 * j : 15 * j + 15] % 60]
        assert along.max() - along.min() == 14


def test_same_input_same_bits():
    keys = skewed(np.random.default_rng(2), (4, 150, 16))
    first = build(keys, keys, 140, **SETTINGS)
    again = build(keys, keys, 140, **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, first, again)


def test_capacity_is_never_passed():
    # All tokens alike but few: every k-means cluster but one is empty, or all are just too large.
    for tokens in (1, 8, 9, 16, 17, 33, 64):
        keys = jnp.ones((1, tokens, 16))
        clusters = build(keys, keys, tokens, **SETTINGS)
        assert np.asarray(clusters.offsets)[0, -1] == tokens
        assert np.diff(np.asarray(clusters.offsets)[0]).max() <= 16


def test_each_row_has_its_own_count():
    rng = np.random.default_rng(4)
    keys, values = (skewed(rng, (3, 2, 60, 16)) for _ in range(2))
    counts = jnp.array([60, 0, 13], jnp.int32)
    together = build(keys, values, counts[:, None], **SETTINGS)
    for i, count in enumerate(counts):
        alone = build(keys[i], values[i], count, **SETTINGS)
        own = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(np.testing.assert_array_equal, own, alone)
        assert (np.asarray(own.offsets)[:, -1] == count).all()
    both = build(keys, values, jnp.broadcast_to(counts[:, None], (3, 2)), **SETTINGS)
    jax.tree.map(np.testing.assert_array_equal, both, together)
