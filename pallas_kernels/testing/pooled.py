"""A random pooled covariance of a step's clusters, and their deviations."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.testing import StepInputs


class PooledInputs(NamedTuple):
    """What a step with a pooled covariance has besides.

    Attributes:
        covariance: `[layers, batch, kv_heads, 2, head_dim, head_dim]`, of the centroids' dtype; the
            first of each two is symmetric and positive.
        deviations: `[layers, batch, kv_heads, clusters]`, likewise.
    """

    covariance: Array
    deviations: Array


def make_pooled(inputs: StepInputs, seed: int) -> PooledInputs:
    """Make a covariance of every head, of mean variance about 1, and small deviations.

    Args:
        inputs: from `make_step`.
        seed: the same seed makes the same.
    """
    *row, clusters, head_dim = inputs.centroids.shape
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 3)
    square = (*row, head_dim, head_dim)
    roots, values = (jax.random.normal(key, square) / head_dim**0.5 for key in keys[:2])
    covariance = jnp.stack([roots @ roots.swapaxes(-1, -2), values], axis=-3)
    deviations = jax.random.uniform(keys[2], (*row, clusters), minval=0.05, maxval=0.3)
    dtype = inputs.centroids.dtype
    return PooledInputs(covariance.astype(dtype), deviations.astype(dtype))
