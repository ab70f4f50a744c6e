"""The estimate by a pooled covariance: against float64, its order, and the kernel against it."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as ops
from pallas_kernels.attend_zones import reference
from pallas_kernels.attend_zones import triton as kernel
from pallas_kernels.attend_zones._pooled import attend_pooled
from pallas_kernels.types import MASKED, Estimate, Pooled
from tests.pallas_kernels.attend_zones.test_corrected import check
from tests.pallas_kernels.attend_zones.test_kernel import QUICKLY, TILES, TOLERANCES
from tests.support.pooled_cases import SCALE, by_loops, pooled_case
from tests.support.rest_cases import BATCH, HEADS, LAYER, in_levels, rest_case
from tests.support.zone_operands import zone_operands

SPLIT = kernel.Config(2, 2, 3, 1, **TILES)


@functools.partial(jax.jit, static_argnames="config", **QUICKLY)
def run_kernel(case, config=SPLIT):
    operands = zone_operands(case)
    return kernel.attend_zones(*operands, LAYER, scale=SCALE, config=config, interpret=True)


@functools.partial(jax.jit, **QUICKLY)
def run_reference(case):
    return reference.attend_zones(*zone_operands(case), jnp.int32(LAYER), scale=SCALE)


@pytest.mark.parametrize("far", [0.3, 3.0])
def test_it_is_the_formula(far):
    case = pooled_case(3, 3, 64, far=far)
    found = run_reference(case)
    outputs, logsumexps = np.asarray(found.outputs)[2], np.asarray(found.logsumexps)[2]
    seen = 0
    for at, output, logsumexp in by_loops(case):
        assert np.isfinite(output).all()
        np.testing.assert_allclose(outputs[at], output, rtol=2e-4, atol=2e-4)
        assert logsumexps[at] == pytest.approx(logsumexp, abs=2e-4)
        seen += 1
    assert seen == (BATCH - 1) * HEADS * 3
    # The last sequence has no clusters.
    assert (logsumexps[-1] <= MASKED / 2).all()


@pytest.mark.parametrize(
    "group, head_dim, dtype, cached, levels",
    [
        (3, 64, "float32", True, False),
        (6, 96, "float32", False, False),
        (7, 128, "bfloat16", True, False),
        (6, 64, "bfloat16", True, True),
        (3, 64, "float16", False, False),
    ],
)
def test_the_kernel_is_the_reference(group, head_dim, dtype, cached, levels):
    case = pooled_case(group * head_dim, group, head_dim, dtype=dtype, cached=cached)
    if levels:
        case = in_levels(case)
    check(run_kernel(case), run_reference(case), TOLERANCES[dtype])


def test_tiles_change_nothing_but_rounding():
    case = pooled_case(0, 3, 64)
    config = kernel.Config(1, 1, 1, 1, cluster_tile=64)
    check(run_kernel(case, config), run_reference(case), TOLERANCES["float32"])


@pytest.mark.parametrize("times", [10, 40])
def test_logits_that_are_far_apart(times):
    case = pooled_case(0, 3, 64)
    case |= {"query": times * case["query"], "logits": times * case["logits"]}
    pooled = case["pooled"]
    case["pooled"] = pooled._replace(products=times * pooled.products)
    found = run_kernel(case)
    assert not np.isnan(np.asarray(found.outputs)).any()
    check(found, run_reference(case), times * TOLERANCES["float32"])


def test_what_is_not_a_number_shows():
    case = pooled_case(5, 3, 64)
    products = case["pooled"].products.at[0, 1, 2].set(jnp.nan)
    case["pooled"] = case["pooled"]._replace(products=products)
    for found in (run_kernel(case), run_reference(case)):
        bad = np.isnan(np.asarray(found.outputs)[np.asarray(found.estimated)]).any(axis=(0, -1))
        expected = np.zeros_like(bad)
        expected[0, 1, 2] = True
        np.testing.assert_array_equal(bad, expected)


def test_two_corrections_are_refused():
    case = pooled_case(5, 3, 64) | {"correction": rest_case(5, 3, 64)["correction"]}
    with pytest.raises(ValueError, match="`correction` or `pooled`"):
        ops.attend_zones(*zone_operands(case), LAYER, scale=SCALE)


def test_the_error_is_of_third_order_in_the_residuals():
    """Of clusters whose residuals have one shape: halving them divides the error by eight."""
    rng = np.random.default_rng(7)
    clusters, members, dim = 6, 64, 16
    shape = rng.normal(size=(members, dim)) * rng.uniform(0.2, 1.5, dim)
    shape -= shape.mean(0)
    to_values = rng.normal(size=(dim, dim))
    deviations = rng.uniform(0.5, 1.5, clusters)
    centroids, means = rng.normal(size=(2, clusters, dim))
    query = rng.normal(size=(1, 1, 2, dim))
    errors, without = [], []
    for spread in (0.4, 0.2, 0.1):
        residuals = spread * deviations[:, None, None] * shape
        keys = centroids[:, None] + residuals
        values = means[:, None] + residuals @ to_values.T
        covariance = shape.T @ shape / members
        unit = np.trace(covariance) / dim
        matrices = np.stack([covariance, to_values @ covariance]) / unit
        pooled = Pooled(
            jnp.asarray(SCALE * np.einsum("bhgd,ked->bhgke", query, matrices), jnp.float32),
            jnp.asarray(spread * deviations * np.sqrt(unit), jnp.float32)[None, None, None],
        )
        sizes = jnp.arange(clusters + 1)[None, None, None] * members
        estimate = Estimate(
            jnp.asarray(SCALE * query @ centroids.T, jnp.float32),
            jnp.asarray(means, jnp.float32)[None, None, None],
            sizes,
            jnp.full((1, 1, clusters), members),
            pooled=pooled,
        )
        masses = np.exp(SCALE * np.einsum("gd,cnd->gcn", query[0, 0], keys))
        true = np.einsum("gcn,cnd->gd", masses, values)
        for found, (output, logsumexp) in (
            (errors, attend_pooled(jnp.asarray(query, jnp.float32), estimate, 0, scale=SCALE)),
            (without, reference.attend_clusters(estimate, 0)),
        ):
            total = np.asarray(output)[0, 0] * np.exp(np.asarray(logsumexp))[0, 0][:, None]
            norms = np.linalg.norm(total - true, axis=-1) / np.linalg.norm(true, axis=-1)
            found.append(norms.max())
    assert errors[0] < without[0] / 4
    for one, next_one in itertools.pairwise(errors):
        assert one / next_one > 6
    for one, next_one in itertools.pairwise(without):
        assert 3 < one / next_one < 5.5
