"""`build_moments` against float64: of each cluster the best directions, and nothing of others."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.build_moments import in_int8
from tests.support.varying_clusters import (
    TOKENS,
    check_best,
    clusters_of,
    exact,
    members,
    varying,
)

HEAD_DIM = 8
build = jax.jit(ops.build_moments, static_argnames="rank")


def case(seed, spectrum=4.0):
    return varying(seed, HEAD_DIM, spectrum)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("rank", [1, 2, 4, HEAD_DIM])
def test_directions_are_the_best(rank, seed):
    keys, values, order = case(seed)
    found = build(keys, values, clusters_of(keys, values, order), rank=rank)
    found = jax.tree.map(lambda x: np.asarray(x, np.float64), found)
    check_best(found, keys, values, order, rank)


def test_values_that_do_not_vary_leave_the_keys_own_directions():
    keys, values, order = case(3)
    values = np.where(np.isfinite(values), 1, values).astype(np.float32)
    found = build(keys, values, clusters_of(keys, values, order), rank=2)
    for j, (_, own) in enumerate(exact(keys, values, order)):
        best = np.linalg.eigvalsh(own)[::-1][:2]
        np.testing.assert_allclose(found.lambdas[j], best, rtol=1e-3, atol=1e-6)
    np.testing.assert_allclose(found.weights, 0, atol=1e-6)


def test_a_number_that_is_not_finite_stays_in_its_cluster():
    keys, values, order = case(4)
    sound = build(keys, values, clusters_of(keys, values, order), rank=2)
    keys[members(order)[0][3]], values[members(order)[2][0], 1] = np.inf, np.nan
    spoilt = build(keys, values, clusters_of(keys, values, order), rank=2)
    for one, other in zip(jax.tree.leaves(sound), jax.tree.leaves(spoilt), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert np.isnan(other[[0, 2]]).all()
        np.testing.assert_array_equal(np.delete(one, (0, 2), 0), np.delete(other, (0, 2), 0))
    rounded = in_int8(spoilt)
    assert np.isnan(rounded.weight_scales[jnp.array([0, 2])]).all()
    assert np.isfinite(np.delete(np.asarray(rounded.weight_scales), (0, 2), 0)).all()


def test_rows_do_not_matter_to_each_other():
    cases = [case(seed) for seed in (5, 6, 7, 8)]
    alone = [build(k, v, clusters_of(k, v, o), rank=2) for k, v, o in cases]
    keys, values = (np.stack([c[i] for c in cases]).reshape(2, 2, TOKENS, -1) for i in (0, 1))
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *(clusters_of(*c) for c in cases))
    stacked = jax.tree.map(lambda x: x.reshape(2, 2, *x.shape[1:]), stacked)
    together = build(keys, values, stacked, rank=2)
    for i, one in enumerate(alone):
        own = jax.tree.map(lambda x, i=i: x[i // 2, i % 2], together)
        jax.tree.map(np.testing.assert_array_equal, own, one)


def test_eight_bits_lose_little():
    keys, values, order = case(9, spectrum=1.5)
    full = build(keys, values, clusters_of(keys, values, order), rank=4)
    rounded = in_int8(full)
    assert rounded.directions.dtype == rounded.weights.dtype == jnp.int8
    query = np.random.default_rng(0).normal(size=HEAD_DIM)

    def correction(m):
        p = np.asarray(m.directions, np.float64) @ query
        scales = 1 if m.weight_scales is None else np.asarray(m.weight_scales)
        weighted = (np.asarray(m.weights, np.float64) * (p * scales)[..., None]).sum(-2)
        return weighted, (np.asarray(m.lambdas) * p**2).sum(-1)

    for one, other in zip(correction(full), correction(rounded), strict=True):
        np.testing.assert_allclose(other, one, atol=0.02 * np.abs(one).max())


def test_a_rank_out_of_range_is_refused():
    keys, values, _ = given = case(0)
    with pytest.raises(ValueError, match="rank is 9; it must be from 1 to 8"):
        ops.build_moments(jnp.asarray(keys), jnp.asarray(values), clusters_of(*given), rank=9)
