"""What makes the index, on a CUDA GPU against plain JAX or float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.encode_tokens import rotation
from pallas_kernels.encode_tokens.reference import unpack_signs
from tests.support.gpu_cases import SEED, assert_close, run_twice
from tests.support.varying_clusters import check_best, clusters_of, varying

pytestmark = pytest.mark.gpu

KERNEL = "triton"


@pytest.mark.parametrize(
    "dtype, head_dim, count",
    [("bfloat16", 128, 8192), ("float32", 64, 1000), ("float16", 96, 2048)],
)
def test_build_clusters(dtype, head_dim, count):
    """What clusters promise, and no worse clusters than plain JAX makes of the same keys."""
    rows, size = 3, 8192 if count > 2048 else 2048
    keys = jax.random.split(jax.random.key(SEED), 4)
    # Keys lie around centres, as real ones do; past `count` they are poison.
    centres = jax.random.normal(keys[0], (rows, 64, head_dim))
    around = jax.random.randint(keys[1], (rows, size), 0, 64)
    x = jnp.take_along_axis(centres, around[..., None], axis=1)
    x = x + 0.5 * jax.random.normal(keys[2], x.shape)
    values = jax.random.normal(keys[3], x.shape)
    valid = (jnp.arange(size) < count)[:, None]
    x, values = (jnp.where(valid, y, jnp.nan).astype(dtype) for y in (x, values))
    settings = {"cluster_size": 32, "max_cluster_size": 64, "iterations": 10}

    def build(implementation):
        return lambda k, v, n: ops.build_clusters(
            k, v, n, **settings, implementation=implementation
        )

    found = run_twice(build(KERNEL), x, values, jnp.int32(count))
    expected = jax.jit(build("xla"))(x, values, jnp.int32(count))

    def spread(clusters):
        """Sum of the squared distances to the centroids, by float64, and the means themselves."""
        total = 0.0
        for row in range(rows):
            offsets, order = (np.asarray(y[row]) for y in (clusters.offsets, clusters.order))
            sizes = np.diff(offsets)
            assert offsets[0] == 0
            assert offsets[-1] == count
            assert sizes.max() <= 64
            used = int((sizes > 0).sum())
            assert (sizes[:used] > 0).all()
            assert sorted(order[:count]) == list(range(count))
            owner = np.repeat(np.arange(used), sizes[:used])
            assert (np.diff(order[:count])[np.diff(owner) == 0] > 0).all()
            for given, means in ((x, clusters.centroids), (values, clusters.value_means)):
                members = np.asarray(given[row].astype(jnp.float32), np.float64)[order[:count]]
                exact = np.add.reduceat(members, offsets[:used]) / sizes[:used, None]
                assert_close(np.asarray(means[row])[:used], exact, "float32", "means")
                if given is x:
                    total += float(((members - exact[owner]) ** 2).sum())
        return total

    assert spread(found) <= 1.01 * spread(expected)


def clusters_by_kernel(keys, values, count):
    settings = {"cluster_size": 32, "max_cluster_size": 64, "iterations": 10}
    return ops.build_clusters(keys, values, count, **settings, implementation=KERNEL)


def of_many_segments(build):
    """What is built of five segments, after a look that each has what it has alone."""
    shape = 5, 2, 1024, 128
    keys, values = jax.random.normal(jax.random.key(SEED), (2, *shape), jnp.bfloat16)
    counts = jnp.array([1024, 1024, 700, 0, 0], jnp.int32)
    build = jax.jit(build)
    together = build(keys, values, counts[:, None])
    for i, count in enumerate(counts):
        own = jax.tree.map(lambda x, i=i: x[i], together)
        jax.tree.map(np.testing.assert_array_equal, own, build(keys[i], values[i], count))
    return together


def test_build_clusters_of_many_segments():
    """Every segment's clusters are those it has alone, whatever is built beside it."""
    of_many_segments(clusters_by_kernel)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
def test_build_moments(head_dim, rank):
    given = varying(SEED, head_dim)
    keys, values = map(jnp.asarray, given[:2])
    found = run_twice(
        functools.partial(ops.build_moments, rank=rank, implementation=KERNEL),
        *(keys, values, clusters_of(*given)),
    )
    check_best(jax.tree.map(lambda x: np.asarray(x, np.float64), found), *given, rank)


def test_build_moments_of_many_segments():
    """Every segment's are those it has alone, and there are some."""

    def build(keys, values, count):
        clusters = clusters_by_kernel(keys, values, count)
        return ops.build_moments(keys, values, clusters, rank=2, implementation=KERNEL)

    together = of_many_segments(build)
    assert (np.asarray(together.lambdas[:3, :, :8]) > 0).all()


@pytest.mark.parametrize("dtype, head_dim", [("bfloat16", 128), ("float32", 96), ("float16", 64)])
def test_encode_tokens(dtype, head_dim):
    keys = jax.random.split(jax.random.key(SEED))
    x = jax.random.normal(keys[0], (3, 1000, head_dim)).astype(dtype)
    centroids = (x + jax.random.normal(keys[1], x.shape)).astype(dtype)
    centroids = centroids.at[:, 7].set(x[:, 7])  # no residual at all
    matrix = jnp.asarray(rotation(head_dim))
    found = run_twice(lambda *a: ops.encode_tokens(*a, implementation=KERNEL), x, centroids, matrix)
    # Residuals are taken in float32 of what is stored, whatever its dtype.
    expected = ops.encode_tokens(x, centroids, matrix, implementation="xla")
    assert_close(found.scales, expected.scales, dtype, "scales")
    assert (found.scales[:, 7] == 0).all()
    signs = [unpack_signs(jnp.asarray(y), head_dim) for y in (found.codes, expected.codes)]
    wrong = float(jnp.mean(signs[0] != signs[1]))
    # A rotated residual near zero may round to either side.
    assert wrong < (1e-4 if dtype == "float32" else 5e-3), f"{wrong:.1e}, WAVEJAX_SEED={SEED}"
