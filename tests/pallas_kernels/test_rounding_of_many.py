"""Rows in int8 as users' programs round them, which XLA optimises: many vectors at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.rounding import dequantise, quantise

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
