"""The kernels by Mosaic GPU on a Hopper GPU, against their references."""

import functools

import jax
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_dense import mosaic_gpu as attend_dense
from pallas_kernels.score_clusters import mosaic_gpu as score_clusters
from tests.pallas_kernels.attend_dense import test_mosaic_gpu as of_rows
from tests.pallas_kernels.score_clusters import test_mosaic_gpu as of_clusters

pytestmark = pytest.mark.gpu


def run_twice(kernel, case):
    """What the compiled kernel gives, the same bits a second time."""
    compiled = jax.jit(kernel)
    found, again = compiled(*case), compiled(*case)
    for one, other in zip(jax.tree.leaves(found), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(one, other)
    return found


@pytest.mark.parametrize("group, head_dim, dtype, room, config", of_clusters.CASES)
def test_score_clusters(group, head_dim, dtype, room, config):
    case = of_clusters.cluster_case(group + 1, group, head_dim, dtype, room)
    settings = {"scale": of_clusters.SCALE, "rotated": True, "config": config}
    found = run_twice(functools.partial(score_clusters.score_clusters, **settings), case)
    of_clusters.check(found, case, rotated=True)


@pytest.mark.parametrize("group, head_dim, dtype, tokens, config", of_rows.CASES)
def test_attend_dense(group, head_dim, dtype, tokens, config):
    case = of_rows.make_case(group, head_dim, dtype, tokens, seed=1)
    settings = {"scale": of_rows.SCALE, "config": config}
    of_rows.check(run_twice(functools.partial(attend_dense.attend_dense, **settings), case), case)


def test_nan_shows_in_its_row_alone():
    by_mosaic = {"implementation": "mosaic_gpu"}
    run = functools.partial(ops.score_clusters, scale=of_clusters.SCALE, **by_mosaic)
    of_clusters.spoilt_by_nan(jax.jit(run))
    of_rows.check_nan(
        jax.jit(functools.partial(ops.attend_dense, scale=of_rows.SCALE, **by_mosaic))
    )
