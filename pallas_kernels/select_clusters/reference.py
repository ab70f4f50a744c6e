"""The semantics of `select_clusters`, in plain JAX."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels._numerics import MASKED, heaviest, log_sum_exp, ordered_bits


class Candidates(NamedTuple):
    """The best clusters of each row of (sequence, kv head).

    Attributes:
        selected: `[batch, kv_heads, clusters]` bool.
        tokens: `[batch, kv_heads]` int32, the members that they hold together.
    """

    selected: Array
    tokens: Array


def select_clusters(
    logits: Array, logsumexp: Array, offsets: Array, layer: Array | int, budget: Array
) -> Candidates:
    """See `pallas_kernels.select_clusters`."""
    sizes = jnp.diff(offsets[layer], axis=-1)
    mass = jnp.where(sizes > 0, log_sum_exp(logits - logsumexp[..., None], axis=2), MASKED)
    row_budget = jnp.broadcast_to(budget[:, None], mass.shape[:2])
    selected = heaviest(ordered_bits(mass), sizes, row_budget)
    return Candidates(selected, jnp.sum(jnp.where(selected, sizes, 0), axis=-1, dtype=jnp.int32))
