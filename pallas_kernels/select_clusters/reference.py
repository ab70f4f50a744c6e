"""The semantics of `select_clusters`, in plain JAX."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.numerics import MASKED, NO_ID, heaviest, list_places, log_sum_exp, ordered_bits

# Places of the list that one entry of `Candidates.granules` stands for.
GRANULE = 32


class Candidates(NamedTuple):
    """The best clusters of each row of (sequence, kv head), and the list of their tokens.

    The list itself is not written down: its n-th token is member n - starts[i] of clusters[i],
    with i the last one whose start is at most n. So it is in the order of index positions.

    Attributes:
        selected: `[batch, kv_heads, clusters]` bool.
        clusters: `[batch, kv_heads, clusters]` int32, the selected ones, rising; NO_ID after.
        starts: `[batch, kv_heads, clusters + 1]` int32, each one's first place in the list; past
            the last one, the list's length.
        granules: `[batch, kv_heads, ceil(max_candidates / GRANULE)]` int32: where in `clusters` to
            begin looking for place n: entry n // GRANULE is the i of place n // GRANULE * GRANULE;
            past the list's end, its last cluster's.
    """

    selected: Array
    clusters: Array
    starts: Array
    granules: Array


def list_candidates(selected: Array, sizes: Array, max_candidates: int) -> Candidates:
    """The candidates that the selected clusters make.

    Args:
        selected, sizes: `[batch, kv_heads, clusters]`, bool and int32.
        max_candidates: room for candidates a row.
    """
    clusters = list_places(selected, selected.shape[-1])
    safe = jnp.minimum(clusters, sizes.shape[-1] - 1)
    held = jnp.where(clusters != NO_ID, jnp.take_along_axis(sizes, safe, axis=-1), 0)
    ends = jnp.cumsum(held, axis=-1, dtype=jnp.int32)
    starts = jnp.concatenate([ends[..., :1] * 0, ends], axis=-1)
    place = jnp.arange(0, max_candidates, GRANULE, dtype=jnp.int32)
    place = jnp.minimum(place, jnp.maximum(ends[..., -1:] - 1, 0))
    find = jax.vmap(jax.vmap(lambda ends, place: jnp.searchsorted(ends, place, side="right")))
    # An empty list's search ends past its end.
    granules = jnp.minimum(find(ends, place), selected.shape[-1] - 1).astype(jnp.int32)
    granules = jnp.where(ends[..., -1:] > 0, granules, 0)
    return Candidates(selected, clusters, starts, granules)


def select_clusters(
    logits: Array,
    logsumexp: Array,
    offsets: Array,
    layer: Array | int,
    budget: Array,
    *,
    max_candidates: int,
) -> Candidates:
    """See `pallas_kernels.select_clusters`."""
    sizes = jnp.diff(offsets[layer], axis=-1)
    mass = jnp.where(sizes > 0, log_sum_exp(logits - logsumexp[..., None], axis=2), MASKED)
    row_budget = jnp.broadcast_to(budget[:, None], mass.shape[:2])
    selected = heaviest(ordered_bits(mass), sizes, row_budget)
    return list_candidates(selected, sizes, max_candidates)
