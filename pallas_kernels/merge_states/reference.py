"""The semantics of `merge_states`, in plain JAX."""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.numerics import is_masked, log_sum_exp


def merge_states(
    outputs: Array, logsumexps: Array, *, dtype: DTypeLike = jnp.float32
) -> tuple[Array, Array]:
    """See `pallas_kernels.merge_states`."""
    logsumexp = log_sum_exp(logsumexps, axis=0)
    present = ~is_masked(logsumexps)
    weights = jnp.where(present, jnp.exp(logsumexps - logsumexp[None]), 0.0)
    # A part with nothing in it may hold anything, NaN included: it must not reach the sum.
    parts = jnp.where(present[..., None], outputs, 0.0)
    return jnp.sum(weights[..., None] * parts, axis=0).astype(dtype), logsumexp
