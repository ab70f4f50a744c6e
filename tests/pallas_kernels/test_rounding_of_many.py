"""Rows in int8 as users' programs round them, which XLA optimises: many vectors at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.build_moments import in_int8
from pallas_kernels.rounding import dequantise, quantise
from pallas_kernels.types import Moments

# Of programs that are not optimised, the maximum of a vector with NaN is NaN.
pytestmark = pytest.mark.optimised


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_a_vector_that_is_not_finite_stays_so(head_dim, bad):
    vectors = np.random.default_rng(0).normal(size=(2, 4, 2, 200, head_dim)).astype(np.float32)
    vectors[0, ..., 3], vectors[1, 1] = bad, bad
    spoilt = ~np.isfinite(vectors).all(-1)
    for dtype in (jnp.float32, jnp.bfloat16):
        found = jax.jit(quantise)(jnp.asarray(vectors, dtype))
        numbers = np.asarray(dequantise(found))
        assert np.isnan(numbers[spoilt]).all()
        np.testing.assert_allclose(numbers[~spoilt], vectors[~spoilt], atol=0.05)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_moments_that_are_not_finite_stay_so(bad):
    rng = np.random.default_rng(0)
    directions, weights = rng.normal(size=(2, 4, 200, 2, 128)).astype(np.float32)
    directions[1, 7, 0, 3], weights[2, 9, 1, 64] = bad, bad
    lambdas = np.ones(directions.shape[:-1], np.float32)
    found = jax.jit(in_int8)(Moments(directions, weights, lambdas))
    scales = np.asarray(found.weight_scales)
    spoilt = np.zeros(lambdas.shape, bool)
    spoilt[1, 7, 0] = spoilt[2, 9, 1] = True
    assert np.isnan(scales[spoilt]).all()
    assert np.isfinite(scales[~spoilt]).all()
    assert np.isnan(found.lambdas[1, 7, 0])
