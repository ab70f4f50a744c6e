"""`build_clusters` where keys or values are not finite, or too large; and sizes by row."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.build_clusters import reference, triton
from pallas_kernels.build_clusters.reference import capacity
from tests.pallas_kernels.attend_zones.test_kernel import QUICKLY
from tests.support.spoilt_clusters import BAD_KEY, BAD_VALUE, check_spoilt

TOKENS, SIZES = 128, {"cluster_size": 8, "max_cluster_size": 16, "iterations": 3}
STATIC = ("cluster_size", "max_cluster_size", "iterations", "least_sizes")
BUILD = {
    "plain": jax.jit(reference.build_clusters, static_argnames=STATIC, **QUICKLY),
    "kernel": jax.jit(
        functools.partial(triton.build_clusters, interpret=True), static_argnames=STATIC, **QUICKLY
    ),
}


def random_rows(seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(2, 3, TOKENS, 64)).astype(np.float32)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_no_token_is_lost_beside_a_bad_one(build, bad):
    keys, values = random_rows()
    clean = keys.copy(), values.copy()
    keys[BAD_KEY], values[BAD_VALUE] = bad, bad
    counts = jnp.array([TOKENS, TOKENS, 77])
    found = build(jnp.asarray(keys), jnp.asarray(values), counts, **SIZES)
    check_spoilt(found, *clean, (TOKENS, TOKENS, 77))


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
@pytest.mark.parametrize("size", [1e18, 1e25, 3e38])
def test_no_token_is_lost_where_products_pass_float32(build, size):
    keys, values = random_rows(1)
    keys[0, ::3] *= np.float32(size) / np.abs(keys[0]).max()
    counts = jnp.array([TOKENS, TOKENS, 77])
    found = build(jnp.asarray(keys), jnp.asarray(values), counts, **SIZES)
    for row, count in enumerate((TOKENS, TOKENS, 77)):
        assert found.offsets[row, -1] == count
        assert sorted(np.asarray(found.order[row])[:count].tolist()) == list(range(count))


@pytest.mark.parametrize("build", BUILD.values(), ids=BUILD)
def test_each_row_has_sizes_of_its_own(build):
    keys, values = map(jnp.asarray, random_rows(2))
    counts = jnp.array([TOKENS, 100, 77])
    sizes = [(8, 16), (16, 24), (32, 64)]
    mean, most = (jnp.array(x) for x in zip(*sizes, strict=True))

    @functools.partial(jax.jit, **QUICKLY)
    def together(mean, most):
        named = {"cluster_size": mean, "max_cluster_size": most, "least_sizes": (8, 16)}
        return build.__wrapped__(keys, values, counts, **named, iterations=3)

    found = together(mean, most)
    assert found.centroids.shape[1] == capacity(TOKENS, 8, 16)
    for row, (mean, most) in enumerate(sizes):
        alone = build(
            keys[row : row + 1],
            values[row : row + 1],
            counts[row : row + 1],
            cluster_size=mean,
            max_cluster_size=most,
            iterations=3,
        )
        used = int((np.diff(alone.offsets[0]) > 0).sum())
        np.testing.assert_array_equal(found.order[row], alone.order[0])
        np.testing.assert_array_equal(found.offsets[row, : used + 1], alone.offsets[0, : used + 1])
        assert (np.asarray(found.offsets[row, used:]) == counts[row]).all()
        for x, y in zip(found[:2], alone[:2], strict=True):
            np.testing.assert_allclose(x[row, :used], y[0, :used], atol=1e-5)


@pytest.mark.parametrize("module", [reference, triton])
def test_sizes_by_row_want_room_that_is_known(module):
    keys, sizes = jnp.ones((1, 32, 64)), {"cluster_size": jnp.array([8]), "max_cluster_size": 16}
    with pytest.raises(ValueError, match="give least_sizes"):
        module.build_clusters(keys, keys, 32, **sizes, iterations=1)
