"""Random moments of a step's clusters, and the clusters of the rows that it reads."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.build_moments import in_int8
from pallas_kernels.testing import StepInputs
from pallas_kernels.types import NO_ID, Correction, Moments


def make_correction(
    inputs: StepInputs, seed: int, *, rank: int, dtype: str, scale: float, layer: int = 0
) -> Correction:
    """Make moments in all layers, and what corrects one layer's estimate by them.

    Args:
        inputs: from `make_step`.
        seed: the same seed makes the same moments.
        rank: directions of a cluster.
        dtype: of the vectors; a float, or int8 with scales.
        scale: multiplies every product.
        layer: which layer.
    """
    keys = jax.random.split(jax.random.key(seed, impl="unsafe_rbg"), 4)
    clusters, head_dim = inputs.value_means.shape[:4], inputs.value_means.shape[4]
    moments = _moments(keys[:3], (*clusters, rank, head_dim), dtype)
    step = inputs.lengths / jnp.maximum(inputs.retrieved_budget, 1)
    own = _clusters_of(keys[3], inputs.tokens, step, inputs.offsets[layer])
    products = _products(inputs.query, moments.directions[layer], scale)
    return Correction(moments, products, own)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _moments(keys: Array, size: tuple[int, ...], dtype: str) -> Moments:
    directions = jax.random.normal(keys[0], size) / size[-1] ** 0.5
    weights = jax.random.normal(keys[1], size) / 4
    moments = Moments(directions, weights, jax.random.uniform(keys[2], size[:-1]) / 2)
    if dtype == "int8":
        return in_int8(moments)
    return Moments(directions.astype(dtype), weights.astype(dtype), moments.lambdas)


@jax.jit
def _products(query: Array, directions: Array, scale: Array | float) -> Array:
    numbers = query.astype(jnp.float32), directions.astype(jnp.float32)
    return scale * jnp.einsum("bhgd,bhcrd->bhgcr", *numbers)


@jax.jit
def _clusters_of(key: Array, tokens: Array, step: Array, offsets: Array) -> Array:
    """Draw a cluster for each row to read, as if they were spread over the index: rising."""
    jitter = jax.random.uniform(key, tokens.shape, minval=0.1, maxval=0.9)
    nth = jnp.arange(tokens.shape[2])
    place = ((nth + jitter) * step[:, None, None]).astype(jnp.int32)

    def of_row(offsets: Array, place: Array) -> Array:
        return jnp.searchsorted(offsets, place, side="right").astype(jnp.int32) - 1

    return jnp.where(tokens == NO_ID, NO_ID, jax.vmap(jax.vmap(of_row))(offsets, place))
