"""`score_clusters` multiplies the query with a covariance too: reference, kernel and lowering."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.score_clusters import reference, triton
from tests.support.cluster_cases import BATCH, HEADS, LAYER, LAYERS, SCALE, cluster_case
from tests.support.kernel_cases import Heads, kernel_cases
from tests.support.lowering import lower_for


@pytest.mark.parametrize(
    "group, head_dim, dtype, rank",
    [(1, 64, "float32", 0), (6, 96, "float32", 2), (7, 128, "bfloat16", 0), (3, 64, "float16", 1)],
)
@pytest.mark.parametrize("rotated", [False, True])
def test_products_are_those_of_float64(group, head_dim, dtype, rank, rotated):
    operands = cluster_case(group, group, head_dim, dtype)
    rng = np.random.default_rng(group)
    row = (LAYERS, BATCH, HEADS)
    covariance = rng.normal(size=(*row, 2, head_dim, head_dim))
    covariance[1 - LAYER] = np.nan
    covariance = jnp.asarray(covariance, dtype)
    directions = None
    if rank:
        shape = (*operands[1].shape[:-1], rank, head_dim)
        directions = jnp.asarray(rng.normal(size=shape), dtype)
    kernel = functools.partial(triton.score_clusters, config=triton.Config(32, 2), interpret=True)
    query, matrices = (np.asarray(x, np.float64) for x in (operands[0], covariance[LAYER]))
    expected = SCALE * np.einsum("bhgd,bhked->bhgke", query, matrices)
    for score in (kernel, reference.score_clusters):
        score = functools.partial(score, scale=SCALE, rotated=rotated, directions=directions)
        found, without = score(*operands, covariance=covariance), score(*operands)
        assert np.abs(found.pooled - expected).max() < 1e-6 * np.abs(expected).max()
        # All else is as without, to the bit.
        assert without.pooled is None
        others = jax.tree.leaves(found._replace(pooled=None)), jax.tree.leaves(without)
        for one, other in zip(*others, strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("platform", ["cuda", "rocm"])
@pytest.mark.parametrize("heads", [Heads(7, 128, "bfloat16"), Heads(1, 96, "float32")], ids=str)
def test_it_lowers(platform, heads):
    cases = kernel_cases(heads)
    for case in (cases["score_clusters-covariance"], cases["attend_zones-pooled"]):
        text = lower_for(platform, case.function, *case.operands)
        for name in case.kernels:
            assert f'"{name}"' in text
        assert "dynamic_slice" not in text
