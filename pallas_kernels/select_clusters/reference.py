"""The semantics of `select_clusters`, in plain JAX."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from pallas_kernels._numerics import (
    MASKED,
    NO_ID,
    heaviest,
    list_places,
    log_sum_exp,
    ordered_bits,
)


class Candidates(NamedTuple):
    """The best clusters of each row of (sequence, kv head), and the list of their tokens.

    The list itself is not written down: its n-th token is member n - starts[i] of clusters[i],
    with i the last one whose start is at most n. So it is in the order of index positions.

    Attributes:
        selected: `[batch, kv_heads, clusters]` bool.
        clusters: `[batch, kv_heads, clusters]` int32, the selected ones, rising; NO_ID after.
        starts: `[batch, kv_heads, clusters + 1]` int32, each one's first place in the list; past
            the last one, the list's length.
    """

    selected: Array
    clusters: Array
    starts: Array


def list_candidates(selected: Array, sizes: Array) -> Candidates:
    """The candidates that the selected clusters make; both `[..., clusters]`, bool and int32."""
    clusters = list_places(selected, selected.shape[-1])
    safe = jnp.minimum(clusters, sizes.shape[-1] - 1)
    held = jnp.where(clusters != NO_ID, jnp.take_along_axis(sizes, safe, axis=-1), 0)
    ends = jnp.cumsum(held, axis=-1, dtype=jnp.int32)
    return Candidates(selected, clusters, jnp.concatenate([ends[..., :1] * 0, ends], axis=-1))


def select_clusters(
    logits: Array, logsumexp: Array, offsets: Array, layer: Array | int, budget: Array
) -> Candidates:
    """See `pallas_kernels.select_clusters`."""
    sizes = jnp.diff(offsets[layer], axis=-1)
    mass = jnp.where(sizes > 0, log_sum_exp(logits - logsumexp[..., None], axis=2), MASKED)
    row_budget = jnp.broadcast_to(budget[:, None], mass.shape[:2])
    return list_candidates(heaviest(ordered_bits(mass), sizes, row_budget), sizes)
