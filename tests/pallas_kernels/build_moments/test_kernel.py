"""The kernel of `build_moments`, interpreted, against float64 and plain JAX."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.build_moments import triton
from tests.support.varying_clusters import TOKENS, check_best, clusters_of, members, varying

build = jax.jit(
    functools.partial(triton.build_moments, interpret=True), static_argnames=("rank", "config")
)


@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("head_dim", [64, 96])
def test_directions_are_the_best(rank, head_dim):
    given = varying(rank, head_dim)
    config = triton.Config(members=16)
    found = build(*given[:2], clusters_of(*given), rank=rank, config=config)
    check_best(jax.tree.map(lambda x: np.asarray(x, np.float64), found), *given, rank)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rows_of_16_bits_are_as_in_plain_jax(dtype):
    cases = [varying(seed, 64) for seed in range(4)]
    keys, values = (np.stack([c[i] for c in cases]).reshape(2, 2, TOKENS, -1) for i in (0, 1))
    keys, values = (jnp.asarray(x, dtype) for x in (keys, values))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(clusters_of(*c) for c in cases))
    stacked = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), stacked)
    found, expected = (
        function(keys, values, stacked, rank=2)
        for function in (build, functools.partial(ops.build_moments, implementation="xla"))
    )
    for one, best in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert one.shape == best.shape

    def spans(moments):
        """The projections on the directions, and C within them."""
        u, w = (np.asarray(x, np.float64) for x in (moments.directions, moments.weights))
        return np.einsum("abcrd,abcre->abcde", u, u), np.einsum("abcrd,abcre->abcde", w, u)

    for one, best in zip(spans(found), spans(expected), strict=True):
        # Not of clusters with one member or two: what is left open there, rounding decides.
        np.testing.assert_allclose(one[:, :, :3], best[:, :, :3], atol=2e-3 * np.abs(best).max())


def test_a_number_that_is_not_finite_stays_in_its_cluster():
    keys, values, order = varying(4, 64)
    sound = build(keys, values, clusters_of(keys, values, order), rank=2)
    keys[members(order)[0][3]], values[members(order)[2][0], 1] = np.inf, np.nan
    spoilt = build(keys, values, clusters_of(keys, values, order), rank=2)
    for one, other in zip(jax.tree.leaves(sound), jax.tree.leaves(spoilt), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.isnan(other[[0, 2]]).all()
        np.testing.assert_array_equal(np.delete(one, (0, 2), 0), np.delete(other, (0, 2), 0))


def test_what_the_kernel_does_not_know_is_refused():
    given = varying(0, 64)
    with pytest.raises(NotImplementedError, match="rank is 5; the kernel knows 1 to 4"):
        triton.build_moments(*map(jnp.asarray, given[:2]), clusters_of(*given), rank=5)
    given = varying(0, 8)
    with pytest.raises(NotImplementedError, match="head_dim is 8"):
        triton.build_moments(*map(jnp.asarray, given[:2]), clusters_of(*given), rank=2)
