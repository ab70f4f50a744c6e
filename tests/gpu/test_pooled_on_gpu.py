"""The estimate by a pooled covariance on a CUDA GPU against plain JAX in float32."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.testing.pooled import make_pooled
from pallas_kernels.types import Pooled
from tests.gpu.test_moments_on_gpu import FLOATS, KERNEL, compare
from tests.support.gpu_cases import (
    CASES,
    LAYER,
    SEED,
    arguments,
    assert_close,
    inputs_of,
    references_of,
    run_twice,
    upcast,
)
from tests.support.pooled_cases import SCALE, pooled_case
from tests.support.rest_cases import LAYER as CASE_LAYER
from tests.support.rest_cases import in_levels
from tests.support.zone_operands import zone_operands

pytestmark = pytest.mark.gpu

of_cases = pytest.mark.parametrize(
    "case", [case for case in CASES if case.shape.tokens < 500_000], ids=str
)


def products_of(case):
    """Scale times the query multiplied by the covariance, in float64."""
    covariance = np.asarray(make_pooled(inputs_of(case), SEED).covariance[LAYER], np.float64)
    query = np.asarray(inputs_of(case).query, np.float64)
    return case.shape.scale * np.einsum("bhgd,bhked->bhgke", query, covariance)


@of_cases
def test_score_clusters(case):
    x, scale = inputs_of(case), case.shape.scale

    def score(*operands):
        *operands, covariance = operands
        keywords = {"scale": scale, "rotated": True, "covariance": covariance}
        return ops.score_clusters(*operands, **keywords, implementation=KERNEL)

    operands = x.query, x.centroids, x.offsets, jnp.int32(LAYER)
    found = run_twice(score, *operands, make_pooled(x, SEED).covariance)
    assert_close(found.pooled, products_of(case), case.shape.dtype, "products")
    logits = references_of(case)["score_clusters"].logits
    assert_close(found.logits, logits, case.shape.dtype, "logits")


@of_cases
def test_attend_zones(case):
    x, keywords = inputs_of(case), {"scale": case.shape.scale}
    pooled = Pooled(jnp.asarray(products_of(case), jnp.float32), make_pooled(x, SEED).deviations)

    def attend(implementation):
        def run(operands, pooled):
            *others, estimate, layer = operands
            estimate = estimate._replace(pooled=pooled)
            zones = ops.attend_zones(
                *others, estimate, layer, **keywords, implementation=implementation
            )
            return zones._replace(cache_rows=zones.cache_rows.data[LAYER])

        return run

    given, plain = (
        arguments("attend_zones", case, inputs, references_of(case))[0] for inputs in (x, upcast(x))
    )
    found = run_twice(attend(KERNEL), given, pooled)
    widened = jax.tree.map(lambda y: y.astype(jnp.float32) if y.dtype in FLOATS else y, pooled)
    expected = jax.jit(attend("xla"))(plain, widened)
    compare(found, expected, case.shape.dtype)


@pytest.mark.parametrize("levels", [False, True])
@pytest.mark.parametrize("group, head_dim, dtype", [(7, 128, "bfloat16"), (3, 96, "float32")])
def test_clusters_of_few_and_many(group, head_dim, dtype, levels):
    case = pooled_case(group, group, head_dim, dtype=dtype)
    if levels:
        case = in_levels(case)

    def attend(case, implementation):
        operands, layer = zone_operands(case), jnp.int32(CASE_LAYER)
        zones = ops.attend_zones(*operands, layer, scale=SCALE, implementation=implementation)
        return zones._replace(cache_rows=())

    found = run_twice(lambda case: attend(case, KERNEL), case)
    wide = jax.tree.map(lambda y: y.astype(jnp.float32) if y.dtype in FLOATS else y, case)
    expected = jax.jit(lambda case: attend(case, "xla"))(wide)
    compare(found, expected, dtype)
