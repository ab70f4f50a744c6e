"""The kernels by Mosaic GPU on a Hopper GPU, against their references."""

import functools

import jax
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_dense import mosaic_gpu as attend_dense
from pallas_kernels.score_clusters import mosaic_gpu as score_clusters
from tests.pallas_kernels.attend_dense import test_mosaic_gpu as of_rows
from tests.pallas_kernels.score_clusters import test_mosaic_gpu as of_clusters
from tests.support.cluster_cases import SCALE, check, check_nan, cluster_case
from tests.support.gpu_cases import run_twice

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("group, head_dim, dtype, room, config", of_clusters.CASES)
def test_score_clusters(group, head_dim, dtype, room, config):
    case = cluster_case(group + 1, group, head_dim, dtype, room)
    settings = {"scale": SCALE, "rotated": True, "config": config}
    found = run_twice(functools.partial(score_clusters.score_clusters, **settings), *case)
    check(found, case, rotated=True)


@pytest.mark.parametrize("group, head_dim, dtype, tokens, config", of_rows.CASES)
def test_attend_dense(group, head_dim, dtype, tokens, config):
    case = of_rows.make_case(group, head_dim, dtype, tokens, seed=1)
    settings = {"scale": of_rows.SCALE, "config": config}
    found = run_twice(functools.partial(attend_dense.attend_dense, **settings), *case)
    of_rows.check(found, case)


def test_nan_shows_in_its_row_alone():
    by_mosaic = {"implementation": "mosaic_gpu"}
    run = functools.partial(ops.score_clusters, scale=SCALE, **by_mosaic)
    check_nan(jax.jit(run), 64, "bfloat16", 320)
    of_rows.check_nan(
        jax.jit(functools.partial(ops.attend_dense, scale=of_rows.SCALE, **by_mosaic))
    )
